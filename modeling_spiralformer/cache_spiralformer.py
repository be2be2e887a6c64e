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

Shape letters: B batch, R rows of the batch that run, S new tokens, K chunks (latents), D hidden size, H heads.
"""

from collections.abc import Callable

import torch
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.utils.import_utils import is_torchdynamo_compiling

from .cache_name_spiralformer import CACHE_ARGUMENT
from .chunking_spiralformer import ChunkGrid, Filling
from .configuration_spiralformer import LATENT_LAYER_TYPE, TOKEN_LAYER_TYPE, SpiralFormerConfig
from .level_spiralformer import Level, StaticLevel, append_columns, copy_columns, write_columns


class GrowingLayer(DynamicLayer):
    """A dynamic layer whose keys and values grow without being copied at every step."""

    def __init__(self, **kwargs):
        super().__init__()  # of 5.17, which hands every layer the arguments of all kinds

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Starts with no columns, in the shape, dtype and on the device of `(B, H, K, D // H)` states to come."""
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]

    def reset(self) -> None:
        """Forgets every state."""
        forget(self)


class SpiralFormerTokenLayer(GrowingLayer):
    """Keys and values over tokens, of one layer of prelude or coda."""

    _layer_type = TOKEN_LAYER_TYPE

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds `(B, H, S, D // H)` keys and values; returns those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = append_columns(self.keys, key_states)
        self.values = append_columns(self.values, value_states)
        return self.keys, self.values


class UncroppableLayer(StaticLayer):
    """A layer of a static cache, whose latents know no way back: levels of fixed size keep no past."""

    is_croppable = False

    def crop(self, tokens_to_remove: int) -> None:
        """Raises `ValueError` for any count but 0: before a layer of the cache has changed, since all refuse."""
        if int(tokens_to_remove) != 0:
            raise ValueError(
                f"A static cache must not be cropped, but got {int(tokens_to_remove)}: call reset(), or take "
                "DynamicCache(config=model.config)."
            )


class SpiralFormerStaticTokenLayer(UncroppableLayer):
    """The library's static layer, for `StaticCache`."""

    _layer_type = TOKEN_LAYER_TYPE


class SpiralFormerLatentLayer(GrowingLayer):
    """Keys and values over the latents of one (iteration, core layer); registered for `DynamicCache(config=...)`.

    The first core layer of an iteration owns its level, the others share it. A layer is built without arguments and
    meets its level when the model first uses the cache.
    """

    _layer_type = LATENT_LAYER_TYPE

    def __init__(self, **kwargs):
        super().__init__()
        self.level: Level | None = None
        self.owns_level = False
        self.record_past = False  # the library sets it too, and the level looks at it in every call

    def attend(self, grid: ChunkGrid, owner: "SpiralFormerLatentLayer", empty: torch.Tensor) -> None:
        """Gets ready for its level's first tokens.

        Args:
            grid: the level's chunks.
            owner: the layer that owns the level, this one or the iteration's first.
            empty: `(B, H, 0, D // H)`, no keys in the dtype and on the device of those to come.
        """
        if owner is self:
            self.level, self.owns_level = Level(grid, cached=True), True
        self.level = owner.level
        self.lazy_initialization(empty, empty)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, filling: Filling | None = None, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds `(R, H, K, D // H)` keys and values of the latents that `filling` describes.

        Returns:
            The keys and values `(R, H, filling.last, D // H)` of the rows that run.
        """
        if filling is None:
            raise ValueError("`filling` must say which chunks the keys belong to: this cache layer holds latents.")
        self.keys = write_columns(self.keys, key_states, filling)
        self.values = write_columns(self.values, value_states, filling)
        if filling.rows is None:
            return self.keys[..., : filling.last, :], self.values[..., : filling.last, :]
        return self.keys[filling.rows, :, : filling.last], self.values[filling.rows, :, : filling.last]

    def get_seq_length(self) -> int:
        """The latent column of the next filling where rows agree: the number of filled chunks."""
        return 0 if self.level is None else self.level.grid.latent_columns(self.level.seen, self.level.padding)

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
        if self.level is None:
            return
        if self.owns_level:
            self.level.crop(-tokens_to_remove)
        columns = self.get_seq_length()
        if columns < self.keys.shape[-2]:
            self.keys, self.values = self.keys[..., :columns, :].clone(), self.values[..., :columns, :].clone()

    def reset(self) -> None:
        """Forgets every state."""
        super().reset()
        self.level = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row b becomes what row `beam_idx[b]` was."""
        map_rows(self, lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times."""
        map_rows(self, lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows `indices`, integers or booleans."""
        map_rows(self, lambda states: states[indices.to(states.device)])


class SpiralFormerStaticLatentLayer(UncroppableLayer):
    """Keys and values over the latents of one (iteration, core layer), of fixed size; for `StaticCache`."""

    _layer_type = LATENT_LAYER_TYPE
    supports_early_init = False  # it does not know its chunk size before the model first uses it

    def __init__(self, max_cache_len: int, **kwargs):
        super().__init__(max_cache_len=max_cache_len)
        self.level: StaticLevel | None = None
        self.owns_level = False

    def attend(self, grid: ChunkGrid, owner: "SpiralFormerStaticLatentLayer", empty: torch.Tensor) -> None:
        """As for the dynamic layer: gets ready for its level's first tokens, allocating everything."""
        if self.level is not None and self.level.rows == empty.shape[0]:
            return
        if owner is self:
            states = empty.transpose(1, 2).flatten(2)
            self.level, self.owns_level = StaticLevel(grid, self.max_cache_len, states), True
        self.level = owner.level
        shape = (*empty.shape[:2], self.level.max_latents, empty.shape[-1])
        self.keys, self.values = empty.new_zeros(shape), empty.new_zeros(shape)
        self.dtype, self.device, self.batch_size = empty.dtype, empty.device, empty.shape[0]
        self.is_initialized = True
        if not is_torchdynamo_compiling():
            level = self.level
            for state in (self.keys, self.values, level.token_ring, level.latent_ring, level.column):
                torch._dynamo.mark_static_address(state)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, filling: Filling | None = None, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds `(B, H, K, D // H)` keys and values; returns those of all latent columns."""
        if filling is None:
            raise ValueError("`filling` must say which chunks the keys belong to: this cache layer holds latents.")
        for stored, new in ((self.keys, key_states), (self.values, value_states)):
            copy_columns(stored, new, filling.first, filling.fresh)
        return self.keys, self.values

    @property
    def cumulative_length(self) -> torch.Tensor:
        """Raises `ValueError`: whoever asks for it wants to set it, and the latents would stay where they are."""
        raise ValueError(
            "A static cache of latents must not be rewound by its `cumulative_length`, as the wrappers of the library "
            "for ExecuTorch do: call reset(), and export without a cache."
        )

    @cumulative_length.setter
    def cumulative_length(self, value: torch.Tensor) -> None:
        """Of the library's constructor; the level counts."""

    def get_seq_length(self) -> int | torch.Tensor:
        """The number of latent columns that unpadded rows have filled."""
        return 0 if self.level is None else self.level.grid.opened(self.level.column, self.level.grid.phase(0))

    def reset(self) -> None:
        """Forgets every state and keeps the tensors."""
        if self.level is not None:
            self.keys.zero_()
            self.values.zero_()
            if self.owns_level:
                self.level.reset()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row b becomes what row `beam_idx[b]` was."""
        map_rows(self, lambda states: states.index_select(0, beam_idx.to(states.device)))


def map_rows(
    layer: "SpiralFormerLatentLayer | SpiralFormerStaticLatentLayer", change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Applies a change of the batch dimension to a layer's keys and values, and to the level where it owns one.

    A layer that holds nothing has no rows yet: the next call says how many.
    """
    if layer.level is None or layer.level.is_new:
        return
    if layer.owns_level:
        layer.level.map_rows(change)
    layer.keys, layer.values = change(layer.keys), change(layer.values)


def forget(layer: DynamicLayer) -> None:
    """Drops a layer's keys and values, and with them its number of rows; `reset` of transformers 5.17 zeroes them."""
    layer.keys = layer.values = None
    layer.is_initialized = False


def restart(cache: Cache) -> None:
    """Forgets a cache that holds no token, so that it may go on with another number of rows."""
    for layer in cache.layers:
        ours = getattr(layer, "_layer_type", None) in (TOKEN_LAYER_TYPE, LATENT_LAYER_TYPE)
        layer.reset() if ours else forget(layer)


def fit_static_layers(cache: Cache, rows: int) -> None:
    """Lets a static cache that holds no token go on with another number of rows: its token layers allocate anew."""
    for layer in cache.layers:
        if getattr(layer, "_layer_type", None) == TOKEN_LAYER_TYPE and layer.is_initialized:
            layer.is_initialized = layer.batch_size == rows


def bind_levels(
    cache: Cache, config: SpiralFormerConfig, grids: list[ChunkGrid], inputs_embeds: torch.Tensor
) -> list[Level]:
    """The levels that `cache` holds, one per iteration, made ready where the cache is new.

    Args:
        inputs_embeds: `(B, S, D)` what is about to be fed.

    Raises:
        `ValueError`: for a cache that holds no latents, belongs to another schedule or batch, is quantised or
            offloaded, is full, or was left half cropped or half written by an error.
    """
    if not grids:
        rows, static = inputs_embeds.shape[0], cache.is_compileable
        held = cache.batch_size if static and cache.layers[0].is_initialized else rows
        # A static cache counts in a tensor, which is read where the rows differ alone.
        if held != rows and (is_torchdynamo_compiling() or cache.get_seq_length() > 0):
            raise ValueError(f"{CACHE_ARGUMENT} holds {held} rows, but the input has {rows}.")
        if static:
            fit_static_layers(cache, rows)
        elif cache.get_seq_length() == 0:
            restart(cache)
        return []
    expected = f"{CACHE_ARGUMENT} must be built for this model by DynamicCache(config=model.config)"
    layers = getattr(cache, "layers", [])
    if [getattr(layer, "_layer_type", None) == LATENT_LAYER_TYPE for layer in layers] != [
        layer_type == LATENT_LAYER_TYPE for layer_type in config.layer_types
    ]:
        raise ValueError(
            f"{expected}, and hold latents unquantised, but got {cache!r} of {len(layers)} layers. Prefix tuning puts "
            "in a cache of its own and is not supported: its keys belong to no chunk. Take prompt tuning or LoRA."
        )
    if cache.offloading:
        raise ValueError(f"{expected}, but got an offloaded cache: latents are few, keep them on the device.")

    first, count = config.num_prelude_layers, config.num_core_layers
    cores = [layers[first + t * count : first + (t + 1) * count] for t in range(len(grids))]
    static, compiling = cache.is_compileable, is_torchdynamo_compiling()
    is_new = all(core[0].level is None or core[0].level.is_new for core in cores)
    # A static cache counts in a tensor, which a compiled call cannot look at.
    if is_new and ((static and compiling) or layers[0].get_seq_length() == 0):
        if static:
            fit_static_layers(cache, inputs_embeds.shape[0])
        else:
            restart(cache)
        heads = config.num_attention_heads
        empty = inputs_embeds.new_zeros(inputs_embeds.shape[0], heads, 0, config.hidden_size // heads)
        for core, grid in zip(cores, grids, strict=True):
            for layer in core:
                layer.attend(grid, core[0], empty)
    levels = [core[0].level for core in cores]

    if [None if level is None else level.grid for level in levels] != grids:
        raise ValueError(f"{expected}, but got one built for other chunk sizes, offsets or shifts.")
    if any(level.unfinished for level in levels):
        raise ValueError(f"{expected} and whole, but an error ended a forward that was writing to it: call reset().")
    if not levels[0].is_new and levels[0].rows != inputs_embeds.shape[0]:
        raise ValueError(f"{CACHE_ARGUMENT} holds {levels[0].rows} rows, but the input has {inputs_embeds.shape[0]}.")
    if static:
        check_room(levels, inputs_embeds.shape[1])
    else:
        for core, level in zip(cores, levels, strict=True):
            level.recording = core[0].record_past
        seen = [level.seen for level in levels]
        if set(seen) != {cache.get_seq_length()}:
            raise ValueError(f"{expected} and whole, but its levels hold {seen} of {cache.get_seq_length()} tokens.")
    return levels


def read_column(levels: list[StaticLevel]) -> None:
    """Reads from the device how many columns compiled calls have fed, where they have: one read for all levels."""
    if levels[0].seen is None:
        seen = int(levels[0].column)
        for level in levels:
            level.seen = seen


def check_room(levels: list[StaticLevel], length: int) -> None:
    """Refuses `length` more tokens than fit; compiled calls leave that to the device.

    Raises:
        `ValueError`: naming the size of the cache.
    """
    size = levels[0].max_tokens
    if is_torchdynamo_compiling():
        torch._assert_async(levels[0].column + length <= size, f"{CACHE_ARGUMENT} is full: see its max_cache_len")
        return
    read_column(levels)
    held = levels[0].seen + length
    if held > size:
        raise ValueError(f"{CACHE_ARGUMENT} is a static cache of max_cache_len {size}, but got token {held}.")


def settle_levels(cache: Cache) -> None:
    """Looks at the padding that a compiled prefill left on the device: until then every level runs at every column."""
    levels = [layer.level for layer in cache.layers if getattr(layer, "owns_level", False)]
    if levels:
        read_column(levels)
    for level in levels:
        level.settle()


class SlotView:
    """A cache as the core sees it in one iteration: its layers' slots moved on, at the latents being filled.

    GPT-NeoX attention asks for slot `layer_idx`, which a shared layer has only one of; mask creation asks for the
    column of the first query. Slot of iteration t, core layer i: N_pre + t * N_core + i.
    """

    def __init__(self, cache: Cache, slot_offset: int, filling: Filling):
        self.cache = cache
        self.slot_offset = slot_offset
        self.filling = filling

    @property
    def is_compileable(self) -> bool:
        """Whether the cache is static."""
        return self.cache.is_compileable

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """As `Cache.update`, into this iteration's slot of the layer."""
        return self.cache.update(key_states, value_states, layer_idx + self.slot_offset, self.filling)

    def get_query_offset(self, layer_idx: int) -> int:
        """The first latent column that runs."""
        return self.filling.first

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """How many latent columns the keys span, and the first of them."""
        return self.filling.last, 0


__all__ = [
    "SlotView",
    "SpiralFormerLatentLayer",
    "SpiralFormerStaticLatentLayer",
    "SpiralFormerStaticTokenLayer",
    "SpiralFormerTokenLayer",
    "bind_levels",
    "settle_levels",
]
