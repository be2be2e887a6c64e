"""Loads a committed model, lets it write molecules, judges them and draws them; and where its errors go, pass by pass.

    python scripts/draw_molecules.py

Needs no download and no training: less than a minute on 2 cores. `docs/molecules.md` says how the models were trained.
"""

import sys
import time
from dataclasses import dataclass, field

from transformers import HfArgumentParser

from workshop.evaluation import load
from workshop.files import ROOT, check_folder, remove_older, write_json
from workshop.molecules.judging import check_rdkit, classes_of, judge
from workshop.molecules.passes import check_loop, errors_by_pass
from workshop.molecules.pictures import draw_grid, draw_passes
from workshop.molecules.sampling import SAMPLING, sample
from workshop.molecules.tables import classes_table, passes_table
from workshop.settings import LARGEST_SEED, check_counts, check_numbers

PICTURES = ("molecules.png", "passes.png")


@dataclass
class DrawingArguments:
    """Which model, and how many molecules."""

    model: str = field(
        default=str(ROOT / "checkpoints" / "spiralformer-155k"),
        metadata={"help": "Folder or Hub name of a model of molecules with its tokenizer."},
    )
    samples: int = field(default=1000, metadata={"help": "How many molecules are drawn from the model."})
    pass_samples: int = field(default=200, metadata={"help": "How many from the model stopped after each pass."})
    shown: int = field(default=12, metadata={"help": "How many of the valid ones are in the picture."})
    seed: int = field(default=0, metadata={"help": "Of the samples."})
    output_dir: str = field(default=str(ROOT / "runs" / "molecules"), metadata={"help": "Where the pictures go."})

    def __post_init__(self):
        check_numbers(self, seed=(0, LARGEST_SEED))
        check_counts(self, "samples", "pass_samples", "shown")


def main(argv: list[str]) -> dict:
    """The counts: printed as tables, written with the pictures into the folder, and returned."""
    started = time.time()
    (arguments,) = HfArgumentParser(DrawingArguments).parse_args_into_dataclasses(argv)
    check_rdkit()
    folder = check_folder("output_dir", arguments.output_dir, (*PICTURES, "molecules.json"))
    model, tokenizer = load(arguments.model, arguments.model)
    check_loop(model)
    options = {"seed": arguments.seed, **SAMPLING}
    samples = sample(model, tokenizer, arguments.samples, **options)
    classes = classes_of(samples)
    counts = judge(samples, classes)
    print(f"{model.num_parameters():,} parameters, passes of chunk sizes {model.config.chunk_sizes}\n")
    print(classes_table(counts))
    passes = list(errors_by_pass(model, tokenizer, [], None, count=arguments.pass_samples, **options))
    print(f"\n{passes_table(passes)}")
    folder.mkdir(parents=True, exist_ok=True)
    remove_older(folder, PICTURES)
    valid = [smiles for smiles in dict.fromkeys(samples) if classes[smiles] == "valid"]
    if valid:
        draw_grid(valid[: arguments.shown], folder / "molecules.png")
    draw_passes(passes, folder / "passes.png")
    results = {"settings": vars(arguments), "counts": counts, "passes": passes, "shown": valid[: arguments.shown]}
    write_json(folder / "molecules.json", results, indent=1)
    drawn = PICTURES if valid else PICTURES[1:]
    print(f"\n{' and '.join(str(folder / name) for name in drawn)}, after {time.time() - started:.0f} s")
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
