"""Tables and a picture of what the benchmark measured.

Ratios are made within each round, of things timed one after the other; a figure is their median, with the first and
third quartile in brackets.
"""

import statistics
from dataclasses import dataclass

import numpy as np
import torch

from workshop.benchmarks.models import ModelSize, deeper_name, models_of, plain_name
from workshop.costs import DECODE_STEPS, promised_bytes
from workshop.plotting import new_figure, save
from workshop.tables import markdown_table

MEBIBYTE = 2**20
WORKLOADS = ("prefill", "training", "compiled training")  # those of whole texts
B, ANCHOR, L = "spiralformer-b", "spiralformer-b, anchor", "spiralformer-l"


@dataclass(frozen=True)
class Ratio:
    """The median of ratios made round by round, and their quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, above: list[float], below: list[float], factor: float = 1.0) -> "Ratio":
        """The ratios `above / below / factor`, round by round."""
        ratios = [a / b / factor for a, b in zip(above, below, strict=True)]
        low, median, high = np.percentile(ratios, (25, 50, 75))
        return cls(float(median), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}-{self.high:.3f})"


class GridResults:
    """What was measured at one size of models, looked up by workload and model."""

    def __init__(self, results: dict):
        self.grid, self.counts, self.peaks = results["grid"], results["counts"], results["training_peak_bytes"]
        self.width = self.grid["size"]["width"]
        self.family = self.grid["family"]
        self.plain, self.deeper = plain_name(self.family), deeper_name(self.family)
        self.samples = results["samples"]

    def lengths(self, workload: str) -> list[int]:
        """Those of the texts of a workload. Runs before compiled training was measured say nothing of it."""
        return self.grid.get(f"{workload.replace(' ', '_')}_lengths", [])

    def cell(self, workload: str, model: str, **key) -> dict:
        """What is known of one cell. Raises KeyError where it was not measured."""
        wanted = {"workload": workload, "model": model, **key}
        for sample in self.samples:
            if all(sample.get(name) == value for name, value in wanted.items()):
                return sample
        raise KeyError(wanted)

    def find(self, workload: str, model: str, **key) -> list:
        """The samples of one cell. Raises KeyError where it was not measured."""
        return self.cell(workload, model, **key)["seconds"]

    def compiling(self, model: str, workload: str = "decode", **key) -> dict[str, float]:
        """Seconds of the call that compiled, of decoding also of its round, and graphs."""
        return self.cell(workload, model, **key)["compiling"]

    def has(self, workload: str, model: str, **key) -> bool:
        """Whether that cell was measured."""
        try:
            return bool(self.find(workload, model, **key))
        except KeyError:
            return False

    def models(self, workload: str, **key) -> list[str]:
        """The models of which that workload was measured, in order."""
        return [name for name in self.counts if self.has(workload, name, **key)]

    def round_means(self, workload: str, model: str, **key) -> list[float]:
        """Mean seconds of a step in each round: each round holds whole periods of the levels."""
        return [statistics.fmean(steps) for steps in self.find(workload, model, **key)]

    def flops(self, model: str, length: int, kind: str) -> int:
        """Counted FLOPs, compiled or not; JSON has made text of the lengths."""
        return self.counts[model]["flops"][str(length)][kind.removeprefix("compiled ")]

    def time_over_flops(self, workload: str, model: str, length: int, causal: bool = False) -> Ratio:
        """Time ratio over FLOPs ratio, both against the plain stack of the same width and layers."""
        kind = f"{workload} causal" if causal else workload
        factor = self.flops(model, length, kind) / self.flops(self.plain, length, kind)
        times = [self.find(workload, name, length=length) for name in (model, self.plain)]
        return Ratio.of(*times, factor=factor)

    def decode_quotient(self, model: str, **key) -> Ratio:
        """Time of a decode step over the plain stack's, over the ratio of layer-equivalents."""
        factor = self.counts[model]["layer_equivalents"] / self.counts[self.plain]["layer_equivalents"]
        return Ratio.of(*(self.round_means("decode", name, **key) for name in (model, self.plain)), factor=factor)

    def floor_speed(self, model: str, **key) -> Ratio:
        """Speed of decoding as a share of that of the bare matrix products."""
        products = self.round_means("bare products", model, **key)
        return Ratio.of(products, self.round_means("decode", model, **key))

    def percentiles(self, model: str, **key) -> np.ndarray:
        """p50, p95, p99 and the worst of all decode steps, in milliseconds."""
        steps = np.concatenate([np.array(round_) for round_ in self.find("decode", model, **key)])
        return np.percentile(steps, (50, 95, 99, 100)) * 1e3

    def peak_ratio(self, model: str, length: int, kind: str = "training") -> float:
        """Peak memory of a training step over a plain stack's of equal FLOPs, between and beyond its two depths."""
        flops = [self.flops(name, length, kind) for name in (self.plain, self.deeper, model)]
        share = (flops[2] - flops[0]) / (flops[1] - flops[0])
        return self.peaks[model] / (
            self.peaks[self.plain] + share * (self.peaks[self.deeper] - self.peaks[self.plain])
        )


def length_table(results: GridResults, workload: str, lengths: list[int]) -> str:
    """Time over FLOPs of prefill or training at every length, and its growth."""
    header = ["model", *(f"FLOPs ratio, {n}" for n in lengths), *(f"time/FLOPs, {n}" for n in lengths)]
    header += [f"causal FLOPs, {lengths[-1]}", f"growth {lengths[0]} to {lengths[-1]}"]
    rows = []
    for model in results.models(workload, length=lengths[0]):
        quotients = [results.time_over_flops(workload, model, n) for n in lengths]
        ratios = [results.flops(model, n, workload) / results.flops(results.plain, n, workload) for n in lengths]
        causal = results.time_over_flops(workload, model, lengths[-1], causal=True)
        growth = f"{quotients[-1].median / quotients[0].median:.3f}"
        rows.append([model, *(f"{ratio:.3f}" for ratio in ratios), *map(str, quotients), str(causal), growth])
    return markdown_table(header, rows)


def decode_table(results: GridResults, **key) -> str:
    """Latencies of decode steps, and their mean over the plain stack's and the layer-equivalents."""
    header = ["model", "layer-equivalents", "p50 ms", "p95", "p99", "worst", "p95/p50", f"over {results.plain}'s"]
    header += ["time/layer-equivalents"]
    plain = results.percentiles(results.plain, **key)
    rows = []
    for model in results.models("decode", **key):
        found = results.percentiles(model, **key)
        row = [model, f"{results.counts[model]['layer_equivalents']:.2f}", *(f"{value:.1f}" for value in found)]
        row += [f"{found[1] / found[0]:.2f}", f"{found[1] / found[0] / (plain[1] / plain[0]):.2f}"]
        rows.append([*row, str(results.decode_quotient(model, **key))])
    return markdown_table(header, rows)


def compile_table(results: GridResults, **key) -> str:
    """
    What compiling costs: graphs, time to the first token and to the last of its round, since a level is compiled where
    it first fills, and tokens until it has paid where eager was timed.
    """
    header = ["model", "graphs", "s to the first token", f"over {results.plain}'s"]
    header += [f"s to token {DECODE_STEPS}", f"over {results.plain}'s", "tokens until it pays"]
    rows, plain = [], results.compiling(results.plain, **key)
    for model in results.models("decode", **key):
        found, pays = results.compiling(model, **key), "-"
        if results.has("decode", model, **{**key, "compiled": False}):
            eager, compiled = (
                statistics.median(results.round_means("decode", model, **{**key, "compiled": kind}))
                for kind in (False, True)
            )
            pays = f"{found['all'] / (eager - compiled):.0f}" if eager > compiled else "never"
        taken = []
        for kind in ("first", "all"):
            taken += [f"{found[kind]:.1f}", f"{found[kind] / plain[kind]:.2f}"]
        rows.append([model, str(int(found["graphs"])), *taken, pays])
    return markdown_table(header, rows)


def compiled_training_table(results: GridResults, length: int) -> str:
    """What compiling a training step costs: graphs, and seconds to the end of the first step."""
    header = ["model", "graphs", "s to the end of the first step", f"over {results.plain}'s"]
    plain, rows = results.compiling(results.plain, "compiled training", length=length), []
    for model in results.models("compiled training", length=length):
        found = results.compiling(model, "compiled training", length=length)
        rows.append([model, str(found["graphs"]), f"{found['first']:.1f}", f"{found['first'] / plain['first']:.2f}"])
    return markdown_table(header, rows)


def floor_table(results: GridResults) -> str:
    """Decoding beside its bare matrix products, and ragged batches beside uniform ones."""
    header = ["model", "width", "batch", "ragged", "share of the bare products' speed", "time over the uniform batch"]
    rows = []
    for setting in results.grid["decode"]:
        key = {name: setting[name] for name in ("batch", "ragged", "compiled")}
        for model in setting["floored"]:
            over = "-"
            uniform = {**key, "ragged": False}
            if setting["ragged"] and results.has("decode", model, **uniform):
                times = [results.round_means("decode", model, **which) for which in (key, uniform)]
                over = str(Ratio.of(*times))
            row = [model, str(results.width), str(key["batch"]), "yes" if key["ragged"] else "no"]
            rows.append([*row, str(results.floor_speed(model, **key)), over])
    return markdown_table(header, rows)


def memory_table(results: GridResults) -> str:
    """Counted bytes: weights of a decode step, cache, peak of a training step."""
    context, longest = results.grid["context"], results.grid["size"]["longest"]
    header = ["model", "M parameters", "MiB of weights a step", f"KiB of cache a token, {context}", f"{longest}"]
    header += ["over the formula"]
    header += ["MiB at the peak of a training step", f"over {results.plain} of equal FLOPs", "of equal causal FLOPs"]
    itemsize, rows = getattr(torch, results.grid["dtype"]).itemsize, []
    models = models_of(results.family)
    for model, counts in results.counts.items():
        cache = [counts["cache_bytes"][str(length)] / length / 1024 for length in (context, longest)]
        row = [model, f"{counts['parameters'] / 1e6:.1f}", f"{counts['step_weight_bytes'] / MEBIBYTE:.0f}"]
        row += [f"{value:.1f}" for value in cache]
        formula = promised_bytes(models[model].config(ModelSize(**results.grid["size"])), itemsize)
        row.append(f"{cache[1] * 1024 / formula:.4f}")
        if model in results.peaks:
            length = max(results.grid["training_lengths"])
            row += [f"{results.peaks[model] / MEBIBYTE:.0f}", f"{results.peak_ratio(model, length):.3f}"]
            row.append(f"{results.peak_ratio(model, length, 'training causal'):.3f}")
        else:
            row += ["-", "-", "-"]
        rows.append(row)
    return markdown_table(header, rows)


def mesh_over_anchor(results: GridResults) -> Ratio:
    """Time of a training step with MeSH over that with the anchor topology, at the longest text."""
    length = max(results.grid["training_lengths"])
    return Ratio.of(*(results.find("training", name, length=length) for name in (B, ANCHOR)))


def report(results: dict) -> str:
    """All tables of a run, as Markdown."""
    machine = results["machine"]
    parts = [
        f"{machine['device']}, {machine['cores']} cores, {machine['threads']} threads, load {machine['load'][0]:.1f} "
        f"before and {results['load_at_end'][0]:.1f} after; Python {machine['python']}, torch {machine['torch']}, "
        f"transformers {machine['transformers']}; commit {machine['commit'][:7]}, {machine['date']}; "
        f"{results['repeats']} rounds, {results['minutes']:.0f} minutes."
    ]
    for grid in map(GridResults, results["grids"]):
        parts.append(f"### Width {grid.width}, {grid.grid['dtype']}")
        for workload in WORKLOADS:
            if lengths := grid.lengths(workload):
                parts += [
                    f"{workload.capitalize()}, batch 1, against `{grid.plain}`:",
                    length_table(grid, workload, lengths),
                ]
        for length in grid.lengths("compiled training"):
            parts += ["Compiling them:", compiled_training_table(grid, length)]
        if grid.grid["training_lengths"]:
            parts.append(f"MeSH over anchor, training step: {mesh_over_anchor(grid)}.")
        for setting in grid.grid["decode"]:
            key = {name: setting[name] for name in ("batch", "ragged", "compiled")}
            kind = ", ".join(name for name in ("ragged", "compiled") if setting[name])
            title = f"Decode, batch {setting['batch']}{', ' + kind if kind else ''}, {grid.grid['context']} tokens"
            parts += [title + " in the cache:", decode_table(grid, **key)]
            if setting["compiled"]:
                parts += ["Compiling them:", compile_table(grid, **key)]
        if any(setting["floored"] for setting in grid.grid["decode"]):
            parts += ["Decode beside the bare matrix products:", floor_table(grid)]
        parts += ["Counted:", memory_table(grid)]
    return "\n\n".join(parts)


def draw(results: dict, path: str) -> None:
    """Time over counted cost of every model and workload: 1 is what the counts promise, with quartiles."""
    grid = GridResults(results["grids"][0])
    bars = []
    for workload in WORKLOADS:
        for length in grid.lengths(workload)[-1:]:
            models = [name for name in grid.models(workload, length=length) if name != grid.plain]
            bars.append(
                (f"{workload}, {length} tokens", {m: grid.time_over_flops(workload, m, length) for m in models})
            )
    for batch in sorted({setting["batch"] for setting in grid.grid["decode"]}):
        compiled = all(setting["compiled"] for setting in grid.grid["decode"])
        key = {"batch": batch, "ragged": False, "compiled": compiled}
        if models := [name for name in grid.models("decode", **key) if name != grid.plain]:
            bars.append((f"decode, batch {batch}", {m: grid.decode_quotient(m, **key) for m in models}))
    figure, [panels] = new_figure(3.2 * len(bars), 4.2, len(bars), sharey=True)
    order = [name for name in grid.counts if name != grid.plain]
    for axes, (title, ratios) in zip(panels, bars, strict=True):
        for name, ratio in ratios.items():
            row = order.index(name)
            axes.plot([ratio.low, ratio.high], [row, row], color="tab:blue", linewidth=5, alpha=0.35)
            axes.plot(ratio.median, row, "o", color="tab:blue")
        axes.axvline(1.0, color="black", linewidth=1)
        axes.axvline(1.05, color="tab:red", linewidth=1, linestyle="--")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("time ratio / cost ratio")
    panels[0].set_yticks(range(len(order)), order, fontsize=9)
    panels[0].invert_yaxis()
    figure.suptitle(
        f"Against {grid.plain} of the same width ({grid.width}): left of 1 is faster than its count", fontsize=11
    )
    save(figure, path)
