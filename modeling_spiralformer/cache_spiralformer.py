# Copyright 2026 The SpiralFormer maintainers
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The multi-resolution KV cache: one cache layer per layer call; `DynamicCache(config=...)` builds them from
`config.layer_types`. `docs/cache.md` has the layout and its cost.

Shape letters: B batch, R rows of the batch that run, S new tokens, K chunks (latents), D hidden size, H heads of keys,
E size of a head.
"""

from collections.abc import Mapping
from itertools import compress
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.utils.import_utils import is_torchdynamo_compiling

from .batch_spiralformer import Batch, Columns, MaybeNone, Past, Rows
from .cache_name_spiralformer import CACHE_ARGUMENT
from .chunking_spiralformer import ChunkGrid, FilledChunks
from .configuration_spiralformer import LATENT_LAYER_TYPE, TOKEN_LAYER_TYPE, SpiralFormerConfig, processes_of
from .level_spiralformer import LatentEntry, ResolutionState
from .precision_spiralformer import DEFAULT_BITS, Precision, entry_sizes, read_precisions
from .static_cache_spiralformer import check_room, check_size, fit_static_layers
from .storage_spiralformer import append_columns, write_columns


class GrowingLayer(DynamicLayer):
    """A dynamic layer whose keys and values grow without being copied at every step.

    With a `precision` they are records of bytes, else what the model computes.
    """

    keys: torch.Tensor | MaybeNone  # None before `lazy_initialization`
    values: torch.Tensor | MaybeNone
    precision: Precision | None = None

    def __init__(self, **kwargs):
        super().__init__()  # of 5.17, which hands every layer the arguments of all kinds

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Starts with no columns, in the shape, dtype and on the device of `(B, H, K, E)` states to come."""
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = self._kept(key_states[..., :0, :]), self._kept(value_states[..., :0, :])

    def _kept(self, states: torch.Tensor) -> torch.Tensor:
        """What is kept of `(..., E)` states."""
        return states if self.precision is None else self.precision.pack(states)

    def _read(self, kept: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The `(..., E)` states that attention reads of what is kept."""
        return kept if self.precision is None else self.precision.unpack(kept, dtype)

    def reset(self) -> None:
        """Forgets every state."""
        forget(self)


class SpiralFormerTokenLayer(GrowingLayer):
    """Keys and values over tokens, of one layer of prelude or coda."""

    _layer_type = TOKEN_LAYER_TYPE

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds `(B, H, S, E)` keys and values; returns those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = append_columns(self.keys, self._kept(key_states))
        self.values = append_columns(self.values, self._kept(value_states))
        return self._read(self.keys, key_states.dtype), self._read(self.values, value_states.dtype)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows `indices`, integers or booleans."""
        if self.is_initialized:
            super().batch_select_indices(row_indices(indices, self.keys.device))


class SpiralFormerLatentLayer(LatentEntry, GrowingLayer):
    """Keys and values over the latents of one (iteration, core layer); registered for `DynamicCache(config=...)`."""

    _layer_type = LATENT_LAYER_TYPE

    def __init__(self, **kwargs):
        super().__init__()
        self.record_past = False  # the library sets it too, and the state follows it in every call

    def bind(
        self,
        grid: ChunkGrid,
        owner: "SpiralFormerLatentLayer",
        rows: Rows,
        states: torch.Tensor,
        heads: tuple[int, int],
    ) -> None:
        """Gets ready for its iteration's first tokens.

        Args:
            grid: the iteration's chunks.
            owner: the layer that owns the state, this one or the iteration's first.
            rows: what all iterations share.
            states: `(B, 0, D)`, none in the dtype and on the device of those to come.
            heads: H and E of the keys.
        """
        if owner is self:
            self.state, self.owns_state = ResolutionState(grid, rows, cached=True), True
        self.state = owner.state
        empty = states.new_zeros(states.shape[0], heads[0], 0, heads[1])
        self.lazy_initialization(empty, empty)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, filled: FilledChunks | None = None, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds `(R, H, K, E)` keys and values of the latents that `filled` describes.

        Returns:
            The keys and values `(R, H, filled.end, E)` of the rows that run.
        """
        if filled is None:
            raise ValueError("`filled` must say which chunks the keys belong to: this cache layer holds latents.")
        self.keys = write_columns(self.keys, self._kept(key_states), filled)
        self.values = write_columns(self.values, self._kept(value_states), filled)
        rows = slice(None) if filled.rows is None else filled.rows.to(self.keys.device)
        keys, values = self.keys[rows, :, : filled.end], self.values[rows, :, : filled.end]
        return self._read(keys, key_states.dtype), self._read(values, value_states.dtype)

    def get_seq_length(self) -> int:
        """The latent column of the next filling where rows agree: the number of filled chunks."""
        return 0 if self.state is None else self.state.grid.latent_columns(self.state.seen, self.state.rows.padding)

    def activate_past_recording(self) -> None:
        """From now on keeps the states of every token, until `crop`, so that `crop` can go back over them."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Goes back by `-tokens_to_remove` tokens (a count <= 0, in tokens, not latents).

        Raises:
            `ValueError`: for a positive count, and for a point whose states are gone.
        """
        tokens_to_remove = int(tokens_to_remove)
        if tokens_to_remove > 0:
            raise ValueError(f"`tokens_to_remove` must be 0 or negative, but got {tokens_to_remove}.")
        if self.state is None:
            return
        if self.owns_state:
            self.state.crop(-tokens_to_remove)
        columns = self.get_seq_length()
        if columns < self.keys.shape[-2]:
            self.keys, self.values = self.keys[..., :columns, :].clone(), self.values[..., :columns, :].clone()

    def reset(self) -> None:
        """Forgets every state."""
        super().reset()
        self.state = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times."""
        self.map_rows(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows `indices`, integers or booleans."""
        self.map_rows(lambda states: states[row_indices(indices, states.device)])


class SpiralFormerQuantizedCache(DynamicCache):
    """A dynamic cache whose keys and values are integers, in as many bits at each resolution as asked for.

    `generate(cache_implementation="quantized", cache_config={"nbits": ...})` builds it. What a dynamic cache can do it
    does exactly, on the stored integers. Attention reads rounded keys alone, those of its own call among them: no
    logit depends on how a text is cut into calls. The states of the resolutions stay as they are.

    Args:
        config (`SpiralFormerConfig`): of the model.
        nbits (`int` or `dict`, *optional*): 8, 4, or 16 for what the model computes; for all chunk sizes, or by chunk
            size, such as `{1: 4, 2: 8}`: those that are not named stay as they are. Prelude and coda are of size 1.
        q_group_size (`int`, *optional*): channels of a head that share a scale, of 4 bytes. Default all.

    Raises:
        `ValueError`: for other bits, a chunk size that the model lacks, and a group that does not fit a head.
    """

    def __init__(
        self,
        config: SpiralFormerConfig,
        nbits: int | Mapping[int | str, int] = DEFAULT_BITS,
        q_group_size: int | None = None,
    ):
        precisions = read_precisions(config, nbits, q_group_size)
        super().__init__(config=config)
        layers: list[Any] = self.layers  # more than the library's union of layers has in common
        for layer, size in zip(layers, entry_sizes(config), strict=True):
            layer.precision = precisions[size]


def row_indices(indices: Any, device: torch.device) -> torch.Tensor:
    """Which rows a cache is to keep, out of a tensor, an array or a list.

    Raises:
        `ValueError`: for anything but one dimension of integers or booleans.
    """
    found = None if isinstance(indices, slice) else torch.as_tensor(indices, device=device)
    if found is None or found.dim() != 1 or found.is_floating_point():
        raise ValueError(f"`indices` must be one dimension of integers or booleans, but got {indices!r}.")
    return found


def forget(layer: DynamicLayer) -> None:
    """Drops a layer's keys and values, and with them its number of rows; `reset` of transformers 5.17 zeroes them."""
    layer.keys = layer.values = None
    layer.is_initialized = False


def restart(cache: Cache) -> None:
    """Forgets a cache that holds no token, so that it may go on with another number of rows."""
    layers: list[Any] = cache.layers  # more than the library's union of layers has in common
    for layer in layers:
        ours = getattr(layer, "_layer_type", None) in (TOKEN_LAYER_TYPE, LATENT_LAYER_TYPE)
        layer.reset() if ours else forget(layer)


# -- finding the states of a call -----------------------------------------------------------------------------------


def find_states(
    cache: Cache, config: SpiralFormerConfig, grids: list[ChunkGrid], inputs_embeds: torch.Tensor
) -> list[ResolutionState]:
    """The states that `cache` holds, one per iteration, made ready where the cache is new.

    Args:
        inputs_embeds: `(B, S, D)` what is about to be fed.

    Raises:
        `ValueError`: for a cache that holds no latents, belongs to another schedule or batch, is offloaded, is full,
            or was left half cropped or half written by an error; for a quantised one where gradients are recorded.
    """
    if torch.is_grad_enabled() and any(getattr(layer, "precision", None) for layer in getattr(cache, "layers", [])):
        raise ValueError(f"{CACHE_ARGUMENT} must not be quantised where gradients are recorded: take torch.no_grad().")
    if not grids:
        _fit_token_layers(cache, config, inputs_embeds)
        return []
    core = _latent_layers(cache, config)
    owners = [layers[0] for layers in core]
    static, is_new = cache.is_compileable, all(owner.state is None or owner.state.is_new for owner in owners)
    # A static cache counts in a tensor, which a compiled call cannot look at.
    if is_new and ((static and is_torchdynamo_compiling()) or cache.get_seq_length() == 0):
        _start(cache, core, config, grids, inputs_embeds)
    states = [owner.state for owner in owners if owner.state is not None]
    check_states(states, grids, inputs_embeds.shape[0])
    _check_dtype(states[0].rows.dtype, inputs_embeds)
    if static:
        check_room(states, inputs_embeds.shape[1])  # type: ignore[arg-type]  # each a StaticState
        return states
    for owner, state in zip(owners, states, strict=True):
        state.recording = owner.record_past
    seen, tokens = [state.seen for state in states], cache.get_seq_length()
    if set(seen) != {tokens}:
        raise ValueError(f"{BUILT_FOR} and whole, but its levels hold {seen} of {tokens} tokens.")
    return states


def read_past(cache: Cache | None, states: list[ResolutionState], is_given: bool) -> Past:
    """What a call with that cache goes on from. `is_given`: whether the user gave it."""
    if cache is None:
        return Past()
    room = cache.layers[-1].get_max_length() if cache.is_compileable else None
    if states:
        return Past(states[0].past, states[0].rows, states[0].settled, room, is_given)
    columns = cache.get_seq_length()
    if isinstance(columns, torch.Tensor) and not is_torchdynamo_compiling():  # of a static cache without a loop
        columns = int(columns)
    return Past(columns, room=room, is_given=is_given)


BUILT_FOR = f"{CACHE_ARGUMENT} must be built for this model by DynamicCache(config=model.config)"
NOT_WHOLE = f"{BUILT_FOR} and whole, but an error ended a forward that was writing to it: call reset()."
QUANTISED = 'generate(cache_implementation="quantized")'
NOT_OFFLOADED = (
    "the library fetches the keys of the next entry while a layer runs, and which entry is next depends on the chunks "
    f"that fill. To hold less on the device, quantise the cache: {QUANTISED}."
)


def make_quantised(config: SpiralFormerConfig, cache_config: dict[str, Any] | None) -> SpiralFormerQuantizedCache:
    """The cache of `generate(cache_implementation="quantized", cache_config=...)`.

    Raises:
        `ValueError`: as the cache does, and for options of the library's own layers.
    """
    options = dict(cache_config or {})
    if unknown := sorted(options.keys() - {"nbits", "q_group_size"}):
        raise ValueError(
            f"`cache_config` must hold `nbits` and `q_group_size` alone, but got {unknown}: this model has layers of "
            "its own, without a backend. They round every key once, by its own scale, and keep no window of others."
        )
    return SpiralFormerQuantizedCache(config, **options)


def _fit_token_layers(cache: Cache, config: SpiralFormerConfig, inputs_embeds: torch.Tensor) -> None:
    """The cache of a stack without a loop: one that holds no token goes on with another number of rows."""
    static, rows = cache.is_compileable, inputs_embeds.shape[0]
    layers: list[Any] = cache.layers
    wrong = any(isinstance(layer, LatentEntry) or getattr(layer, "is_sliding", False) for layer in layers)
    if wrong or len(layers) not in (0, config.num_hidden_layers):
        raise ValueError(f"{BUILT_FOR}, but got {cache!r} of {len(layers)} layers.")
    held = rows
    if layers and layers[0].is_initialized:
        held = cache.batch_size if static else layers[0].keys.shape[0]
    if is_torchdynamo_compiling():  # a static cache counts in a tensor, which a compiled call cannot look at
        _check_rows(held, rows)
        return
    state: Any = cache  # what is kept of a call that began
    columns = int(cache.get_seq_length())
    if columns == 0:
        fit_static_layers(cache, inputs_embeds) if static else restart(cache)
        state.dtype = inputs_embeds.dtype
    else:
        if getattr(state, "unfinished", False):
            raise ValueError(NOT_WHOLE)
        _check_rows(held, rows)
        _check_dtype(getattr(state, "dtype", None), inputs_embeds)
    if static:
        check_size(columns + inputs_embeds.shape[1], layers[0].get_max_length())


def _check_rows(held: int, rows: int) -> None:
    """Refuses an input of another number of rows than the cache holds."""
    if held != rows:
        raise ValueError(f"{CACHE_ARGUMENT} holds {held} rows, but the input has {rows}.")


def _check_dtype(kept: torch.dtype | None, inputs_embeds: torch.Tensor) -> None:
    """Refuses embeddings of another dtype than those before; None where nobody knows."""
    if inputs_embeds.is_floating_point() and kept not in (None, inputs_embeds.dtype):
        raise ValueError(f"{CACHE_ARGUMENT} holds states in {kept}, but got an input in {inputs_embeds.dtype}.")


def begin_call(cache: Cache | None, states: list[ResolutionState], batch: Batch, every_row: bool) -> None:
    """A call that was not refused begins to write: what fails before `end_call` leaves the cache half written."""
    if states:
        states[0].rows.begin(batch, every_row)
    elif cache is not None and not is_torchdynamo_compiling():
        cache.unfinished = True  # type: ignore[attr-defined]


def end_call(cache: Cache | None, states: list[ResolutionState]) -> None:
    """A call has written all of its tokens."""
    if states:
        states[0].rows.end()
    elif cache is not None and not is_torchdynamo_compiling():
        cache.unfinished = False  # type: ignore[attr-defined]


def _latent_layers(cache: Cache, config: SpiralFormerConfig) -> list[list[LatentEntry]]:
    """The cache's layers of each iteration's core."""
    layers = getattr(cache, "layers", [])
    are_latent = [getattr(layer, "_layer_type", None) == LATENT_LAYER_TYPE for layer in layers]
    if are_latent != [layer_type == LATENT_LAYER_TYPE for layer_type in config.layer_types]:
        raise ValueError(
            f"{BUILT_FOR}, or quantised by {QUANTISED}, but got {cache!r} of {len(layers)} layers. Prefix tuning puts "
            "in a cache of its own and is not supported: its keys belong to no chunk. Take prompt tuning or LoRA."
        )
    if cache.offloading:
        raise ValueError(f"{BUILT_FOR}, but got an offloaded cache: {NOT_OFFLOADED}")
    latent, count = list(compress(layers, are_latent)), config.num_core_layers
    return [latent[first : first + count] for first in range(0, len(latent), count)]


def _start(
    cache: Cache,
    core: list[list[LatentEntry]],
    config: SpiralFormerConfig,
    grids: list[ChunkGrid],
    inputs_embeds: torch.Tensor,
) -> None:
    """Makes a cache that holds no token ready for as many rows as `inputs_embeds` has."""
    if cache.is_compileable:
        fit_static_layers(cache, inputs_embeds)
    else:
        restart(cache)
    states = inputs_embeds.detach()[:, :0]
    heads = _local_heads(config), config.resolved_head_dim
    rows, core[0][0].owns_rows = Rows(), True
    for layers, grid in zip(core, grids, strict=True):
        for layer in layers:
            layer.bind(grid, layers[0], rows, states, heads)
    core[0][0].state.rows.dtype = states.dtype  # type: ignore[union-attr]  # those of before, where a static cache fits


def _local_heads(config: SpiralFormerConfig) -> int:
    """Heads of keys that this process holds: tensor parallelism deals them out."""
    heads, processes = config.resolved_num_key_value_heads, processes_of(config)
    if heads % processes:
        raise ValueError(f"`tp_size` must divide the {heads} heads of keys, but got {processes}.")
    return heads // processes


def check_states(states: list[ResolutionState], grids: list[ChunkGrid], rows: int) -> None:
    """Raises `ValueError` for states of another schedule or batch, or that an error left half written."""
    if [state.grid for state in states] != grids:
        raise ValueError(
            f"{BUILT_FOR}, but got one built for other chunk sizes, offsets or shifts, or by another copy of the code."
        )
    if states[0].rows.unfinished:
        raise ValueError(NOT_WHOLE)
    if not states[0].is_new:
        _check_rows(states[0].num_rows, rows)


class MovedCache:
    """A cache as layers see it whose entries are others than their numbers: that many further on.

    Attention asks for entry `layer_idx`, which a layer has only one of. A shared layer has an entry in each iteration,
    and in a view of some iterations the coda comes earlier.

    Args:
        first: the first of the layers that are moved; those before it have their own entries.
    """

    def __init__(self, cache: Any, entry_offset: int, first: int = 0):
        self.cache = cache
        self.entry_offset = entry_offset
        self.first = first

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """As `Cache.update`, into the entry that the layer has here."""
        entry = layer_idx + self.entry_offset if layer_idx >= self.first else layer_idx
        return self.cache.update(key_states, value_states, entry, *args, **kwargs)


class IterationCache(MovedCache):
    """A cache as the core sees it in one iteration, at the latents being filled, whose columns a mask is made for."""

    def __init__(self, cache: Cache, entry_offset: int, filled: FilledChunks):
        super().__init__(cache, entry_offset)
        self.filled = filled

    @property
    def is_compileable(self) -> bool:
        """Whether the cache is static."""
        return self.cache.is_compileable

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """As `Cache.update`, into this iteration's entry of the layer."""
        return super().update(key_states, value_states, layer_idx, self.filled)

    def get_query_offset(self, layer_idx: int) -> Columns:
        """The first latent column that runs."""
        return self.filled.first

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """How many latent columns the keys span, and the first of them."""
        return self.filled.end, 0


__all__ = [
    "IterationCache",
    "MovedCache",
    "SpiralFormerLatentLayer",
    "SpiralFormerQuantizedCache",
    "SpiralFormerTokenLayer",
    "begin_call",
    "check_states",
    "end_call",
    "find_states",
    "make_quantised",
    "read_past",
]
