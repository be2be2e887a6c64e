"""Where a figure comes from: the commit of the code, and the machine and libraries it was measured with."""

import os
import platform
import subprocess
import time

import torch
import transformers

from workshop.files import ROOT

CODE = ("modeling_spiralformer", "scripts", "setup.py", "constraints.txt")


def current_commit() -> str:
    """The commit of the code, with "-dirty" where a tracked file of it differs.

    "unknown" outside of git, and where none is installed.
    """

    def git(*words: str) -> str:
        try:
            return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, encoding="utf-8").stdout.strip()
        except OSError:
            return ""

    changed = git("status", "--porcelain", "--untracked-files=no", "--", *CODE)
    return (git("rev-parse", "HEAD") or "unknown") + ("-dirty" if changed else "")


def load() -> tuple[float, ...] | None:
    """Processes that wait for a core, the mean over 1, 5 and 15 minutes; None where the system does not count them."""
    return os.getloadavg() if hasattr(os, "getloadavg") else None  # Windows does not


def machine(device: torch.device) -> dict:
    """What the figures were measured on and with."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": load(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": current_commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
