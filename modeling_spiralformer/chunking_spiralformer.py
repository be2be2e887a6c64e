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
"""Chunk geometry: which tokens a chunk holds, when it fills, who reads it. Pure functions, no weights.

Shape letters: B batch, R rows of the batch that run, S new tokens, K chunks (latents), G tokens in a chunk.

Everything is written over the columns of a padded batch. A row with p columns of left padding has its token i in
column a = p + i, and its chunk j fills at the column a of its last member. All chunks of a row fill at the same place
of a window of g columns, its phase e = (p - 1 - w) mod g, so the chunk that fills at column a is given the latent
column a // g: each row has at most one filling per window, latent columns never collide, and unpadded rows waste none.
The members of latent column c are the batch columns c*g + e - g + 1 ... c*g + e. `docs/cache.md` draws it.

Packed rows, where documents follow each other, have no one phase: their filled chunks get latent columns in the order
in which they fill.
"""

from dataclasses import dataclass
from functools import cached_property

import torch


class LeftPadding:
    """Leading columns of padding in each row of a batch; a batch without any has None in its place.

    Args:
        columns (`torch.LongTensor` of shape `(B,)`): how many leading columns of each row are padding.
    """

    def __init__(self, columns: torch.Tensor):
        self.columns = columns

    @cached_property
    def on_host(self) -> list[int]:
        """The same as Python integers: one read from the device, made once for each batch."""
        return self.columns.tolist()

    def cropped(self, columns: int) -> "LeftPadding":
        """The padding that is left of a batch cut back to its first `columns` columns."""
        return LeftPadding(self.columns.clamp(max=columns))

    def real_columns(self, columns: int) -> torch.Tensor:
        """A `(B, columns)` boolean mask, True where a column holds a token."""
        return torch.arange(columns, device=self.columns.device) >= self.columns[:, None]


class Documents:
    """The texts of packed rows, which follow each other without padding.

    Args:
        position_ids (`torch.LongTensor` of shape `(B or 1, S)`): the place of each token in its document.

    Raises:
        `ValueError`: where a document does not count 0, 1, 2, ...
    """

    def __init__(self, position_ids: torch.Tensor):
        self.position_ids = position_ids
        self.on_host = position_ids.cpu()  # one read from the device for all levels
        before = self.on_host.new_full((len(position_ids), 1), -1)
        wrong = (self.on_host != 0) & (self.on_host.diff(dim=-1, prepend=before) != 1)
        if wrong.any():
            row, column = wrong.nonzero()[0].tolist()
            raise ValueError(
                "`position_ids` of packed rows must count 0, 1, 2, ... in each document, but row "
                f"{row} has {self.on_host[row, max(0, column - 1) : column + 1].tolist()} up to column {column}."
            )


@dataclass(frozen=True)
class Filling:
    """The chunks of one level that one call completes: latent columns `first` to `last` (excluded).

    Where rows agree (no padding) `member_columns` is an integer, and `rows`, `valid` and `fresh` are None. In a padded
    batch some of the (row, column) pairs are not filled by this call: they are computed along and left out, by `fresh`
    when written to a cache and by `valid` when attended to.

    Args:
        rows: `(R,)` the rows of the batch that run, or None for all of them.
        position_ids: `(R or 1, K)` chunk index of each latent, its rotary position.
        member_columns: `(R or 1, K, G)` batch column of each member, or the int column of the first member of `first`.
            A one-token step of a static cache has `first` as a 0-dim tensor and `last` as the size of its store.
        present: `(R or 1, K, G)` True where that member is a token of the row; None where all are.
        valid: `(R, last)` True where a latent column is filled in that row; None where all are.
        fresh: `(R, K)` True where this call fills that pair; None where it fills all.
        packed: whether `position_ids` restart, and latents attend only to those of their own document.
    """

    first: int | torch.Tensor
    last: int
    position_ids: torch.Tensor
    member_columns: torch.Tensor | int
    present: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    valid: torch.Tensor | None = None
    fresh: torch.Tensor | None = None
    packed: bool = False

    @property
    def count(self) -> int:
        """K, the number of latent columns that run."""
        return self.last - self.first


@dataclass(frozen=True)
class ChunkGrid:
    """The chunks of one level: size g, offset w, causal shift s (paper, Chunks and Causal shift).

    The methods that take `pads` or `phase` work on Python integers and on tensors alike.
    """

    size: int
    offset: int
    shift: int

    def phase(self, pads):
        """e: the chunks of a row with `pads` columns of padding fill at the columns a with a mod g = e."""
        return (pads - 1 - self.offset) % self.size

    def first_latent(self, pads):
        """The latent column of a row's first chunk."""
        return (pads + self.size - 1 - self.offset) // self.size

    def opened(self, columns, phase):
        """How many latent columns a row with that phase has passed after `columns` batch columns."""
        return (columns - phase + self.size - 1) // self.size

    def read_position(self, column, phase):
        """Where column `column` reads (its own column less the shift), in slots counted from latent column 0."""
        return column - self.shift - phase + self.size - 1

    # -- what one call fills ------------------------------------------------------------------------------------

    def filling(
        self,
        start: int,
        end: int,
        padding: LeftPadding | None,
        device: torch.device,
        skip_idle: bool,
        every_row: bool = False,
    ) -> Filling | None:
        """What the tokens in batch columns `start` to `end` (excluded) fill.

        Args:
            padding: the batch's left padding, None where there is none.
            skip_idle: leave out the rows of a padded batch that fill nothing. Otherwise all rows run, and no value is
                read from the device.
            every_row: run all rows where one fills something, whatever `skip_idle` says.

        Returns:
            None where no row fills anything.
        """
        if padding is None:
            return self._filling_of_agreeing_rows(start, end, device)
        pads, rows = padding.columns, None
        first, last = start // self.size, -(-end // self.size)
        if skip_idle:
            spans = [self._span(start, end, p) for p in padding.on_host]
            busy = [row for row, (first_row, last_row) in enumerate(spans) if first_row < last_row]
            if not busy:
                return None
            first, last = min(spans[row][0] for row in busy), max(spans[row][1] for row in busy)
            if len(busy) < len(spans) and not every_row:
                rows = torch.tensor(busy, device=device)
                pads = pads[rows]
        pads = pads[:, None]
        phase = self.phase(pads)
        latents = torch.arange(last, device=device)
        fill_columns = latents * self.size + phase
        valid = (latents >= self.first_latent(pads)) & (fill_columns < end)
        slots = torch.arange(1 - self.size, 1, device=device)
        member_columns = fill_columns[:, first:, None] + slots
        return Filling(
            first=first,
            last=last,
            position_ids=(latents[first:] - self.first_latent(pads)).clamp(min=0),
            member_columns=member_columns,
            present=member_columns >= pads[..., None],
            rows=rows,
            valid=valid,
            fresh=fill_columns[:, first:] >= start,
        )

    def _filling_of_agreeing_rows(self, start: int, end: int, device: torch.device) -> Filling | None:
        first, last = self._span(start, end, 0)
        if first == last:
            return None
        first_member = first * self.size - self.offset
        present = None
        if first_member < 0:
            present = (torch.arange((last - first) * self.size, device=device) + first_member >= 0).view(
                1, -1, self.size
            )
        return Filling(
            first=first,
            last=last,
            position_ids=torch.arange(first, last, device=device)[None],
            member_columns=first_member,
            present=present,
        )

    def _span(self, start: int, end: int, pads: int) -> tuple[int, int]:
        """First and last (excluded) latent column that one row fills in batch columns `start` to `end`."""
        phase, first_latent = self.phase(pads), self.first_latent(pads)
        return max(self.opened(start, phase), first_latent), max(self.opened(end, phase), first_latent)

    # -- packed rows --------------------------------------------------------------------------------------------

    def packed_filling(self, documents: Documents) -> Filling | None:
        """What packed rows fill, from first to last token; None where no document fills anything.

        A row that fills fewer chunks than another ends in latents of its other tokens, which nobody reads.
        """
        count = int(self._fills(documents.on_host).sum(dim=-1).max())
        if count == 0:
            return None
        position_ids = documents.position_ids
        # Where each chunk has its last member: the columns that fill, in order, come before those that do not.
        columns = self._fills(position_ids).long().argsort(dim=-1, descending=True, stable=True)[:, :count]
        last_members = position_ids.gather(1, columns)
        slots = torch.arange(1 - self.size, 1, device=position_ids.device)
        return Filling(
            first=0,
            last=count,
            position_ids=(last_members + self.offset) // self.size,
            member_columns=columns[..., None] + slots,
            present=last_members[..., None] + slots >= 0,
            packed=True,
        )

    def packed_reads(self, documents: Documents) -> tuple[torch.Tensor, torch.Tensor]:
        """For each token the slot it reads, counted from latent column 0, and whether it reads: both `(B or 1, S)`."""
        position_ids = documents.position_ids
        fills = self._fills(position_ids).long()
        latents = fills.cumsum(dim=-1) - fills  # a token's chunk is the next to fill
        slots = latents * self.size + (position_ids + self.offset) % self.size
        columns = torch.arange(position_ids.shape[1], device=position_ids.device) - self.shift
        return slots[:, columns.clamp(min=0)], position_ids >= self.shift

    def _fills(self, position_ids: torch.Tensor) -> torch.Tensor:
        """True where a token is the last member of its chunk."""
        return (position_ids + self.offset + 1) % self.size == 0

    # -- what the next call will need ---------------------------------------------------------------------------

    def open_tokens(self, columns: int, padding: LeftPadding | None) -> int:
        """How many of the newest of `columns` columns belong to a chunk that has not filled, in any row."""
        pads = [0] if padding is None else padding.on_host
        return max(max(0, min((columns - 1 - self.phase(p)) % self.size, columns - p)) for p in pads)

    def first_read_latent(self, columns: int, padding: LeftPadding | None) -> int | None:
        """The first filled latent column that a token in column `columns` or later reads; None where none is."""
        spans = self._read_spans(columns, padding)
        return min((read for read, opened in spans if read < opened), default=None)

    def first_kept_latent(self, columns: int, padding: LeftPadding | None) -> int:
        """The first latent column to keep after `columns` columns: one that is still read, or that fills next."""
        return min(min(read, opened) for read, opened in self._read_spans(columns, padding))

    def _read_spans(self, columns: int, padding: LeftPadding | None) -> list[tuple[int, int]]:
        """For each row, the latent column that column `columns` reads, and the next one to fill."""
        pads = [0] if padding is None else padding.on_host
        read = [self.read_position(columns, self.phase(p)) // self.size for p in pads]
        opened = [self.opened(columns, self.phase(p)) for p in pads]
        first = [self.first_latent(p) for p in pads]
        return [(max(r, f), max(o, f)) for r, o, f in zip(read, opened, first, strict=True)]

    def latent_columns(self, columns: int, padding: LeftPadding | None) -> int:
        """How many latent columns any row has opened after `columns` columns: all filled ones, where rows agree."""
        pads = [0] if padding is None else padding.on_host
        return max(self.opened(columns, self.phase(p)) for p in pads)


def read_left_padding(attention_mask: torch.Tensor) -> torch.Tensor:
    """Counts the leading zeros of each row of a `(B, columns)` mask: its columns of left padding, `(B,)`."""
    return (attention_mask.bool().cumsum(dim=-1) == 0).sum(dim=-1)


# What collators of packed rows say beside `position_ids`, where the library's layers need it.
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


def check_boundaries(boundaries: dict[str, torch.Tensor], position_ids: torch.Tensor) -> None:
    """Refuses starts of texts, `(texts + 1,)` or `seq_idx` `(B, S)`, where `position_ids` `(B, S)` do not restart."""
    for name, value in boundaries.items():
        value = value.to(position_ids.device)
        is_index = name == "seq_idx"
        starts = (value.diff(dim=-1).flatten() != 0).nonzero()[:, 0] + 1 if is_index else value[:-1].long()
        firsts = position_ids.flatten()[starts[starts < position_ids.numel()]]
        if firsts.ne(0).any():
            raise ValueError(
                f"`{name}` must start a text only where `position_ids` are 0, but got starts {starts.tolist()} with "
                f"positions {firsts.tolist()}."
            )


# Of arguments that no user gave.
READ_AGAIN = (
    "generate() gives such ones where it reads a text once more that the cache already holds: assisted and "
    "prompt-lookup decoding over a filled cache, or a cache of the whole prompt."
)


def wrong_positions(position_ids: torch.Tensor, counted: torch.Tensor, wrong: torch.Tensor) -> str:
    """The message on `position_ids` that are not those of the row's tokens, all of `(B or 1, S)`."""
    row, column = wrong.nonzero()[0].tolist()
    got, allowed = (ids[row if len(ids) > 1 else 0, column].item() for ids in (position_ids, counted))
    return (
        f"`position_ids` must count the tokens of each row, from 0 or from where the cache ends, but got {got} "
        f"in row {row} for a new token that is number {allowed}: chunks are cut by that count. Left out, they are "
        "counted. " + READ_AGAIN
    )


__all__ = [
    "BOUNDARIES",
    "READ_AGAIN",
    "ChunkGrid",
    "Documents",
    "Filling",
    "LeftPadding",
    "check_boundaries",
    "read_left_padding",
    "wrong_positions",
]
