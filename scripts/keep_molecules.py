"""Measures a finished model of molecules, and puts it with its card into a folder that the repository keeps.

    python scripts/keep_molecules.py --model runs/molecules --validation_file data/zinc_jtnn/valid.txt \
        --output_dir checkpoints/mine --command "python scripts/train_molecules.py ..." --commit 0123abc \
        --training_data "ZINC-250K, the training part of the junction-tree VAE's split" --license apache-2.0

`docs/molecules.md` says what the folder holds.
"""

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from workshop.evaluation import load
from workshop.files import check_folder
from workshop.molecules.committed import FILES, measure, read_run, write_folder
from workshop.molecules.judging import check_rdkit
from workshop.molecules.passes import check_loop
from workshop.molecules.rows import read_molecules
from workshop.settings import check_counts


@dataclass
class KeepingArguments:
    """Which model, and where it came from."""

    model: str = field(metadata={"help": "The folder of a finished run of train_molecules.py."})
    validation_file: str = field(metadata={"help": "Molecules for its loss, one SMILES a line."})
    output_dir: str = field(metadata={"help": "The folder that keeps it."})
    command: str = field(metadata={"help": "The command that trained it, for the card."})
    commit: str = field(metadata={"help": "The commit of the code that trained it."})
    training_data: str = field(metadata={"help": "What it was trained on, in words, for the card."})
    license: str | None = field(default=None, metadata={"help": "Of the model, as the Hub spells it, for the card."})
    samples: int = field(default=10000, metadata={"help": "Molecules drawn for the card, a fifth of them per pass."})

    def __post_init__(self):
        check_counts(self, "samples")
        if not re.fullmatch("[0-9a-f]{7,40}", self.commit):
            raise ValueError(f"`commit` must be a commit in hexadecimal digits, but got {self.commit!r}.")


def main(argv: list[str]) -> dict:
    """The figures, as they are written."""
    (arguments,) = HfArgumentParser(KeepingArguments).parse_args_into_dataclasses(argv)
    check_rdkit()
    folder = check_folder("output_dir", arguments.output_dir, (*FILES, "README.md", "figures.json"))
    run = read_run(Path(arguments.model))
    model, tokenizer = load(arguments.model, arguments.model)
    check_loop(model)
    validation = read_molecules("validation_file", arguments.validation_file)
    run |= {name: getattr(arguments, name) for name in ("training_data", "license", "command", "commit")}
    figures = run | measure(model, tokenizer, validation, arguments.samples)
    write_folder(model, tokenizer, figures, folder, arguments.output_dir)
    print((folder / "README.md").read_text(encoding="utf-8"))
    return figures


if __name__ == "__main__":
    main(sys.argv[1:])
