"""Trains a model on molecules, a SMILES a line, by SMolLM's recipe unless told otherwise, and evaluates its loss.

    python scripts/train_molecules.py --train_file data/zinc_jtnn/train.txt --validation_file data/zinc_jtnn/valid.txt

`docs/molecules.md` says more; `evaluate_molecules.py` draws molecules from the trained model.
"""

import sys

from transformers import Trainer

from workshop.molecules.training import MOLECULE_ARGUMENTS, run
from workshop.training_arguments import parse_arguments


def main(argv: list[str]) -> Trainer:
    """Runs the job that the command line, or the file that it names, describes, and returns its Trainer."""
    return run(*parse_arguments(argv, MOLECULE_ARGUMENTS))


if __name__ == "__main__":
    main(sys.argv[1:])
