"""The main job in a few steps: everything it promises to leave behind is there."""

import json
import sys

from documents import ROOT, run


def test_quickstart(tmp_path):
    command = [sys.executable, "scripts/quickstart.py", "--max_steps", "12", "--output_dir", str(tmp_path)]
    printed = run(command, ROOT)
    summary = json.loads((tmp_path / "quickstart.json").read_text())
    first, last = summary["training loss, first and last"]
    assert last < first and summary["held-out bits per byte"] > 0
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "model.safetensors").is_file()
    assert "def __init__(self" in printed and str(tmp_path / "loss.png") in printed
