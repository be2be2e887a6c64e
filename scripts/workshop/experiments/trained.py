"""The trained models of an experiment, where the runner left them."""

from dataclasses import dataclass, field
from pathlib import Path

from modeling_spiralformer.files_spiralformer import digest
from workshop.experiments.plan import Experiment, load_experiment
from workshop.experiments.report import short
from workshop.experiments.store import read_lines, run_folder
from workshop.files import ROOT, check_text_file


@dataclass
class TrainedArguments:
    """Which trained models of which experiment are asked."""

    experiment: str = field(metadata={"help": "YAML file of an experiment on molecules."})
    data_dir: str = field(metadata={"help": "Folder that holds the text files which the experiment names."})
    models: list[str] = field(default_factory=list, metadata={"help": "Names of its models. Default: all."})
    sweep: bool = field(
        default=False, metadata={"help": "Take the runs of the sweep at the chosen rates, not the whole runs."}
    )
    runs: str = field(
        default=str(ROOT / "docs" / "results" / "runs.jsonl"), metadata={"help": "Lines of the finished runs."}
    )
    runs_dir: str = field(
        default=str(ROOT / "runs" / "experiments"), metadata={"help": "Where the runs left their models."}
    )

    def __post_init__(self):
        check_text_file("runs", self.runs)


@dataclass(frozen=True)
class Trained:
    """A model that a run left: its name in the experiment, its line and its folder."""

    model: str
    seed: int
    line: dict
    folder: Path


def chosen_runs(experiment: Experiment, name: str, lines: list[dict], sweep: bool) -> dict[int, dict]:
    """Seed -> line of the finished runs at the chosen rate, whole ones or that of the sweep."""
    rate = experiment.chosen_rate(name, lines)
    if not sweep:
        return experiment.finished(name, lines)
    return {} if rate is None else {experiment.seeds[0]: experiment.sweep(name, lines)[rate]}


def load_trained(arguments: TrainedArguments) -> tuple[Experiment, Path, list[Trained]]:
    """
    The experiment, the file of its validation molecules, and its trained models in the order of the YAML.

    Raises ValueError for an experiment that is not on molecules, a name that it lacks, validation molecules other than
    those of a run, or where nothing has run, and FileNotFoundError where they, or the model of a run, are not there.
    """
    experiment, lines = load_experiment(arguments.experiment), read_lines(arguments.runs)
    if experiment.smiles is None:
        raise ValueError(f"`experiment` must be on molecules, but {arguments.experiment} has no `smiles`.")
    if unknown := set(arguments.models) - set(experiment.models):
        raise ValueError(f"`models` must be of {list(experiment.models)}, but got {sorted(unknown)}.")
    validation = Path(arguments.data_dir) / experiment.text["validation"]
    if not validation.is_file():
        raise FileNotFoundError(f"`data_dir` must hold {validation.name}, but {validation} is no file.")
    read, found = digest(validation), []
    for name in arguments.models or experiment.models:
        for seed, line in chosen_runs(experiment, name, lines, arguments.sweep).items():
            if line["text"]["validation"]["sha256"] != read:
                raise ValueError(
                    f"`data_dir` must hold the validation molecules of {name}, seed {seed}, but {validation} differs."
                )
            folder = run_folder(arguments.runs_dir, line)
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"`runs_dir` must hold the model of {name}, seed {seed}, but {folder} is none."
                )
            found.append(Trained(name, seed, line, folder))
    if not found:
        kind = "runs of a whole sweep" if arguments.sweep else "whole runs"
        raise ValueError(f"`runs` must hold {kind} of {arguments.experiment}, but {arguments.runs} has none.")
    return experiment, validation, found


def describe_trained(trained: list[Trained]) -> str:
    """What was trained, in a sentence: on how many tokens, at which commits, and which models have fewer seeds."""
    tokens = [item.line["tokens"] for item in trained]
    counts = " to ".join(f"{count:,}" for count in sorted({min(tokens), max(tokens)}))
    commits = sorted({short(item.line["commit"]) for item in trained})
    seeds: dict[str, list[int]] = {}
    for item in trained:
        seeds.setdefault(item.model, []).append(item.seed)
    named = "; ".join(f"`{name}` {', '.join(map(str, found))}" for name, found in seeds.items())
    return f"Trained on {counts} tokens, code of {', '.join(commits)}. Seeds: {named}."
