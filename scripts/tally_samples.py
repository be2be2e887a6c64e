"""Counts rings and branches in the samples that finished runs on molecules kept, and the valid ones among them.

    python scripts/tally_samples.py --data_dir data

Runs that were read before are skipped; `python scripts/report.py` makes tables and a picture of the counts.
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from workshop.experiments.hierarchy import tally_runs
from workshop.experiments.store import drop_torn_line, read_lines
from workshop.files import ROOT, check_file, check_text_file
from workshop.molecules.judging import check_rdkit


@dataclass
class TallyArguments:
    """Which runs to read, and where the counts go."""

    data_dir: str = field(metadata={"help": "Folder that holds the training molecules which the runs name."})
    runs: str = field(
        default=str(ROOT / "docs" / "results" / "runs.jsonl"), metadata={"help": "Lines of the finished runs."}
    )
    runs_dir: str = field(
        default=str(ROOT / "runs" / "experiments"), metadata={"help": "Where the runs kept their samples."}
    )
    hierarchy: str = field(
        default=str(ROOT / "docs" / "results" / "molecules_hierarchy.jsonl"),
        metadata={"help": "Where the counts are: a line a run."},
    )

    def __post_init__(self):
        check_text_file("runs", self.runs)
        check_file("hierarchy", self.hierarchy)


def main(argv: list[str] | None = None) -> None:
    (arguments,) = HfArgumentParser(TallyArguments).parse_args_into_dataclasses(argv)
    check_rdkit()
    drop_torn_line(arguments.hierarchy)
    lines, places = read_lines(arguments.runs), (arguments.runs_dir, arguments.data_dir, arguments.hierarchy)
    absent = tally_runs(lines, *places)
    for line in absent:
        named = f"{line['experiment']}: {line['model']}, seed {line['seed']}, rate {line['learning_rate']:g}"
        print(f"not read, its samples are not in {Path(arguments.runs_dir)}: {named}")


if __name__ == "__main__":
    main()
