"""Steps over paged blocks against each request alone: splits, shared beginnings, dropped requests, copied blocks."""

from dataclasses import dataclass, field
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import large_weights, small_config

from modeling_spiralformer.batch_spiralformer import Rows
from modeling_spiralformer.chunking_spiralformer import ChunkGrid
from modeling_spiralformer.level_spiralformer import ResolutionState
from modeling_spiralformer.modeling_spiralformer import SpiralFormerResolution
from modeling_spiralformer.paging_spiralformer import PagedState, check_block_size, kept_counts, plan_step

WIDTH = 8
UNWRITTEN = float("nan")


def sum_of_earlier(latents: torch.Tensor) -> torch.Tensor:
    """A core that shows what it attends to: of latents `(K, D)` the sums up to each, weighted by position."""
    positions = torch.arange(1, len(latents) + 1, dtype=latents.dtype)
    return (positions[:, None] * latents).cumsum(0)


class Engine:
    """One resolution over paged blocks, and nothing else: latents attend to what is in their slots."""

    def __init__(self, resolution: SpiralFormerResolution, grid: ChunkGrid, blocks: int, block_size: int):
        self.resolution, self.grid, self.block_size = resolution, grid, block_size
        self.slots = torch.full((blocks, block_size // grid.size, WIDTH), UNWRITTEN, dtype=torch.float64)
        self.states = torch.full((blocks, sum(kept_counts(grid)), WIDTH), UNWRITTEN, dtype=torch.float64)

    def copy(self, source: int, target: int) -> None:
        """The contents of one block into another."""
        for store in (self.slots, self.states):
            store[target] = store[source]

    def step(self, past: list[int], tables: list[list[int]], states: list[torch.Tensor]) -> list[torch.Tensor]:
        """Updates `(S, D)` of the new token states `(S, D)` of each request."""
        lengths = [len(part) for part in states]
        table = torch.nn.utils.rnn.pad_sequence([torch.tensor(blocks) for blocks in tables], batch_first=True)
        total = torch.tensor(past) + torch.tensor(lengths)
        plan = plan_step(self.grid, torch.tensor(past), total, table, self.block_size)

        def core(latents: torch.Tensor, filled, cache) -> torch.Tensor:
            self.slots[plan.slots] = latents[0]
            held = self.slots[plan.held_slots].split(plan.held_counts.tolist())
            new = [sum_of_earlier(own)[len(own) - n :] for own, n in zip(held, plan.counts.tolist(), strict=True)]
            return torch.cat(new)[None]

        updates = self.resolution(torch.cat(states)[None], PagedState(self.grid, plan, self.states), core)
        return list(updates[0].split(lengths))


@dataclass
class Request:
    """The states of a text, the blocks that it has, and the updates so far."""

    states: torch.Tensor
    blocks: list[int] = field(default_factory=list)
    done: int = 0
    updates: list[torch.Tensor] = field(default_factory=list)


def make_resolution(grid: ChunkGrid, scalings: dict) -> SpiralFormerResolution:
    shift = {"chunk_sizes": [grid.size], "chunk_offsets": [grid.offset], "causal_shifts": [grid.shift]}
    config = small_config(hidden_size=WIDTH, intermediate_size=WIDTH, num_attention_heads=1, **shift, **scalings)
    return large_weights(SpiralFormerResolution(config, 0)).double()


def alone(resolution: SpiralFormerResolution, grid: ChunkGrid, states: torch.Tensor) -> torch.Tensor:
    """The updates of one whole text."""
    state = ResolutionState(grid, Rows(), cached=False)
    return resolution(states[None], state, lambda latents, filled, cache: sum_of_earlier(latents[0])[None])[0]


@st.composite
def grids(draw) -> ChunkGrid:
    size = draw(st.integers(1, 8))
    extra = draw(st.sampled_from([0, 1, size, 2 * size + 1]))
    return ChunkGrid(size, draw(st.integers(0, size - 1)), size - 1 + extra)


SCALINGS = ({}, {"down_scaling": "mean", "up_scaling": "broadcast"})


@given(grids(), st.integers(1, 3), st.sampled_from(SCALINGS), st.integers(0, 10**6))
@torch.no_grad()
def test_any_split_of_any_requests_gives_what_each_gives_alone(grid, chunks_in_block, scalings, seed):
    """With requests that share a beginning, ones that are dropped and begin again elsewhere, and forks."""
    block_size, resolution, chosen = chunks_in_block * grid.size, make_resolution(grid, scalings), Random(seed)
    lengths = [chosen.randint(1, 30) for _ in range(chosen.randint(1, 4))]
    free = chosen.sample(range(2000), 2000)
    engine = Engine(resolution, grid, len(free), block_size)
    generator = torch.Generator().manual_seed(seed)
    requests = [Request(torch.randn(n, WIDTH, dtype=torch.float64, generator=generator)) for n in lengths]
    while any(request.done < len(request.states) for request in requests):
        for request in requests:
            match chosen.choice(["share"] * 6 + ["drop", "fork"] + ["go on"] * 4):
                case "drop":
                    request.blocks, request.done, request.updates = [], 0, []
                case "share" if request.done == 0:  # the whole blocks of another: its text begins as that one does
                    other = chosen.choice(requests)
                    shared = min(other.done, len(request.states) - 1) // block_size
                    request.blocks, request.done = other.blocks[:shared], shared * block_size
                    request.states = torch.cat([other.states[: request.done], request.states[request.done :]])
                    request.updates = [torch.cat([*other.updates, other.states[:0]])[: request.done]]
                case "fork" if request.blocks:  # its newest block is copied before it is written again
                    engine.copy(request.blocks[-1], free[-1])
                    request.blocks = [*request.blocks[:-1], free.pop()]
        waiting = [request.done == 0 and chosen.random() < 0.7 for request in requests]  # others run before
        counts = [
            0 if waits else chosen.randint(0, min(12, len(r.states) - r.done))
            for r, waits in zip(requests, waiting, strict=True)
        ]
        if not any(counts):
            continue
        for request, count in zip(requests, counts, strict=True):
            while len(request.blocks) * block_size < max(request.done + count, 1):
                request.blocks = [*request.blocks, free.pop()]
        found = engine.step(
            [request.done for request in requests],
            [request.blocks for request in requests],
            [r.states[r.done : r.done + count] for r, count in zip(requests, counts, strict=True)],
        )
        for request, count, updates in zip(requests, counts, found, strict=True):
            request.done += count
            request.updates.append(updates)
    for request in requests:
        torch.testing.assert_close(
            torch.cat(request.updates), alone(resolution, grid, request.states), atol=1e-9, rtol=1e-9
        )


@given(grids(), st.integers(0, 40), st.integers(0, 40))
def test_one_request_fills_what_the_cache_of_one_row_fills(grid, past, new):
    """Latents, members and what is present, as `ChunkGrid.filling` has them."""
    table, total = torch.arange(80)[None], past + new
    plan = plan_step(grid, torch.tensor([past]), torch.tensor([total]), table, 2 * grid.size)
    filled = grid.filling(past, total, None, torch.device("cpu"), skip_idle=True)
    if filled is None:
        assert not len(plan.latents)
        return
    assert plan.latents.tolist() == filled.position_ids[0].tolist()
    assert all(map(torch.equal, plan.slots, (plan.latents // 2, plan.latents % 2)))
    tokens = filled.member_columns + torch.arange(filled.count * grid.size).view(-1, grid.size)
    assert torch.equal(plan.present, tokens >= 0)
    new_members = plan.present & (tokens >= past)
    assert torch.equal(plan.members[new_members], tokens[new_members] - past)
    held = plan.present & (tokens < past)
    assert torch.equal(plan.members[held], new + grid.rho(tokens[held]))


def test_a_block_that_cuts_a_chunk_is_refused():
    grid = ChunkGrid(4, 0, 3)
    check_block_size([ChunkGrid(8, 4, 7), grid], 8)
    for check in (
        lambda: check_block_size([ChunkGrid(8, 4, 7), grid], 12),
        lambda: plan_step(grid, torch.tensor([0]), torch.tensor([1]), torch.tensor([[0]]), 6),
    ):
        with pytest.raises(ValueError, match="`block_size` must be a multiple of every chunk size"):
            check()


@pytest.mark.parametrize(
    ("grid", "counts"),
    [
        (ChunkGrid(1, 0, 0), (0, 0)),
        (ChunkGrid(4, 2, 3), (3, 1)),
        (ChunkGrid(4, 0, 4), (3, 1)),
        (ChunkGrid(4, 0, 9), (3, 3)),
    ],
    ids=str,
)
def test_a_block_keeps_no_more_than_its_next_tokens_need(grid, counts):
    assert kept_counts(grid) == counts
