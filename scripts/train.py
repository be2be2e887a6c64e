"""Trains a causal language model with the library's own Trainer, and evaluates it in perplexity and bits per byte."""

import sys

from transformers import Trainer

from workshop.training import run
from workshop.training_arguments import parse_arguments


def main(argv: list[str]) -> Trainer:
    """Runs the job that the command line describes, and returns its Trainer with the log in `state.log_history`."""
    return run(*parse_arguments(argv))


if __name__ == "__main__":
    main(sys.argv[1:])
