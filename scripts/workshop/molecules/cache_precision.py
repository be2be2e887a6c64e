"""
What int8 and int4 keys and values do to models of molecules, level by level: loss on the same molecules, and bytes.

Molecules are read in one call through a quantised cache: its logits are those of decoding token by token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from modeling_spiralformer import SpiralFormerQuantizedCache
from modeling_spiralformer.precision_spiralformer import FULL, entry_sizes
from workshop.costs import cache_layer_bytes, meta_model
from workshop.evaluation import load_by_name
from workshop.experiments.quantised import change_cell
from workshop.molecules.quantising import ratio
from workshop.molecules.rows import make_rows
from workshop.padded_rows import losses_of_rows
from workshop.tables import format_resolution, markdown_table

ALL = "all"
# Tokens in the cache whose bytes are counted: a multiple of every published chunk size.
COUNTED_TOKENS = 2048


@dataclass(frozen=True)
class Way:
    """How keys and values are kept: their bits, and channels that share a scale; None: all of a head.

    Args:
        finest: other bits for the finest of several levels that are quantised together.
    """

    bits: int
    group_size: int | None = None
    finest: int | None = None

    @property
    def name(self) -> str:
        """Bits and group in words."""
        finest = "" if self.finest is None else f", the finest level int{self.finest}"
        return f"int{self.bits}, {'heads' if self.group_size is None else f'groups of {self.group_size}'}{finest}"

    def options(self, sizes: list[int]) -> dict | None:
        """Arguments of the cache that keeps the levels of these chunk sizes so, and the others as they are.

        None for a mixture of one level.
        """
        bits = dict.fromkeys(sizes, self.bits)
        if self.finest is not None:
            bits[min(sizes)] = self.finest
        return (
            None if self.finest is not None and len(sizes) == 1 else {"nbits": bits, "q_group_size": self.group_size}
        )


def ways_of(group_size: int) -> list[Way]:
    """Those that are compared: int8, int4 with a scale a head and with a scale a group, and int4 but for level 1."""
    return [Way(8), Way(4), Way(4, group_size), Way(4, finest=8)]


def levels_of(model: PreTrainedModel) -> dict[str, list[int]]:
    """What is quantised in turn: each chunk size by itself, where there are several, and all."""
    sizes = sorted(set(entry_sizes(model.config)), reverse=True)
    each = {format_resolution(size): [size] for size in sizes} if len(sizes) > 1 else {}
    return each | {ALL: sizes}


def cases(ways: list[Way], sizes: list[int]) -> list[tuple[Way, dict]]:
    """The ways that there are to keep the levels of these chunk sizes, with the arguments of the cache."""
    asked = [(way, way.options(sizes)) for way in ways]
    return [(way, options) for way, options in asked if options is not None]


def bytes_per_token(model: PreTrainedModel, options: dict) -> float:
    """Of a bfloat16 model's cache, states of the resolutions included, per token and row."""
    shapes = meta_model(model.config).to(torch.bfloat16)
    cache = SpiralFormerQuantizedCache(model.config, **options)
    return sum(cache_layer_bytes(shapes, COUNTED_TOKENS, cache=cache)) / COUNTED_TOKENS


def losses_through_cache(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, options: dict
) -> np.ndarray:
    """What a model loses on each row that it reads through a quantised cache: `row_losses` in float64, `(rows, 2)`.

    Args:
        options: of the cache.
    """

    def read(batch: BatchEncoding) -> torch.Tensor:
        return model(**batch, past_key_values=SpiralFormerQuantizedCache(model.config, **options)).logits

    return losses_of_rows(model, tokenizer, rows, read)


def compare_precisions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    molecules: list[str],
    ways: list[Way],
    done: Callable[[], object],
) -> dict:
    """
    Nats and bytes per token before and after each way of keeping each level, and the difference with its interval.

    Args:
        done: is called after each evaluation.
    """
    rows = make_rows(molecules, tokenizer, model.config.max_position_embeddings)
    before = losses_of_rows(model, tokenizer, rows)
    done()
    nats = before[:, 0].sum() / before[:, 1].sum()
    figures: dict = {"nats_per_token": nats, "bytes": bytes_per_token(model, {"nbits": FULL}), "levels": {}}
    for level, sizes in levels_of(model).items():
        figures["levels"][level] = found = {}
        for way, options in cases(ways, sizes):
            after = losses_through_cache(model, tokenizer, rows, options)
            done()
            found[way.name] = {
                "nats_per_token": after[:, 0].sum() / after[:, 1].sum(),
                "difference": ratio(after[:, 0] - before[:, 0], before[:, 1]),
                "bytes": bytes_per_token(model, options),
            }
    return figures


def compare_all(folders: list[str], molecules: list[str], group_size: int) -> dict[str, dict]:
    """The figures of `compare_precisions` of each checkpoint, by the name of its folder."""
    loaded, ways = load_by_name(folders), ways_of(group_size)
    total = len(loaded)
    total += sum(len(cases(ways, sizes)) for model, _ in loaded.values() for sizes in levels_of(model).values())
    with tqdm(total=total, desc="quantising caches", unit="evaluation") as progress:
        return {
            name: compare_precisions(model, tokenizer, molecules, ways, progress.update)
            for name, (model, tokenizer) in loaded.items()
        }


def precision_report(results: dict[str, dict], group_size: int, molecules: int) -> str:
    """What was asked, and the tables of perplexity and of bytes, as Markdown."""
    names = [way.name for way in ways_of(group_size)]
    changes, sizes = [], []
    for model, figures in results.items():
        for level, found in figures["levels"].items():
            there = [found.get(name) for name in names]
            changes.append([model, level, *("" if way is None else change_cell(way["difference"]) for way in there)])
            counts = ["" if way is None else f"{way['bytes']:.0f}" for way in there]
            sizes.append([model, level, f"{figures['bytes']:.0f}", *counts])
    losses = ", ".join(f"`{model}` {figures['nats_per_token']:.4f}" for model, figures in results.items())
    return "\n\n".join(
        [
            f"{molecules:,} validation molecules, the same for all. Nats per token unquantised: {losses}. Change of "
            "perplexity in percent, paired over molecules, with 95% intervals over draws of molecules, which know "
            "nothing of other seeds:",
            markdown_table(["model", "quantised", *names], changes, text_columns=2),
            f"Bytes of cache per token and row after {COUNTED_TOKENS} tokens, beside those of bfloat16:",
            markdown_table(["model", "quantised", "bfloat16", *names], sizes, text_columns=2),
        ]
    )
