"""What int8 and int4 weights do to the trained models of an experiment, beside one another on the same molecules."""

import math

import numpy as np
from tqdm import tqdm

from workshop.evaluation import load
from workshop.experiments.report import NOTHING
from workshop.experiments.trained import Trained
from workshop.molecules.quantising import PARTS_WAY, Weights, compare_quantised, ratio
from workshop.molecules.rows import make_rows
from workshop.tables import markdown_table


def quantise_all(trained: list[Trained], references: list[str], molecules: list[str], group_size: int) -> list[dict]:
    """
    For each model the figures of `compare_quantised` on the molecules, and what each way costs it more than each of
    the references with the same seed, paired over molecules.
    """
    ways = [Weights(8), Weights(4), Weights(4, group_size)]
    results, gains = [], {}
    with tqdm(total=len(trained), desc="quantising", unit="model") as progress:
        for item in trained:
            model, tokenizer = load(str(item.folder), str(item.folder))
            rows = make_rows(molecules, tokenizer, model.config.max_position_embeddings)
            counts = np.array([len(ids) - 1 for ids in rows["input_ids"]])
            figures, gains[item.model, item.seed] = compare_quantised(model, tokenizer, rows, ways)
            results.append({"model": item.model, "seed": item.seed, "key": item.line["key"], **figures})
            progress.update()
    for found in results:
        own = gains[found["model"], found["seed"]]
        for way, figures in found["ways"].items():
            figures["beside"] = {
                reference: ratio(own[way] - gains[reference, found["seed"]][way], counts)
                for reference in references
                if reference != found["model"] and (reference, found["seed"]) in gains
            }
    return results


def percent(difference: float) -> float:
    """A difference in nats per token as a change of perplexity in percent."""
    return 100 * math.expm1(difference)


def change_cell(figure: dict) -> str:
    """A change of perplexity in percent, and its interval."""
    low, high = map(percent, figure["interval"])
    return f"{percent(figure['value']):+.2f} ({low:+.2f} to {high:+.2f})"


def loss_table(results: list[dict]) -> str:
    """One row a model: shares of its parameters, and nats per token before and after."""
    ways = list(results[0]["ways"])
    header = ["model", "seed", "quantised", f"in {ways[-1].split(', ')[1]}", "nats per token", *ways]
    rows = []
    for found in results:
        figures = [found["ways"][way] for way in ways]
        row = [found["model"], str(found["seed"]), f"{figures[-1]['quantised']:.1%}", f"{figures[-1]['grouped']:.1%}"]
        rows.append([*row, *(f"{figure['nats_per_token']:.4f}" for figure in (found, *figures))])
    return markdown_table(header, rows)


def change_table(results: list[dict], reference: str | None = None) -> str:
    """One row a model: the change of its perplexity, or by how much that is above the change of a reference."""
    ways = list(results[0]["ways"])
    rows = []
    for found in results:
        figures = [found["ways"][way] for way in ways]
        if reference is None:
            changes = [figure["difference"] for figure in figures]
        elif reference in figures[0]["beside"]:
            changes = [figure["beside"][reference] for figure in figures]
        else:
            continue
        rows.append([found["model"], str(found["seed"]), *map(change_cell, changes)])
    named = "perplexity, %" if reference is None else f"perplexity, % beyond `{reference}`"
    return markdown_table([named, "seed", *ways], rows)


def part_table(results: list[dict]) -> str:
    """One row a model: the change of its perplexity where one part of it is quantised and the others are not."""
    parts = list(dict.fromkeys(part for found in results for part in found["parts"]))
    rows = []
    for found in results:
        changes = [change_cell(found["parts"][part]) if part in found["parts"] else NOTHING for part in parts]
        rows.append([found["model"], str(found["seed"]), *changes])
    return markdown_table([f"perplexity, %, {PARTS_WAY.name}, one part", "seed", *parts], rows)


def quantised_report(results: list[dict], references: list[str], described: str, molecules: int) -> str:
    """What was asked, and the tables, as Markdown."""
    parts = [
        f"{described} Loss on {molecules:,} validation molecules, the same for all; changes are paired, with 95% "
        "intervals over draws of molecules, which know nothing of what another seed would have trained. Quantised: "
        "the share of all parameters, every matrix but embeddings and head; these, norms and biases stay in float32. "
        "A row of weights has one scale. With groups each group in it has its own where their size divides the row: "
        "the share of the parameters for which it does stands in the next column. One part: its matrices are "
        "quantised, and those of the others are not.",
        loss_table(results),
        change_table(results),
        part_table(results),
    ]
    for reference in references:
        if any(reference in way["beside"] for found in results for way in found["ways"].values()):
            parts.append(change_table(results, reference))
    return "\n\n".join(parts)
