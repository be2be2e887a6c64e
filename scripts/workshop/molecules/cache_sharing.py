"""
One entry of the cache for several iterations of a resolution: what that does to the loss of a loop of shared layers.

Tokens are read one by one. A latent attends to what is kept of those before it, and to its own keys and values. What
is kept of a latent are the keys and values of one of the iterations that share, or their mean.
"""

from collections.abc import Callable

import numpy as np
import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import BatchEncoding, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from modeling_spiralformer import SpiralFormerConfig
from modeling_spiralformer.cache_spiralformer import SpiralFormerLatentLayer
from modeling_spiralformer.chunking_spiralformer import ChunkGrid, FilledChunks
from workshop.evaluation import load_by_name
from workshop.experiments.quantised import change_cell
from workshop.molecules.quantising import ratio
from workshop.molecules.rows import make_rows
from workshop.padded_rows import losses_of_rows
from workshop.tables import markdown_table

FIRST, FIRST_ALONE, MEAN, LAST = "first", "first alone", "mean", "last"
WAYS = (FIRST, FIRST_ALONE, MEAN, LAST)
# How many iterations of a resolution share, the last of them; None: all.
SHARING = (2, 4, None)


class SharedKeys:
    """What is kept of the latents of one resolution for one core layer, whatever the iteration.

    Args:
        way: which iteration's keys and values are kept: the first, the last, or the mean of all. `first alone` also
            lets a latent attend to itself by those of its first iteration.
        iterations: how many share them.
    """

    def __init__(self, way: str, iterations: int):
        self.way, self.iterations = way, iterations
        self.kept: tuple[torch.Tensor, ...] | None = None  # of the latents before
        self.newest: list[tuple[torch.Tensor, ...]] = []  # of the newest latent, by iteration

    def update(self, new: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Takes keys and values `(B, H, 1, E)` of the newest latent in the next iteration; returns what it reads."""
        self.newest.append(new)
        own = self.newest[0] if self.way == FIRST_ALONE else new
        read = own if self.kept is None else self._append(own)
        if len(self.newest) == self.iterations:
            by_iteration = list(zip(*self.newest, strict=True))  # keys, values
            if self.way == MEAN:
                last = tuple(torch.stack(states).mean(dim=0) for states in by_iteration)
            else:
                last = self.newest[-1 if self.way == LAST else 0]
            self.kept, self.newest = last if self.kept is None else self._append(last), []
        return read

    def _append(self, new: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        assert self.kept is not None
        return tuple(torch.cat(pair, dim=-2) for pair in zip(self.kept, new, strict=True))


class SharingLayer(SpiralFormerLatentLayer):
    """A cache layer of latents that keeps its keys and values with those of other iterations."""

    _layer_type = None  # not to be built by name
    shared: SharedKeys

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, filled: FilledChunks | None = None, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.shared.update((key_states, value_states))
        return keys, values


def groups_of(config: SpiralFormerConfig, last: int | None) -> list[list[int]]:
    """The last iterations of each resolution that occurs more than once: the same chunks, offsets and shifts.

    Raises ValueError for a model without iterations that could share.
    """
    grids = ChunkGrid.of(config)
    equal = [[t for t, other in enumerate(grids) if other == grid] for grid in dict.fromkeys(grids)]
    groups = [group[-(last or 0) :] for group in equal if len(group) > 1]
    if not groups or not config.share_core:
        raise ValueError(
            f"`models` must have `share_core` and a chunk size more than once, but got {config.share_core} and "
            f"{config.chunk_sizes}."
        )
    return groups


def sharing_cache(config: SpiralFormerConfig, groups: list[list[int]], way: str) -> DynamicCache:
    """An empty cache for calls of one token, in which the iterations of each group share their entries."""
    cache = DynamicCache(config=config)
    for group in groups:
        for layer in range(config.num_core_layers):
            shared = SharedKeys(way, len(group))
            for iteration in group:
                entry = config.core_entries(iteration)[layer]
                # Its type is that of the entry it stands for, by which the model knows it.
                cache.layers[entry] = sharing = SharingLayer()
                sharing._layer_type, sharing.shared = SpiralFormerLatentLayer._layer_type, shared
    return cache


def losses_by_token(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    groups: list[list[int]],
    way: str = LAST,
) -> np.ndarray:
    """What a model loses on each row that it reads token by token: `row_losses` in float64, `(rows, 2)`."""

    def read(batch: BatchEncoding) -> torch.Tensor:
        # Without the mask: rows end in pad ids, which no loss and no earlier token sees.
        cache, columns = sharing_cache(model.config, groups, way), batch["input_ids"].split(1, dim=1)
        return torch.cat([model(column, past_key_values=cache).logits for column in columns], dim=1)

    return losses_of_rows(model, tokenizer, rows, read)


def compare_sharing(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, done: Callable[[], object]
) -> dict:
    """
    Nats per token with an entry for every iteration; with each way of sharing among the last iterations the difference
    with its interval, and the entries of the cache.

    Args:
        done: is called after each evaluation.
    """
    before = losses_by_token(model, tokenizer, rows, [])
    done()
    figures: dict = {"nats_per_token": before[:, 0].sum() / before[:, 1].sum(), "sharing": []}
    figures["entries"] = entries = model.config.num_hidden_layers
    for last in SHARING:
        groups = groups_of(model.config, last)
        spared = sum(len(group) - 1 for group in groups) * model.config.num_core_layers
        found: dict = {"last": last, "entries": entries - spared, "ways": {}}
        for way in WAYS:
            after = losses_by_token(model, tokenizer, rows, groups, way)
            done()
            found["ways"][way] = ratio(after[:, 0] - before[:, 0], before[:, 1])
        figures["sharing"].append(found)
    return figures


def share_all(folders: list[str], molecules: list[str]) -> dict[str, dict]:
    """The figures of `compare_sharing` of each checkpoint, by the name of its folder."""
    loaded, results = load_by_name(folders), {}
    for model, _ in loaded.values():
        groups_of(model.config, None)  # refuses before the work
    with tqdm(total=len(loaded) * (1 + len(SHARING) * len(WAYS)), desc="sharing", unit="evaluation") as progress:
        for name, (model, tokenizer) in loaded.items():
            rows = make_rows(molecules, tokenizer, model.config.max_position_embeddings)
            results[name] = compare_sharing(model, tokenizer, rows, progress.update)
    return results


def sharing_report(results: dict[str, dict], molecules: int) -> str:
    """What was asked, and the table, as Markdown."""
    rows = []
    for name, figures in results.items():
        for found in figures["sharing"]:
            which = "all" if found["last"] is None else f"last {found['last']}"
            changes = [change_cell(found["ways"][way]) for way in WAYS]
            rows.append([name, which, f"{figures['entries']} to {found['entries']}", *changes])
    losses = ", ".join(f"`{name}` {figures['nats_per_token']:.4f}" for name, figures in results.items())
    return (
        f"{molecules:,} validation molecules, read token by token. Nats per token with an entry for every iteration: "
        f"{losses}. Change of perplexity in percent, paired over molecules, with 95% intervals over draws of "
        "molecules:\n\n" + markdown_table(["model", "iterations that share", "entries", *WAYS], rows, text_columns=3)
    )
