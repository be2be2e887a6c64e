"""What a level keeps between calls, beside the definition (`chunks.Row`): states say which token they are.

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

from modeling_spiralformer.chunking_spiralformer import ChunkGrid, LeftPadding
from modeling_spiralformer.level_spiralformer import Level, StaticLevel

WIDTH = 4  # of a token: (number, 0, 0, 0); of an update: (first member, last member, chunk + 1, place + 1)
NOTHING = [0] * WIDTH
NO_CHUNK = -7  # latents that a call computes along and must leave out
COLUMNS = 48


class Driver:
    """All that these tests call of a level; `pads` are those of the rows in the end, also before their first token."""

    def __init__(self, grid: ChunkGrid, pads: list[int], kind: str):
        self.grid, self.pads, self.columns, self.recording = grid, pads, 0, False
        if kind == "static":
            self.level = StaticLevel(grid, COLUMNS, torch.zeros(len(pads), 0, WIDTH))
        else:
            self.level = Level(grid, cached=kind == "dynamic")

    def feed(self, numbers: list[list[int]], every_row: bool) -> tuple[dict, list[list[list[int]]]]:
        """One call: the members of each (row, chunk) that it fills, and the update of each of its tokens."""
        states = nn.functional.pad(torch.tensor(numbers)[..., None].float(), (0, WIDTH - 1))
        self.columns += states.shape[1]
        pads = torch.tensor(self.pads).clamp(max=self.columns)
        self.level.begin(states.shape[1], LeftPadding(pads) if pads.any() else None, False, every_row)
        filling, filled = self.level.feed(states), {}
        if filling is not None:
            latents, filled = self._core(self.level.members(filling), filling, len(numbers))
            self.level.store(latents, filling)
        return filled, self.level.read(states.shape[1], self._up).long().tolist()

    def _core(self, members: torch.Tensor, filling, rows: int) -> tuple[torch.Tensor, dict]:
        latents, filled = torch.full((len(members), members.shape[1], WIDTH), float(NO_CHUNK)), {}
        for index, row, k in pairs_filled(filling, rows):
            present = present_members(filling, self.grid.size, index, k)
            # A ring hands its members out from any place on.
            numbers = sorted(members[index, k, present, 0].long().tolist())
            chunk = of_pair(filling.position_ids, index, k)
            filled[row, chunk] = numbers
            latents[index, k] = torch.tensor([numbers[0], numbers[-1], chunk + 1, 0])
        return latents, filled

    def _up(self, latents: torch.Tensor) -> torch.Tensor:
        updates = latents.repeat_interleave(self.grid.size, dim=1)
        updates[..., 3] = (torch.arange(updates.shape[1]) % self.grid.size) + 1
        return updates

    def record(self) -> None:
        self.level.recording = self.recording = True

    def crop(self, count: int) -> None:
        self.level.crop(count)
        self.columns -= count

    def select(self, rows: list[int]) -> None:
        self.level.map_rows(lambda states: states[rows])
        self.pads = [self.pads[row] for row in rows]


class Rows:
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


PADS = st.lists(st.integers(0, 14), min_size=1, max_size=3)
COUNTS = st.sampled_from([1, 1, 1, 2, 3, 5, 8, 13])


@given(grid=grids(), pads=PADS, count=st.integers(1, COLUMNS))
def test_one_call_without_a_cache(grid, pads, count):
    Rows(grid, pads, "uncached").feed(count)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@given(grid=grids(), pads=PADS, record=st.booleans(), data=st.data())
def test_calls_that_go_on(kind, grid, pads, record, data):
    rows = Rows(grid, pads, kind)
    if record and kind == "dynamic":
        rows.record()
    rows.feed(data.draw(COUNTS))
    for _ in range(data.draw(st.integers(1, 12))):
        operation, held = data.draw(st.sampled_from(["feed"] * 3 + ["select", "crop"])), len(rows.numbers)
        if operation == "select":
            rows.select(data.draw(st.lists(st.integers(0, held - 1), min_size=held, max_size=held)))
        elif operation == "crop" and kind == "dynamic":
            rows.crop(data.draw(st.integers(0, min(8, rows.driver.columns - 1))))
        elif (count := data.draw(COUNTS)) <= COLUMNS - rows.driver.columns:
            rows.feed(count, every_row=data.draw(st.booleans()))
