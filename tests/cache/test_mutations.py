"""The cache tests must be able to fail: deliberate bugs, each of which a random history has to catch."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from histories import random_history
from support import small_config
from transformers import DynamicCache

from modeling_spiralformer import (
    batch_spiralformer,
    cache_spiralformer,
    elastic_spiralformer,
    modeling_spiralformer,
    storage_spiralformer,
)
from modeling_spiralformer.batch_spiralformer import LeftPadding
from modeling_spiralformer.cache_spiralformer import SpiralFormerLatentLayer, SpiralFormerTokenLayer
from modeling_spiralformer.chunking_spiralformer import ChunkGrid
from modeling_spiralformer.layers_spiralformer import FAMILIES
from modeling_spiralformer.level_spiralformer import ResolutionState
from modeling_spiralformer.storage_spiralformer import append_columns, write_columns

MODELS = (
    {"chunk_sizes": [4, 2, 1], "num_core_layers": 1},
    {"chunk_sizes": [5, 3], "num_core_layers": 2, "topology": "anchor", "causal_shifts": [6, 9]},
    {"chunk_sizes": [3], "num_core_layers": 1, "chunk_offsets": [2], "topology": "residual"},
    {"chunk_sizes": [3, 1], "num_core_layers": 1, "topology": "hyper_connections"},
    {"chunk_sizes": [4, 1], "num_core_layers": 1, "layer_family": "llama"},
    {"chunk_sizes": [5, 2], "num_core_layers": 1, "layer_family": "qwen3", "topology": "anchor"},
    {"chunk_sizes": [4, 2, 4, 1], "num_core_layers": 1, "part": [4, 1]},
    {"chunk_sizes": [1, 3, 5], "num_core_layers": 1, "chunk_offsets": [0, 2, 1], "share_core": False, "part": [3, 5]},
)
HISTORIES = 8 * len(MODELS)


def run_histories() -> None:
    for seed in range(HISTORIES):
        options = dict(MODELS[seed % len(MODELS)])
        part = options.pop("part", None)  # chunk sizes of a view of the model
        turn = seed // len(MODELS) % 4  # of the eight histories of each model two are static and two are quantised
        bits = None
        if turn == 2:
            sizes = part or options["chunk_sizes"]
            bits = {size: (4, 8)[place % 2] for place, size in enumerate(sorted({1, *sizes}))}
        random_history(options, seed, static=turn == 3, part=part, bits=bits)


def no_operation(self, *args) -> None:
    """Does nothing at all."""


def keys_and_values_only(operation: str):
    """The layer's operation without its state: what a cache that knows only keys and values does."""
    changes = {
        "reorder_cache": lambda rows: lambda states: states.index_select(0, rows),
        "batch_select_indices": lambda rows: lambda states: states[rows],
        "batch_repeat_interleave": lambda times: lambda states: states.repeat_interleave(times, dim=0),
    }

    def operate(self, argument):
        if self.state is not None:
            change = changes[operation](argument)
            self.keys, self.values = change(self.keys), change(self.values)

    return operate


def crop_of_keys_and_values_only(self, tokens_to_remove):
    if self.state is not None:
        if self.owns_state:
            self.state.seen += int(tokens_to_remove)
        columns = self.get_seq_length()
        self.keys, self.values = self.keys[..., :columns, :], self.values[..., :columns, :]


def changed_filling(change):
    """`ChunkGrid.filling` with its result changed by `change(filling)`."""
    original = ChunkGrid.filling

    def filling(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        return None if result is None else change(result)

    return filling


def open_chunk_not_rolled_back(self, tokens_to_remove):
    newest = self.tokens
    ORIGINAL["crop"](self, tokens_to_remove)
    self.tokens = newest[:, newest.shape[1] - self.tokens.shape[1] :]


def latents_not_rolled_back(self, tokens_to_remove):
    newest = self.latents
    ORIGINAL["crop"](self, tokens_to_remove)
    if newest is not None:
        self.latents = newest[:, newest.shape[1] - self.latents.shape[1] :]


def stale_output(self, latents, filled):
    """The tokens go on reading the chunk before the one that filled last."""
    before = self.latents
    ORIGINAL["store"](self, latents, filled)
    if before is not None and before.shape[1] and self.latents.shape[1] > before.shape[1]:
        self.latents = torch.cat([self.latents[:, :-1], before[:, -1:]], dim=1)


def rows_change_only_after_chunks(self, change):
    if self.latents is not None:
        ORIGINAL["map_rows"](self, change)


def padding_is_not_changed_with_the_rows(self, change):
    padding = self.state.rows.padding if self.state is not None else None
    ORIGINAL["entry.map_rows"](self, change)
    if padding is not None and len(padding.columns) == self.state.num_rows:
        self.state.rows.padding = padding


def padding_counted_as_tokens(self, states):
    self.rows.padding = None
    return ORIGINAL["feed"](self, states)


def one_phase_for_all_rows(attention_mask, inputs_embeds, past):
    padding, *rest = ORIGINAL["_read_mask"](attention_mask, inputs_embeds, past)
    if padding is not None and past.columns:
        padding = LeftPadding(padding.columns[:1].expand(len(padding.columns)))
    return padding, *rest


def trimmed_one_token_too_many(self, columns, padding):
    return max(0, ORIGINAL["open_tokens"](self, columns, padding) - 1)


def filled_columns_written_again(stored, new, filled, *args, **kwargs):
    if filled.new is not None:
        filled = replace(filled, new=torch.ones_like(filled.new))
    return write_columns(stored, new, filled, *args, **kwargs)


def room_outlives_a_change_of_rows():
    """`append_columns` that goes on in the room of the last store of that shape, whatever has replaced it."""
    rooms = {}

    def append(stored, new):
        stored = rooms.get((stored.shape, stored.dtype), stored)
        grown = append_columns(stored, new)
        rooms[grown.shape, grown.dtype] = grown
        return grown

    return append


def as_many_heads_of_keys_as_of_queries(config):
    return config.num_attention_heads


def heads_that_share_the_width(self, grid, owner, rows, states, heads):
    ORIGINAL["bind"](self, grid, owner, rows, states, (heads[0], states.shape[-1] // heads[0]))


def family_with(**changes):
    """All families but GPT-NeoX, changed."""
    return {name: family if name == "gpt_neox" else replace(family, **changes) for name, family in FAMILIES.items()}


def latest_iterations_that_fit(config, chunk_sizes):
    backwards = SimpleNamespace(chunk_sizes=config.chunk_sizes[::-1])
    last = len(config.chunk_sizes) - 1
    return [last - t for t in reversed(ORIGINAL["choose_iterations"](backwards, chunk_sizes[::-1]))]


def offsets_of_the_default(config, iterations):
    chosen = ORIGINAL["view_config"](config, iterations)
    chosen.chunk_offsets = None
    return chosen


def coda_in_the_entries_of_the_model(view, body, iterations):
    ORIGINAL["_share_body"](view, body, iterations)
    view.coda_offset = body.coda_offset


def core_in_the_entries_of_the_model(view, body, iterations):
    ORIGINAL["_share_body"](view, body, iterations)
    view.core_offsets = [body.core_offsets[t] for t in iterations]


def newest_keys_unrounded(self, key_states, value_states, *args, **kwargs):
    """Attention reads what was rounded of earlier calls, and of its own call what was computed."""
    keys, values = ORIGINAL["update"](self, key_states, value_states)
    return torch.cat([keys[..., : -key_states.shape[-2], :], key_states], dim=-2), values


def prelude_and_coda_in_the_bits_of_the_core(config):
    sizes = ORIGINAL["entry_sizes"](config)
    core = [size for size in sizes if size != 1] or [1]
    return [core[0] if size == 1 else size for size in sizes]


ORIGINAL = {
    "update": SpiralFormerTokenLayer.update,
    "entry_sizes": cache_spiralformer.entry_sizes,
    "bind": SpiralFormerLatentLayer.bind,
    "crop": ResolutionState.crop,
    "store": ResolutionState.store,
    "map_rows": ResolutionState.map_rows,
    "entry.map_rows": SpiralFormerLatentLayer.map_rows,
    "feed": ResolutionState.feed,
    "_read_mask": batch_spiralformer._read_mask,
    "open_tokens": ChunkGrid.open_tokens,
    "read_position": ChunkGrid.read_position,
    "choose_iterations": elastic_spiralformer.choose_iterations,
    "view_config": elastic_spiralformer.view_config,
    "_share_body": elastic_spiralformer._share_body,
}

MUTATIONS = {
    "reorder does nothing": (SpiralFormerLatentLayer, "reorder_cache", no_operation),
    "reorder of keys and values only": (
        SpiralFormerLatentLayer,
        "reorder_cache",
        keys_and_values_only("reorder_cache"),
    ),
    "select does nothing": (SpiralFormerLatentLayer, "batch_select_indices", no_operation),
    "select of keys and values only": (
        SpiralFormerLatentLayer,
        "batch_select_indices",
        keys_and_values_only("batch_select_indices"),
    ),
    "repeat does nothing": (SpiralFormerLatentLayer, "batch_repeat_interleave", no_operation),
    "repeat of keys and values only": (
        SpiralFormerLatentLayer,
        "batch_repeat_interleave",
        keys_and_values_only("batch_repeat_interleave"),
    ),
    "crop does nothing": (SpiralFormerLatentLayer, "crop", no_operation),
    "crop of keys and values only": (SpiralFormerLatentLayer, "crop", crop_of_keys_and_values_only),
    "open chunk not rolled back": (ResolutionState, "crop", open_chunk_not_rolled_back),
    "latents not rolled back": (ResolutionState, "crop", latents_not_rolled_back),
    "reset does nothing": (SpiralFormerLatentLayer, "reset", no_operation),
    "one phase for all rows": (batch_spiralformer, "_read_mask", one_phase_for_all_rows),
    "padding does not follow the rows": (SpiralFormerLatentLayer, "map_rows", padding_is_not_changed_with_the_rows),
    "padding counted as tokens": (ResolutionState, "feed", padding_counted_as_tokens),
    "missing members of the first chunk counted": (
        ChunkGrid,
        "filling",
        changed_filling(lambda filling: replace(filling, present=None)),
    ),
    "stale output": (ResolutionState, "store", stale_output),
    "shift off by one": (
        ChunkGrid,
        "read_position",
        lambda self, column, phase: ORIGINAL["read_position"](self, column + 1, phase),
    ),
    "rotary position of latents counts from the call": (
        ChunkGrid,
        "filling",
        changed_filling(lambda f: replace(f, position_ids=(f.position_ids - f.first).clamp(min=0))),
    ),
    "no mask over unfilled latents": (
        ChunkGrid,
        "filling",
        changed_filling(lambda filling: replace(filling, valid=None)),
    ),
    "rows change only after the first filling": (
        ResolutionState,
        "map_rows",
        rows_change_only_after_chunks,
    ),
    "one state of the open chunk lost": (ChunkGrid, "open_tokens", trimmed_one_token_too_many),
    "filled columns written again": (
        cache_spiralformer,
        "write_columns",
        filled_columns_written_again,
    ),
    # Of families alone whose keys have heads of their own, or whose layers call the cache by another name.
    "heads of keys are those of queries": (cache_spiralformer, "_local_heads", as_many_heads_of_keys_as_of_queries),
    "heads of keys share the width": (SpiralFormerLatentLayer, "bind", heads_that_share_the_width),
    "the cache under the name of GPT-NeoX": (
        modeling_spiralformer,
        "FAMILIES",
        family_with(cache_argument=FAMILIES["gpt_neox"].cache_argument),
    ),
    # Of views alone. The first two change cached and uncached forwards alike: the reference tells.
    "a view of the latest iterations that fit": (
        elastic_spiralformer,
        "choose_iterations",
        latest_iterations_that_fit,
    ),
    "a view whose offsets are the default": (elastic_spiralformer, "view_config", offsets_of_the_default),
    "the coda of a view in the entries of its model": (
        elastic_spiralformer,
        "_share_body",
        coda_in_the_entries_of_the_model,
    ),
    "the core of a view in the entries of its model": (
        elastic_spiralformer,
        "_share_body",
        core_in_the_entries_of_the_model,
    ),
    # Of quantised caches alone.
    "the newest keys are read unrounded": (SpiralFormerTokenLayer, "update", newest_keys_unrounded),
    "prelude and coda in the bits of the core": (
        cache_spiralformer,
        "entry_sizes",
        prelude_and_coda_in_the_bits_of_the_core,
    ),
    "codes cut off where they should be rounded": (torch.Tensor, "round", torch.Tensor.floor),
    "room outlives a change of rows": (storage_spiralformer, "append_columns", room_outlives_a_change_of_rows()),
}


def test_without_a_bug_every_history_passes():
    run_histories()


def test_the_histories_run_on_the_classes_that_are_broken_below():
    """Not on those of another copy of the code, which may have come with a checkpoint in the same process."""
    layers = DynamicCache(config=small_config()).layers
    assert SpiralFormerLatentLayer in [type(layer) for layer in layers]


@pytest.mark.host
@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS.keys())
def test_a_deliberate_bug_is_caught(mutation, monkeypatch):
    """Caught: logits that differ, or an operation that breaks; an error of the mutation's own does not count."""
    monkeypatch.setattr(*mutation)
    with pytest.raises((AssertionError, RuntimeError, ValueError, IndexError)):
        run_histories()
