"""Probes of all looped models of an experiment on molecules: those of a model's seeds are one table's row."""

from pathlib import Path

import numpy as np
import torch

from workshop.evaluation import load
from workshop.experiments.trained import Trained
from workshop.molecules.rows import read_molecules
from workshop.probes.measures import METRICS, choose_molecules, collect, dynamic_heads
from workshop.probes.pictures import change_table, metric_table, router_table, update_table


def probe_all(trained: list[Trained], path: Path, sequences: int, length: int, local_tokens: int) -> list[dict]:
    """
    What `collect` finds of every model, on the first molecules of `length` tokens in a file; without the samples.

    Raises ValueError for models that have not two iterations to compare.
    """
    molecules, results = read_molecules("data_dir", path), []
    for item in trained:
        model, tokenizer = load(str(item.folder), str(item.folder))
        ids = choose_molecules(molecules, tokenizer, sequences, length)
        found = collect(model, ids, batch_size=sequences, local_tokens=local_tokens)
        for metric in found["metrics"].values():
            del metric["samples"]
        results.append({"model": item.model, "seed": item.seed, "key": item.line["key"], **found})
    return results


def mean_over(seeds: list) -> list:
    """The mean of nested lists of numbers that have one shape, or are ragged alike."""
    if isinstance(seeds[0], list):
        return [mean_over(list(parts)) for parts in zip(*seeds, strict=True)]
    return float(np.mean(seeds))


def join_seeds(results: list[dict]) -> dict[str, dict]:
    """
    Model -> what `collect` gives of one, for all its seeds together: their heads beside one another, as if each seed
    were a layer more, and the means of updates and routers.
    """
    by_model: dict[str, list[dict]] = {}
    for found in results:
        by_model.setdefault(found["model"], []).append(found)
    joined = {}
    for name, seeds in by_model.items():
        metrics = {}
        for metric in METRICS:
            values = np.concatenate([found["metrics"][metric]["values"] for found in seeds], axis=1)
            uniform = seeds[0]["metrics"][metric]["uniform"]
            dynamic = dynamic_heads(torch.tensor(values))
            metrics[metric] = {"values": values.tolist(), "uniform": uniform, "dynamic_heads": dynamic}
        updates = {block: mean_over([found["updates"][block] for found in seeds]) for block in seeds[0]["updates"]}
        routers = seeds[0]["routers"]
        if routers is not None:
            parts = [part for part in routers if part != "sources"]
            routers = {part: mean_over([found["routers"][part] for found in seeds]) for part in parts} | {
                "sources": routers["sources"]
            }
        joined[name] = seeds[0] | {"metrics": metrics, "updates": updates, "routers": routers}
    return joined


def probes_report(results: list[dict], described: str, sequences: int, length: int, local_tokens: int) -> str:
    """What was asked, and the tables, as Markdown."""
    models = join_seeds(results)
    parts = [
        f"{described} {sequences} validation molecules of {length} tokens; local: the last {local_tokens} tokens. "
        "Medians are over the heads of all seeds, each the mean over molecules; the dynamic heads of each metric are "
        "its own.",
        metric_table(models),
        "From the first iteration to the last, head by head:",
        change_table(models),
        "||out - in|| / ||in||, the mean over tokens, molecules and seeds:",
        update_table(models),
    ]
    if any(probed["routers"] is not None for probed in models.values()):
        parts.append("What MeSH reads in each cycle, and entropies of its routers, means over tokens and seeds:")
        parts.append(router_table(models))
    return "\n\n".join(parts)
