"""Many damages, each of a fresh copy, in processes that may die: what became of each.

refused   an error of the usual kinds, whose message names the file or the damaged field
harmless  everything that the files decide is as it was, bit for bit
changed   it loads, and something is not as it was
unclear   an error that names neither, or of a kind that nobody expects
crashed   the process died, or hung
"""

import dataclasses
import json
import multiprocessing
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from modeling_spiralformer.files_spiralformer import DIGESTS_NAME, matches
from workshop.checkpoints import CHECKPOINT_FILES
from workshop.damage.kinds import HEADER_BYTES, STRUCTURED, clear, damage, kinds_of
from workshop.damage.loads import Load, build, loads_of, quiet

CLASSES = ("refused", "harmless", "changed", "unclear", "crashed")
FAULTS = CLASSES[2:]
EXPECTED = (ValueError, OSError, StrictDataclassError)
SUBJECTS = ("one", "shards", "run", "runs.jsonl")
BATCH = 1000  # damages of a process
LONGEST = 120  # seconds without a result, after which a process hangs


@dataclass(frozen=True)
class Trial:
    """One damage, and what became of it."""

    number: int
    subject: str
    file: str
    kind: str
    load: str
    outcome: str
    said: str

    @property
    def failed(self) -> bool:
        return self.outcome in FAULTS


def listed(folder: Path) -> list[tuple[str, str]]:
    """Subject and file of everything that can be damaged: what the digests list, and the digests themselves."""
    found = []
    for subject in SUBJECTS:
        path = folder / subject
        if path.is_file():
            found.append((subject, path.name))
        else:
            names = [file.name for file in path.iterdir() if matches(file.name, (*CHECKPOINT_FILES, DIGESTS_NAME))]
            found += [(subject, name) for name in sorted(names)]
    return found


def keys_of(path: Path) -> set[str]:
    """The keys of the JSON in a file: of its lines, or of the header before tensors."""
    text = path.read_bytes()
    if path.suffix == ".safetensors":
        text = text[HEADER_BYTES : HEADER_BYTES + int.from_bytes(text[:HEADER_BYTES], "little")]
    return set(re.findall(r'"([^"\\]+)"\s*:', text.decode())) if path.suffix in STRUCTURED else set()


def is_clear(error: BaseException, file: str, keys: set[str]) -> bool:
    """Whether an error is of an expected kind and names the file, a tensor of it, or in quotes a field."""
    message = str(error)
    quoted = {word.strip("`'\"") for word in re.findall(r"`[^`]+`|'[^']+'|\"[^\"]+\"", message)}
    named = file in message or any(key in message for key in keys if "." in key) or bool(quoted & keys)
    # Of an index that is gone nobody can know: the library says what it looked for.
    gone = file == SAFE_WEIGHTS_INDEX_NAME and SAFE_WEIGHTS_NAME in message
    return isinstance(error, EXPECTED) and (named or gone)


def same(found: Any, expected: Any, subject: str) -> bool:
    """A store that lost a whole line has the runner do that run again: what it still holds must be as it was."""
    if subject == "runs.jsonl":
        return all(expected.get(key) == line for key, line in found.items())
    return found == expected


def attempt(load: Load, path: Path, expected: Any, subject: str, file: str, keys: set[str]) -> tuple[str, str]:
    """The outcome of a load, and what it said."""
    try:
        found = load(path)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also a panic of a library in Rust, which is no Exception
        outcome = "refused" if is_clear(error, file, keys) else "unclear"
        return outcome, f"{type(error).__name__}: {error}"
    if same(found, expected, subject):
        return "harmless", ""
    names = [name for name in expected if found.get(name) != expected[name]] if isinstance(expected, dict) else []
    return "changed", ", ".join(names)


def place_of(folder: Path, subject: str, file: str) -> Path:
    """Where a file of a subject is; that of lines is its own subject."""
    return folder / subject if subject == file else folder / subject / file


def plan(home: Path, seed: int, number: int) -> tuple[Trial, Random]:
    """The trial of a number before it is made, and the generator that damages."""
    random = Random(f"{seed}/{number}")
    subject, file = random.choice(listed(home))
    kind = random.choice(kinds_of(place_of(home, subject, file)))
    name = random.choice(list(loads_of(subject, file, home)))
    return Trial(number, subject, file, kind, name, "crashed", ""), random


class Workplace:
    """A copy of everything, in which one file at a time is damaged and put back."""

    def __init__(self, home: Path, place: Path):
        self.home, self.place = home, place
        self.expected: dict[tuple[str, str], Any] = {}
        for subject in SUBJECTS:
            source = home / subject
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, place / subject)

    def try_one(self, seed: int, number: int) -> Trial:
        planned, random = plan(self.home, seed, number)
        subject, file, name = planned.subject, planned.file, planned.load
        load = loads_of(subject, file, self.home)[name]
        if (subject, name) not in self.expected:
            self.expected[subject, name] = load(self.place / subject)
        whole, path = place_of(self.home, subject, file), place_of(self.place, subject, file)
        damage(path, planned.kind, random)
        keys = keys_of(whole) | keys_of(self.home / "one" / CONFIG_NAME)
        found = attempt(load, self.place / subject, self.expected[subject, name], subject, file, keys)
        clear(path)
        shutil.copyfile(whole, path)
        return dataclasses.replace(planned, outcome=found[0], said=found[1])


# -- in processes ---------------------------------------------------------------------------------------------------


def serve(connection: Connection, home: Path, place: Path, seed: int, numbers: list[int]) -> None:
    """What a process does: one trial after the other, each announced before it begins."""
    quiet()
    torch.set_num_threads(1)
    workplace = Workplace(home, place)
    for number in numbers:
        connection.send(dataclasses.asdict(workplace.try_one(seed, number)))


def run_batch(home: Path, place: Path, seed: int, numbers: list[int]) -> Iterator[Trial]:
    """The trials of some numbers, in one process after the other where one dies."""
    context = multiprocessing.get_context("fork")
    waiting = list(numbers)
    while waiting:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=serve, args=(sender, home, place, seed, waiting))
        process.start()
        sender.close()
        try:
            while waiting and receiver.poll(LONGEST):
                yield Trial(**receiver.recv())
                waiting.pop(0)
            found = "no result in time"
        except EOFError:
            process.join()
            found = f"the process ended with {process.exitcode}"
        finally:
            process.kill()
            process.join()
        if waiting:
            yield dataclasses.replace(plan(home, seed, waiting.pop(0))[0], said=found)
    shutil.rmtree(place, ignore_errors=True)


def build_apart(home: Path, digests: bool) -> None:
    """Makes what is damaged in a process of its own: a process that has trained should not be forked."""
    process = multiprocessing.get_context("fork").Process(target=build, args=(home, digests))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"The process that makes the files ended with {process.exitcode}.")


def run_trials(folder: Path, seed: int, numbers: list[int], digests: bool = True) -> Iterator[Trial]:
    """
    What became of the damages with these numbers; equal seed and number damage alike.

    Args:
        folder: an empty one, for files and their copies.
        digests: whether the folders hold SHA256SUMS.
    """
    build_apart(folder / "home", digests)
    for start in range(0, len(numbers), BATCH):
        yield from run_batch(folder / "home", folder / "place", seed, numbers[start : start + BATCH])


def write_trial(path: Path, trial: Trial) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(trial)) + "\n")
