"""Makes a process one without the package, wherever it is installed; imports nothing that could hold it."""

import sys
from importlib.machinery import PathFinder
from pathlib import Path

PATH, FINDERS = list(sys.path), list(sys.meta_path)


def hide_package() -> None:
    """Takes away every way to `modeling_spiralformer`: folders that hold it, and the finder of an editable install."""
    sys.path[:] = [folder for folder in PATH if not Path(folder or ".", "modeling_spiralformer").is_dir()]
    sys.meta_path[:] = [f for f in FINDERS if f is PathFinder or f.find_spec("modeling_spiralformer", None) is None]
