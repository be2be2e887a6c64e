"""Draws docs/architecture.png and docs/cache_grid.png."""

from dataclasses import dataclass, field

from transformers import HfArgumentParser

from workshop.figures import draw_architecture, draw_cache_grid
from workshop.files import ROOT, check_folder


@dataclass
class FigureArguments:
    """Where to draw."""

    output_dir: str = field(default=str(ROOT / "docs"), metadata={"help": "Folder for the two PNG files."})


def main(arguments: FigureArguments) -> None:
    folder = check_folder("output_dir", arguments.output_dir, ("architecture.png", "cache_grid.png"))
    folder.mkdir(parents=True, exist_ok=True)
    for draw, name in ((draw_architecture, "architecture.png"), (draw_cache_grid, "cache_grid.png")):
        draw(folder / name)
        print(folder / name)


if __name__ == "__main__":
    main(*HfArgumentParser(FigureArguments).parse_args_into_dataclasses())
