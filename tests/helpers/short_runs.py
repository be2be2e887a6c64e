"""Runs of `scripts/train.py` of a few steps, on a text that every machine has."""

from pathlib import Path

import train
from workshop.corpus import standard_library_root


def write_text(folder: Path) -> str:
    """A file of the standard library as a text, and its path."""
    path = folder / "text.txt"
    path.write_text((standard_library_root() / "textwrap.py").read_text(encoding="utf-8"), encoding="utf-8")
    return str(path)


def train_shortly(text: str, output: Path, overrides: str, **changes):
    """Trains for four steps of two rows, saving after two; `changes` replace settings. Returns the Trainer."""
    settings = {"train_file": text, "output_dir": str(output), "config_overrides": overrides, "block_size": "64"}
    settings |= {"per_device_train_batch_size": "2", "learning_rate": "1e-2", "max_steps": "4", "save_steps": "2"}
    settings |= {"report_to": "none", "do_eval": "False", "disable_tqdm": "True", "logging_steps": "1"} | changes
    return train.main([word for name, value in settings.items() for word in (f"--{name}", value)])
