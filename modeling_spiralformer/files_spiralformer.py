# Copyright 2026 The SpiralFormer maintainers
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The files of a checkpoint in a folder: whole, as far as they say of themselves, and as SHA256SUMS says.

No file of weights or settings tells that a bit of it has changed. A file SHA256SUMS beside them does, in the format of
the `sha256sum` command, with which anybody can write one. A folder without it is loaded as it is.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

DIGESTS_NAME = "SHA256SUMS"
JSON_FILES = (CONFIG_NAME, GENERATION_CONFIG_NAME)
# What a model is loaded from.
MODEL_FILES = (CONFIG_NAME, GENERATION_CONFIG_NAME, "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*")


# -- digests --------------------------------------------------------------------------------------------------------


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_digests(folder: Path) -> dict[str, str]:
    """Name -> digest of the files that SHA256SUMS lists; none where there is no such file.

    Raises ValueError, with the number of the line, where it is another text, or lists a file twice.
    """
    path = folder / DIGESTS_NAME
    if not os.path.lexists(path):
        return {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be a text in UTF-8, but cannot be read: {error}") from error
    digests: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        found = re.fullmatch("([0-9a-fA-F]{64}) [ *](.+)", line)
        name = os.path.normpath(found[2]) if found else ""
        if not found or name in digests:
            allowed = "a digest of 64 hexadecimal digits, two blanks and the name of a file, each file once"
            raise ValueError(f"{path}, line {number}, must be {allowed}, but is {line!r}.")
        digests[name] = found[1].lower()
    return digests


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name is that of a file in the folder itself which one of the patterns describes."""
    return "/" not in name and any(fnmatch(name, pattern) for pattern in patterns)


def check_digests(folder: str | os.PathLike, patterns: Iterable[str] = MODEL_FILES) -> None:
    """Raises ValueError, naming each, where files that SHA256SUMS lists, of these patterns, are not as it says."""
    listed = {name: value for name, value in read_digests(Path(folder)).items() if matches(name, patterns)}
    faults = []
    for name, value in listed.items():
        path = Path(folder, name)
        if not path.is_file():
            faults.append(f"{name} is missing")
        elif digest(path) != value:
            faults.append(f"{name} has other content")
    if faults:
        raise ValueError(
            f"The files of {str(folder)!r} must be as its {DIGESTS_NAME} says, but {', '.join(faults)}: damaged, or "
            f"changed since. Of a file that was changed on purpose, take the line out of {DIGESTS_NAME}."
        )


def list_digests(folder: str | os.PathLike, digests: dict[str, str], patterns: Iterable[str]) -> None:
    """Puts digests by name into SHA256SUMS, in place of what it said of files that match these patterns."""
    kept = {name: value for name, value in read_digests(Path(folder)).items() if not matches(name, patterns)}
    lines = kept | digests
    text = "".join(f"{lines[name]}  {name}\n" for name in sorted(lines))
    Path(folder, DIGESTS_NAME).write_text(text, encoding="utf-8", newline="\n")


def write_digests(folder: str | os.PathLike, patterns: Iterable[str] = MODEL_FILES) -> None:
    """The same with the digests of the files of these patterns."""
    names = [path.name for path in Path(folder).iterdir() if path.is_file() and matches(path.name, patterns)]
    list_digests(folder, {name: digest(Path(folder, name)) for name in names}, patterns)


# -- what files say of themselves -----------------------------------------------------------------------------------


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError for a key that stands there twice, of which one would be dropped."""
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"the key {key!r} stands there twice")
    return dict(pairs)


def read_object(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError, naming the file, where it is no such object in UTF-8."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be a JSON object in UTF-8, but cannot be read as one: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must be a JSON object, but holds {value!r}.")
    return value


def read_index(path: Path) -> dict[str, str]:
    """Name of a weight -> name of its file, as an index of shards has them. Raises ValueError, naming it, else."""
    places = read_object(path).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{path} must have a `weight_map` of names of weights to names of files, but has {places!r}.")
    return places


def check_index(path: Path) -> None:
    """Raises ValueError, naming the index, where a file that it names is not beside it."""
    missing = sorted(file for file in set(read_index(path).values()) if not (path.parent / file).is_file())
    if missing:
        raise ValueError(f"{path} must name files that are beside it, but {', '.join(missing)} is none.")


def check_files(folder: str | os.PathLike) -> None:
    """Raises ValueError, naming the file, where what a model is loaded from is no JSON, or not as SHA256SUMS says.

    The library would go on without a generation_config.json that it cannot read. It reads no index where one file
    holds all weights.
    """
    check_digests(folder)
    for name in JSON_FILES:
        path = Path(folder, name)
        if os.path.lexists(path):
            read_object(path)
    index = Path(folder, SAFE_WEIGHTS_INDEX_NAME)
    if os.path.lexists(index) and not Path(folder, SAFE_WEIGHTS_NAME).is_file():
        check_index(index)


def remove_replaced(folder: str | os.PathLike) -> None:
    """After a save by the library: removes what it leaves of the save before, of each variant such as "fp16".

    Of one file over shards it removes the shards and leaves their index; of shards over one file it leaves the file,
    which is what it would load. So where both are there, the index is the new one if its shards are there too.
    """
    stem, ending = SAFE_WEIGHTS_NAME.split(".")
    start = SAFE_WEIGHTS_INDEX_NAME.removesuffix(".json")
    for index in Path(folder).glob(f"{start}*.json"):
        variant = index.name.removeprefix(start).removesuffix(".json")
        whole = Path(folder, f"{stem}{variant}.{ending}")
        if whole.is_file():
            (whole if _is_of_the_last_save(index, f"{stem}{variant}") else index).unlink()


def _is_of_the_last_save(index: Path, start: str) -> bool:
    """Whether an index names shards as the library does, "model-00001-of-00002.safetensors", that are all there."""
    try:
        check_index(index)
    except ValueError:
        return False
    return all(
        re.fullmatch(rf"{re.escape(start)}-\d{{5}}-of-\d{{5}}\..+", file) for file in read_index(index).values()
    )


def unreadable(folder: str | os.PathLike) -> list[str]:
    """What is wrong with each file of safetensors that cannot be opened."""
    faults = []
    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            faults.append(f"{path.name}: {error}")
    return faults


@contextmanager
def naming_damage(folder: str | os.PathLike) -> Iterator[None]:
    """Around what reads safetensors, whose errors do not say which file they are about: ValueError that does."""
    try:
        yield
    except SafetensorError as error:
        faults = "; ".join(unreadable(folder)) or str(error)
        raise ValueError(f"The checkpoint {str(folder)!r} has damaged safetensors: {faults}") from error


@contextmanager
def checked_files(
    name_or_path: str | os.PathLike | None, subfolder: str = "", needs_config: bool = True
) -> Iterator[None]:
    """Around a load by the library: the files of a folder are checked before, and errors name the file.

    Where `needs_config`, a folder without config.json is refused: the library would take a configuration by default.
    """
    folder = None if name_or_path is None else Path(name_or_path, subfolder)
    if folder is None or not folder.is_dir():
        yield
        return
    if needs_config and not any((folder / name).is_file() for name in (CONFIG_NAME, ADAPTER_CONFIG_NAME)):
        raise ValueError(f"The checkpoint {str(folder)!r} must hold {CONFIG_NAME}, but has none.")
    check_files(folder)
    with naming_damage(folder):
        yield
