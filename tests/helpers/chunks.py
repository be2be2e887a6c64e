"""Chunks by their definition: one row, one token at a time, in lists and sets. And what a call fills, as plain Python.

Token i of a row lies in chunk pi(i) = (i + offset) // size at place rho(i) = (i + offset) mod size. A chunk fills with
its token at place size - 1. A row's tokens begin behind its padding; the latent of a chunk that fills at batch column
a has latent column a // size. Token i reads what token i - shift lies in, if there is such a token.
"""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from modeling_spiralformer.chunking_spiralformer import ChunkGrid, FilledChunks


@dataclass(frozen=True)
class Row:
    """One row of a batch: `pads` columns of padding, then tokens without end."""

    grid: ChunkGrid
    pads: int = 0

    def pi(self, token: int) -> int:
        return (token + self.grid.offset) // self.grid.size

    def rho(self, token: int) -> int:
        return (token + self.grid.offset) % self.grid.size

    def members(self, chunk: int) -> list[int]:
        """The batch columns of a chunk's tokens; those of chunk 0 are fewer, by the offset."""
        last = (chunk + 1) * self.grid.size
        return [self.pads + token for token in range(last) if self.pi(token) == chunk]

    def filled(self, start: int, end: int) -> dict[int, list[int]]:
        """The chunks that fill in batch columns `start` to `end`, with their members."""
        tokens = [column - self.pads for column in range(start, end) if column >= self.pads]
        chunks = [self.pi(token) for token in tokens if self.rho(token) == self.grid.size - 1]
        return {chunk: self.members(chunk) for chunk in chunks}

    def open(self, columns: int) -> list[int]:
        """The columns, of the first `columns`, whose chunk has not filled."""
        full = self.filled(0, columns)
        return [column for column in range(self.pads, columns) if self.pi(column - self.pads) not in full]

    def latent(self, chunk: int) -> int:
        """The latent column of a chunk."""
        return self.members(chunk)[-1] // self.grid.size

    def read(self, column: int) -> tuple[int, int] | None:
        """Chunk and place that the token in a batch column reads; None where it reads nothing, or is no token."""
        token = column - self.pads - self.grid.shift
        return None if token < 0 else (self.pi(token), self.rho(token))


def pairs_filled(filled: FilledChunks | None, rows: int) -> list[tuple[int, int, int]]:
    """What a call fills of a batch of `rows`: place among the rows that run, row of the batch, place among latents.

    A pair that is written before it holds a chunk (`new` and not `valid`) is nothing yet: the call that fills it
    writes it again.
    """
    if filled is None:
        return []
    running = list(range(rows)) if filled.rows is None else filled.rows.tolist()
    is_filled = torch.ones(len(running), filled.position_ids.shape[1], dtype=torch.bool)
    if filled.new is not None:
        is_filled &= filled.new
    if filled.valid is not None:
        is_filled &= filled.valid.narrow(1, int(filled.first), is_filled.shape[1])
    return [(index, running[index], k) for index, k in is_filled.nonzero().tolist()]


def of_pair(values: torch.Tensor, index: int, k: int) -> list:
    """The entry of one row that runs and one latent, where values may be the same for all rows, `(R or 1, K, ...)`."""
    return values[index if len(values) > 1 else 0, k].tolist()


def present_members(filled: FilledChunks, size: int, index: int, k: int) -> list[bool]:
    """Which of a chunk's members are tokens."""
    return [True] * size if filled.present is None else of_pair(filled.present, index, k)


def member_columns(filled: FilledChunks, size: int, index: int, k: int) -> list[int | None]:
    """The batch column of each member of a chunk, None where it is no token."""
    columns = filled.member_columns
    if isinstance(columns, int):  # the first of one stretch
        columns = torch.arange(filled.position_ids.shape[1] * size).view(1, -1, size) + columns
    pairs = zip(of_pair(columns, index, k), present_members(filled, size, index, k), strict=True)
    return [column if present else None for column, present in pairs]


@st.composite
def grids(draw, max_size: int = 9) -> ChunkGrid:
    """Sizes, offsets and shifts that a configuration allows: offset < size, shift >= size - 1."""
    size = draw(st.integers(1, max_size))
    return ChunkGrid(size, draw(st.integers(0, size - 1)), size - 1 + draw(st.integers(0, 2 * size + 1)))
