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
"""One resolution between calls: the tokens of its open chunks and its newest latents.

A call does the same five things at every resolution, be it training, prefill or one token of decoding: `feed` takes
the new token states and says which chunks they fill, `members` gives the tokens of those, `store` takes their latents,
`readable` gives the latents that tokens read, `shift` picks each token's update. `trim` then frees what no later call
needs. `members`, `readable` and `shift` change nothing.

Shape letters: B batch, R rows of the batch that run, S new tokens, K chunks (latents), G tokens in a chunk, D hidden
size. A place is a member's position in its chunk, counted on from chunk to chunk.
"""

from collections.abc import Callable

import torch
from torch import nn

from .batch_spiralformer import Columns, MaybeNone, PackedTexts, RowChange, Rows
from .chunking_spiralformer import ChunkGrid, FilledChunks
from .storage_spiralformer import write_columns


def pick_places(updates: torch.Tensor, places: torch.Tensor, readable: torch.Tensor) -> torch.Tensor:
    """`(B, S, D)` out of updates `(B, K * G, D)`: the one at `places` `(B or 1, S)`, zero if not `readable`."""
    index = places.clamp(0, updates.shape[1] - 1)
    rows = torch.arange(updates.shape[0], device=updates.device)[:, None]
    return updates[rows, index] * readable[..., None].to(updates.dtype)


class ResolutionState:
    """One resolution between calls: the token states of the open chunks and the newest latents.

    Args:
        grid (`ChunkGrid`): its chunks.
        rows (`Rows`): what is known of the batch's rows, shared by all resolutions.
        cached (`bool`): keep what the next call needs. False for a forward without a cache, after which the state is
            dropped; it runs every row of a padded batch and reads nothing from the device.
    """

    def __init__(self, grid: ChunkGrid, rows: Rows, cached: bool):
        self.grid = grid
        self.rows = rows
        self.cached = cached
        self.recording = False
        self.seen = 0  # columns of the batch so far: a cache that was half cropped has states that disagree
        self.tokens: torch.Tensor | MaybeNone = None  # (B, n, D), the newest n columns
        self.latents: torch.Tensor | MaybeNone = None  # (B, n, D), from latent column `first_latent` on
        self.first_latent = 0

    @property
    def num_rows(self) -> int:
        """B, the number of rows that are kept."""
        return self.tokens.shape[0]

    @property
    def is_new(self) -> bool:
        """Whether no column has been fed."""
        return self.seen == 0

    @property
    def settled(self) -> bool:
        """Whether every row has had a token: its padding is final then."""
        return self.rows.settled(self.seen)

    @property
    def past(self) -> Columns:
        """How many columns of the batch there have been."""
        return self.seen

    @property
    def first_token(self) -> Columns:
        """The column of the oldest token state."""
        return self.seen - self.tokens.shape[1]

    # -- a call -------------------------------------------------------------------------------------------------

    def feed(self, states: torch.Tensor) -> FilledChunks | None:
        """Takes `(B, S, D)` new token states; returns the chunks that they fill, None where they fill none."""
        start, self.seen = self.seen, self.seen + states.shape[1]
        self.tokens = states if self.tokens is None else torch.cat([self.tokens, states], dim=1)
        return self.grid.filling(
            start,
            self.seen,
            self.rows.padding,
            states.device,
            skip_idle=self.cached,
            every_row=self.rows.every_row,
        )

    def members(self, filled: FilledChunks) -> torch.Tensor:
        """The token states `(R, K, G, D)` of the chunks filled; arbitrary but finite where no token is present."""
        size = self.grid.size
        if isinstance(filled.member_columns, int):
            start = filled.member_columns - self.first_token
            window = nn.functional.pad(self.tokens, (0, 0, -start, 0)) if start < 0 else self.tokens[:, start:]
            return window[:, : filled.count * size].unflatten(1, (-1, size))
        window = self.tokens if filled.rows is None else self.tokens[filled.rows]
        index = (filled.member_columns - self.first_token).clamp(0, window.shape[1] - 1)
        rows = torch.arange(window.shape[0], device=window.device).view(-1, 1, 1)
        return window[rows, index]

    def store(self, latents: torch.Tensor, filled: FilledChunks) -> None:
        """Keeps the core's outputs `(R, K, D)` for the tokens that will read them."""
        if self.cached:
            latents = latents.to(self.tokens.dtype)  # of the embeddings, also where autocast rounds within a call
        if self.latents is None:
            self.first_latent = filled.first
            empty_shape = (self.tokens.shape[0], 0, latents.shape[-1])
            self.latents = latents.new_zeros(empty_shape) if filled.rows is not None else latents
            if filled.rows is None:
                return
        # What is there may be among the hidden states that a forward returned: only a copy is written to.
        stored = self.latents if filled.new is None else self.latents.clone()
        self.latents = write_columns(stored, latents, filled, origin=self.first_latent)

    def readable(self, length: int) -> torch.Tensor | None:
        """The latents `(B, K, D)` that the newest `length` tokens read; None where there is nothing to read yet."""
        if self.latents is None:
            return None
        latents = self.latents
        if self.cached:
            first = self.grid.first_kept_latent(self.seen - length, self.rows.padding)
            latents = latents[:, max(0, first - self.first_latent) :]
        return latents if latents.shape[1] else None

    def shift(self, updates: torch.Tensor | None, length: int) -> torch.Tensor:
        """u_(i - s) for the newest `length` tokens i, `(B, S, D)`: zero where a token has nothing to read yet.

        Args:
            updates: `(B, K * G, D)`, those of every place of the latents that are `readable`.
        """
        if updates is None:
            return torch.zeros_like(self.tokens[:, -length:])
        start, latents_end = self.seen - length, self.first_latent + self.latents.shape[1]
        places_before = latents_end * self.grid.size - updates.shape[1]
        if self.rows.padding is None:
            before = min(max(0, self.grid.shift - start), length)  # tokens that would read before the first one
            place = self.grid.read_position(start + before, self.grid.phase(0)) - places_before
            shifted = updates[:, place : place + length - before]
            return nn.functional.pad(shifted, (0, 0, before, 0)) if before else shifted
        pads = self.rows.padding.on(updates.device)
        columns = torch.arange(start, start + length, device=updates.device)
        places = self.grid.read_position(columns, self.grid.phase(pads)) - places_before
        return pick_places(updates, places, columns - self.grid.shift >= pads)

    def trim(self, length: int) -> None:
        """Ends a call of `length` tokens: drops what no later call needs."""
        if not self.cached:
            self.tokens = self.latents = None
            return
        if self.recording:
            return
        # Clones, or a slice would keep the whole prefill alive.
        open_tokens = self.grid.open_tokens(self.seen, self.rows.padding)
        if open_tokens < self.tokens.shape[1]:
            self.tokens = self.tokens[:, self.tokens.shape[1] - open_tokens :].clone()
        if self.latents is not None:
            kept = self.grid.first_kept_latent(self.seen, self.rows.padding)
            if kept > self.first_latent:
                self.latents = self.latents[:, kept - self.first_latent :].clone()
                self.first_latent = kept

    # -- cache operations ---------------------------------------------------------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        """Goes back by `tokens_to_remove` columns. Raises `ValueError` where the states of that point are gone."""
        target = self.seen - tokens_to_remove
        padding = None if self.rows.padding is None else self.rows.padding.cropped(target)
        open_tokens = self.grid.open_tokens(target, padding)
        first_token = self.first_token
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
        self.rows.padding, self.seen = padding, target  # the next resolution crops the padding again: the same

    def map_rows(self, change: RowChange) -> None:
        """Applies a change of the batch dimension to the states; `rows` are changed once for all resolutions."""
        self.tokens = change(self.tokens)
        if self.latents is not None:
            self.latents = change(self.latents)


class PackedState(ResolutionState):
    """The state of packed rows, for one forward without a cache: no chunk and no read leaves its text."""

    def __init__(self, grid: ChunkGrid, rows: Rows, texts: PackedTexts):
        super().__init__(grid, rows, cached=False)
        self.texts = texts

    def feed(self, states: torch.Tensor) -> FilledChunks | None:
        self.seen, self.tokens = states.shape[1], states
        return self.grid.packed_filling(self.texts, states.device)

    def shift(self, updates: torch.Tensor | None, length: int) -> torch.Tensor:
        if updates is None:
            return torch.zeros_like(self.tokens)
        return pick_places(updates, *self.grid.packed_reads(self.texts, updates.device))


class LatentEntry:
    """What the cache's entries of latents have in common: they share the state of their iteration.

    The first core layer of an iteration owns the state, and that of the first iteration the rows. An entry is built
    without arguments, and bound when the model first uses the cache.
    """

    state: ResolutionState | None = None
    owns_state = False
    owns_rows = False
    # What its subclasses have. None is what keys and values are in an entry that holds nothing.
    keys: torch.Tensor | MaybeNone  # (B, H, columns, E): heads of keys, size of a head
    values: torch.Tensor | MaybeNone
    record_past: bool  # in a dynamic cache
    bind: Callable[..., None]

    def map_rows(self, change: RowChange) -> None:
        """Applies a change of the batch dimension to keys and values, and to what the entry owns.

        An entry that holds nothing has no rows yet: the next call says how many.
        """
        if self.state is None or self.state.is_new:
            return
        if self.owns_state:
            self.state.map_rows(change)
        if self.owns_rows:
            self.state.rows.change(change)
        self.keys, self.values = change(self.keys), change(self.values)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row b becomes what row `beam_idx[b]` was."""
        self.map_rows(lambda states: states.index_select(0, beam_idx.to(states.device)))


__all__ = ["LatentEntry", "PackedState", "ResolutionState", "pick_places"]
