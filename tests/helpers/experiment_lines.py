"""Made-up experiments and lines of finished runs, for the tests of the reports."""

import math
from dataclasses import dataclass, field

from support import small_config

from modeling_spiralformer import SpiralFormerConfig
from workshop.experiments.store import losses

SPIRAL_B, SPIRAL_L, LOOPED = [8, 4, 2, 1], [16, 8, 4, 2], [1, 1]
PLAIN = {"num_prelude_layers": 12, "num_core_layers": 0, "num_coda_layers": 0, "chunk_sizes": [], "topology": "anchor"}


def looped(prelude: int, core: int, chunk_sizes: list[int], **options) -> dict:
    """Fields of a looped model with as many layers behind the loop as before it."""
    layers = {"num_prelude_layers": prelude, "num_core_layers": core, "num_coda_layers": prelude}
    return {**layers, "chunk_sizes": chunk_sizes, "topology": "mesh", **options}


MAIN = {
    "gpt-neox": PLAIN,
    "gpt-neox-mesh": looped(2, 4, LOOPED, share_core=False),
    "looped-anchor": looped(2, 4, LOOPED, topology="anchor"),
    "looped-mesh": looped(2, 4, LOOPED),
    "spiralformer-b": looped(2, 4, SPIRAL_B),
    "spiralformer-l": looped(4, 4, SPIRAL_L),
}
ABLATIONS = {
    "published": looped(2, 4, SPIRAL_B),
    "anchor": looped(2, 4, SPIRAL_B, topology="anchor"),
    "fine-to-coarse": looped(2, 4, SPIRAL_B[::-1]),
    "no-overlap": looped(2, 4, SPIRAL_B, causal_shifts=SPIRAL_B),
    "zero-offsets": looped(2, 4, SPIRAL_B, chunk_offsets=[0] * 4),
    "mean-pooling": looped(2, 4, SPIRAL_B, down_scaling="mean"),
    "broadcast": looped(2, 4, SPIRAL_B, up_scaling="broadcast"),
    "neither-learned": looped(2, 4, SPIRAL_B, down_scaling="mean", up_scaling="broadcast"),
}
RATIOS = {"ratio-0": PLAIN, **{f"ratio-{core}": looped(6 - core // 2, core, SPIRAL_B) for core in (2, 4, 6, 8)}}


@dataclass
class MadeUpExperiment:
    """What the reports ask of an experiment; its runs are found by name, and each sweep chooses its lowest loss."""

    name: str
    report: str
    models: dict[str, dict]
    references: list[str]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    learning_rates: list[float] = field(default_factory=lambda: [0.002, 0.004, 0.008])
    rate_of: str | None = None

    @property
    def title(self) -> str:
        return f"Made-up {self.name}"

    def model_config(self, name: str) -> SpiralFormerConfig:
        return small_config(**self.models[name])

    def _runs(self, name: str, lines: list[dict]) -> dict[tuple[int, float], dict]:
        return {
            (e["seed"], e["learning_rate"]): e for e in lines if (e["experiment"], e["model"]) == (self.name, name)
        }

    def sweep(self, name: str, lines: list[dict]) -> dict[float, dict]:
        found = self._runs(self.rate_of or name, lines)
        return {rate: found[0, rate] for rate in self.learning_rates if (0, rate) in found}

    def chosen_rate(self, name: str, lines: list[dict]) -> float | None:
        found = {rate: losses(line)["validation"] for rate, line in self.sweep(name, lines).items()}
        found = {rate: math.inf if loss is None else loss for rate, loss in found.items()}
        if len(found) < len(self.learning_rates) or min(found.values()) == math.inf:
            return None
        return min(found, key=found.get)

    def finished(self, name: str, lines: list[dict]) -> dict[int, dict]:
        rate, found = self.chosen_rate(name, lines), self._runs(name, lines)
        return {seed: found[seed, rate] for seed in self.seeds if (seed, rate) in found}


def make_line(experiment: str, model: str, seed: int, rate: float, bits: float | None, **changes) -> dict:
    """A line of the store; bits per byte on foreign text are 0.4 above those on validation text."""
    tokens, points = 2**21, 16
    end = 3.0 if bits is None else bits
    curve = [
        [tokens * i // points, end + 4.0 * (1 - i / points) ** 2 / (1 + 3 * i / points)] for i in range(points + 1)
    ]
    line = {
        "key": f"{experiment} {model} {seed} {rate}",
        "experiment": experiment,
        "model": model,
        "seed": seed,
        "learning_rate": rate,
        "settings": {},
        "text": {name: {"file": f"{name}.txt", "sha256": name * 4} for name in ("train", "validation", "foreign")},
        "tokens": tokens,
        "steps": 1024,
        "flops": 1.9e12,
        "prefill_flops_per_token": 700000.0,
        "parameters": 233000,
        "non_embedding_parameters": 200064,
        "kv_bytes_per_token": 2944.0,
        "decode_layer_equivalents": 5.75,
        "wall_seconds": 180.0,
        "resumed_from_step": 0,
        "commit": "abcdef0123456789",
        "date": "2026-11-24",
        "machine": {
            **{"device": "x86_64", "cores": 2, "threads": 1, "workers": 2},
            **{"torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.7"},
        },
        "training_curve": [],
        "validation_curve": curve,
        "bits_per_byte": {"validation": bits, "foreign": None if bits is None else bits + 0.4},
    }
    return {**line, **changes}


def make_lines(experiment: MadeUpExperiment, bits: dict[str, list[float | None]], rate: float = 0.004, **changes):
    """
    All lines of an experiment whose models end at the given bits per byte, a value per seed, at the given rate; the
    other rates of the sweep end 0.1 above.
    """
    lines = []
    for name, values in bits.items():
        for seed, value in zip(experiment.seeds, values, strict=False):
            lines.append(make_line(experiment.name, name, seed, rate, value, **changes))
        if experiment.rate_of in (None, name):
            others = [other for other in experiment.learning_rates if other != rate]
            first = 3.0 if values[0] is None else values[0] + 0.1
            lines += [make_line(experiment.name, name, 0, other, first, **changes) for other in others]
    return lines


def make_molecule_line(model: str, seed: int, rate: float, nats: float | None, valid: int) -> dict:
    """A line of molecules; of 1000 samples 40 have bracket errors, 10 are other, ring and valence share the rest."""
    line = make_line(
        "molecules", model, seed, rate, nats, settings={"smiles": {}}, nats_per_token={"validation": nats}
    )
    del line["bits_per_byte"], line["text"]["foreign"]
    rest = 1000 - valid - 50
    samples = {"valid": valid, "bracket": 40, "ring": rest // 2, "valence": rest - rest // 2, "other": 10}
    return line | {
        "samples": {"count": 1000, **samples, "valid_interval": [0.0, 1.0], "unique": valid - 1, "rdkit": "2026.09.1"}
    }


def make_task_line(model: str, seed: int, rate: float, nats: float | None, shallow: int, deep: int) -> dict:
    """A line of a task: right answers of 500 at depth 1 and of 500 at depth 10; half as many in "longer"."""
    line = make_line("dyck", model, seed, rate, nats, settings={"task": {}}, nats_per_token={"validation": nats})
    del line["bits_per_byte"]
    splits = ("train", "validation", "longer")
    line["text"] = {name: {"file": f"Made-up, {name}", "sha256": name * 4} for name in splits}
    line["accuracy"] = {
        split: {"all": [right(shallow + deep), 1000], "depth 1": [right(shallow), 500], "depth 10": [right(deep), 500]}
        for split, right in (("validation", int), ("longer", lambda count: count // 2))
    }
    return line
