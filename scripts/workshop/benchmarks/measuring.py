"""What the benchmark measures and in which order: prefill, training step and decode of all models, in turn.

Every sample is one round through all models, so that a slow moment of the machine meets all of them alike. Only ratios
within a run mean anything.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from workshop.benchmarks.models import BenchmarkModel, ModelSize, models_of, plain_name
from workshop.benchmarks.workloads import Decode, Floor, Prefill, TrainingStep, seconds, training_peak_bytes
from workshop.costs import cache_layer_bytes, count_flops, layer_equivalents, step_weight_bytes
from workshop.provenance import load, machine

# Columns of left padding of a ragged batch, repeated where it has more rows: many phases of every level.
PADDING = (0, 3, 7, 12, 17, 22, 30, 41)


def floored_of(family: str) -> tuple[str, ...]:
    """The models whose bare matrix products are timed too."""
    return plain_name(family), "spiralformer-b", "spiralformer-l"


@dataclass(frozen=True)
class DecodeSetting:
    """One decode measurement: rows, models, those whose bare matrix products are timed too, and the kind of batch."""

    batch: int
    models: tuple[str, ...]
    floored: tuple[str, ...] = ()
    ragged: bool = False
    compiled: bool = False


@dataclass(frozen=True)
class Grid:
    """What is measured at one size of models of one family of layers."""

    family: str
    size: ModelSize
    dtype: str
    prefill_lengths: tuple[int, ...]
    training_lengths: tuple[int, ...]
    context: int
    decode: tuple[DecodeSetting, ...]
    compiled_training_lengths: tuple[int, ...] = ()

    @property
    def timed(self) -> list[str]:
        """The models whose prefills and training steps are timed; offsets of 0 change nothing there."""
        if not self.prefill_lengths and not self.training_lengths:
            return []
        return [name for name, model in models_of(self.family).items() if not model.zero_offsets]

    @property
    def contenders(self) -> dict[str, BenchmarkModel]:
        """All models of which anything is measured, by name."""
        used = {*self.timed, *(name for setting in self.decode for name in setting.models)}
        used |= {*floored_of(self.family)} if self.compiled_training_lengths else set()
        return {name: model for name, model in models_of(self.family).items() if name in used}


def read_grid(fields: dict) -> Grid:
    """A grid, from the fields that JSON holds of it."""
    decode = [
        DecodeSetting(**{name: tuple(v) if isinstance(v, list) else v for name, v in one.items()})
        for one in fields["decode"]
    ]
    lengths = {name: tuple(value) for name, value in fields.items() if name.endswith("_lengths")}
    return Grid(**{**fields, **lengths, "size": ModelSize(**fields["size"]), "decode": tuple(decode)})


def small_grids(family: str) -> tuple[Grid, ...]:
    """What a CPU measures of a family of layers in under half an hour."""
    every, floored = tuple(models_of(family)), floored_of(family)
    return (
        Grid(
            family=family,
            size=ModelSize(width=512, layers=12, vocabulary=4096, longest=2048),
            dtype="float32",
            prefill_lengths=(512, 1024, 2048),
            training_lengths=(512, 2048),
            context=512,
            decode=(
                DecodeSetting(1, every, floored),
                DecodeSetting(8, every, floored),
                DecodeSetting(8, floored, floored, ragged=True),
            ),
        ),
        Grid(
            family=family,
            size=ModelSize(width=1024, layers=12, vocabulary=4096, longest=2048),
            dtype="float32",
            prefill_lengths=(),
            training_lengths=(),
            context=512,
            decode=(DecodeSetting(1, floored, floored), DecodeSetting(8, floored, floored, ragged=True)),
        ),
    )


def full_grids(family: str) -> tuple[Grid, ...]:
    """What an accelerator measures in a few minutes."""
    every, floored = tuple(models_of(family)), floored_of(family)
    return tuple(
        Grid(
            family=family,
            size=ModelSize(width=width, layers=layers, vocabulary=50304, longest=4096),
            dtype="bfloat16",
            prefill_lengths=(512, 4096),
            training_lengths=(512, 4096),
            context=512,
            decode=(
                DecodeSetting(1, every, floored),
                *(DecodeSetting(batch, floored, floored) for batch in (8, 32)),
                DecodeSetting(8, floored, floored, ragged=True),
            ),
        )
        for width, layers in ((768, 12), (1024, 24))
    )


def with_compiled(grids: tuple[Grid, ...]) -> tuple[Grid, ...]:
    """The same with compiled decoding too, and compiled training at the smallest length: minutes for each cell."""

    def settings(grid: Grid) -> list[DecodeSetting]:
        floored = floored_of(grid.family)
        models = (*floored, "small cache {1/8,1/4,1/2}")
        kinds = ((1, False), (8, False), (8, True))
        return [DecodeSetting(batch, models, floored, ragged, compiled=True) for batch, ragged in kinds]

    return tuple(
        replace(grid, decode=(*grid.decode, *settings(grid)), compiled_training_lengths=grid.training_lengths[:1])
        for grid in grids
    )


def compiled_decoding_alone(grids: tuple[Grid, ...]) -> tuple[Grid, ...]:
    """Compiled decoding, and nothing else: every kind of batch at the smaller width, one row at the wider."""
    first, *wider = with_compiled(grids)

    def alone(grid: Grid, batches: tuple[int, ...]) -> Grid:
        decode = tuple(setting for setting in grid.decode if setting.compiled and setting.batch in batches)
        return replace(grid, prefill_lengths=(), training_lengths=(), compiled_training_lengths=(), decode=decode)

    return alone(first, (1, 8)), *(alone(grid, (1,)) for grid in wider)


def compiled_training_alone(grids: tuple[Grid, ...]) -> tuple[Grid, ...]:
    """Compiled training of the smaller width beside the same steps as they stand, and nothing else."""
    grid = with_compiled(grids)[0]
    return (replace(grid, prefill_lengths=(), training_lengths=grid.compiled_training_lengths, decode=()),)


# What a run may be restricted to.
ALONE = {"compiled_decoding": compiled_decoding_alone, "compiled_training": compiled_training_alone}


@dataclass
class Cell:
    """One thing to time again and again, and what it took: `work` gives seconds, or those of every decode step."""

    key: dict
    work: object
    samples: list = field(default_factory=list)

    def run(self, device: torch.device) -> None:
        """One sample."""
        timed_inside = isinstance(self.work, (Decode, Floor))
        self.samples.append(self.work() if timed_inside else seconds(self.work, device))

    def sampled(self) -> dict:
        """What it is and what it took so far, as the results hold it."""
        return {**self.key, "seconds": list(self.samples), "compiling": getattr(self.work, "compiling", None)}


def make_cells(grid: Grid, models: dict[str, PreTrainedModel]) -> list[Cell]:
    """Everything that the grid measures, models side by side within each measurement."""
    cells = []
    for workload, lengths in ((Prefill, grid.prefill_lengths), (TrainingStep, grid.training_lengths)):
        label = "prefill" if workload is Prefill else "training"
        cells += [
            Cell({"workload": label, "model": name, "length": length}, workload(models[name], 1, length))
            for length in lengths
            for name in grid.timed
        ]
    cells += [
        Cell(
            {"workload": "compiled training", "model": name, "length": length},
            TrainingStep(models[name], 1, length, compiled=True),
        )
        for length in grid.compiled_training_lengths
        for name in floored_of(grid.family)
    ]
    for setting in grid.decode:
        padding = [PADDING[row % len(PADDING)] for row in range(setting.batch)] if setting.ragged else None
        for name in setting.models:
            key = {"model": name, "batch": setting.batch, "ragged": setting.ragged, "compiled": setting.compiled}
            decode = Decode(models[name], setting.batch, grid.context, padding, setting.compiled)
            cells.append(Cell({"workload": "decode", **key}, decode))
            if name in setting.floored:
                floor = Floor(models[name], setting.batch, grid.context, padding)
                cells.append(Cell({"workload": "bare products", **key}, floor))
    return cells


def count(grid: Grid, model: BenchmarkModel) -> dict:
    """What needs no clock, on the meta device: FLOPs, and bytes of weights and cache that decoding touches."""
    meta = model.build(grid.size, torch.device("meta"), getattr(torch, grid.dtype))
    lengths = sorted({*grid.prefill_lengths, *grid.training_lengths, *grid.compiled_training_lengths})
    # Attention is switched to eager by the count of FLOPs: it comes last.
    counts = {
        "layer_equivalents": layer_equivalents(meta.config),
        "parameters": sum(parameter.numel() for parameter in meta.parameters()),
        "step_weight_bytes": step_weight_bytes(meta, grid.context),
        "cache_bytes": {length: sum(cache_layer_bytes(meta, length)) for length in (grid.context, grid.size.longest)},
    }
    return counts | {"flops": {length: count_flops(meta, length) for length in lengths}}


def measure_grid(grid: Grid, device: torch.device, repeats: int) -> Iterator[dict]:
    """All samples of one size of models after each round, and with the peaks of memory in the end."""
    dtype = getattr(torch, grid.dtype)
    models = {name: model.build(grid.size, device, dtype) for name, model in grid.contenders.items()}
    cells = make_cells(grid, models)
    compiles = [setting.compiled for setting in grid.decode] + [bool(grid.compiled_training_lengths)]
    if any(compiles):  # what torch does once in a process is nobody's
        torch.compile(torch.neg)(torch.ones(3, device=device))
    for cell in tqdm(cells, desc=f"warming up, width {grid.size.width}"):
        cell.run(device)
        cell.samples.clear()
    found = {"grid": asdict(grid), "training_peak_bytes": {}}
    with tqdm(total=repeats * len(cells), desc=f"timing, width {grid.size.width}") as progress:
        for _ in range(repeats):
            for cell in cells:
                cell.run(device)
                progress.update()
            yield found | {"samples": [cell.sampled() for cell in cells]}
    longest = max(grid.training_lengths, default=0)
    steps = [cell for cell in cells if cell.key["workload"] == "training" and cell.key["length"] == longest]
    peaks = {cell.key["model"]: training_peak_bytes(cell.work) for cell in tqdm(steps, desc="peak memory")}
    yield found | {"training_peak_bytes": peaks, "samples": [cell.sampled() for cell in cells]}


def measure(
    grids: tuple[Grid, ...],
    device: torch.device,
    repeats: int,
    threads: int | None = None,
    save: Callable[[dict], object] | None = None,
) -> dict:
    """
    Samples of all grids, with the machine and its load before and after; one CPU thread a core.

    Args:
        save: called after each round with what there is: an accelerator may be lent for minutes.
    """
    torch.set_num_threads(threads or os.cpu_count())
    torch.manual_seed(0)
    started, finished = time.time(), []
    results = {"machine": machine(device), "repeats": repeats}
    for grid in grids:
        for found in measure_grid(grid, device, repeats):
            results |= {"grids": [*finished, found], "load_at_end": load(), "minutes": (time.time() - started) / 60}
            if save is not None:
                save(results)
        finished = results["grids"]
    return results


def with_counts(results: dict) -> dict:
    """The results, as JSON holds them, with the counts of all models: they are made last, also of a run cut short."""
    results = json.loads(json.dumps(results))
    for found in results["grids"]:
        if "counts" not in found:
            grid = read_grid(found["grid"])
            models = tqdm(grid.contenders.items(), desc=f"counting, width {grid.size.width}")
            found["counts"] = json.loads(json.dumps({name: count(grid, model) for name, model in models}))
    return results
