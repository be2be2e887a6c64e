"""Kills runs of train.py, at random moments and while they save, and compares what they end with after going on.

    python scripts/kill_training.py --count 20 --seed 0

Losses, evaluation and weights must be those of a run that was not killed, bit for bit. Ends with 1 where they are not.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm
from transformers import HfArgumentParser

from workshop.damage.kills import run_kills
from workshop.settings import LARGEST_SEED, check_counts, check_numbers
from workshop.tables import plain_table


@dataclass
class KillArguments:
    """How many runs."""

    count: int = field(default=20, metadata={"help": "Runs, each killed once: every second one while it saves."})
    seed: int = field(default=0, metadata={"help": "Of the moments."})

    def __post_init__(self):
        check_counts(self, "count")
        check_numbers(self, seed=(0, LARGEST_SEED))


def main(argv: list[str] | None = None) -> int:
    """The number of runs that ended otherwise than the one that was not killed."""
    (arguments,) = HfArgumentParser(KillArguments).parse_args_into_dataclasses(argv)
    with TemporaryDirectory() as folder:
        kills = run_kills(Path(folder), arguments.seed, arguments.count)
        made = list(tqdm(kills, total=arguments.count, unit="run"))
    rows = [(str(kill.number), kill.moment, kill.resumed_from, kill.differs or "nothing") for kill in made]
    print(plain_table([("run", "killed", "went on from", "differs"), *rows]))
    same = sum(not kill.differs for kill in made)
    print(f"{same} of {len(made)} ended as the run that was not killed")
    return len(made) - same


if __name__ == "__main__":
    sys.exit(main() > 0)
