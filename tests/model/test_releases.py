"""A checkpoint saved under one release of transformers, pulled as remote code under another, without the package."""

import sys

import pytest
from documents import OLDEST, ROOT, run

OLDEST_PYTHON = ROOT / f".venv-{OLDEST}" / "bin" / "python"
needs_oldest = pytest.mark.skipif(
    not OLDEST_PYTHON.exists(), reason="`make test-min` makes the environment of the oldest release"
)


@needs_oldest
@pytest.mark.processes
@pytest.mark.parametrize(
    "saver, puller, family",
    [
        (sys.executable, OLDEST_PYTHON, "gpt_neox"),
        (OLDEST_PYTHON, sys.executable, "gpt_neox"),
        (sys.executable, OLDEST_PYTHON, "qwen3"),
        (OLDEST_PYTHON, sys.executable, "llama"),
    ],
    ids=["old", "new", "old, qwen3", "new, llama"],
)
def test_saved_by_one_release_and_pulled_by_the_other(saver, puller, family, tmp_path):
    command = [str(ROOT / "tests" / "helpers" / "release_checkpoint.py")]
    folder, home = tmp_path / "checkpoint", {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    saved = run([str(saver), *command, "save", str(folder), family], tmp_path, **home)
    pulled = run([str(puller), *command, "pull", str(folder)], tmp_path, **home)
    assert saved.startswith("save 5.") and pulled.startswith("pull 5.")
