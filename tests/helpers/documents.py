"""The code blocks of README and docs, and a way to run them; and what the Makefile says."""

import os
import re
import subprocess
import sys
from pathlib import Path

from forked import run_python

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "tokenization" / "README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
MAKEFILE = (ROOT / "Makefile").read_text()
(OLDEST,) = re.findall(r"^OLDEST = (.*)$", MAKEFILE, re.MULTILINE)  # supported version of transformers
BLOCK = re.compile(r"(<!-- needs the network -->\n)?```(\w+)\n(.*?)```", re.DOTALL)


def blocks(page: str | Path, language: str) -> list[tuple[str, bool]]:
    """Code blocks of a page in one language: text, and whether it needs the network."""
    found = BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    return [(text, bool(network)) for network, kind, text in found if kind == language]


def offline(text: str) -> str:
    """A snippet with the tokenizer of this project in place of one from the Hub."""
    return re.sub(r'from_pretrained\("EleutherAI/[^"]*"\)', "from_pretrained(TOKENIZER_FOLDER)", text)


def commands(page: str | Path) -> list[str]:
    """The lines of a page's bash blocks; a line that ends in a backslash goes on in the next."""
    text = "\n".join(text.strip() for text, _ in blocks(page, "bash"))
    return [re.sub(r"\s+", " ", line) for line in text.replace("\\\n", " ").splitlines()]


def run(command: list[str], folder: Path, **environment: str) -> str:
    """Runs a command in a folder with this checkout's package, and returns what it printed; it must succeed.

    A Python command that needs no environment of its own finds the libraries imported already.
    """
    if command[0] == sys.executable and not environment:
        code, printed, errors = run_python(command[1:], folder, python_path=str(ROOT))
    else:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8")
        code, printed, errors = result.returncode, result.stdout, result.stderr
    assert code == 0, errors  # whole: where processes fail, the cause stands far above the end
    return printed
