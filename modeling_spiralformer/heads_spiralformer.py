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
"""What a head reads: which positions of the states, and which labels go with them.

What is wrong is refused before the body runs: it would have written its tokens to the cache.

Shape letters: B batch, S new tokens, K positions that are kept, D hidden size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.utils.import_utils import is_torchdynamo_compiling


def new_tokens(
    input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, hidden_size: int
) -> tuple[int, int]:
    """(B, S) of a call. Raises `ValueError` for anything but ids `(B, S)` or embeddings `(B, S, D)`."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Exactly one of `input_ids` and `inputs_embeds` must be given.")
    name, given = ("inputs_embeds", inputs_embeds) if input_ids is None else ("input_ids", input_ids)
    given, dims = read_numbers(name, given, floating=input_ids is None), 3 if input_ids is None else 2
    if dims == 2 and given.dtype not in (torch.int64, torch.int32):  # what an embedding takes
        raise ValueError(f"`input_ids` must be a tensor of int64 or int32, but got {given.dtype}.")
    shape = tuple(given.shape)
    if len(shape) != dims or 0 in shape[:2]:
        raise ValueError(f"`{name}` must hold at least one row and one token, but got shape {shape}.")
    if dims == 3 and shape[2] != hidden_size:
        raise ValueError(f"`inputs_embeds` must be {hidden_size} wide, but got shape {shape}.")
    return shape[0], shape[1]


def check_kept(logits_to_keep: Any, tokens: tuple[int, int]) -> None:
    """Raises `ValueError` for what `keep_positions` cannot take of `(B, S)` tokens."""
    rows, length = tokens
    if isinstance(logits_to_keep, int) and not isinstance(logits_to_keep, bool):
        if logits_to_keep < 0:
            raise ValueError(f"`logits_to_keep` must be 0 or more, or a tensor, but got {logits_to_keep}.")
        return
    if not isinstance(logits_to_keep, torch.Tensor) or logits_to_keep.is_floating_point():
        got = logits_to_keep.dtype if isinstance(logits_to_keep, torch.Tensor) else repr(logits_to_keep)
        raise ValueError(f"`logits_to_keep` must be an integer, or a tensor of integers or booleans, but got {got}.")
    shape, is_bool = tuple(logits_to_keep.shape), logits_to_keep.dtype == torch.bool
    allowed = ((length,), (rows, length)) if is_bool else (shape[-1:], (rows, *shape[-1:]))
    if not shape or shape not in allowed:
        wanted = f"{allowed[0]} or {allowed[1]}" if is_bool else f"(K,) or ({rows}, K)"
        raise ValueError(f"`logits_to_keep` must have shape {wanted}, but got {shape}.")
    if is_bool or not _is_readable(logits_to_keep) or not logits_to_keep.numel():
        return
    least, most = int(logits_to_keep.min()), int(logits_to_keep.max())
    if least < -length or most >= length:
        raise ValueError(f"`logits_to_keep` must be in [{-length}, {length - 1}], but got {least} to {most}.")


def read_labels(
    labels: Any,
    shifted: Any,
    logits_to_keep: int | torch.Tensor,
    tokens: tuple[int, int],
    vocab_size: int,
    ignored: int,
) -> dict[str, torch.Tensor]:
    """`labels` and `shift_labels` as the loss takes them, in int64.

    Args:
        labels: integers of any dtype, which the loss moves by one position.
        shifted: `shift_labels`, which it takes in their place as they are; None where there are none.
        ignored: the label without a loss.

    Raises:
        `ValueError`: for labels that do not go with the logits of `(B, S)` tokens.
    """
    if isinstance(logits_to_keep, torch.Tensor):
        raise ValueError(
            "`labels` must be None where `logits_to_keep` is a tensor: the loss of a position is that of the next one."
        )
    kept = tokens[1] if logits_to_keep == 0 else min(logits_to_keep, tokens[1])
    name, given = ("labels", labels) if shifted is None else ("shift_labels", shifted)
    given = read_numbers(name, given, floating=False)
    if tuple(given.shape) != (tokens[0], kept):
        raise ValueError(
            f"`{name}` must have shape {(tokens[0], kept)}, one for each logit, but got {tuple(given.shape)}."
        )
    return {"labels": labels, name: _classes(name, given, vocab_size, ignored)}


def read_row_labels(labels: Any, rows: int, num_labels: int, problem_type: str | None) -> torch.Tensor:
    """Labels of B rows as the library's loss takes them: classes in int64, or floating numbers.

    Args:
        labels: `(B,)` classes in integers of any dtype, or `(B,)` numbers of one label; else `(B, num_labels)`
            numbers, which may be integers or booleans.
        problem_type: of the configuration; None where the loss is to tell it by the labels.

    Raises:
        `ValueError`: for labels that do not go with the rows.
    """
    if not isinstance(labels, torch.Tensor):
        raise ValueError(f"`labels` must be a tensor, but got {type(labels).__name__}.")
    shape, is_number = tuple(labels.shape), labels.is_floating_point()
    if problem_type is None and num_labels == 1:  # as the library's loss tells it
        problem_type = "regression"
    elif problem_type is None:
        is_class = not is_number and labels.dtype != torch.bool
        problem_type = "single_label_classification" if is_class else "multi_label_classification"
    of_row = problem_type == "single_label_classification" or (problem_type == "regression" and num_labels == 1)
    wanted = [(rows,), (rows, 1)] if of_row else [(rows, num_labels)]
    if shape not in wanted:
        raise ValueError(f"`labels` must have shape {' or '.join(map(str, wanted))}, but got {shape}.")
    if problem_type != "single_label_classification":
        return labels if is_number else labels.float()
    return _classes("labels", read_numbers("labels", labels, floating=False), num_labels)


def read_positions_of_span(name: str, positions: Any, rows: int) -> torch.Tensor:
    """Starts or ends of the spans of B rows, `(B,)` or `(B, 1)`, in int64. Raises `ValueError` for anything else."""
    read = read_numbers(name, positions, floating=False).long()
    if tuple(read.shape) not in ((rows,), (rows, 1)):
        raise ValueError(f"`{name}` must have shape {(rows,)} or {(rows, 1)}, but got {tuple(read.shape)}.")
    return read


def _classes(name: str, given: torch.Tensor, count: int, ignored: int = -100) -> torch.Tensor:
    """Classes below `count`, or `ignored`, in int64. Raises `ValueError` for others, where Python may look at them."""
    given = given.long()
    if _is_readable(given):
        wrong = given[(given != ignored) & ((given < 0) | (given >= count))]
        if wrong.numel():
            raise ValueError(f"`{name}` must be in [0, {count - 1}], or {ignored}, but got {int(wrong[0])}.")
    return given


def read_numbers(name: str, given: Any, floating: bool) -> torch.Tensor:
    """What is given, where it is a tensor of such numbers. Raises `ValueError` for anything else."""
    if not isinstance(given, torch.Tensor) or given.is_floating_point() != floating or given.dtype == torch.bool:
        kind = "floating point numbers" if floating else "integers"
        got = given.dtype if isinstance(given, torch.Tensor) else type(given).__name__
        raise ValueError(f"`{name}` must be a tensor of {kind}, but got {got}.")
    return given


def _is_readable(values: torch.Tensor) -> bool:
    """Whether Python may look at values: not in a graph or `torch.func`, and not where it would wait for a device."""
    if is_torchdynamo_compiling() or torch.jit.is_tracing() or torch._C._functorch.is_functorch_wrapped_tensor(values):
        return False
    return values.device.type == "cpu"


def keep_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The states whose logits are asked for, out of `(B, S, D)`.

    Args:
        logits_to_keep: an integer, that many of the last positions, 0 for all; a 1-D tensor of positions for all rows;
            a 2-D tensor of integers `(B, K)`, positions of each row; or of booleans `(B, S)`.

    Returns:
        `(B, K, D)`; of 2-D booleans `(positions, D)`.
    """
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:]
    if logits_to_keep.dtype != torch.bool:
        logits_to_keep = logits_to_keep.long()  # torch takes uint8 for a mask, and no other integers in every place
    if logits_to_keep.dim() != 2:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)


def check_last(attention_mask: torch.Tensor | None, tokens: tuple[int, int], pad_token_id: int | None) -> None:
    """Raises `ValueError` for several rows without a mask and without an id of padding: `last_tokens` finds no end."""
    if attention_mask is None and pad_token_id is None and tokens[0] > 1:
        raise ValueError(
            f"`attention_mask` must be given with {tokens[0]} rows where `pad_token_id` is None: where a row ends, "
            "nothing else says."
        )


def last_tokens(
    attention_mask: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    past: int,
    tokens: Sequence[int],
    pad_token_id: int | None,
) -> torch.Tensor | int:
    """The position `(B,)` of each row's last token among S new ones; -1 where that is the last position.

    Args:
        attention_mask: `(B, past + S)`, or as long as a static cache. Without it ids of padding are left out, as the
            library does.
        tokens: (B, S), which `check_last` has seen.
    """
    if attention_mask is not None:
        real = attention_mask[:, past : past + tokens[1]].bool()
    elif pad_token_id is None or input_ids is None:
        return -1
    else:
        real = input_ids != pad_token_id
    return (torch.arange(tokens[1], device=real.device, dtype=torch.int32) * real).argmax(-1)


__all__ = [
    "check_kept",
    "check_last",
    "keep_positions",
    "last_tokens",
    "new_tokens",
    "read_labels",
    "read_positions_of_span",
    "read_row_labels",
]
