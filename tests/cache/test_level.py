"""What a resolution keeps between calls, beside the definition (`chunks.Row`): states say which token they are.

Every token has a number of its own. A latent is made of the numbers of its chunk's members and the chunk's index, an
update of its latent and the place: whatever comes back tells where it came from.
"""

import copy

import pytest
import torch
from chunks import Row, grids, of_pair, pairs_filled, present_members
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modeling_spiralformer.batch_spiralformer import Batch, LeftPadding, Rows
from modeling_spiralformer.chunking_spiralformer import ChunkGrid, FilledChunks
from modeling_spiralformer.level_spiralformer import ResolutionState
from modeling_spiralformer.static_cache_spiralformer import StaticState

WIDTH = 4  # of a token: (number, 0, 0, 0); of an update: (first member, last member, chunk + 1, place + 1)
NOTHING = [0] * WIDTH
NO_CHUNK = -7  # latents that a call computes along and must leave out
COLUMNS = 48


class Driver:
    """All that these tests call of a state; `pads` are those of the rows in the end, also before their first token."""

    def __init__(self, grid: ChunkGrid, pads: list[int], kind: str):
        self.grid, self.pads, self.columns, self.recording = grid, pads, 0, False
        if kind == "static":
            self.state = StaticState(grid, Rows(), COLUMNS, torch.zeros(len(pads), 0, WIDTH))
        else:
            self.state = ResolutionState(grid, Rows(), cached=kind == "dynamic")

    def feed(self, numbers: list[list[int]], every_row: bool) -> tuple[dict, list[list[list[int]]]]:
        """One call: the members of each (row, chunk) that it fills, and the update of each of its tokens."""
        states = nn.functional.pad(torch.tensor(numbers)[..., None].float(), (0, WIDTH - 1))
        length = states.shape[1]
        self.columns += length
        padding = self.state.rows.padding  # it stays what it is once every row has had a token
        if not self.state.settled:
            pads = torch.tensor(self.pads).clamp(max=self.columns)
            padding = LeftPadding(pads) if pads.any() else None
        self.state.rows.begin(Batch(padding, None, None, position_ids=None), every_row)
        filled, chunks = self.state.feed(states), {}
        if filled is not None:
            latents, chunks = self._core(self.state.members(filled), filled, len(numbers))
            self.state.store(latents, filled)
        readable = self.state.readable(length)
        updates = self.state.shift(None if readable is None else self._up(readable), length)
        self.state.trim(length)
        return chunks, updates.long().tolist()

    def _core(self, members: torch.Tensor, filled: FilledChunks, rows: int) -> tuple[torch.Tensor, dict]:
        latents, chunks = torch.full((len(members), members.shape[1], WIDTH), float(NO_CHUNK)), {}
        for index, row, k in pairs_filled(filled, rows):
            present = present_members(filled, self.grid.size, index, k)
            # A ring hands its members out from any place on.
            numbers = sorted(members[index, k, present, 0].long().tolist())
            chunk = of_pair(filled.position_ids, index, k)
            chunks[row, chunk] = numbers
            latents[index, k] = torch.tensor([numbers[0], numbers[-1], chunk + 1, 0])
        return latents, chunks

    def _up(self, latents: torch.Tensor) -> torch.Tensor:
        updates = latents.repeat_interleave(self.grid.size, dim=1)
        updates[..., 3] = (torch.arange(updates.shape[1]) % self.grid.size) + 1
        return updates

    def record(self) -> None:
        self.state.recording = self.recording = True

    def crop(self, count: int) -> None:
        self.state.crop(count)
        self.columns -= count

    def select(self, rows: list[int]) -> None:
        self.state.map_rows(lambda states: states[rows])
        if self.state.rows.padding is not None:
            self.state.rows.padding = LeftPadding(self.state.rows.padding.columns[rows])
        self.pads = [self.pads[row] for row in rows]


class History:
    """Feeds a driver and knows by the definition what has to come back."""

    def __init__(self, grid: ChunkGrid, pads: list[int], kind: str):
        self.driver, self.grid = Driver(grid, pads, kind), grid
        self.numbers: list[list[int]] = [[] for _ in pads]
        self.next = 1
        self.recorded_from = COLUMNS  # after a crop the recorded window starts anew

    def feed(self, count: int, every_row: bool = False) -> None:
        start, rows = self.driver.columns, len(self.numbers)
        new = [list(range(self.next + count * row, self.next + count * (row + 1))) for row in range(rows)]
        self.next += rows * count
        self.numbers = [row + numbers for row, numbers in zip(self.numbers, new, strict=True)]
        filled, updates = self.driver.feed(new, every_row)
        expected = {}
        for index, (row, pads) in enumerate(zip(self.numbers, self.driver.pads, strict=True)):
            chunks = Row(self.grid, pads)
            numbers = {
                chunk: [row[column] for column in chunks.members(chunk)] for chunk in chunks.filled(0, len(row))
            }
            expected |= {(index, chunk): numbers[chunk] for chunk in chunks.filled(start, start + count)}
            for column in range(max(start, pads), start + count):
                read, update = chunks.read(column), updates[index][column - start]
                if read is None:
                    assert update == NOTHING
                else:
                    members = numbers[read[0]]
                    assert update == [members[0], members[-1], read[0] + 1, read[1] + 1]
        assert filled == expected

    def select(self, rows: list[int]) -> None:
        self.driver.select(rows)
        self.numbers = [self.numbers[row] for row in rows]

    def record(self) -> None:
        self.driver.record()
        self.recorded_from = self.driver.columns

    def crop(self, count: int) -> None:
        target, trial = self.driver.columns - count, copy.deepcopy(self.driver)
        try:
            trial.crop(count)
        except ValueError:
            assert target < self.recorded_from, "refused a recorded point"
            return
        self.driver, self.numbers = trial, [row[:target] for row in self.numbers]
        if self.driver.recording:
            self.recorded_from = target


PADS = st.sampled_from([[0], [0, 0]]) | st.lists(st.integers(0, 14), min_size=1, max_size=3)
COUNTS = st.sampled_from([1, 1, 1, 2, 3, 5, 8, 13])


@given(grid=grids(), pads=PADS, count=st.integers(1, COLUMNS))
def test_one_call_without_a_cache(grid, pads, count):
    History(grid, pads, "uncached").feed(count)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@given(grid=grids(), pads=PADS, record=st.booleans(), data=st.data())
def test_calls_that_go_on(kind, grid, pads, record, data):
    rows = History(grid, pads, kind)
    if record and kind == "dynamic":
        rows.record()
    rows.feed(data.draw(COUNTS))
    for _ in range(data.draw(st.integers(1, 12))):
        operation, held = data.draw(st.sampled_from(["feed"] * 3 + ["select", "crop"])), len(rows.numbers)
        if operation == "select":
            rows.select(data.draw(st.lists(st.integers(0, held - 1), min_size=held, max_size=held)))
        elif operation == "crop" and kind == "dynamic":
            rows.crop(data.draw(st.integers(0, min(12, rows.driver.columns))))
        elif (count := data.draw(COUNTS)) <= COLUMNS - rows.driver.columns:
            rows.feed(count, every_row=data.draw(st.booleans()))
