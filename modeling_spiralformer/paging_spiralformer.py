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

import torch

from .chunking_spiralformer import ChunkGrid


@dataclass(frozen=True)
class PagedStep:
    """What one resolution does in a step. Every index is a `torch.LongTensor` on the device of the given tensors.

    `members` and `kept_tokens` count in [states of the N new tokens | open tokens of request 0 | of request 1 | ...],
    `reads` and `kept_latents` in [the K new latents | kept latents of request 0 | ...]; what each request brings along
    is the state slot of its `held_blocks`.

    Args:
        requests: `(K,)` the request of each latent that fills: request after request, in order.
        latents: `(K,)` its chunk index, which is its rotary position.
        slots: two of `(K,)`, where its keys and values go: a block, and a slot in it.
        counts: `(R,)` how many latents of each request fill.
        held_counts: `(R,)` how many it has then; 0 where none fills, since nothing attends to them.
        held_slots: two of `(L,)`, where the keys and values of these are, request after request, in order.
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

    requests: torch.Tensor
    latents: torch.Tensor
    slots: tuple[torch.Tensor, torch.Tensor]
    counts: torch.Tensor
    held_counts: torch.Tensor
    held_slots: tuple[torch.Tensor, torch.Tensor]
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
    check_block_size([grid], block_size)
    step = _Step(grid, past, total)
    requests, latents = step.filling
    members = latents[:, None] * grid.size - grid.offset + torch.arange(grid.size, device=past.device)
    present = members >= 0
    token_requests, tokens = step.new_tokens
    reads, readable = grid.pi(tokens - grid.shift), tokens >= grid.shift
    kept_requests, kept_blocks, ends = step.touched(block_size)
    open_tokens, newest = _kept(grid, ends)
    counts = step.has - step.had
    held_counts = torch.where(counts > 0, step.has, 0)
    per_block = block_size // grid.size

    def slots_of(requests: torch.Tensor, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return table[requests, latents // per_block], latents % per_block

    return PagedStep(
        requests=requests,
        latents=latents,
        slots=slots_of(requests, latents),
        counts=counts,
        held_counts=held_counts,
        held_slots=slots_of(*_counted(torch.zeros_like(held_counts), held_counts)),
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

    def __init__(self, grid: ChunkGrid, past: torch.Tensor, total: torch.Tensor):
        self.grid, self.past, self.total = grid, past, total
        self.had, self.has = grid.num_filled(past), grid.num_filled(total)
        self.new_tokens = _counted(past, total)
        self.filling = _counted(self.had, self.has)

    def token_index(self, requests: torch.Tensor, tokens: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
        """Where a token's state is; 0 where there is none."""
        count, _ = kept_counts(self.grid)
        held = len(self.new_tokens[0]) + requests * count + self.grid.rho(tokens)
        return self._index(requests, tokens, self.past, self.total, held, exists)

    def latent_index(self, requests: torch.Tensor, latents: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
        """Where a latent's update is; 0 where there is none."""
        _, count = kept_counts(self.grid)
        held = len(self.filling[0]) + requests * count + latents % max(count, 1)
        return self._index(requests, latents, self.had, self.has, held, exists)

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


__all__ = ["PagedStep", "check_block_size", "kept_counts", "plan_step"]
