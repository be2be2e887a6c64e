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
"""One resolution between calls: the tokens of its open chunks and its newest latents; and stores that grow.

Shape letters: B batch, R rows of the batch that run, S new tokens, K chunks (latents), G tokens in a chunk, D hidden
size.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers.utils.import_utils import is_torchdynamo_compiling

from .chunking_spiralformer import ChunkGrid, Documents, Filling, LeftPadding

# A store that grows gets room for this share of its columns more than it holds.
SPARE_SHARE = 1 / 64


def may_write(stored: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether `new` may be written into the memory of `stored`: one kind, and no gradients or graph recorded."""
    if stored.requires_grad or new.requires_grad or is_torchdynamo_compiling():
        return False
    if stored.dtype != new.dtype or stored.device != new.device:
        return False
    return torch.is_inference_mode_enabled() or not stored.is_inference()


def append_columns(stored: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """`torch.cat([stored, new], dim=-2)` that does not copy `stored` at every step, but leaves room for the next ones.

    Copying all keys for every token would take up to a third of a decode step. The result is a view of a longer
    tensor, its `room`. That goes with the newest view alone: what a cache operation puts in its place is copied first.

    Args:
        stored: `(B, ..., columns, D)`.
        new: `(B, ..., K, D)`.
    """
    held, total = stored.shape[-2], stored.shape[-2] + new.shape[-2]
    if held == 0 or stored.shape[:-2] != new.shape[:-2] or not may_write(stored, new):
        return torch.cat([stored, new], dim=-2)
    room = stored.__dict__.pop("room", None)
    if room is None or total > room.shape[-2]:
        room = stored.new_empty(*stored.shape[:-2], total + int(total * SPARE_SHARE), stored.shape[-1])
        room.narrow(-2, 0, held).copy_(stored)
    room.narrow(-2, held, total - held).copy_(new)
    grown = room.narrow(-2, 0, total)
    grown.room = room
    return grown


def write_columns(stored: torch.Tensor, new: torch.Tensor, filling: Filling, origin: int = 0) -> torch.Tensor:
    """Writes what a call computed into columns `filling.first` ... of latent columns; in place where it may.

    Args:
        stored: `(B, ..., columns, D)`; its first column is latent column `origin`.
        new: `(R, ..., K, D)`, one entry per row that runs and latent column of `filling`.

    Returns:
        `(B, ..., columns, D)`, long enough for `filling.last`. Pairs that `filling` does not fill keep what they had.
    """
    if filling.fresh is None:
        return append_columns(stored, new)
    first, last = filling.first - origin, filling.last - origin
    if last > stored.shape[-2]:
        missing = (*stored.shape[:-2], last - stored.shape[-2], stored.shape[-1])
        stored = append_columns(stored, stored.new_zeros(missing))
    if not may_write(stored, new):
        stored = stored.to(torch.promote_types(stored.dtype, new.dtype), copy=True)
    block = stored.narrow(-2, first, last - first)
    rows = slice(None) if filling.rows is None else filling.rows
    fresh = filling.fresh.view(filling.fresh.shape[0], *[1] * (new.dim() - 3), -1, 1)
    block[rows] = torch.where(fresh, new, block[rows])
    return stored


def copy_columns(
    stored: torch.Tensor, new: torch.Tensor, first: int | torch.Tensor, fresh: torch.Tensor | None
) -> None:
    """Writes `(B, ..., K, D)` into the columns from `first` on, of a store of fixed address.

    Args:
        stored: `(B, ..., columns, D)`.
        fresh: `(B or 1, K)`, False where a column keeps what it had; None where all are written.
    """
    count = new.shape[-2]
    if count == 1 and isinstance(first, torch.Tensor):
        columns = first[None]
    else:
        columns = torch.arange(count, device=new.device) + first
    if fresh is not None:
        new = torch.where(fresh.view(-1, *[1] * (new.dim() - 3), count, 1), new, stored.index_select(-2, columns))
    stored.index_copy_(-2, columns, new)


def read_slots(updates: torch.Tensor, position: torch.Tensor, readable: torch.Tensor) -> torch.Tensor:
    """`(B, S, D)` out of updates `(B, K * G, D)`: the one at `position` `(B or 1, S)`, zero if not `readable`."""
    index = position.clamp(0, updates.shape[1] - 1)
    rows = torch.arange(updates.shape[0], device=updates.device)[:, None]
    return updates[rows, index] * readable[..., None].to(updates.dtype)


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
        self.every_row = False  # adapters tell the rows of the batch apart: all of them run where one does
        self.padding: LeftPadding | None = None
        self.seen = 0  # columns of the batch so far
        self.tokens: torch.Tensor | None = None  # (B, n, D), the newest n columns
        self.latents: torch.Tensor | None = None  # (B, n, D), from latent column `first_latent` on
        self.first_latent = 0

    @property
    def rows(self) -> int:
        """B, the number of rows that are kept."""
        return self.tokens.shape[0]

    @property
    def is_new(self) -> bool:
        """Whether no column has been fed."""
        return self.seen == 0

    @property
    def settled(self) -> bool:
        """Whether every row has had a token: its padding is final then."""
        return self.seen > 0 and (self.padding is None or max(self.padding.on_host) < self.seen)

    @property
    def past(self) -> int | torch.Tensor:
        """How many columns of the batch there were before this call."""
        return self.seen

    @property
    def window_start(self) -> int | torch.Tensor:
        """The column of the oldest token state."""
        return self.seen - self.tokens.shape[1]

    def begin(self, length: int, padding: LeftPadding | None, right_padded: bool, every_row: bool) -> None:
        """A call of `length` tokens begins. Nothing is refused from here on: what fails now leaves parts unwritten."""
        self.padding, self.right_padded, self.every_row, self.unfinished = padding, right_padded, every_row, True

    def feed(self, states: torch.Tensor) -> Filling | None:
        """Takes `(B, S, D)` new token states; returns what they fill, None where they fill nothing."""
        start, self.seen = self.seen, self.seen + states.shape[1]
        self.tokens = states if self.tokens is None else torch.cat([self.tokens, states], dim=1)
        return self.grid.filling(
            start, self.seen, self.padding, states.device, skip_idle=self.cached, every_row=self.every_row
        )

    def members(self, filling: Filling) -> torch.Tensor:
        """The token states `(R, K, G, D)` of the chunks filled; arbitrary but finite where no token is present."""
        size = self.grid.size
        if isinstance(filling.member_columns, int):
            start = filling.member_columns - self.window_start
            window = nn.functional.pad(self.tokens, (0, 0, -start, 0)) if start < 0 else self.tokens[:, start:]
            return window[:, : filling.count * size].unflatten(1, (-1, size))
        window = self.tokens if filling.rows is None else self.tokens[filling.rows]
        index = (filling.member_columns - self.window_start).clamp(0, window.shape[1] - 1)
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
        # What is there may be among the hidden states that a forward returned: only a copy is written to.
        stored = self.latents if filling.fresh is None else self.latents.clone()
        self.latents = write_columns(stored, latents, filling, origin=self.first_latent)

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
        return read_slots(updates, position, readable)

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


class PackedLevel(Level):
    """A level of packed rows, for one forward without a cache: no chunk and no read leaves its document."""

    def __init__(self, grid: ChunkGrid, documents: Documents):
        super().__init__(grid, cached=False)
        self.documents = documents

    def feed(self, states: torch.Tensor) -> Filling | None:
        self.seen, self.tokens = states.shape[1], states
        return self.grid.packed_filling(self.documents)

    def _shift(self, updates: torch.Tensor, first: int, start: int, length: int) -> torch.Tensor:
        return read_slots(updates, *self.grid.packed_reads(self.documents))


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


class StaticLevel(Level):
    """A level in tensors of fixed size and address, so that calls compile.

    Tokens and latents sit in rings: batch column a in slot a mod g, latent column c in slot c mod n. All positions are
    tensors, and shapes depend on the number of new tokens alone. Python decides no more than whether the core runs in
    a one-token step. A padded batch runs all its rows where any of them fills, and writes only those that do. Calls
    of several tokens run as many latent columns as they could fill at most, and write those that they do.

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
        self.column = torch.zeros(
            (), dtype=torch.long, device=states.device
        )  # `seen`, which a compiled call cannot set
        self._restart()

    def _restart(self) -> None:
        self.seen: int | None = 0  # None once compiled calls have moved `column`
        self.padding = None
        self.begun = self.final_padding = False
        self.right_padded = self.mask_unchecked = self.unfinished = False
        self.tokens = self.latents = None
        self.turn: Turn | None = self._turn({0})  # None where only the device knows the padding: every column may fill

    def _turn(self, pads: set[int]) -> Turn:
        """The turn of the next column, where rows have that padding."""
        phases, size = {self.grid.phase(p) for p in pads}, self.grid.size
        return Turn.round([(self.seen + i) % size in phases for i in range(size)])

    @property
    def rows(self) -> int:
        return self.token_ring.shape[0]

    @property
    def is_new(self) -> bool:
        return not self.begun

    @property
    def settled(self) -> bool:
        return self.final_padding

    @property
    def past(self) -> int | torch.Tensor:
        return self.column if is_torchdynamo_compiling() else self.seen

    @property
    def window_start(self) -> torch.Tensor:
        return self.column - self.grid.size

    def begin(self, length: int, padding: LeftPadding | None, right_padded: bool, every_row: bool) -> None:
        self.begun = True
        super().begin(length, self.padding if self.final_padding else padding, right_padded, every_row)
        if not is_torchdynamo_compiling():
            self.settle(length)
        elif self.padding is None:
            self.final_padding = True
        elif not self.final_padding:
            self.turn = None

    def settle(self, length: int = 0) -> None:
        """Looks at the padding once it is final after `length` more tokens, to know at which columns rows fill."""
        if self.final_padding:
            return
        pads = {0} if self.padding is None else set(self.padding.on_host)
        self.turn, self.final_padding = self._turn(pads), max(pads) < self.seen + length

    def feed(self, states: torch.Tensor) -> Filling | None:
        length, size = states.shape[1], self.grid.size
        fills = length > 1 or self.turn is None or self.turn.fills
        if self.turn is not None:
            for _ in range(length % size):
                self.turn = self.turn.next
        self.seen = None if is_torchdynamo_compiling() else self.seen + length
        if length == 1:
            self.token_ring.index_copy_(1, (self.column % size)[None], states)
            return self._filling_of_one_token() if fills else None
        past = self.column + torch.arange(size, device=states.device)
        self.tokens = torch.cat([self.token_ring[:, past % size], states], dim=1)
        self.token_ring.index_copy_(1, (past + length) % size, self.tokens[:, -size:])
        return self._filling(length)

    def _pads(self) -> torch.Tensor:
        """Left padding as a column vector `(B or 1, 1)`."""
        return self.column.new_zeros(1, 1) if self.padding is None else self.padding.columns[:, None]

    def _valid(self, end: torch.Tensor) -> torch.Tensor | None:
        """Where latent columns are filled after `end` columns, `(B, max_latents)`; None where rows agree."""
        if self.padding is None:
            return None
        pads, latents = self._pads(), torch.arange(self.max_latents, device=self.column.device)
        filled = latents * self.grid.size + self.grid.phase(pads) < end
        return filled & (latents >= self.grid.first_latent(pads))

    def _filling_of_one_token(self) -> Filling:
        pads, size = self._pads(), self.grid.size
        latent = self.column // size
        ring_columns = self.column - (self.column - torch.arange(size, device=pads.device)) % size
        return Filling(
            first=latent,
            last=self.max_latents,
            position_ids=(latent - self.grid.first_latent(pads)).clamp(min=0),
            member_columns=ring_columns,
            present=(ring_columns >= pads)[:, None],
            valid=self._valid(self.column + 1),
            fresh=None if self.padding is None else self.column % size == self.grid.phase(pads),
        )

    def _filling(self, length: int) -> Filling:
        """As many latent columns as `length` tokens can touch, moved back where they would pass the last column."""
        pads, size, end = self._pads(), self.grid.size, self.column + length
        count = min((length + size - 2) // size + 1, self.max_latents)
        if self.seen is None:
            first = (self.column // size).clamp(max=self.max_latents - count)
        else:  # an integer where it is known: in eager calls the library looks at it
            first = min((self.seen - length) // size, self.max_latents - count)
        latents = first + torch.arange(count, device=pads.device)
        fill_columns = latents * size + self.grid.phase(pads)
        member_columns = fill_columns[..., None] + torch.arange(1 - size, 1, device=pads.device)
        return Filling(
            first=first,
            last=self.max_latents,
            position_ids=(latents - self.grid.first_latent(pads)).clamp(min=0),
            member_columns=member_columns,
            present=member_columns >= pads[..., None],
            valid=self._valid(end),
            fresh=(fill_columns >= self.column) & (fill_columns < end),
        )

    def members(self, filling: Filling) -> torch.Tensor:
        return self.token_ring[:, None] if self.tokens is None else super().members(filling)

    def store(self, latents: torch.Tensor, filling: Filling) -> None:
        kept = self.latent_ring.shape[1]
        if self.tokens is None:
            copy_columns(self.latent_ring, latents, filling.first % kept, filling.fresh)
            return
        count, length = latents.shape[1], self.tokens.shape[1] - self.grid.size
        self.first_latent = filling.first - kept
        columns = self.first_latent + torch.arange(kept + count, device=latents.device)
        stored = self.latent_ring[:, columns % kept]
        new = torch.where(filling.fresh[..., None], latents, stored[:, kept:])
        self.latents = torch.cat([stored[:, :kept], new], dim=1)
        newest = (self.column + length - 1) // self.grid.size - torch.arange(kept, device=latents.device)
        self.latent_ring.index_copy_(1, newest % kept, self.latents[:, newest - self.first_latent])

    def read(self, length: int, up: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        pads, size = self._pads(), self.grid.size
        if self.tokens is None:
            position = self.grid.read_position(self.column, self.grid.phase(pads))
            rows = torch.arange(self.rows, device=pads.device)[:, None]
            latents = self.latent_ring[rows, position // size % self.latent_ring.shape[1]]
            readable = self.column - self.grid.shift >= pads
            updates = up(latents)[rows, position % size] * readable[..., None].to(latents.dtype)
        else:
            columns = self.column + torch.arange(length, device=pads.device)
            position = self.grid.read_position(columns, self.grid.phase(pads)) - self.first_latent * size
            updates = read_slots(up(self.latents), position, columns - self.grid.shift >= pads)
        self.tokens = self.latents = None
        self.column.add_(length)
        return updates

    def map_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.token_ring, self.latent_ring = change(self.token_ring), change(self.latent_ring)
        if self.padding is not None:
            self.padding = LeftPadding(change(self.padding.columns))

    def reset(self) -> None:
        """Forgets every state and keeps the tensors."""
        self._restart()
        for state in (self.token_ring, self.latent_ring, self.column):
            state.zero_()


__all__ = ["Level", "PackedLevel", "StaticLevel", "append_columns", "copy_columns", "write_columns"]
