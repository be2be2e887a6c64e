"""The lines of finished runs, one JSON object each: read, appended, mended after a kill in mid-line."""

import hashlib
import json
import os
from pathlib import Path

from modeling_spiralformer.files_spiralformer import unique
from workshop.files import read_text

DIGEST = "sha256"


def digest(line: dict) -> str:
    """SHA-256 of a line as it is written, without the field that holds it."""
    return hashlib.sha256(json.dumps(line, allow_nan=False).encode()).hexdigest()


def parse_line(text: str) -> dict:
    """
    What a line holds, without its digest. Raises ValueError where it is no JSON object, or not the one that was
    written; lines that are older than digests have none.
    """
    line = json.loads(text, object_pairs_hook=unique)
    if not isinstance(line, dict):
        raise ValueError(f"it is {text!r}")
    written = line.pop(DIGEST, None)
    if written is not None and written != digest(line):
        raise ValueError(f"`{DIGEST}` is not that of its other fields")
    return line


def read_lines(path: str | Path) -> list[dict]:
    """All lines; none where there is no file yet. Raises ValueError, with its number, for a line that is damaged."""
    if not os.path.lexists(path):
        return []
    lines = []
    for number, text in enumerate(read_text("lines", path).splitlines(), start=1):
        try:
            lines.append(parse_line(text))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}, must be a JSON object as it was written: {error}") from error
    return lines


def append_line(path: str | Path, line: dict) -> None:
    """
    Adds one line, with its digest, and waits until it is on the disk. NaN and infinities have no place in JSON:
    ValueError.
    """
    text = json.dumps({**line, DIGEST: digest(line)}, allow_nan=False) + "\n"
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def drop_torn_line(path: str | Path) -> str:
    """
    Cuts off a last line that a kill left without its end, and returns it; "" where there is none. A line that lacks
    nothing but its newline gets one.
    """
    if not Path(path).exists():
        return ""
    content = Path(path).read_bytes()
    whole = content.rfind(b"\n") + 1
    torn = content[whole:].decode("utf-8", errors="replace")
    if not torn:
        return ""
    try:
        json.loads(torn)
    except json.JSONDecodeError:
        os.truncate(path, whole)
        return torn
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n")
    return ""


def losses(line: dict) -> dict[str, float | None]:
    """Text -> loss of a finished run: nats per token of molecules, else bits per byte; None where it diverged."""
    return line["nats_per_token" if "nats_per_token" in line else "bits_per_byte"]


def text_folder(runs_dir: str | Path, text: dict) -> Path:
    """Where runs on a text are kept: one folder for each, told by its digests, so that none goes on on another."""
    return Path(runs_dir) / hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()[:8]


def run_folder(runs_dir: str | Path, line: dict) -> Path:
    """Where the model of a finished run is."""
    return text_folder(runs_dir, line["text"]) / line["key"]
