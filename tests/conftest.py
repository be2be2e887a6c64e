"""Hypothesis profiles (a hundred histories in `make test`, two thousand in `make fuzz`), and a folder for commands."""

from pathlib import Path

import pytest
from documents import ROOT
from hypothesis import settings

settings.register_profile("test", max_examples=100, stateful_step_count=14, deadline=None)
settings.register_profile("fuzz", max_examples=2000, stateful_step_count=14, deadline=None)
settings.load_profile("test")


@pytest.fixture
def workplace(tmp_path) -> Path:
    """A folder that looks like the repository to a command, and takes what the command writes."""
    for name in ("configuration", "examples", "scripts", "tokenization"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "text.txt").write_text("def add(a, b):\n    return a + b\n" * 2000)
    return tmp_path
