"""Tables and pictures of the training experiments, from the lines of their finished runs and nothing else.

    python scripts/report.py

Writes <name>.md and its PNG files for every experiment in `scripts/experiments/`, finished or not. `--check` writes
nothing, and fails with the names of the Markdown files that are not what the lines give.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from transformers import HfArgumentParser

from workshop.experiments.hierarchy import Hierarchy
from workshop.experiments.molecules_report import molecules_report
from workshop.experiments.pictures import Picture, hierarchy_pictures, pictures, scaling_picture
from workshop.experiments.plan import load_experiment
from workshop.experiments.report import report
from workshop.experiments.results import ExperimentResults
from workshop.experiments.store import read_lines
from workshop.experiments.tasks_report import tasks_report
from workshop.files import ROOT, check_folder, check_text_file


@dataclass
class ReportArguments:
    """What to read, and where to write."""

    experiments: list[str] = field(
        default_factory=lambda: sorted(map(str, (ROOT / "scripts" / "experiments").glob("*.yaml"))),
        metadata={"help": "YAML files of the experiments. Default: all of scripts/experiments."},
    )
    runs: str = field(
        default=str(ROOT / "docs" / "results" / "runs.jsonl"), metadata={"help": "Lines of the finished runs."}
    )
    hierarchy: str = field(
        default=str(ROOT / "docs" / "results" / "molecules_hierarchy.jsonl"),
        metadata={"help": "What `tally_samples.py` counted in the samples of runs on molecules."},
    )
    output_dir: str = field(
        default=str(ROOT / "docs" / "results"), metadata={"help": "Folder for the Markdown and PNG files."}
    )
    check: bool = field(default=False, metadata={"help": "Write nothing; fail where a Markdown file is out of date."})


def stale_files(texts: dict[Path, str]) -> list[str]:
    """The files that do not exist, or hold another text."""
    return [
        path.name for path, text in texts.items() if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]


def writer_of(kind: str, hierarchy: Hierarchy) -> Callable[[ExperimentResults, dict[str, str]], str]:
    """What writes the report of an experiment of that kind."""
    return {"molecules": partial(molecules_report, hierarchy=hierarchy), "task": tasks_report}.get(kind, report)


def main(arguments: ReportArguments) -> None:
    folder = Path(arguments.output_dir)
    check_text_file("runs", arguments.runs)
    if not arguments.check:
        check_folder("output_dir", folder, [f"{Path(path).stem}.md" for path in arguments.experiments])
    lines, hierarchy = read_lines(arguments.runs), Hierarchy.load(arguments.hierarchy)
    everything = [ExperimentResults.gather(load_experiment(path), lines) for path in arguments.experiments]
    texts: dict[Path, str] = {}
    drawn: list[Picture] = scaling_picture(everything)
    for results in everything:
        own = pictures(results) + hierarchy_pictures(results, hierarchy)
        write = writer_of(results.report, hierarchy)
        texts[folder / f"{results.name}.md"] = write(results, {picture.file: picture.shows for picture in own})
        drawn += own
    if arguments.check:
        if stale := stale_files(texts):
            raise SystemExit(f"Not what {arguments.runs} gives: {', '.join(stale)}. Run `python scripts/report.py`.")
        return
    check_folder("output_dir", folder, [picture.file for picture in drawn])
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
        print(path)
    for picture in drawn:
        picture.draw(folder / picture.file)
        print(folder / picture.file)


if __name__ == "__main__":
    main(*HfArgumentParser(ReportArguments).parse_args_into_dataclasses())
