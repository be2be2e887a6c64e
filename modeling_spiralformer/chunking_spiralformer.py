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

Packed rows, where texts follow each other, have no one phase: their filled chunks get latent columns in the order
in which they fill.
"""

from dataclasses import dataclass

import torch

from .batch_spiralformer import Columns, LeftPadding, PackedTexts
from .configuration_spiralformer import SpiralFormerConfig


@dataclass(frozen=True)
class FilledChunks:
    """The chunks of one resolution that a call completes: latent columns `first` to `end` (excluded).

    Where rows agree (no padding) `member_columns` is an integer, and `rows`, `valid` and `new` are None. In a padded
    batch some of the (row, column) pairs are not filled by this call: they are computed along and left out, by `new`
    when written to a cache and by `valid` when attended to.

    Args:
        position_ids: `(R or 1, K)` chunk index of each latent, its rotary position.
        member_columns: `(R or 1, K, G)` batch column of each member, or the int column of the first member of `first`.
            A one-token step of a static cache has `first` as a 0-dim tensor and `end` as the size of its store.
        present: `(R or 1, K, G)` True where that member is a token of the row; None where all are.
        rows: `(R,)` the rows of the batch that run, or None for all of them.
        valid: `(R, end)` True where a latent column is filled in that row; None where all are.
        new: `(R, K)` True where this call fills that pair, or a later one will; None where it fills all.
        packed: whether `position_ids` restart, and latents attend only to those of their own text.
    """

    first: Columns
    end: int
    position_ids: torch.Tensor
    member_columns: torch.Tensor | int
    present: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    valid: torch.Tensor | None = None
    new: torch.Tensor | None = None
    packed: bool = False

    @property
    def count(self) -> Columns:
        """K, the number of latent columns that run."""
        return self.end - self.first


@dataclass(frozen=True)
class ChunkGrid:
    """The chunks of one resolution: size g, offset w, causal shift s (paper, Chunks and Causal shift).

    The methods that take a token, `pads` or `phase` work on Python integers and on tensors alike.
    """

    size: int
    offset: int
    shift: int

    @classmethod
    def of(cls, config: SpiralFormerConfig) -> "list[ChunkGrid]":
        """The grids of a schedule, one for each iteration."""
        return [
            cls(size, offset, shift)
            for size, offset, shift in zip(
                config.chunk_sizes, config.resolved_chunk_offsets, config.resolved_causal_shifts, strict=True
            )
        ]

    # -- the paper's functions, of a text without padding -------------------------------------------------------
    # The methods after them give the same where there is no padding: members are cut every g columns from -w on, and
    # token i reads place pi(i - s) * g + rho(i - s).

    def pi(self, token):
        """The chunk that holds a token."""
        return (token + self.offset) // self.size

    def rho(self, token):
        """The place of a token in its chunk, 0 ... g - 1. The chunk fills with the token at place g - 1."""
        return (token + self.offset) % self.size

    def num_filled(self, tokens):
        """K(n): how many chunks n tokens fill."""
        return (tokens + self.offset) // self.size

    # -- the same over the columns of a padded batch ------------------------------------------------------------

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
        """Where column `column` reads (its own column less the shift), in places counted from latent column 0."""
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
    ) -> FilledChunks | None:
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
        pads, rows = padding.on(device), None
        first, latent_end = start // self.size, -(-end // self.size)
        if skip_idle:
            spans = [self._span(start, end, p) for p in padding.on_host]
            busy = [row for row, (row_first, row_end) in enumerate(spans) if row_first < row_end]
            if not busy:
                return None
            first, latent_end = min(spans[row][0] for row in busy), max(spans[row][1] for row in busy)
            if len(busy) < len(spans) and not every_row:
                rows = torch.tensor(busy, device=device)
                pads = pads[rows]
        phase = self.phase(pads)
        latents = torch.arange(latent_end, device=device)
        fill_columns = latents * self.size + phase
        valid = (latents >= self.first_latent(pads)) & (fill_columns < end)
        member_columns = fill_columns[:, first:, None] + torch.arange(1 - self.size, 1, device=device)
        return FilledChunks(
            first=first,
            end=latent_end,
            position_ids=(latents[first:] - self.first_latent(pads)).clamp(min=0),
            member_columns=member_columns,
            present=member_columns >= pads[..., None],
            rows=rows,
            valid=valid,
            new=fill_columns[:, first:] >= start,
        )

    def _filling_of_agreeing_rows(self, start: int, end: int, device: torch.device) -> FilledChunks | None:
        first, latent_end = self.num_filled(start), self.num_filled(end)
        if first == latent_end:
            return None
        first_member = first * self.size - self.offset
        present = None
        if first_member < 0:
            members = torch.arange((latent_end - first) * self.size, device=device) + first_member
            present = (members >= 0).view(1, -1, self.size)
        return FilledChunks(
            first=first,
            end=latent_end,
            position_ids=torch.arange(first, latent_end, device=device)[None],
            member_columns=first_member,
            present=present,
        )

    def _span(self, start: int, end: int, pads: int) -> tuple[int, int]:
        """First and end (excluded) of the latent columns that one row fills in batch columns `start` to `end`."""
        phase, first_latent = self.phase(pads), self.first_latent(pads)
        return max(self.opened(start, phase), first_latent), max(self.opened(end, phase), first_latent)

    # -- packed rows --------------------------------------------------------------------------------------------

    def packed_filling(self, texts: PackedTexts, device: torch.device) -> FilledChunks | None:
        """What packed rows fill of chunks that are read, from first to last token; None where no text reads anything.

        A row with fewer of them than there are latent columns ends in latents of its other tokens, which nobody reads.
        """
        count = self._packed_count(texts)
        if count == 0:
            return None
        position_ids = texts.position_ids.to(device)
        # Where each chunk has its last member: the columns that fill, in order, come before those that do not.
        columns = self._fills(position_ids).long().argsort(dim=-1, descending=True, stable=True)[:, :count]
        last_members = position_ids.gather(1, columns)
        before = torch.arange(1 - self.size, 1, device=position_ids.device)
        return FilledChunks(
            first=0,
            end=count,
            position_ids=self.pi(last_members),
            member_columns=columns[..., None] + before,
            present=last_members[..., None] + before >= 0,
            packed=True,
        )

    def packed_reads(self, texts: PackedTexts, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The place that each token reads, counted from latent column 0, and whether it reads: both `(B or 1, S)`."""
        position_ids = texts.position_ids.to(device)
        fills = self._fills(position_ids).long()
        latents = fills.cumsum(dim=-1) - fills  # a token's chunk is the next to fill
        places = latents * self.size + self.rho(position_ids)
        columns = torch.arange(position_ids.shape[1], device=position_ids.device) - self.shift
        return places[:, columns.clamp(min=0)], position_ids >= self.shift

    def _packed_count(self, texts: PackedTexts) -> int:
        """How many latent columns packed rows get: those of the row that fills the most.

        A compiled call looks at no position, and takes the most that any texts of a row's length fill. The shortest
        text that reads k chunks has s + 1 tokens for k = 1 and s + 1 - w + (k - 1) g for more: texts that read two are
        the densest where s + 1 - w < g, and elsewhere none has a chunk for less than g tokens.
        """
        if texts.on_host is None:
            of_two = min(self.size + self.shift + 1 - self.offset, 2 * self.size)  # tokens
            return 2 * texts.position_ids.shape[1] // of_two
        return int(self._fills(texts.on_host).sum(dim=-1).max())

    def _fills(self, position_ids: torch.Tensor) -> torch.Tensor:
        """True where a token is the last member of its chunk, and a token of its text reads that chunk."""
        columns = torch.arange(position_ids.shape[1], device=position_ids.device)
        first_read = (position_ids - self.size + 1).clamp(min=0) + self.shift  # by the token at this position
        reading = (columns + first_read - position_ids).clamp(max=len(columns) - 1)
        return (self.rho(position_ids) == self.size - 1) & (position_ids.gather(1, reading) == first_read)

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


__all__ = ["ChunkGrid", "FilledChunks"]
