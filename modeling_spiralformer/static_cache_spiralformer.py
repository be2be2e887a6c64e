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
"""The static cache: states and cache entries in tensors of fixed size and address, so that calls compile.

Registered for `StaticCache`, which `generate(cache_implementation="static")` builds. Shape letters as in
`level_spiralformer`.
"""

from dataclasses import replace
from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache, StaticLayer
from transformers.utils.import_utils import is_torchdynamo_compiling

from .batch_spiralformer import Columns, MaybeNone, RowChange, Rows
from .cache_name_spiralformer import CACHE_ARGUMENT
from .chunking_spiralformer import ChunkGrid, FilledChunks
from .configuration_spiralformer import LATENT_LAYER_TYPE, TOKEN_LAYER_TYPE
from .level_spiralformer import LatentEntry, ResolutionState, pick_places
from .storage_spiralformer import copy_columns


class Turn:
    """A place in the round of g columns: whether a row fills a chunk there, and the turn of the next column.

    A compiled step looks at the turn and goes on to the next: it is compiled once for each set of levels that fill
    together. If it looked at a count of columns, it would be compiled again for every count.
    """

    def __init__(self, fills: bool):
        self.fills = fills
        self.next = self

    @classmethod
    def round(cls, fills: list[bool]) -> "Turn":
        """The first of a round of turns."""
        first = last = cls(fills[0])
        for fill in fills[1:]:
            last.next = cls(fill)
            last = last.next
        last.next = first
        return first

    def __reduce__(self):
        """Copies and pickles as a list: a chain would be followed by recursion."""
        fills, turn = [self.fills], self.next
        while turn is not self:
            fills.append(turn.fills)
            turn = turn.next
        return Turn.round, (fills,)


class StaticState(ResolutionState):
    """A resolution's state in tensors of fixed size and address.

    Tokens and latents sit in rings: batch column a has ring index a mod g, latent column c the index c mod n. All
    positions are tensors, and shapes depend on the number of new tokens alone. Python decides no more than whether the
    core runs in a one-token step. A padded batch runs all its rows where any of them fills, and writes only those that
    do. Calls of several tokens run as many latent columns as they could fill at most, and write those that they do.

    Args:
        max_tokens (`int`): columns of the batch that fit.
        states: `(B, 0, D)`, no states in the dtype and on the device of those to come.
    """

    def __init__(self, grid: ChunkGrid, rows: Rows, max_tokens: int, states: torch.Tensor):
        super().__init__(grid, rows, cached=True)
        self.max_tokens = max_tokens
        self.max_latents = -(-max_tokens // grid.size)
        latents_read = 2 + -(-(grid.shift - grid.size + 1) // grid.size)
        self.token_ring = states.new_zeros(states.shape[0], grid.size, states.shape[2])
        self.latent_ring = states.new_zeros(states.shape[0], latents_read, states.shape[2])
        # `seen`, which a compiled call cannot set
        self.column = torch.zeros((), dtype=torch.long, device=states.device)
        self._restart()

    def _restart(self) -> None:
        self.seen: int | MaybeNone = 0  # None once compiled calls have moved `column`
        self.begun = False  # a compiled call that looked at `seen` instead would be compiled for every prompt length
        self.final_padding = False
        self.tokens = self.latents = None  # of a call of several tokens, while it goes on
        self.turn: Turn | None = self._turn({0})  # None where only the device knows the padding: every column may fill

    def _turn(self, pads: set[int]) -> Turn:
        """The turn of the next column, where rows have that padding."""
        phases, size = {self.grid.phase(p) for p in pads}, self.grid.size
        return Turn.round([(self.seen + i) % size in phases for i in range(size)])

    @property
    def num_rows(self) -> int:
        return self.token_ring.shape[0]

    @property
    def is_new(self) -> bool:
        return not self.begun

    @property
    def settled(self) -> bool:
        return self.final_padding

    @property
    def past(self) -> Columns:
        return self.column if is_torchdynamo_compiling() else self.seen

    @property
    def first_token(self) -> torch.Tensor:
        return self.column - self.grid.size

    # -- a call -------------------------------------------------------------------------------------------------

    def _begin(self, length: int) -> None:
        """Before `length` tokens: what is known of the padding, for Python to look at."""
        self.begun = True
        if not is_torchdynamo_compiling():
            _read_column([self])  # the rest of the call may be compiled: torch compiles a call in parts where it must
            self.settle(length)
        elif self.rows.padding is None:
            self.final_padding = True
        elif not self.final_padding:
            self.turn = None

    def settle(self, length: int = 0) -> None:
        """Looks at the padding once it is final after `length` more tokens, to know at which columns rows fill."""
        if self.final_padding:
            return
        pads = {0} if self.rows.padding is None else set(self.rows.padding.on_host)
        self.turn, self.final_padding = self._turn(pads), max(pads) < self.seen + length

    def take_turn(self, length: int) -> bool:
        """What Python keeps of a call of `length` tokens goes on by them; returns whether any row may fill a chunk."""
        self._begin(length)
        fills = length > 1 or self.turn is None or self.turn.fills
        if self.turn is not None:
            for _ in range(length % self.grid.size):
                self.turn = self.turn.next
        self.seen = None if is_torchdynamo_compiling() else self.seen + length
        return fills

    def feed(self, states: torch.Tensor) -> FilledChunks | None:
        length, size = states.shape[1], self.grid.size
        fills = self.take_turn(length)
        if length == 1:
            self.write_token(states)
            return self._filled_by_one_token() if fills else None
        past = self.column + torch.arange(size, device=states.device)
        self.tokens = torch.cat([self.token_ring[:, past % size], states], dim=1)
        self.token_ring.index_copy_(1, (past + length) % size, self.tokens[:, -size:])
        return self._filled_by(length)

    def write_token(self, states: torch.Tensor) -> None:
        """One token `(B, 1, D)` into its ring."""
        if (column := self._known_column()) is not None:
            self.token_ring[:, column % self.grid.size] = states[:, 0]
        else:
            self.token_ring.index_copy_(1, (self.column % self.grid.size)[None], states)

    def _known_column(self) -> int | None:
        """The column of the newest token after `take_turn`, where Python knows it and rows agree: nothing is computed
        on the device then to know a place."""
        if is_torchdynamo_compiling() or self.rows.padding is not None or self.seen is None:
            return None  # a graph that looked at `seen` would be of one column
        return self.seen - 1

    def _fills_at(self, column: int) -> bool:
        """Whether a chunk fills at that column, where rows agree."""
        return column % self.grid.size == self.grid.phase(0)

    def _pads(self) -> torch.Tensor:
        """Left padding as a column vector `(B or 1, 1)`."""
        padding = self.rows.padding
        return self.column.new_zeros(1, 1) if padding is None else padding.columns[:, None]

    def _valid(self, end: torch.Tensor) -> torch.Tensor | None:
        """Where latent columns are filled after `end` columns, `(B, max_latents)`; None where rows agree."""
        if self.rows.padding is None:
            return None
        pads, latents = self._pads(), torch.arange(self.max_latents, device=self.column.device)
        is_filled = latents * self.grid.size + self.grid.phase(pads) < end
        return is_filled & (latents >= self.grid.first_latent(pads))

    def _filled_by_one_token(self) -> FilledChunks:
        if (column := self._known_column()) is not None:
            return self._filled_at(column)
        pads, size = self._pads(), self.grid.size
        latent = self.column // size
        ring_columns = self.column - (self.column - torch.arange(size, device=pads.device)) % size
        return FilledChunks(
            first=latent,
            end=self.max_latents,
            position_ids=(latent - self.grid.first_latent(pads)).clamp(min=0),
            member_columns=ring_columns,
            present=(ring_columns >= pads)[:, None],
            valid=self._valid(self.column + 1),
            new=None if self.rows.padding is None else self.column % size == self.grid.phase(pads),
        )

    def _filled_at(self, column: int) -> FilledChunks:
        """The same of a column that Python knows, where rows agree: with as few kernels as there can be."""
        size, device = self.grid.size, self.column.device
        latent, first_member = column // size, column + 1 - size
        present = None
        if first_member < 0:
            present = (torch.arange(size, device=device) <= column).view(1, 1, size)  # of a ring that is not full yet
        return FilledChunks(
            first=torch.full((), latent, device=device),
            end=self.max_latents,
            position_ids=torch.full((1, 1), latent, device=device),
            member_columns=first_member,
            present=present,
        )

    def _filled_by(self, length: int) -> FilledChunks:
        """As many latent columns as `length` tokens can touch, moved back where they would pass the last column."""
        pads, size, end = self._pads(), self.grid.size, self.column + length
        count = min((length + size - 2) // size + 1, self.max_latents)
        if self.seen is None:
            first: Columns = (self.column // size).clamp(max=self.max_latents - count)
        else:  # an integer where it is known: in eager calls the library looks at it
            first = min((self.seen - length) // size, self.max_latents - count)
        latents = first + torch.arange(count, device=pads.device)
        fill_columns = latents * size + self.grid.phase(pads)
        member_columns = fill_columns[..., None] + torch.arange(1 - size, 1, device=pads.device)
        return FilledChunks(
            first=first,
            end=self.max_latents,
            position_ids=(latents - self.grid.first_latent(pads)).clamp(min=0),
            member_columns=member_columns,
            present=member_columns >= pads[..., None],
            valid=self._valid(end),
            new=(fill_columns >= self.column) & (fill_columns < end),
        )

    def members(self, filled: FilledChunks) -> torch.Tensor:
        return self.token_ring[:, None] if self.tokens is None else super().members(filled)

    def store(self, latents: torch.Tensor, filled: FilledChunks) -> None:
        kept, latents = self.latent_ring.shape[1], latents.to(self.latent_ring.dtype)
        if self.tokens is None and (column := self._known_column()) is not None:
            if self._fills_at(column):
                self.latent_ring[:, column // self.grid.size % kept] = latents[:, 0]
            return
        if self.tokens is None:
            copy_columns(self.latent_ring, latents, filled.first % kept, filled.new)
            return
        count, length = latents.shape[1], self.tokens.shape[1] - self.grid.size
        self.first_latent = filled.first - kept
        columns = self.first_latent + torch.arange(kept + count, device=latents.device)
        stored = self.latent_ring[:, columns % kept]
        new = torch.where(filled.new[..., None], latents, stored[:, kept:])  # type: ignore[index]
        self.latents = torch.cat([stored[:, :kept], new], dim=1)
        newest = (self.column + length - 1) // self.grid.size - torch.arange(kept, device=latents.device)
        self.latent_ring.index_copy_(1, newest % kept, self.latents[:, newest - self.first_latent])

    def readable(self, length: int) -> torch.Tensor:
        if self.tokens is not None:
            return self.latents
        if (column := self._known_column()) is not None:
            latent = self.grid.read_position(column, self.grid.phase(0)) // self.grid.size
            return self.latent_ring[:, latent % self.latent_ring.shape[1], None].clone()  # a later step writes there
        place = self.grid.read_position(self.column, self.grid.phase(self._pads()))
        rows = torch.arange(self.num_rows, device=place.device)[:, None]
        return self.latent_ring[rows, place // self.grid.size % self.latent_ring.shape[1]]

    def shift(self, updates: torch.Tensor | MaybeNone, length: int) -> torch.Tensor:
        size = self.grid.size  # something is always `readable` here: there are updates
        if self.tokens is None and (column := self._known_column()) is not None:
            if column < self.grid.shift:
                return torch.zeros_like(updates[:, :1])
            return updates[:, self.grid.read_position(column, self.grid.phase(0)) % size, None]
        pads = self._pads()
        if self.tokens is None:
            place = self.grid.read_position(self.column, self.grid.phase(pads))
            rows = torch.arange(self.num_rows, device=pads.device)[:, None]
            is_readable = self.column - self.grid.shift >= pads
            return updates[rows, place % size] * is_readable[..., None].to(updates.dtype)
        columns = self.column + torch.arange(length, device=pads.device)
        places = self.grid.read_position(columns, self.grid.phase(pads)) - self.first_latent * size
        return pick_places(updates, places, columns - self.grid.shift >= pads)

    def trim(self, length: int) -> None:
        """Ends a call of `length` tokens: time moves."""
        self.tokens = self.latents = None
        self.column.add_(length)

    # -- a step whose parts are compiled, after `take_turn` -------------------------------------------------------

    def filled_by_token(self) -> FilledChunks:
        """The latent that the newest token fills, and in which rows: in none of them it may be, too."""
        if (column := self._known_column()) is not None:
            fills = torch.full((1, 1), self._fills_at(column), device=self.column.device)
            return replace(self._filled_at(column), new=fills)  # a compiled core is given one in every step
        pads, filled = self._pads(), self._filled_by_one_token()
        phase = self.grid.phase(pads)
        filled = replace(filled, new=self.column % self.grid.size == phase)
        if self.rows.padding is None:
            return filled
        last = self.grid.opened(self.column + 1, phase) - 1
        return replace(filled, valid=torch.cat([self.grid.first_latent(pads), last], dim=1))

    # -- cache operations ---------------------------------------------------------------------------------------

    def map_rows(self, change: RowChange) -> None:
        self.token_ring, self.latent_ring = change(self.token_ring), change(self.latent_ring)

    def reset(self) -> None:
        """Forgets every state and keeps the tensors."""
        self._restart()
        for tensor in (self.token_ring, self.latent_ring, self.column):
            tensor.zero_()


class UncroppableLayer(StaticLayer):
    """A layer of a static cache, whose latents know no way back: states of fixed size keep no past."""

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
    keys: Any  # tensors, once there are any
    values: Any

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """As the library does; keys of another dtype, those of autocast, are kept in that of the first ones.

        What autocast rounded is read in the dtype of a call without it.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.to(self.keys.dtype), value_states.to(self.values.dtype)
        keys, values = super().update(*new, *args, **kwargs)
        wider = (
            torch.promote_types(keys.dtype, key_states.dtype),
            torch.promote_types(values.dtype, value_states.dtype),
        )
        return keys.to(wider[0]), values.to(wider[1])


class SpiralFormerStaticLatentLayer(LatentEntry, UncroppableLayer):
    """Keys and values over the latents of one (iteration, core layer), of fixed size; for `StaticCache`."""

    _layer_type = LATENT_LAYER_TYPE
    supports_early_init = False  # it does not know its chunk size before the model first uses it
    state: StaticState | MaybeNone  # None before `bind`

    def __init__(self, max_cache_len: int, **kwargs):
        super().__init__(max_cache_len=max_cache_len)

    def bind(
        self,
        grid: ChunkGrid,
        owner: "SpiralFormerStaticLatentLayer",
        rows: Rows,
        states: torch.Tensor,
        heads: tuple[int, int],
    ) -> None:
        """As for the dynamic layer: gets ready for its state's first tokens, allocating everything."""
        if self.state is not None and fits(self.keys, states):
            return
        if owner is self:
            self.state, self.owns_state = StaticState(grid, rows, self.max_cache_len, states), True
        self.state = state = owner.state
        shape = (states.shape[0], heads[0], state.max_latents, heads[1])
        self.keys, self.values = states.new_zeros(shape), states.new_zeros(shape)
        self.dtype, self.device, self.batch_size = states.dtype, states.device, states.shape[0]
        self.is_initialized = True
        if not is_torchdynamo_compiling():
            for tensor in (self.keys, self.values, state.token_ring, state.latent_ring, state.column):
                torch._dynamo.mark_static_address(tensor)
            for tensor in (self.keys, self.values):
                torch._dynamo.maybe_mark_dynamic(tensor, 2)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, filled: FilledChunks | None = None, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds `(B, H, K, E)` keys and values; returns those of all latent columns."""
        if filled is None:
            raise ValueError("`filled` must say which chunks the keys belong to: this cache layer holds latents.")
        for stored, new in ((self.keys, key_states), (self.values, value_states)):
            copy_columns(stored, new.to(stored.dtype), filled.first, filled.new)
        return self.keys, self.values

    @property
    def cumulative_length(self) -> NoReturn:
        """Raises `ValueError`: whoever asks for it wants to set it, and the latents would stay where they are."""
        raise ValueError(
            "A static cache of latents must not be rewound by its `cumulative_length`, as the wrappers of the library "
            "for ExecuTorch do: call reset(), and export without a cache."
        )

    @cumulative_length.setter
    def cumulative_length(self, value: Columns) -> None:
        """Of the library's constructor; the state counts."""

    def get_seq_length(self) -> Columns:
        """The number of latent columns that unpadded rows have filled."""
        return 0 if self.state is None else self.state.grid.num_filled(self.state.column)

    def reset(self) -> None:
        """Forgets every state and keeps the tensors."""
        if self.state is None:
            return
        self.keys.zero_()
        self.values.zero_()
        if self.owns_state:
            self.state.reset()
        if self.owns_rows:
            self.state.rows.reset()


def fits(stored: Any, states: torch.Tensor) -> bool:
    """Whether a store was made for as many rows of the dtype and on the device of `states`, and may be written to."""
    same = stored.shape[0] == states.shape[0] and stored.dtype == states.dtype and stored.device == states.device
    if is_torchdynamo_compiling():  # a graph has no inference mode
        return same
    return same and (torch.is_inference_mode_enabled() or not stored.is_inference())


def fit_static_layers(cache: Cache, states: torch.Tensor) -> None:
    """Lets a static cache that holds no token go on with rows `(B, S, D)` of another number or kind: its token layers
    allocate anew."""
    layers: list[Any] = cache.layers  # more than the library's union of layers has in common
    for layer in layers:
        if getattr(layer, "_layer_type", None) == TOKEN_LAYER_TYPE and layer.is_initialized:
            layer.is_initialized = fits(layer.keys, states)


def check_room(states: list[StaticState], length: int) -> None:
    """Refuses `length` more tokens than fit; compiled calls leave that to the device.

    Raises:
        `ValueError`: naming the size of the cache.
    """
    size = states[0].max_tokens
    if is_torchdynamo_compiling():
        torch._assert_async(states[0].column + length <= size, f"{CACHE_ARGUMENT} is full: see its max_cache_len")
        return
    _read_column(states)
    check_size(states[0].seen + length, size)


def check_size(held: int, size: int) -> None:
    """Raises `ValueError` where a static cache of so many tokens would hold more."""
    if held > size:
        raise ValueError(f"{CACHE_ARGUMENT} is a static cache of max_cache_len {size}, but got token {held}.")


def settle_states(cache: Cache) -> None:
    """Looks at the padding that a compiled prefill left on the device: until then every level runs at every column."""
    layers: list[Any] = cache.layers
    states = [layer.state for layer in layers if getattr(layer, "owns_state", False)]
    if states:
        _read_column(states)
    for state in states:
        state.settle()


def _read_column(states: list[StaticState]) -> None:
    """Reads from the device how many columns compiled calls have fed, where they have: one read for all states."""
    if states[0].seen is None:
        seen = int(states[0].column)
        for state in states:
            state.seen = seen


__all__ = [
    "SpiralFormerStaticLatentLayer",
    "SpiralFormerStaticTokenLayer",
    "StaticState",
    "Turn",
    "check_room",
    "check_size",
    "fit_static_layers",
    "settle_states",
]
