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
"""What the rows of a call are: which columns hold tokens, which texts they are, what earlier calls have shown.

Shape letters: B batch, S new tokens. A column is a place in the padded batch, counted from the first call on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers.utils.import_utils import is_torchdynamo_compiling

from .cache_name_spiralformer import CACHE_ARGUMENT
from .heads_spiralformer import read_numbers

# Type checkers take `X | Any` for an X, and ask for no look at it.
MaybeNone = Any  # `X | MaybeNone` is None at times when nobody reads it
Columns = int | Any  # how many columns, or which one: a tensor where a compiled call does not look at it

RowChange = Callable[[torch.Tensor], torch.Tensor]  # of the batch dimension: reorder, select, repeat

COUNTED = "`position_ids` must count the tokens of each row, from 0 or from where the cache ends"
# What collators of packed rows say beside `position_ids`, where the library's layers need it.
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
# Of arguments that no user gave.
READ_AGAIN = (
    "generate() gives such ones where it reads a text once more that the cache already holds: assisted and "
    "prompt-lookup decoding over a filled cache, or a cache of the whole prompt."
)


class LeftPadding:
    """Leading columns of padding in each row of a batch; a batch without any has None in its place.

    Args:
        columns (`torch.LongTensor` of shape `(B,)`): how many leading columns of each row are padding.
    """

    def __init__(self, columns: torch.Tensor):
        self.columns = columns

    @classmethod
    def of(cls, attention_mask: torch.Tensor) -> "LeftPadding":
        """The leading zeros of each row of a `(B, columns)` mask."""
        return cls((attention_mask.bool().cumsum(dim=-1) == 0).sum(dim=-1))

    @cached_property
    def on_host(self) -> list[int]:
        """The same as Python integers: one read from the device, made once for each batch."""
        return self.columns.tolist()

    def on(self, device: torch.device) -> torch.Tensor:
        """The same as a column vector `(B, 1)` on a device: a model may lie on several."""
        return self.columns.to(device)[:, None]

    def cropped(self, columns: Columns) -> "LeftPadding":
        """The padding that is left of a batch cut back to its first `columns` columns."""
        return LeftPadding(self.columns.clamp(max=columns))

    def real_columns(self, columns: int) -> torch.Tensor:
        """A `(B, columns)` boolean mask, True where a column holds a token."""
        return torch.arange(columns, device=self.columns.device) >= self.columns[:, None]


class PackedTexts:
    """The texts of packed rows, which follow each other without padding.

    A compiled call does not look at them: there it is the device that refuses.

    Args:
        position_ids (`torch.LongTensor` of shape `(B or 1, S)`): the place of each token in its text.

    Raises:
        `ValueError`: where a text does not count 0, 1, 2, ...
    """

    def __init__(self, position_ids: torch.Tensor):
        self.position_ids = position_ids
        self.on_host: torch.Tensor | MaybeNone = None
        if not is_torchdynamo_compiling():
            self.on_host = position_ids.cpu()  # one read from the device for all resolutions
        read = position_ids if self.on_host is None else self.on_host
        wrong = (read != 0) & (read.diff(dim=-1, prepend=read.new_full((len(read), 1), -1)) != 1)
        must = "`position_ids` of packed rows must count 0, 1, 2, ... in each document"
        if self.on_host is None:
            torch._assert_async(~wrong.any(), must)
        elif wrong.any():
            row, column = wrong.nonzero()[0].tolist()
            up_to = self.on_host[row, max(0, column - 1) : column + 1].tolist()
            raise ValueError(f"{must}, but row {row} has {up_to} up to column {column}.")


@dataclass(frozen=True)
class Batch:
    """One call as all resolutions see it.

    Args:
        padding: the left padding of all columns, None where there is none.
        texts: the texts of packed rows, None where no row is packed.
        token_mask: `(B, past + S)`, the mask of the token layers (of a static cache: as long as its store); None where
            every column is real.
        position_ids: `(B or 1, S)`, the place of each new token in its text: rotary positions of the token layers.
        row_ends: `(B,)`, how many columns there are up to each row's last token; None where no row ends in padding.
        unchecked: whether a mask was given whose values a compiled call could not look at; None where nobody asked.
    """

    padding: LeftPadding | None
    texts: PackedTexts | None
    token_mask: torch.Tensor | None
    position_ids: torch.Tensor
    row_ends: torch.Tensor | None = None
    unchecked: bool | None = None


class Rows:
    """What is known of a batch's rows between its calls: one for all resolutions of a cache."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.padding: LeftPadding | None = None
        self.row_ends: torch.Tensor | None = None  # of the last call's `Batch`
        self.mask_unchecked = False  # a compiled call took a mask whose values it could not look at
        self.unfinished = False  # a forward has begun and not ended: an error may have left any part half written
        self.every_row = False  # adapters tell the rows of the batch apart: all of them run where one does
        self.dtype: torch.dtype | None = None  # of the embeddings

    def settled(self, columns: int) -> bool:
        """Whether every row has had a token after so many columns: its padding is final then."""
        return columns > 0 and (self.padding is None or max(self.padding.on_host) < columns)

    def has_ended(self, columns: Columns) -> bool:
        """Whether a row ended before that column; one that a compiled call does not look at may have."""
        if self.row_ends is None:
            return False
        return not isinstance(columns, int) or bool((self.row_ends < columns).any())

    def change(self, change: RowChange) -> None:
        """Applies a change of the batch dimension."""
        if self.padding is not None:
            self.padding = LeftPadding(change(self.padding.columns))
        if self.row_ends is not None:
            self.row_ends = change(self.row_ends)

    def begin(self, batch: Batch, every_row: bool) -> None:
        """A call begins. Nothing is refused from here on: what fails before `end` leaves the cache half written."""
        self._keep(batch.padding)
        self.row_ends = batch.row_ends
        self.every_row, self.unfinished = every_row, True
        if batch.unchecked is not None:
            self.mask_unchecked = batch.unchecked

    def _keep(self, padding: LeftPadding | None) -> None:
        """The padding of the call, in a compiled one in the tensor of `make_room`: a later graph reuses the memory of
        what a graph returns.
        """
        kept = self.padding
        if is_torchdynamo_compiling() and kept is not None and padding is not None and padding is not kept:
            padding = LeftPadding(kept.columns.copy_(padding.columns))
        self.padding = padding

    def make_room(self, rows: int, device: torch.device) -> None:
        """A tensor for the padding that compiled calls will find."""
        self.padding = LeftPadding(torch.zeros(rows, dtype=torch.long, device=device))
        torch._dynamo.mark_static_address(self.padding.columns)

    def end(self) -> None:
        """The call has written everything."""
        self.unfinished = False


@dataclass(frozen=True)
class Past:
    """What a call goes on from; the defaults are those of a call without a cache.

    Args:
        columns: those of earlier calls.
        rows: None where nobody remembers the rows: without a cache, or without a loop.
        settled: whether every row has had a token, so that its padding is final.
        room: the columns of a static cache, whose masks may have all of them; None of another.
        is_given: whether the user gave the cache; None where the call has none.
    """

    columns: Columns = 0
    rows: Rows | None = None
    settled: bool = False
    room: int | None = None
    is_given: bool | None = None

    @property
    def padding(self) -> LeftPadding | None:
        """What is known of the padding."""
        return None if self.rows is None else self.rows.padding


def read_batch(
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    boundaries: dict[str, torch.Tensor],
    inputs_embeds: torch.Tensor,
    past: Past,
) -> Batch:
    """What the arguments of a call say of its rows.

    Args:
        attention_mask: 2-D, of all columns.
        position_ids: `(B or 1, S)`: they tell packed rows, and nothing else.
        boundaries: the arguments named in `BOUNDARIES`, where they are given.
        inputs_embeds: `(B, S, D)`.

    Raises:
        `ValueError`: naming the argument, for masks with holes, of a wrong shape, or that contradict the cache, for
            positions that are not those of the tokens, and for packed rows with a cache or a mask.
    """
    padding, token_mask, row_ends, unchecked = _read_mask(attention_mask, inputs_embeds, past)
    columns = past.columns + torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
    counted = columns if padding is None else (columns - padding.columns[:, None]).clamp(min=0)
    texts = _read_positions(position_ids, counted, token_mask, boundaries, inputs_embeds, past)
    if texts is not None:
        return Batch(None, texts, None, texts.position_ids)
    return Batch(padding, None, token_mask, counted, row_ends, unchecked)


# -- the mask -----------------------------------------------------------------------------------------------------


def _read_mask(
    attention_mask: torch.Tensor | None, inputs_embeds: torch.Tensor, past: Past
) -> tuple[LeftPadding | None, torch.Tensor | None, torch.Tensor | None, bool | None]:
    """`padding`, `token_mask`, `row_ends` and `unchecked` of the `Batch`."""
    if past.rows is None and isinstance(past.columns, torch.Tensor):  # compiled steps of a plain GPT-NeoX stack
        return None if attention_mask is None else LeftPadding.of(attention_mask), attention_mask, None, None
    length, padding = inputs_embeds.shape[1], past.padding
    if attention_mask is not None:
        attention_mask = check_mask_shape(attention_mask, inputs_embeds, past).to(inputs_embeds.device)
    if past.rows is not None and past.rows.has_ended(past.columns):
        raise ValueError(f"{CACHE_ARGUMENT} holds right-padded rows: nothing can be appended to them. Pad left.")
    compiling = is_torchdynamo_compiling() or torch.jit.is_tracing()
    trusted = past.rows is not None and past.settled and length == 1 and (compiling or not past.rows.mask_unchecked)
    if attention_mask is None or trusted:
        columns = past.columns + length if past.room is None else past.room
        return padding, None if padding is None else padding.real_columns(columns), None, None
    if compiling:
        if not past.settled:
            padding = LeftPadding.of(attention_mask).cropped(past.columns + length)
        return padding, attention_mask, None, True
    pads = LeftPadding.of(attention_mask)
    is_padded, row_ends = _look_at_mask(attention_mask, pads, past)
    if not past.settled:
        padding = pads if is_padded else None
    return padding, attention_mask if is_padded or row_ends is not None else None, row_ends, False


def _look_at_mask(attention_mask: torch.Tensor, pads: LeftPadding, past: Past) -> tuple[bool, torch.Tensor | None]:
    """Whether a row begins in padding, and `row_ends` of the `Batch`: one read from the device."""
    real = attention_mask.bool()
    after_first = pads.real_columns(real.shape[1])
    trailing = real.flip(-1).cumsum(dim=-1).flip(-1) == 0
    facts = (pads.columns > 0).any(), (after_first & trailing).any(), (after_first & ~real & ~trailing).any()
    is_padded, right_padded, holes = torch.stack(facts).tolist()
    if holes:
        raise ValueError("`attention_mask` must be zero only before or after a row's tokens, but got holes.")
    if past.columns and right_padded:
        raise ValueError("`attention_mask` must not end a row before its newest token when a cache is continued.")
    if past.columns and past.rows is not None:
        before = [0] * len(real) if past.padding is None else past.padding.on_host
        if pads.cropped(past.columns).columns.tolist() != before:
            raise ValueError(
                f"`attention_mask` must keep the {before} columns of padding that the cached rows were started with, "
                f"but got {pads.on_host}."
            )
    if not right_padded:
        return is_padded, None
    ends = (~trailing).sum(dim=-1)
    return is_padded, ends.masked_fill(ends == 0, real.shape[1])  # a row without a token has not begun


def check_mask_shape(attention_mask: torch.Tensor, inputs_embeds: torch.Tensor, past: Past) -> torch.Tensor:
    """The mask `(B, past + S)`, also out of one that has all the columns of a static cache."""
    if not isinstance(attention_mask, torch.Tensor):
        raise ValueError(f"`attention_mask` must be a tensor, but got {type(attention_mask).__name__}.")
    rows, columns = inputs_embeds.shape[0], past.columns + inputs_embeds.shape[1]
    most = columns if past.room is None else past.room
    shape, is_counted = tuple(attention_mask.shape), isinstance(past.columns, int)
    if len(shape) != 2 or shape[0] != rows or (is_counted and shape[1] not in (columns, most)):
        wanted = (rows, columns if is_counted else most)
        raise ValueError(
            f"`attention_mask` must have shape {wanted} (rows, past and new tokens), but got {shape}. Masks of 4 "
            "dimensions are not supported: chunks need to know which tokens are real, not who attends to whom. "
            f"{READ_AGAIN if is_counted and past.columns else ''}".rstrip()
        )
    return attention_mask[:, :columns] if is_counted else attention_mask


# -- the positions ------------------------------------------------------------------------------------------------


def _read_positions(
    position_ids: torch.Tensor | None,
    counted: torch.Tensor,
    token_mask: torch.Tensor | None,
    boundaries: dict[str, torch.Tensor],
    inputs_embeds: torch.Tensor,
    past: Past,
) -> PackedTexts | None:
    """What `position_ids` of shape `(B or 1, S)` say of packed rows: a text starts where they restart.

    They say nothing else: rows that are not packed have the positions `counted`, and others are refused. They would
    turn prelude and coda, and leave the chunks where they are.

    Returns:
        None where no row is packed. A compiled call does not look, and the device refuses what is wrong: without
        cache and mask all rows are packed, those of one text too; with a mask, or a cache that is given, none is.
        Where it is to build a cache it leaves the graph to look, an error with `fullgraph=True`. Steps of one token
        do not wait for the device either.
    """
    batch, length = inputs_embeds.shape[:2]
    if position_ids is None:
        if boundaries:
            name = next(iter(boundaries))
            raise ValueError(f"`position_ids` must say where texts start, but got `{name}` without them.")
        return None
    position_ids = _read_given(position_ids, batch, length).to(counted.device)
    uncached = is_torchdynamo_compiling() and past.is_given is None
    if uncached and token_mask is None:
        _check_boundaries(boundaries, position_ids.expand(batch, -1))
        return PackedTexts(position_ids)
    wrong, restarts = position_ids != counted, position_ids.diff(dim=-1) <= 0
    if token_mask is not None:
        real = token_mask[:, past.columns + torch.arange(length, device=token_mask.device)].bool()
        wrong, restarts = wrong & real, restarts & real[:, :-1] & real[:, 1:]
    compiling = uncached or (is_torchdynamo_compiling() and past.is_given) or torch.jit.is_tracing()
    if compiling or (length == 1 and counted.device.type != "cpu"):
        torch._assert_async(~wrong.any(), COUNTED)
        return None
    _check_boundaries(boundaries, position_ids.expand(batch, -1))
    is_wrong, is_packed = torch.stack([wrong.any(), restarts.any()]).tolist()
    if not is_wrong:
        return None
    if not is_packed:
        raise ValueError(_wrong_positions(position_ids, counted, wrong))
    packed = "`position_ids` restart in a row (packed rows)"
    if past.is_given:
        raise ValueError(f"{packed}, but {CACHE_ARGUMENT} must be None then: nothing can be appended to them.")
    if token_mask is not None:
        raise ValueError(f"{packed}, but `attention_mask` must be all ones then: give padding the position 0.")
    return PackedTexts(position_ids)


def _read_given(position_ids: Any, batch: int, length: int) -> torch.Tensor:
    """The positions, `(B or 1, S)`, in int64. Raises `ValueError` for other than integers, and for another shape."""
    positions = read_numbers("position_ids", position_ids, floating=False).long()
    shape, allowed = tuple(positions.shape), ((1, length), (batch, length))
    if shape not in allowed:
        raise ValueError(f"`position_ids` must have shape {allowed[1]} or {allowed[0]}, but got {shape}.")
    return positions


def _check_boundaries(boundaries: dict[str, torch.Tensor], position_ids: torch.Tensor) -> None:
    """Refuses starts of texts, `(texts + 1,)` or `seq_idx` `(B, S)`, where `position_ids` `(B, S)` do not restart."""
    count = position_ids.numel()
    for name, value in boundaries.items():
        value = value.to(position_ids.device)
        if name == "seq_idx":  # a text starts where the index changes within a row
            starts = torch.arange(count, device=value.device)
            is_start = nn.functional.pad(value.diff(dim=-1), (1, 0)).flatten() != 0
        else:
            starts = value[:-1].long()
            is_start = starts < count
        firsts = position_ids.flatten()[starts.clamp(max=count - 1)]
        wrong = (is_start & (firsts != 0)).any()
        must = f"`{name}` must start a text only where `position_ids` are 0"
        if is_torchdynamo_compiling():
            torch._assert_async(~wrong, must)
        elif wrong:
            raise ValueError(
                f"{must}, but got starts {starts[is_start].tolist()} with positions {firsts[is_start].tolist()}."
            )


def _wrong_positions(position_ids: torch.Tensor, counted: torch.Tensor, wrong: torch.Tensor) -> str:
    """The message on `position_ids` that are not those of the row's tokens, all of `(B or 1, S)`."""
    row, column = wrong.nonzero()[0].tolist()
    got, allowed = (ids[row if len(ids) > 1 else 0, column].item() for ids in (position_ids, counted))
    return (
        f"{COUNTED}, but got {got} in row {row} for a new token that is number {allowed}: chunks are cut by that "
        "count. Left out, they are counted. " + READ_AGAIN
    )


__all__ = [
    "BOUNDARIES",
    "Batch",
    "LeftPadding",
    "PackedTexts",
    "Past",
    "RowChange",
    "Rows",
    "check_mask_shape",
    "read_batch",
]
