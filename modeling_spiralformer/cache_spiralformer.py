"""The multi-resolution KV cache: one cache layer per core call, and the state of each level between calls.

`DynamicCache(config=...)` builds these layers from `config.layer_types`; `docs/cache.md` has the layout and its cost.

Shape letters: B batch, R rows of the batch that run, S new tokens, K chunks (latents), G tokens in a chunk, D hidden
size, H heads.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.utils.import_utils import is_torchdynamo_compiling

from .chunking_spiralformer import ChunkGrid, Filling, LeftPadding
from .configuration_spiralformer import LATENT_LAYER_TYPE, SpiralFormerConfig


def write_columns(stored: torch.Tensor, new: torch.Tensor, filling: Filling, origin: int = 0) -> torch.Tensor:
    """Writes what a call computed into columns `filling.first` ... of a store of latent columns.

    Args:
        stored: `(B, ..., columns, D)`; its first column is latent column `origin`.
        new: `(R, ..., K, D)`, one entry per row that runs and latent column of `filling`.

    Returns:
        `(B, ..., columns, D)`, long enough for `filling.last`. Pairs that `filling` does not fill keep what they had.
    """
    first, last = filling.first - origin, filling.last - origin
    if filling.fresh is None:
        return torch.cat([stored, new], dim=-2)
    grown = nn.functional.pad(stored, (0, 0, 0, max(0, last - stored.shape[-2])))
    rows = slice(None) if filling.rows is None else filling.rows
    fresh = filling.fresh.view(filling.fresh.shape[0], *[1] * (new.dim() - 3), -1, 1)
    merged = torch.where(fresh, new, grown[rows][..., first:last, :])
    block = grown[..., first:last, :].clone()
    block[rows] = merged
    return torch.cat([grown[..., :first, :], block, grown[..., last:, :]], dim=-2)


def write_one_column(stored: torch.Tensor, new: torch.Tensor, column: torch.Tensor, filling: Filling) -> None:
    """Writes `(B, ..., 1, D)` into one column (a tensor) of a store `(B, ..., columns, D)` of fixed address."""
    if filling.fresh is not None:
        fresh = filling.fresh.view(-1, *[1] * (new.dim() - 1))
        new = torch.where(fresh, new, stored.index_select(-2, column[None]))
    stored.index_copy_(-2, column[None], new)


class Level:
    """One resolution between calls: the tokens of the open chunks and the newest latents.

    Training, prefill and decoding are the same three steps: `feed` new token states, `store` the latents of the chunks
    that they fill, `read` the update of every new token.

    Args:
        grid (`ChunkGrid`): the level's chunks.
        cached (`bool`): keep what the next call needs. False for a forward without a cache, after which the level is
            dropped; it runs every row of a padded batch and reads nothing from the device.
    """

    def __init__(self, grid: ChunkGrid, cached: bool):
        self.grid = grid
        self.cached = cached
        self.recording = False
        self.right_padded = False
        self.mask_unchecked = False  # a compiled call took a mask whose values it could not look at
        self.unfinished = False  # a forward has begun and not ended: an error may have left any part half written
        self.padding: LeftPadding | None = None
        self.seen = 0  # columns of the batch so far
        self.tokens: torch.Tensor | None = None  # (B, n, D), the newest n columns
        self.latents: torch.Tensor | None = None  # (B, n, D), from latent column `first_latent` on
        self.first_latent = 0

    @property
    def skips_idle_rows(self) -> bool:
        """Whether rows of a padded batch that fill nothing are left out of the core."""
        return self.cached

    @property
    def rows(self) -> int:
        """B, the number of rows that are kept."""
        return self.tokens.shape[0]

    def feed(self, states: torch.Tensor) -> Filling | None:
        """Takes `(B, S, D)` new token states; returns what they fill, None where they fill nothing."""
        start, self.seen = self.seen, self.seen + states.shape[1]
        self.tokens = states if self.tokens is None else torch.cat([self.tokens, states], dim=1)
        return self.grid.filling(start, self.seen, self.padding, states.device, skip_idle=self.skips_idle_rows)

    def members(self, filling: Filling) -> torch.Tensor:
        """The token states `(R, K, G, D)` of the chunks filled; arbitrary but finite where no token is present."""
        window_start = self.seen - self.tokens.shape[1]
        size = self.grid.size
        if isinstance(filling.member_columns, int):
            start = filling.member_columns - window_start
            window = nn.functional.pad(self.tokens, (0, 0, -start, 0)) if start < 0 else self.tokens[:, start:]
            return window[:, : filling.count * size].unflatten(1, (-1, size))
        window = self.tokens if filling.rows is None else self.tokens[filling.rows]
        index = (filling.member_columns - window_start).clamp(0, window.shape[1] - 1)
        rows = torch.arange(window.shape[0], device=window.device).view(-1, 1, 1)
        return window[rows, index]

    def store(self, latents: torch.Tensor, filling: Filling) -> None:
        """Keeps the core's outputs `(R, K, D)` for the tokens that will read them."""
        if self.latents is None:
            self.first_latent = filling.first
            empty_shape = (self.tokens.shape[0], 0, latents.shape[-1])
            self.latents = latents.new_zeros(empty_shape) if filling.rows is not None else latents
            if filling.rows is None:
                return
        self.latents = write_columns(self.latents, latents, filling, origin=self.first_latent)

    def read(self, length: int, up: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The updates `(B, S, D)` of the newest `length` tokens, zero where a token has nothing to read yet.

        Args:
            up: the up-scaling, from latents `(B, K, D)` to the updates of their slots `(B, K * G, D)`.
        """
        start, first, readable = self.seen - length, self.first_latent, self.latents
        if self.cached and readable is not None:
            first = max(first, self.grid.first_kept_latent(start, self.padding))
            readable = readable[:, first - self.first_latent :]
        if readable is None or readable.shape[1] == 0:
            updates = torch.zeros_like(self.tokens[:, -length:])
        else:
            updates = self._shift(up(readable), first, start, length)
        if self.cached:
            self._trim()
        else:
            self.tokens = self.latents = None
        return updates

    def _shift(self, updates: torch.Tensor, first: int, start: int, length: int) -> torch.Tensor:
        """Picks the slot that each of `length` tokens from column `start` reads, out of latent columns `first` ..."""
        slots_before = first * self.grid.size
        if self.padding is None:
            before = min(max(0, self.grid.shift - start), length)  # tokens that would read before the first one
            position = self.grid.read_position(start + before, self.grid.phase(0)) - slots_before
            shifted = updates[:, position : position + length - before]
            return nn.functional.pad(shifted, (0, 0, before, 0)) if before else shifted
        pads = self.padding.columns[:, None]
        columns = torch.arange(start, start + length, device=updates.device)
        readable = columns - self.grid.shift >= pads
        position = self.grid.read_position(columns, self.grid.phase(pads)) - slots_before
        index = position.clamp(0, updates.shape[1] - 1)
        rows = torch.arange(updates.shape[0], device=updates.device)[:, None]
        return updates[rows, index] * readable[..., None].to(updates.dtype)

    def _trim(self) -> None:
        """Drops the states that no later call needs; clones, or a slice would keep the whole prefill alive."""
        if self.recording:
            return
        open_tokens = self.grid.open_tokens(self.seen, self.padding)
        if open_tokens < self.tokens.shape[1]:
            self.tokens = self.tokens[:, self.tokens.shape[1] - open_tokens :].clone()
        if self.latents is not None:
            kept = self.grid.first_kept_latent(self.seen, self.padding)
            if kept > self.first_latent:
                self.latents = self.latents[:, kept - self.first_latent :].clone()
                self.first_latent = kept

    # -- cache operations ---------------------------------------------------------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        """Goes back by `tokens_to_remove` columns. Raises `ValueError` where the states of that point are gone."""
        target = self.seen - tokens_to_remove
        padding = None if self.padding is None else self.padding.cropped(target)
        open_tokens = self.grid.open_tokens(target, padding)
        first_token = self.seen - self.tokens.shape[1]
        read = self.grid.first_read_latent(target, padding)
        tokens_gone = target < 0 or target - open_tokens < first_token
        if tokens_gone or (read is not None and read < self.first_latent):
            raise ValueError(
                f"`crop` must go back over tokens that the cache still covers, but got -{tokens_to_remove} after "
                f"{self.seen} tokens: the states of chunk size {self.grid.size} at that point are gone. Call "
                "`activate_past_recording()` before feeding the tokens that may be cropped."
            )
        self.tokens = self.tokens[:, target - open_tokens - first_token : target - first_token].clone()
        if self.latents is not None:
            # Columns before `first_latent` are read by nobody (checked above): room for what fills there next.
            kept = self.grid.first_kept_latent(target, padding)
            latents = nn.functional.pad(self.latents, (0, 0, max(0, self.first_latent - kept), 0))
            origin = min(self.first_latent, kept)
            self.latents = latents[:, kept - origin : self.grid.latent_columns(target, padding) - origin].clone()
            self.first_latent = kept
        self.padding, self.seen = padding, target

    def map_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Applies a change of the batch dimension (reorder, select, repeat) to all that is kept per row."""
        self.tokens = change(self.tokens)
        if self.latents is not None:
            self.latents = change(self.latents)
        if self.padding is not None:
            self.padding = LeftPadding(change(self.padding.columns))


class StaticLevel(Level):
    """A level in tensors of fixed size and address, so that a decode step compiles.

    Tokens and latents sit in rings: batch column a in slot a mod g, latent column c in slot c mod n. Python integers
    only choose whether the core runs; every position in a one-token step is a tensor. A padded batch runs all its rows
    at columns where any of them fills, and writes only those that do. Longer calls unpack the rings, go the way of
    `Level`, and pack them again.

    Args:
        max_tokens (`int`): columns of the batch that fit.
        states: `(B, 0, D)`, no states in the dtype and on the device of those to come.
    """

    def __init__(self, grid: ChunkGrid, max_tokens: int, states: torch.Tensor):
        super().__init__(grid, cached=True)
        self.max_tokens = max_tokens
        self.max_latents = -(-max_tokens // grid.size)
        latents_read = 2 + -(-(grid.shift - grid.size + 1) // grid.size)
        self.token_ring = states.new_zeros(states.shape[0], grid.size, states.shape[2])
        self.latent_ring = states.new_zeros(states.shape[0], latents_read, states.shape[2])
        self.column = torch.zeros((), dtype=torch.long, device=states.device)  # `seen`, for the compiled graph

    @property
    def skips_idle_rows(self) -> bool:
        return False

    @property
    def rows(self) -> int:
        return self.token_ring.shape[0]

    def feed(self, states: torch.Tensor) -> Filling | None:
        if states.shape[1] > 1:
            self._unpack()
            return super().feed(states)
        self.token_ring.index_copy_(1, (self.column % self.grid.size)[None], states)
        self.seen += 1
        distance = 1
        for pads in {0} if self.padding is None else set(self.padding.on_host):
            distance *= (self.seen - 1 - self.grid.phase(pads)) % self.grid.size
        # One condition on one product, or a compiled step would be compiled again for each row's phase on its own.
        if distance != 0:
            return None
        return self._filling_of_one_token()

    def _pads(self) -> torch.Tensor:
        """Left padding as a column vector `(B or 1, 1)`."""
        return self.column.new_zeros(1, 1) if self.padding is None else self.padding.columns[:, None]

    def _filling_of_one_token(self) -> Filling:
        pads, size = self._pads(), self.grid.size
        latent = self.column // size
        slots = torch.arange(size, device=pads.device)
        ring_columns = self.column - (self.column - slots) % size
        valid = fresh = None
        if self.padding is not None:
            latents = torch.arange(self.max_latents, device=pads.device)
            filled = latents * size + self.grid.phase(pads) <= self.column
            valid = filled & (latents >= self.grid.first_latent(pads))
            fresh = self.column % size == self.grid.phase(pads)
        return Filling(
            first=latent,
            last=self.max_latents,
            position_ids=(latent - self.grid.first_latent(pads)).clamp(min=0),
            member_columns=ring_columns,
            present=(ring_columns >= pads)[:, None],
            valid=valid,
            fresh=fresh,
        )

    def members(self, filling: Filling) -> torch.Tensor:
        if isinstance(filling.first, torch.Tensor):
            return self.token_ring[:, None]
        return super().members(filling)

    def store(self, latents: torch.Tensor, filling: Filling) -> None:
        if isinstance(filling.first, torch.Tensor):
            write_one_column(self.latent_ring, latents, filling.first % self.latent_ring.shape[1], filling)
        else:
            super().store(latents, filling)

    def read(self, length: int, up: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        if self.tokens is not None:
            return super().read(length, up)
        pads, size = self._pads(), self.grid.size
        position = self.grid.read_position(self.column, self.grid.phase(pads))
        rows = torch.arange(self.rows, device=pads.device)[:, None]
        latents = self.latent_ring[rows, position // size % self.latent_ring.shape[1]]
        updates = up(latents)[rows, position % size]
        readable = self.column - self.grid.shift >= pads
        self.column.add_(1)
        return updates * readable[..., None].to(updates.dtype)

    def _unpack(self) -> None:
        """Rings to the tensors in order that `Level` works on."""
        device = self.column.device
        open_tokens = self.grid.open_tokens(self.seen, self.padding)
        self.tokens = self.token_ring[
            :, torch.arange(self.seen - open_tokens, self.seen, device=device) % self.grid.size
        ]
        self.first_latent = self.grid.first_kept_latent(self.seen, self.padding)
        columns = torch.arange(self.first_latent, self.grid.latent_columns(self.seen, self.padding), device=device)
        self.latents = self.latent_ring[:, columns % self.latent_ring.shape[1]] if len(columns) else None

    def _trim(self) -> None:
        """Packs what the next call may need back into the rings."""
        device = self.column.device
        count = min(self.tokens.shape[1], self.grid.size)
        slots = torch.arange(self.seen - count, self.seen, device=device) % self.grid.size
        self.token_ring.index_copy_(1, slots, self.tokens[:, self.tokens.shape[1] - count :])
        if self.latents is not None:
            count = min(self.latents.shape[1], self.latent_ring.shape[1])
            last = self.first_latent + self.latents.shape[1]
            slots = torch.arange(last - count, last, device=device) % self.latent_ring.shape[1]
            self.latent_ring.index_copy_(1, slots, self.latents[:, self.latents.shape[1] - count :])
        self.tokens = self.latents = None
        self.column.fill_(self.seen)

    def map_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.token_ring, self.latent_ring = change(self.token_ring), change(self.latent_ring)
        if self.padding is not None:
            self.padding = LeftPadding(change(self.padding.columns))

    def reset(self) -> None:
        """Forgets every state and keeps the tensors."""
        self.seen, self.padding = 0, None
        self.right_padded = self.mask_unchecked = self.unfinished = False
        for state in (self.token_ring, self.latent_ring, self.column):
            state.zero_()


class SpiralFormerLatentLayer(DynamicLayer):
    """Keys and values over the latents of one (iteration, core layer); registered for `DynamicCache(config=...)`.

    The first core layer of an iteration owns its level, the others share it. A layer is built without arguments and
    meets its level when the model first uses the cache.
    """

    _layer_type = LATENT_LAYER_TYPE

    def __init__(self, **kwargs):
        super().__init__()
        self.level: Level | None = None
        self.owns_level = False
        self.record_past = False

    def attend(self, grid: ChunkGrid, owner: "SpiralFormerLatentLayer", empty: torch.Tensor) -> None:
        """Gets ready for its level's first tokens.

        Args:
            grid: the level's chunks.
            owner: the layer that owns the level, this one or the iteration's first.
            empty: `(B, H, 0, D // H)`, no keys in the dtype and on the device of those to come.
        """
        if owner is self:
            self.level, self.owns_level = Level(grid, cached=True), True
            self.level.recording = self.record_past
        self.level = owner.level
        self.lazy_initialization(empty, empty)
        self.keys, self.values = empty, empty

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
        if self.level is not None:
            self.level.recording = True

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
        forget(self)
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


class SpiralFormerStaticLatentLayer(StaticLayer):
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
        """Adds `(B, H, K, D // H)` keys and values; returns those of all latent columns up to `filling.last`."""
        if filling is None:
            raise ValueError("`filling` must say which chunks the keys belong to: this cache layer holds latents.")
        for stored, new in ((self.keys, key_states), (self.values, value_states)):
            if isinstance(filling.first, torch.Tensor):
                write_one_column(stored, new, filling.first, filling)
            else:
                columns = stored[..., filling.first : filling.last, :]
                columns.copy_(
                    new if filling.fresh is None else torch.where(filling.fresh[:, None, :, None], new, columns)
                )
        return self.keys[..., : filling.last, :], self.values[..., : filling.last, :]

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
    """Applies a change of the batch dimension to a layer's keys and values, and to the level where it owns one."""
    if layer.level is None:
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
        forget(layer)
        if isinstance(getattr(layer, "level", None), Level):
            layer.level = None


def holds_nothing(layer: DynamicLayer) -> bool:
    """Whether a layer's cache is new, cropped to nothing, or was reset, also by zeroing."""
    return layer.get_seq_length() == 0 or not (layer.keys.any() or layer.values.any())


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
        if not cache.is_compileable and cache.get_seq_length() == 0:
            restart(cache)
        return []
    expected = "`past_key_values` must be built for this model by DynamicCache(config=model.config)"
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
    if all(core[0].level is None or core[0].level.seen == 0 for core in cores) and holds_nothing(layers[0]):
        if not cache.is_compileable:
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
    if levels[0].seen and levels[0].rows != inputs_embeds.shape[0]:
        raise ValueError(f"`past_key_values` holds {levels[0].rows} rows, but the input has {inputs_embeds.shape[0]}.")
    if cache.is_compileable:
        held, size = levels[0].seen + inputs_embeds.shape[1], levels[0].max_tokens
        if held > size:
            raise ValueError(f"`past_key_values` is a static cache of max_cache_len {size}, but got token {held}.")
    else:
        seen = [level.seen for level in levels]
        if set(seen) != {cache.get_seq_length()}:
            raise ValueError(f"{expected} and whole, but its levels hold {seen} of {cache.get_seq_length()} tokens.")
    return levels


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


__all__ = ["Level", "SlotView", "SpiralFormerLatentLayer", "SpiralFormerStaticLatentLayer", "bind_levels"]
