"""Measures `train.py` against the bare step of its model: what text, batches, logs and callbacks cost.

    python scripts/benchmark_training.py --train_file text.txt --block_size 128 --per_device_train_batch_size 8

It takes every setting of `train.py`, trains (200 steps unless `--max_steps` says otherwise), and after each step
takes a bare one on a copy of the model.
"""

import sys

from workshop.benchmarks.data_path import format_measure, measure
from workshop.training import make_trainer
from workshop.training_arguments import parse_arguments

DEFAULTS = ["--max_steps", "200", "--output_dir", "runs/benchmark_training", "--save_strategy", "no"]
DEFAULTS += ["--do_eval", "False", "--report_to", "none"]


def main(argv: list[str]) -> dict:
    found = measure(make_trainer(*parse_arguments([*DEFAULTS, *argv])))
    print(format_measure(found))
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
