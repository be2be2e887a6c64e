"""Seeded damages of one file: of its bytes, of its place, and of the JSON in it.

Every function takes what is there and a generator of random numbers, and gives what is to be there instead.
"""

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

HEADER_BYTES = 8  # of safetensors: the length of its JSON

# -- bytes ----------------------------------------------------------------------------------------------------------


def flip_bits(content: bytes, random: Random, count: int = 1) -> bytes:
    changed = bytearray(content)
    for _ in range(count):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def span(content: bytes, random: Random) -> tuple[int, int]:
    """Start and end of a piece, of one byte up to a quarter of all."""
    length = min(len(content), int(2 ** random.uniform(0, max(len(content).bit_length() - 2, 1))))
    start = random.randrange(len(content) - length + 1)
    return start, start + length


def overwrite(content: bytes, random: Random) -> bytes:
    start, end = span(content, random)
    return content[:start] + random.randbytes(end - start) + content[end:]


def zero(content: bytes, random: Random) -> bytes:
    start, end = span(content, random)
    return content[:start] + bytes(end - start) + content[end:]


def remove(content: bytes, random: Random) -> bytes:
    start, end = span(content, random)
    return content[:start] + content[end:]


def insert(content: bytes, random: Random) -> bytes:
    start, end = span(content, random)
    return content[:start] + random.randbytes(end - start) + content[start:]


def repeat(content: bytes, random: Random) -> bytes:
    start, end = span(content, random)
    return content[:end] + content[start:]


def swap(content: bytes, random: Random) -> bytes:
    """Two pieces of equal length change places."""
    start, end = span(content, random)
    length = min(end - start, len(content) // 2)
    first = random.randrange(len(content) - 2 * length + 1)
    second = random.randrange(first + length, len(content) - length + 1)
    middle = content[first + length : second]
    pieces = content[first : first + length], content[second : second + length]
    return content[:first] + pieces[1] + middle + pieces[0] + content[second + length :]


BYTES: dict[str, Callable[[bytes, Random], bytes]] = {
    "a bit flipped": flip_bits,
    "16 bits flipped": lambda content, random: flip_bits(content, random, 16),
    "bytes overwritten": overwrite,
    "bytes zeroed": zero,
    "bytes removed": remove,
    "bytes inserted": insert,
    "a block repeated": repeat,
    "blocks swapped": swap,
    "cut off": lambda content, random: content[: random.randrange(1, len(content))],
    "emptied": lambda content, random: b"",
}

# -- JSON -----------------------------------------------------------------------------------------------------------


def objects(value: Any) -> Iterator[dict]:
    """Every object in a JSON value that has keys, itself first."""
    if isinstance(value, dict) and value:
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from objects(inner)


def choose(value: Any, random: Random) -> tuple[dict, str]:
    """An object and a key of it; in every second case of the outermost, where most of what matters is."""
    found = list(objects(value))
    chosen = found[0] if random.random() < 0.5 else random.choice(found)
    return chosen, random.choice(list(chosen))


def other_value(value: Any, random: Random) -> Any:
    """A value of the same type, where there is another."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return random.choice([value + 1, -value - 1, value * 2 + 1, value / 2 + 1 if isinstance(value, float) else 0])
    if isinstance(value, str):
        return random.choice([value + "x", value[1:] or "y", value.swapcase() + "z", ""])
    if isinstance(value, list):
        return random.choice([value + value or [0], value[1:] or [1], value[::-1] if value[::-1] != value else [2]])
    return {**value, "more": 1} if isinstance(value, dict) else 0


def other_type(value: Any, random: Random) -> Any:
    kinds = [None, True, 7, 0.5, "word", [1], {"a": 1}, 10**400, float("nan"), float("-inf"), str(value)]
    return random.choice([kind for kind in kinds if type(kind) is not type(value)])


def drop_key(value: Any, random: Random) -> Any:
    place, key = choose(value, random)
    del place[key]
    return value


def rename_key(value: Any, random: Random) -> Any:
    place, key = choose(value, random)
    at = random.randrange(len(key) + 1)
    new = random.choice([key[:at] + "x" + key[at:], key[:at] + key[at + 1 :], key.upper(), key + "_", key[::-1]])
    items = [(new if name == key else name, inner) for name, inner in place.items()]
    place.clear()
    place.update(items)
    return value


def changed(how: Callable[[Any, Random], Any]) -> Callable[[Any, Random], Any]:
    """The damage that gives the value of one key by `how`."""

    def change(value: Any, random: Random) -> Any:
        place, key = choose(value, random)
        place[key] = how(place[key], random)
        return value

    return change


def exchange(value: Any, random: Random) -> Any:
    """Two keys of an object change their values."""
    place, key = choose(value, random)
    other = random.choice(list(place))
    place[key], place[other] = place[other], place[key]
    return value


TREES: dict[str, Callable[[Any, Random], Any]] = {
    "a key dropped": drop_key,
    "a key renamed": rename_key,
    "another value": changed(other_value),
    "another type": changed(other_type),
    "two values exchanged": exchange,
    "in a list": lambda value, random: [value],
    "another JSON": lambda value, random: random.choice([None, 0, "text", [], {}, True]),
}


def double_key(text: str, random: Random) -> str:
    """A key that stands there twice, the second time with another value."""
    value = json.loads(text)
    key = random.choice(list(value))
    start, end = text.index("{") + 1, text.rindex("}")
    entry = f"{json.dumps(key)}: {json.dumps(other_value(value[key], random))}"
    return f"{text[:start]}{entry}, {text[start:]}" if random.random() < 0.5 else f"{text[:end]}, {entry}{text[end:]}"


ENCODINGS: dict[str, Callable[[str], bytes]] = {
    "in UTF-16": lambda text: text.encode("utf-16"),
    "with a byte order mark": lambda text: text.encode("utf-8-sig"),
    "in UTF-32": lambda text: text.encode("utf-32-le"),
    "a letter of Latin-1": lambda text: text.replace('"', "\xe9", 1).encode("latin-1", errors="replace"),
}
TEXTS = [*TREES, "a key twice", *ENCODINGS]


def damage_json(text: str, kind: str, random: Random) -> bytes:
    if kind in ENCODINGS:
        return ENCODINGS[kind](text)
    if kind in TREES:
        return json.dumps(TREES[kind](copy.deepcopy(json.loads(text)), random)).encode()
    return double_key(text, random).encode()


def damage_line(content: bytes, kind: str, random: Random) -> bytes:
    """One of the lines of a file of JSON lines."""
    lines = content.decode().splitlines(keepends=True)
    chosen = random.randrange(len(lines))
    before, after = "".join(lines[:chosen]), "".join(lines[chosen + 1 :])
    return before.encode() + damage_json(lines[chosen].rstrip("\n"), kind, random) + b"\n" + after.encode()


def damage_header(content: bytes, kind: str, random: Random) -> bytes:
    """The JSON before the tensors of safetensors."""
    end = HEADER_BYTES + int.from_bytes(content[:HEADER_BYTES], "little")
    header = damage_json(content[HEADER_BYTES:end].decode(), kind, random)
    return len(header).to_bytes(HEADER_BYTES, "little") + header + content[end:]


# -- places ---------------------------------------------------------------------------------------------------------


def put_folder(path: Path) -> None:
    path.mkdir()


def put_dangling_link(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


PLACES: dict[str, Callable[[Path], None]] = {
    "missing": lambda path: None,
    "a folder": put_folder,
    "a dangling link": put_dangling_link,
}

# -- all of them ----------------------------------------------------------------------------------------------------

STRUCTURED = {".json": damage_json, ".jsonl": damage_line, ".safetensors": damage_header}


def kinds_of(path: Path) -> list[str]:
    """The damages of a file; those of its JSON where it holds JSON."""
    return [*BYTES, *PLACES, *(TEXTS if path.suffix in STRUCTURED else ())]


def clear(path: Path) -> None:
    """Removes whatever is in a place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def damage(path: Path, kind: str, random: Random) -> None:
    """Damages the file in its place. What comes of it may be the same content, of two equal blocks swapped, say."""
    content = path.read_bytes()
    clear(path)
    if kind in PLACES:
        PLACES[kind](path)
    elif kind in BYTES:
        path.write_bytes(BYTES[kind](content, random))
    else:
        text = content.decode() if path.suffix == ".json" else content
        path.write_bytes(STRUCTURED[path.suffix](text, kind, random))
