"""What commands read and write: text byte for byte, outputs that are checked before the work starts, strict JSON."""

import json
import math
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the repository
PICTURES = (".png", ".pdf", ".svg")


# -- text --------------------------------------------------------------------------------------------


def check_text_file(field: str, path: str | Path) -> None:
    """Raises FileNotFoundError or ValueError, naming setting and file, where there is no file of UTF-8 text."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"`{field}` must be an existing file, but got {str(path)!r}.")
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                found = f"{str(path)!r} is not, in line {number}: {error}"
                raise ValueError(f"`{field}` must be text in UTF-8, but {found}.") from error


def read_text(field: str, path: str | Path) -> str:
    """The text of a UTF-8 file, byte for byte: its own line ends are kept. Errors as in `check_text_file`."""
    check_text_file(field, path)
    return Path(path).read_bytes().decode("utf-8")


# -- outputs -----------------------------------------------------------------------------------------


def nearest(path: Path) -> Path:
    """The path itself where something is there, else the nearest folder above it that exists."""
    return next(parent for parent in (path, *path.parents) if parent.exists())


def probe_folder(path: Path) -> None:
    """Raises OSError where no folder of this path can be, or nothing can be written there."""
    found = nearest(path)
    if not found.is_dir():
        raise NotADirectoryError(f"{str(found)!r} is a file")
    # Asked of the file system: bits of permission say nothing of a full or read-only one, and nothing to root.
    tempfile.TemporaryFile(dir=found).close()


def probe_file(path: Path) -> None:
    """Raises OSError where a folder is in the way, or the file cannot be written. One that is there stays as it is."""
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder")
    if path.exists():
        open(path, "ab").close()
    else:
        probe_folder(path.parent)


def check_path(name: str, path: str | Path, allowed: str, probe: Callable[[Path], None]) -> None:
    """Raises ValueError with the name of the setting where a probe of the path fails."""
    try:
        resolved = Path(path).resolve()
        if Path(path).is_symlink() and not resolved.exists():
            raise FileNotFoundError(f"it is a link to {str(resolved)!r}, where nothing is")
        probe(resolved)
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name that no file can have
        raise ValueError(f"`{name}` must be {allowed}, but got {str(path)!r}: {error}") from error


def check_folder(name: str, path: str | Path, files: Iterable[str] = ()) -> Path:
    """
    The folder that a command will make, or write `files` into. Nothing is made yet, and nothing changed.

    Raises ValueError, naming the setting, where a file stands in the folder's way or a folder in that of a file, and
    where nothing can be written.
    """
    check_path(name, path, "a folder that can be written to", probe_folder)
    for file in files:
        check_path(name, Path(path) / file, "a folder whose files can be written", probe_file)
    return Path(path)


def remove_older(folder: Path, files: Iterable[str]) -> None:
    """Removes files of an older run that this one may not write: they would lie beside figures that are not theirs."""
    for file in files:
        (folder / file).unlink(missing_ok=True)


def check_file(name: str, path: str | Path, endings: Iterable[str] = ()) -> Path:
    """
    The file that a command will write. Nothing is made yet, and nothing changed.

    Raises ValueError, naming the setting, where the path has none of the endings, where a folder stands in the file's
    way or a file in that of its folder, and where it cannot be written.
    """
    if endings and Path(path).suffix not in endings:
        raise ValueError(f"`{name}` must end in one of {list(endings)}, but got {str(path)!r}.")
    check_path(name, path, "a file that can be written", probe_file)
    return Path(path)


# -- JSON --------------------------------------------------------------------------------------------


def finite(value: object) -> object:
    """The value with None for NaN and infinities, which JSON cannot hold; through lists, tuples and dictionaries."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_finite(value: object) -> bool:
    """Whether a value holds no NaN and no infinity, as itself or in a list or dictionary."""
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def write_json(path: str | Path, value: object, indent: int | None = None) -> None:
    """Writes JSON in UTF-8 and makes its folder; null stands for a figure that is not finite."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(finite(value), indent=indent, allow_nan=False) + "\n", encoding="utf-8")


def write_report(folder: Path, name: str, figures: object, text: str, indent: int | None = None) -> None:
    """Prints a report, and writes `<name>.json` with its figures and `<name>.md` with its text into the folder."""
    print(text)
    write_json(folder / f"{name}.json", figures, indent=indent)
    (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
