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
"""One step of an engine that serves many requests from paged blocks: what each resolution computes and keeps where.

The step's input is flat: the new tokens of all requests, request after request, none of them padded. A request may
have no new token. A block covers B tokens of one request in every layer:

    token layers        B slots of keys and values
    latent layers       B / g slots, latent j in slot j mod (B / g) of the request's block j // (B / g)
    resolution state    one slot: the tokens of the chunk that is open, and the latents that later tokens still read,
                        both as of the block's last token, or of the request's newest one

Latent j fills with token (j + 1) g - w - 1, one of the g tokens from j g on: its block is there. Neither it nor a
block's state depends on tokens after the block. So what holds for blocks of keys holds for these: they can be shared
by requests with the same beginning, copied, dropped and computed again, and a prompt can come in parts.

Shape letters: R requests, N new tokens, K latents that fill, L latents after the step of the requests with any such, G
tokens in a chunk, P blocks that the step touches.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from .batch_spiralformer import Rows
from .chunking_spiralformer import ChunkGrid, FilledChunks


@dataclass(frozen=True)
class PagedLatents:
    """The latents of a step. Every index is a `torch.LongTensor` on the device of the given tensors.

    Args:
        requests: `(K,)` the request of each latent that fills: request after request, in order.
        latents: `(K,)` its chunk index, which is its rotary position.
        had, has: `(R,)` how many latents each request had before the step, and has after it.
        table: `(R, blocks)` the ids of its blocks.
        per_block: B / g, the latents of one block.
    """

    requests: torch.Tensor
    latents: torch.Tensor
    had: torch.Tensor
    has: torch.Tensor
    table: torch.Tensor
    per_block: int

    @cached_property
    def slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Two of `(K,)`, where the keys and values of the new latents go: a block, and a slot in it."""
        return self._slots_of(self.requests, self.latents)

    @cached_property
    def counts(self) -> torch.Tensor:
        """`(R,)` how many latents of each request fill."""
        return self.has - self.had

    @cached_property
    def held_counts(self) -> torch.Tensor:
        """`(R,)` how many it has then; 0 where none fills, since nothing attends to them."""
        return torch.where(self.counts > 0, self.has, 0)

    @cached_property
    def held_slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Two of `(L,)`, where the keys and values of these L latents are, request after request, in order."""
        return self._slots_of(*_counted(torch.zeros_like(self.held_counts), self.held_counts))

    def _slots_of(self, requests: torch.Tensor, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.table[requests, latents // self.per_block], latents % self.per_block


@dataclass(frozen=True)
class PagedStep(PagedLatents):
    """What one resolution does in a step.

    `members` and `kept_tokens` count in [states of the N new tokens | open tokens of request 0 | of request 1 | ...],
    `reads` and `kept_latents` in [the K new latents | kept latents of request 0 | ...]; what each request brings along
    is the state slot of its `held_blocks`.

    Args:
        members: `(K, G)` the tokens of its chunk.
        present: `(K, G)` False for a member before the text.
        reads: `(N,)` the latent that each new token reads.
        places: `(N,)` the place in that latent's chunk, whose part the token gets.
        readable: `(N,)` False for a token that no latent has reached yet.
        held_blocks: `(R,)` the block with the state that the request goes on from; of a new one its first block.
        kept_blocks: `(P,)` the blocks whose state slots the step writes.
        kept_tokens: `(P, G - 1)` the tokens that go there: the token with place p in its chunk at p.
        kept_latents: `(P, ceil(s / G))` the latents that go there: latent j at j mod ceil(s / G).
    """

    members: torch.Tensor
    present: torch.Tensor
    reads: torch.Tensor
    places: torch.Tensor
    readable: torch.Tensor
    held_blocks: torch.Tensor
    kept_blocks: torch.Tensor
    kept_tokens: torch.Tensor
    kept_latents: torch.Tensor


def check_block_size(grids: list[ChunkGrid], block_size: int) -> None:
    """Refuses blocks that cut a chunk size.

    Raises:
        `ValueError`: naming the chunk size.
    """
    for grid in grids:
        if block_size % grid.size:
            raise ValueError(
                f"`block_size` must be a multiple of every chunk size, but got {block_size} for chunks of {grid.size}."
            )


def kept_counts(grid: ChunkGrid) -> tuple[int, int]:
    """How many tokens and latents the state of one block holds: G - 1 of the open chunk, ceil(s / G) to be read."""
    return grid.size - 1, -(-grid.shift // grid.size)


def plan_latents(
    grid: ChunkGrid, past: torch.Tensor, total: torch.Tensor, table: torch.Tensor, block_size: int
) -> PagedLatents:
    """What the attention over latents has to know of a step: the arguments are those of `plan_step`."""
    check_block_size([grid], block_size)
    had, has = grid.num_filled(past), grid.num_filled(total)
    return PagedLatents(*_counted(had, has), had, has, table, block_size // grid.size)


def plan_step(
    grid: ChunkGrid, past: torch.Tensor, total: torch.Tensor, table: torch.Tensor, block_size: int
) -> PagedStep:
    """
    Args:
        past: `(R,)` tokens of each request that earlier steps have computed.
        total: `(R,)` its tokens after this step.
        table: `(R, blocks)` the ids of its blocks, in order; what is beyond its last one is not looked at.
        block_size: B, a multiple of the chunk size.

    Raises:
        `ValueError`: where the chunk size does not divide `block_size`.
    """
    filling = plan_latents(grid, past, total, table, block_size)
    step = _Step(grid, past, total, filling)
    requests, latents = filling.requests, filling.latents
    members = latents[:, None] * grid.size - grid.offset + torch.arange(grid.size, device=past.device)
    present = members >= 0
    token_requests, tokens = step.new_tokens
    reads, readable = grid.pi(tokens - grid.shift), tokens >= grid.shift
    kept_requests, kept_blocks, ends = step.touched(block_size)
    open_tokens, newest = _kept(grid, ends)
    return PagedStep(
        **vars(filling),
        members=step.token_index(requests[:, None], members, present),
        present=present,
        reads=step.latent_index(token_requests, reads, readable),
        places=grid.rho(tokens - grid.shift),
        readable=readable,
        held_blocks=table[torch.arange(len(past), device=past.device), (past - 1).clamp(min=0) // block_size],
        kept_blocks=table[kept_requests, kept_blocks],
        kept_tokens=step.token_index(kept_requests[:, None], *open_tokens),
        kept_latents=step.latent_index(kept_requests[:, None], *newest),
    )


class _Step:
    """The new tokens and latents of a step, and where each token and latent of a request is found in it."""

    def __init__(self, grid: ChunkGrid, past: torch.Tensor, total: torch.Tensor, filling: PagedLatents):
        self.grid, self.past, self.total, self.filling = grid, past, total, filling
        self.new_tokens = _counted(past, total)

    def token_index(self, requests: torch.Tensor, tokens: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
        """Where a token's state is; 0 where there is none."""
        count, _ = kept_counts(self.grid)
        held = len(self.new_tokens[0]) + requests * count + self.grid.rho(tokens)
        return self._index(requests, tokens, self.past, self.total, held, exists)

    def latent_index(self, requests: torch.Tensor, latents: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
        """Where a latent's update is; 0 where there is none."""
        _, count = kept_counts(self.grid)
        filling = self.filling
        held = len(filling.latents) + requests * count + latents % max(count, 1)
        return self._index(requests, latents, filling.had, filling.has, held, exists)

    def _index(self, requests, numbers, before, after, held, exists) -> torch.Tensor:
        counts = after - before
        first = counts.cumsum(0) - counts - before  # of each request, less what it had
        index = torch.where(numbers >= before[requests], first[requests] + numbers, held)
        return torch.where(exists, index, 0)

    def touched(self, block_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The blocks that end after `past` tokens: request, number in the request, the tokens of it at their end."""
        requests, blocks = _counted(self.past // block_size, -(-self.total // block_size))
        return requests, blocks, torch.minimum((blocks + 1) * block_size, self.total[requests])


def _kept(grid: ChunkGrid, ends: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """The tokens and latents of states after `ends` `(P,)` tokens, in the order of their slots, and which exist."""
    token_count, latent_count = kept_counts(grid)
    ends, filled = ends[:, None], grid.num_filled(ends)[:, None]
    tokens = filled * grid.size - grid.offset + torch.arange(token_count, device=ends.device)
    slots = torch.arange(latent_count, device=ends.device)
    latents = filled - 1 - (filled - 1 - slots) % max(latent_count, 1)  # of those with this slot, the newest
    return (tokens, (tokens >= 0) & (tokens < ends)), (latents, latents >= 0)


def _counted(start: torch.Tensor, end: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers `start[r]` to `end[r]` (excluded) of each row r in turn: the row of each, and the number."""
    counts = end - start
    rows = torch.arange(len(start), device=start.device).repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    return rows, torch.arange(len(rows), device=start.device) - first[rows] + start[rows]


class PagedState:
    """What a resolution keeps of all requests, in their blocks: a `ResolutionState` for the flat batch of a step.

    Args:
        grid: its chunks.
        plan: what the step does.
        slots: `(blocks, tokens and latents, D)` the state slot of every block, which `trim` writes.
    """

    def __init__(self, grid: ChunkGrid, plan: PagedStep, slots: torch.Tensor):
        self.grid, self.plan, self.slots, self.rows = grid, plan, slots, Rows()
        held = slots[plan.held_blocks].split([*kept_counts(grid)], dim=1)
        self.tokens, self.latents = (states.flatten(0, 1) for states in held)

    def feed(self, states: torch.Tensor) -> FilledChunks | None:
        """Takes `(1, N, D)` new token states; returns the chunks that they fill, None where they fill none."""
        self.tokens = torch.cat([states[0], self.tokens])
        plan, count = self.plan, len(self.plan.latents)
        if not count:
            return None
        return FilledChunks(0, count, plan.latents[None], plan.members[None], present=plan.present[None])

    def members(self, filled: FilledChunks) -> torch.Tensor:
        """The token states `(1, K, G, D)` of the chunks filled; arbitrary but finite where no token is present."""
        return self.tokens[self.plan.members][None]

    def store(self, latents: torch.Tensor, filled: FilledChunks) -> None:
        """Keeps the core's outputs `(1, K, D)` for the tokens that will read them."""
        self.latents = torch.cat([latents[0], self.latents])

    def readable(self, length: int) -> torch.Tensor:
        """The latents that new tokens may read, new ones and those that were kept, `(1, K + R * kept, D)`."""
        return self.latents[None]

    def shift(self, updates: torch.Tensor, length: int) -> torch.Tensor:
        """u_(i - s) for each new token i, `(1, N, D)`: zero where it has nothing to read yet.

        Args:
            updates: `(1, (K + R * kept) * G, D)`, those of every place of the latents that are `readable`.
        """
        read = updates[0, self.plan.reads * self.grid.size + self.plan.places]
        return torch.where(self.plan.readable[:, None], read, 0.0)[None]

    def trim(self, length: int) -> None:
        """Ends the step: writes the states of the blocks that it touched."""
        kept = self.tokens[self.plan.kept_tokens], self.latents[self.plan.kept_latents]
        self.slots[self.plan.kept_blocks] = torch.cat(kept, dim=1)


__all__ = ["PagedLatents", "PagedState", "PagedStep", "check_block_size", "kept_counts", "plan_latents", "plan_step"]
