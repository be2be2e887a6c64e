"""Damages files of checkpoints, runs and results in thousands of ways, and tells what each load makes of them.

    python scripts/damage_files.py --count 5000 --seed 0

A load must refuse a damaged file by an error that names it or its field, or give what the whole files give, bit for
bit. Equal seed and number damage alike, so `--numbers 17` does that one again. Ends with 1 where a load did neither.
"""

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm
from transformers import HfArgumentParser

from workshop.damage.trials import CLASSES, run_trials, write_trial
from workshop.files import check_file
from workshop.settings import LARGEST_SEED, check_counts, check_numbers
from workshop.tables import plain_table


@dataclass
class DamageArguments:
    """How many damages, and which."""

    count: int = field(default=5000, metadata={"help": "So many, numbered from 0."})
    seed: int = field(default=0, metadata={"help": "Of all damages."})
    numbers: list[int] | None = field(default=None, metadata={"help": "These alone, in place of all."})
    digests: bool = field(default=True, metadata={"help": "Off: without SHA256SUMS in the folders."})
    output_file: str | None = field(default=None, metadata={"help": "A file for one JSON line a damage."})

    def __post_init__(self):
        check_counts(self, "count")
        check_counts(self, "numbers", least=0)
        check_numbers(self, seed=(0, LARGEST_SEED))
        if self.output_file is not None:
            check_file("output_file", self.output_file)


def main(argv: list[str] | None = None) -> int:
    """The number of damages that were neither refused clearly nor harmless."""
    (arguments,) = HfArgumentParser(DamageArguments).parse_args_into_dataclasses(argv)
    numbers = list(range(arguments.count)) if arguments.numbers is None else arguments.numbers
    counted: dict[str, Counter] = {}
    failed = []
    with TemporaryDirectory() as folder:
        trials = run_trials(Path(folder), arguments.seed, numbers, arguments.digests)
        for trial in tqdm(trials, total=len(numbers), unit="damage"):
            counted.setdefault(trial.file, Counter())[trial.outcome] += 1
            failed += [trial] if trial.failed else []
            if arguments.output_file is not None:
                write_trial(Path(arguments.output_file), trial)
    counted["all"] = sum(counted.values(), Counter())
    rows = [(file, *(str(counts[name]) for name in CLASSES)) for file, counts in counted.items()]
    print(plain_table([("file", *CLASSES), *sorted(rows[:-1]), rows[-1]]))
    for trial in failed:
        print(f"{trial.outcome}: {trial}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main() > 0)
