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
"""Tensors along columns that grow, or that are written where they stand.

Shape letters: B batch, R rows of the batch that run, K chunks (latents) that a call fills, D size of a state.
"""

import torch
from transformers.utils.import_utils import is_torchdynamo_compiling

from .batch_spiralformer import Columns
from .chunking_spiralformer import FilledChunks

# A store that grows gets room for this share of its columns more than it holds.
SPARE_SHARE = 1 / 64


def may_write(stored: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether `new` may be written into the memory of `stored`: one kind, and no gradients or graph recorded.

    Keys without a gradient may still be kept for that of the queries.
    """
    if torch.is_grad_enabled() or stored.requires_grad or is_torchdynamo_compiling():
        return False
    if stored.dtype != new.dtype or stored.device != new.device:
        return False
    return torch.is_inference_mode_enabled() or not stored.is_inference()


def append_columns(stored: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """`torch.cat([stored, new], dim=-2)` that does not copy `stored` at every step, but leaves room for the next ones.

    Copying all keys for every token would take up to a third of a decode step. The result is a view of a longer
    tensor, its `room`. That goes with the newest view alone: what a cache operation puts in its place is copied first.
    What holds nothing yet goes to the device of `new`: a layer's keys may live on another one than the embeddings.

    Args:
        stored: `(B, ..., columns, D)`.
        new: `(B, ..., K, D)`.
    """
    held, total = stored.shape[-2], stored.shape[-2] + new.shape[-2]
    if held == 0:
        stored = stored.to(new.device)
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


def write_columns(stored: torch.Tensor, new: torch.Tensor, filled: FilledChunks, origin: int = 0) -> torch.Tensor:
    """Writes what a call computed into columns `filled.first` ... of latent columns; in place where it may.

    Args:
        stored: `(B, ..., columns, D)`; its first column is latent column `origin`.
        new: `(R, ..., K, D)`, one entry per row that runs and latent column of `filled`.

    Returns:
        `(B, ..., columns, D)`, long enough for `filled.end`. Pairs that `filled` does not fill keep what they had.
    """
    if filled.new is None:
        return append_columns(stored, new)
    first, end = filled.first - origin, filled.end - origin
    if end > stored.shape[-2]:
        missing = (*stored.shape[:-2], end - stored.shape[-2], stored.shape[-1])
        stored = append_columns(stored, stored.new_zeros(missing, device=new.device))
    if not may_write(stored, new):
        stored = stored.to(torch.promote_types(stored.dtype, new.dtype), copy=True)
    block = stored.narrow(-2, first, end - first)
    rows = slice(None) if filled.rows is None else filled.rows.to(new.device)
    is_new = filled.new.to(new.device).view(filled.new.shape[0], *[1] * (new.dim() - 3), -1, 1)
    block[rows] = torch.where(is_new, new, block[rows])
    return stored


def copy_columns(stored: torch.Tensor, new: torch.Tensor, first: Columns, is_new: torch.Tensor | None) -> None:
    """Writes `(B, ..., K, D)` into the columns from `first` on, of a store of fixed address.

    Args:
        stored: `(B, ..., columns, D)`.
        is_new: `(B or 1, K)`, False where a column keeps what it had; None where all are written.
    """
    count = new.shape[-2]
    if count == 1 and isinstance(first, torch.Tensor):
        columns = first[None]
    else:
        columns = torch.arange(count, device=new.device) + first
    if is_new is not None:
        new = torch.where(is_new.view(-1, *[1] * (new.dim() - 3), count, 1), new, stored.index_select(-2, columns))
    stored.index_copy_(-2, columns, new)


__all__ = ["append_columns", "copy_columns", "write_columns"]
