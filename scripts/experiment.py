"""Runs experiments: models x seeds x budget, as YAML files describe them, one JSON line for every finished run.

    python scripts/experiment.py --experiments scripts/experiments/main_small.yaml --data_dir data --workers 2

Can be killed at any moment and started again: finished runs are skipped, others go on from their last checkpoint.
`python scripts/report.py` makes tables and plots of the lines.
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from workshop.experiments.plan import load_experiment
from workshop.experiments.runner import Runner, held
from workshop.experiments.store import drop_torn_line
from workshop.files import ROOT, check_file, check_folder
from workshop.settings import check_counts


@dataclass
class ExperimentArguments:
    """What to run, and with what."""

    experiments: list[str] = field(metadata={"help": "YAML files, in the order in which their runs start."})
    data_dir: str = field(metadata={"help": "Folder that holds the text files which the experiments name."})
    lines: str = field(
        default=str(ROOT / "docs" / "results" / "runs.jsonl"), metadata={"help": "Where the finished runs are."}
    )
    runs_dir: str = field(
        default=str(ROOT / "runs" / "experiments"), metadata={"help": "Where models and checkpoints go."}
    )
    workers: int = field(default=1, metadata={"help": "Runs at a time, each in a process of its own."})
    threads: int | None = field(
        default=None, metadata={"help": "CPU threads of each. Default: the cores shared out among them."}
    )

    def __post_init__(self):
        check_counts(self, "workers", "threads")
        check_file("lines", self.lines)
        check_folder("runs_dir", self.runs_dir)


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser(ExperimentArguments)
    (arguments,) = parser.parse_args_into_dataclasses(argv)
    with held("runs_dir", Path(arguments.runs_dir) / "runner"), held("lines", Path(arguments.lines)):
        torn = drop_torn_line(arguments.lines)
        if torn:
            print(f"cut off, a line that was not written to its end: {torn[:80]!r}...")
        experiments = [load_experiment(path) for path in arguments.experiments]
        places = (arguments.data_dir, arguments.lines, arguments.runs_dir)
        Runner(experiments, *places, arguments.workers, arguments.threads).run()


if __name__ == "__main__":
    main()
