"""The most memory that prefill, decoding and a training step take, counted from allocations: no clock is needed."""

import json
from dataclasses import asdict, replace
from functools import partial

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from workshop.benchmarks.measuring import Grid, count
from workshop.benchmarks.models import models_of
from workshop.benchmarks.results import MEBIBYTE, GridResults
from workshop.benchmarks.workloads import Decode, Prefill, TrainingStep, peak_bytes, training_peak_bytes, weight_bytes
from workshop.tables import markdown_table

WORKLOADS = ("prefill", "decode", "training")


def prefill_peak(model: PreTrainedModel, length: int) -> int:
    """Weights, the cache that the prompt leaves, and what is in use on the way."""
    prefill = Prefill(model, 1, length)
    prefill()
    return peak_bytes(prefill, model.device, weight_bytes(model))


def decode_peak(model: PreTrainedModel, context: int) -> int:
    """Weights, a filled cache, and what the steps after it take, room for new keys included."""
    decode = Decode(model, 1, context)
    decode()
    return peak_bytes(decode, model.device, weight_bytes(model))


def training_peak(model: PreTrainedModel, length: int) -> int:
    """Weights, gradients, both moments of AdamW and activations."""
    step = TrainingStep(model, 1, length)
    step()
    return training_peak_bytes(step)


def measure_peaks(grid: Grid, device: torch.device) -> dict:
    """Counts and peaks of all models of a grid at its longest text; decoding begins after its context."""
    length = grid.size.longest
    counted = replace(grid, prefill_lengths=(length,), training_lengths=(length,))
    peaks: dict[str, dict[str, int]] = {workload: {} for workload in WORKLOADS}
    counts = {}
    for name, model in tqdm(models_of(grid.family).items(), unit=" models"):
        if model.zero_offsets:  # of which nothing here hangs
            continue
        counts[name] = count(counted, model)
        built = model.build(grid.size, device, getattr(torch, grid.dtype))
        peaks["prefill"][name] = prefill_peak(built, length)
        peaks["decode"][name] = decode_peak(built, grid.context)
        peaks["training"][name] = training_peak(built, length)
    return json.loads(json.dumps({"grid": asdict(grid), "counts": counts, "peaks": peaks}))


def peaks_table(found: dict) -> str:
    """MiB of each workload; prefill and training over a plain stack of equal FLOPs, decoding over the plain one."""
    length, context = found["grid"]["size"]["longest"], found["grid"]["context"]
    by_workload = {
        workload: GridResults({**found, "training_peak_bytes": peaks, "samples": []})
        for workload, peaks in found["peaks"].items()
    }
    plain = by_workload["prefill"].plain
    header = ["model", f"prefill of {length}, MiB", f"over {plain} of equal FLOPs", f"decode after {context}, MiB"]
    header += [f"over {plain}", f"training step of {length}, MiB", f"over {plain} of equal FLOPs"]
    rows = []
    for name in found["counts"]:
        mebibytes = {workload: found["peaks"][workload][name] / MEBIBYTE for workload in WORKLOADS}
        ratio = partial(by_workload["prefill"].peak_ratio, name, length)
        decode = found["peaks"]["decode"][name] / found["peaks"]["decode"][plain]
        training = by_workload["training"].peak_ratio(name, length, "training")
        row = [name, f"{mebibytes['prefill']:.1f}", f"{ratio('prefill'):.3f}", f"{mebibytes['decode']:.1f}"]
        rows.append([*row, f"{decode:.3f}", f"{mebibytes['training']:.1f}", f"{training:.3f}"])
    return markdown_table(header, rows)
