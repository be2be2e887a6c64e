"""What the lines of `docs/results/runs.jsonl` say about one experiment: the runs that count, model by model."""

import math
from dataclasses import dataclass

from modeling_spiralformer import SpiralFormerConfig
from workshop.experiments.statistics import Comparison, Mean
from workshop.experiments.store import losses
from workshop.molecules.judging import SAMPLE_CLASSES

TEXTS = ("validation", "foreign")
FIELDS = {
    "key": (),
    "experiment": (),
    "model": (),
    "seed": (),
    "learning_rate": (),
    "settings": (),
    "text": ("train", *TEXTS),
    "tokens": (),
    "steps": (),
    "flops": (),
    "prefill_flops_per_token": (),
    "parameters": (),
    "non_embedding_parameters": (),
    "kv_bytes_per_token": (),
    "decode_layer_equivalents": (),
    "wall_seconds": (),
    "resumed_from_step": (),
    "commit": (),
    "date": (),
    "machine": ("device", "cores", "threads", "workers", "torch", "transformers", "python"),
    "training_curve": (),
    "validation_curve": (),
    "bits_per_byte": TEXTS,
}
# Lines of molecules have another loss, no foreign text, and samples.
MOLECULE_FIELDS = {name: inner for name, inner in FIELDS.items() if name != "bits_per_byte"} | {
    "text": ("train", "validation"),
    "nats_per_token": ("validation",),
    "samples": ("count", *SAMPLE_CLASSES, "valid_interval", "unique", "rdkit"),
}
# Those of a task have right answers in place of samples, on every split but that of training.
TASK_FIELDS = {name: inner for name, inner in MOLECULE_FIELDS.items() if name != "samples"} | {
    "accuracy": ("validation",)
}


def fields_of(settings: dict) -> dict[str, tuple[str, ...]]:
    """What the line of a run holds."""
    if "task" in settings:
        return TASK_FIELDS
    return MOLECULE_FIELDS if "smiles" in settings else FIELDS


def check_line(line: dict) -> None:
    """Raises ValueError where a line of the store lacks a field, or a figure is neither finite nor null."""
    fields = fields_of(line.get("settings", {}))
    for field, inner in fields.items():
        if field not in line:
            raise ValueError(f"A line must have the field `{field}`, but the one of key {line.get('key')!r} lacks it.")
        if inner and not isinstance(line[field], dict):
            raise ValueError(f"`{field}` must have {list(inner)}, but is {line[field]!r} in {line.get('key')!r}.")
        for name in inner:
            if name not in line[field]:
                raise ValueError(f"`{field}` must have {list(inner)}, but lacks {name!r} in {line['key']!r}.")
    for text, value in losses(line).items():
        if value is not None and not math.isfinite(value):
            found = f"`{'nats_per_token' if 'nats_per_token' in fields else 'bits_per_byte'}[{text!r}]`"
            raise ValueError(f"{found} must be finite, or null of a diverged run, but got {value} in {line['key']!r}.")


def figure(line: dict, name: str) -> float | None:
    """A loss on a text, the share of samples in a class, or that of right answers, as in "longer/depth 3"."""
    if name in SAMPLE_CLASSES:
        return line["samples"][name] / line["samples"]["count"]
    split, _, kind = name.partition("/")
    if kind:
        right, count = line["accuracy"][split][kind]
        return right / count
    return losses(line)[name]


@dataclass(frozen=True)
class ModelResults:
    """
    The runs of one model: by seed at its learning rate (None while it is not chosen), and by rate those of its sweep
    (None where the model takes the rate of another).
    """

    name: str
    config: SpiralFormerConfig
    learning_rate: float | None
    runs: dict[int, dict]
    sweep: dict[float, dict] | None
    diverged_at_every_rate: bool

    @property
    def diverged_seeds(self) -> list[int]:
        """Seeds at the chosen learning rate that ended without a loss on one of the texts."""
        return [seed for seed, line in self.runs.items() if None in losses(line).values()]

    def figures(self, name: str) -> dict[int, float]:
        """Seed -> loss or share; nothing at all of a model that diverged: a mean over the others would flatter it."""
        return {} if self.diverged_seeds else {seed: figure(line, name) for seed, line in self.runs.items()}

    def mean(self, name: str) -> Mean | None:
        """Mean of a loss or share over the seeds; None where there are none, or one of them diverged."""
        figures = self.figures(name)
        return Mean.of(figures.values()) if figures else None

    def cost(self, field: str) -> float | None:
        """A figure that all runs of the model share, such as its parameters; None before its first run."""
        return next((line[field] for line in self.runs.values()), None)

    @property
    def recurrence_ratio(self) -> float:
        """N_core / (N_pre + N_core + N_post), the share of layers that the loop repeats."""
        config = self.config
        layers = config.num_prelude_layers + config.num_core_layers + config.num_coda_layers
        return config.num_core_layers / layers


@dataclass(frozen=True)
class ExperimentResults:
    """One experiment, and the results of its models in the order of the table."""

    name: str
    title: str
    report: str
    seeds: list[int]
    learning_rates: list[float]
    rate_of: str | None
    references: list[str]
    models: list[ModelResults]

    @classmethod
    def gather(cls, experiment, lines: list[dict]) -> "ExperimentResults":
        """Asks the experiment which of all lines are its own. Raises ValueError on a line that lacks a field."""
        for line in lines:
            check_line(line)
        models = []
        for name in experiment.models:
            sweep = experiment.sweep(name, lines) if experiment.rate_of in (None, name) else None
            rate, runs = experiment.chosen_rate(name, lines), experiment.finished(name, lines)
            no_rate = sweep is not None and len(sweep) == len(experiment.learning_rates) and rate is None
            models.append(ModelResults(name, experiment.model_config(name), rate, runs, sweep, no_rate))
        fields = ("name", "title", "report", "seeds", "learning_rates", "rate_of", "references")
        return cls(**{field: getattr(experiment, field) for field in fields}, models=models)

    @property
    def reference(self) -> str:
        """The first of the models that the others are compared with."""
        return self.references[0]

    @property
    def swept(self) -> list[ModelResults]:
        """The models that have a sweep of their own."""
        return [model for model in self.models if model.sweep is not None]

    @property
    def lines(self) -> list[dict]:
        """Every line behind these results, once."""
        lines = [line for model in self.models for line in model.runs.values()]
        lines += [line for model in self.swept for line in model.sweep.values()]
        return list({line["key"]: line for line in lines}.values())

    @property
    def measured(self) -> list[ModelResults]:
        """The models that have a mean."""
        return [model for model in self.models if model.mean("validation") is not None]

    @property
    def splits(self) -> list[str]:
        """The splits that the answers of a task are counted on; none before the first run."""
        return list(self.lines[0]["accuracy"]) if self.lines else []

    @property
    def classes(self) -> dict[tuple[str, str], list[str]]:
        """Split and word, such as "hops" -> the names of its classes, such as "hops 1", in order."""
        found: dict[tuple[str, str], list[str]] = {}
        for split in self.splits:
            for name in self.lines[0]["accuracy"][split]:
                word, _, value = name.partition(" ")
                if value:
                    found.setdefault((split, word), []).append(name)
        return found

    @property
    def loss(self) -> str:
        """The loss that chooses the learning rates, in words."""
        losses = {"molecules": "nats per token on validation molecules", "task": "nats per token on validation rows"}
        return losses.get(self.report, "bits per byte on validation text")

    def compare(self, name: str, reference: str | None = None) -> Comparison:
        """Paired differences in a loss or share, to the first reference unless another is named."""
        return Comparison.of({model.name: model.figures(name) for model in self.models}, reference or self.reference)
