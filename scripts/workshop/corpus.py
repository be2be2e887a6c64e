"""The default corpus: the Python standard library's own source on this machine, so that nothing is downloaded."""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# Tests repeat themselves and hold deliberately broken text; `encodings` and `pydoc_data` are generated tables and
# manual pages, a third of all bytes; installed packages are not the standard library.
SKIPPED_DIRECTORIES = {
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
    "site-packages",
    "dist-packages",
    "__pycache__",
}
# Written when Python was built: it holds that machine's paths.
SKIPPED_PREFIX = "_sysconfigdata"
SPLITS = ("train", "validation")


@dataclass
class Corpus:
    """Texts by file, with what was left out and why. `skipped` maps a relative path to the reason."""

    paths: list[str]
    texts: list[str]
    skipped: dict[str, str]


def standard_library_root() -> Path:
    """The directory of the standard library of the running Python."""
    return Path(sysconfig.get_path("stdlib"))


def source_files(root: Path) -> list[str]:
    """Paths of all sources below `root`, relative and with "/", in an order that no file system changes."""
    relative_paths = (path.relative_to(root) for path in root.rglob("*.py"))
    return sorted(
        path.as_posix()
        for path in relative_paths
        if not SKIPPED_DIRECTORIES.intersection(path.parts[:-1]) and not path.name.startswith(SKIPPED_PREFIX)
    )


def is_validation(relative_path: str, validation_percentage: float) -> bool:
    """Whether a file is held out. It hangs on the path alone, so that a file never changes sides between versions."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 * 100 < validation_percentage


def read_corpus(split: str, validation_percentage: float = 5, root: Path | None = None) -> Corpus:
    """
    Reads one split, "train" or "validation", of the sources below `root` (default: the standard library).

    Files that are empty, unreadable or not UTF-8 are left out and listed in `skipped`. Raises ValueError for an
    unknown split, and where no file is left.
    """
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {list(SPLITS)}, but got {split!r}.")
    root = standard_library_root() if root is None else root
    corpus = Corpus(paths=[], texts=[], skipped={})
    for path in source_files(root):
        if is_validation(path, validation_percentage) != (split == "validation"):
            continue
        try:
            # newline="": the text keeps the file's own line ends, byte for byte.
            with open(root / path, encoding="utf-8", newline="") as file:
                text = file.read()
        except (UnicodeDecodeError, OSError) as error:
            corpus.skipped[path] = f"{type(error).__name__}: {error}"
            continue
        if not text:
            corpus.skipped[path] = "empty"
            continue
        corpus.paths.append(path)
        corpus.texts.append(text)
    if not corpus.texts:
        raise ValueError(f"The {split} split of the Python sources below {root} is empty.")
    return corpus
