"""Hypothesis profiles (a hundred histories in `make test`, two thousand in `make fuzz`), a device, and a folder."""

import os
import tempfile
from pathlib import Path

# Before any library reads it: caches of this run alone, in each of its processes.
CACHES = tempfile.TemporaryDirectory()
os.environ["HF_HOME"] = CACHES.name

import pytest  # noqa: E402
import torch  # noqa: E402
from documents import ROOT  # noqa: E402
from hypothesis import Phase, settings  # noqa: E402

settings.register_profile("test", max_examples=100, stateful_step_count=14, deadline=None)
settings.register_profile("fuzz", max_examples=2000, stateful_step_count=14, deadline=None)
# Whether an example fails, and not which is the shortest that does: `make mutants`.
settings.register_profile("mutants", settings.get_profile("test"), phases=[Phase.explicit, Phase.generate])
settings.load_profile("test")


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where models and tensors of the tests are made, such as cuda")


def pytest_configure(config):
    if config.getoption("--device") != "cpu":
        torch.set_default_device(config.getoption("--device"))


@pytest.fixture
def workplace(tmp_path) -> Path:
    """A folder that looks like the repository to a command, and takes what the command writes."""
    for name in ("checkpoints", "configuration", "examples", "scripts", "tokenization"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "text.txt").write_text("def add(a, b):\n    return a + b\n" * 2000, encoding="utf-8")
    return tmp_path
