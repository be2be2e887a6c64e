"""Draws docs/architecture.png, docs/cache_grid.png and docs/uptraining.png."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from workshop.figures import draw_architecture, draw_cache_grid
from workshop.files import ROOT, check_folder, read_text
from workshop.plotting import draw_stages


@dataclass
class FigureArguments:
    """Where to draw."""

    output_dir: str = field(default=str(ROOT / "docs"), metadata={"help": "Folder for the PNG files."})


def draw_uptraining(path: Path) -> None:
    """The curves of docs/results/uptraining.json, which `examples/uptrain.py` wrote."""
    draw_stages(json.loads(read_text("uptraining", ROOT / "docs" / "results" / "uptraining.json")), path)


def main(arguments: FigureArguments) -> None:
    figures = {
        "architecture.png": draw_architecture,
        "cache_grid.png": draw_cache_grid,
        "uptraining.png": draw_uptraining,
    }
    folder = check_folder("output_dir", arguments.output_dir, tuple(figures))
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in figures.items():
        draw(folder / name)
        print(folder / name)


if __name__ == "__main__":
    main(*HfArgumentParser(FigureArguments).parse_args_into_dataclasses())
