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
"""Attention of continuous batching, request by request: a query meets the keys of its own request alone.

A flat batch as one row would have every query meet the keys of all requests, and a mask hide most of them.

Shape letters: R requests, N new states of all requests, M states that they have with them, S requests with one new
state, H heads, U heads of keys and values, E size of a head.
"""

from collections.abc import Callable

import torch
from torch.nn import functional
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface


class RequestAttention:
    """What each new state of a flat batch attends to: the states of its request up to itself.

    Layers take it in place of a mask, and hand it on to an attention of `by_request`. Requests with one new state
    are a batch, whose keys are padded to the longest; each other request is on its own.

    Args:
        new: `(R,)` the new states of each request, 0 or more: the last ones that it has.
        total: `(R,)` the states that it has with them. New ones, and all, lie request after request.
        dtype: of the scores.
    """

    def __init__(self, new: torch.Tensor, total: torch.Tensor, dtype: torch.dtype):
        rows, keys = new.cumsum(0), total.cumsum(0)
        one = new == 1
        self.rows = (rows - 1)[one]  # (S,)
        lengths, last = total[one], (keys - 1)[one]
        behind = torch.arange(int(lengths.max()) if len(lengths) else 0, device=new.device)
        self.keys = (last[:, None] - behind).clamp(min=0)  # (S, longest), the newest first
        self.mask = hidden((behind < lengths[:, None])[:, None, None], dtype)
        self.others = []
        counts = torch.stack([rows, keys, new, total], dim=1)[new > 1]
        for row, key, count, length in counts.tolist():
            causal = torch.ones(count, length, dtype=torch.bool, device=new.device).tril(length - count)
            self.others.append((slice(row - count, row), slice(key - length, key), hidden(causal, dtype)))

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, fused: bool
    ) -> torch.Tensor:
        """Queries `(1, H, N, E)`, keys and values `(1, U, M, E)`; returns `(1, N, H, E)`."""
        query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))  # states first
        output = torch.empty_like(query)
        if len(self.rows):
            keys, values = (
                states.index_select(0, self.keys.flatten()).unflatten(0, self.keys.shape) for states in (key, value)
            )
            output[self.rows] = attend(query[self.rows, None], keys, values, self.mask, scaling, fused)[:, 0]
        for rows, held, mask in self.others:
            output[rows] = attend(query[None, rows], key[None, held], value[None, held], mask, scaling, fused)[0]
        return output[None]


def hidden(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the scores: nothing where a state is seen, the lowest number elsewhere."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    fused: bool,
) -> torch.Tensor:
    """Attention of `(B, queries, H, E)` to `(B, keys, U, E)`, returned like the queries.

    The H / U heads that share keys are queries more of one head, so that nothing is repeated.
    """
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    grouped = query.unflatten(1, (-1, groups)).flatten(2, 3)
    mask = mask.repeat(*[1] * (mask.ndim - 2), groups, 1)
    if fused:
        output = functional.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    else:
        scores = grouped @ key.mT * (key.shape[-1] ** -0.5 if scaling is None else scaling) + mask
        output = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ value
    return output.unflatten(2, (groups, -1)).flatten(1, 2).transpose(1, 2)


def by_request(usual: str, fused: bool) -> Callable:
    """An attention for layers while requests are batched, in torch's fused kernel or step by step.

    Args:
        usual: the library's attention, of calls that have a mask.
    """

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        if isinstance(attention_mask, RequestAttention):
            return attention_mask(query, key, value, scaling, fused), None
        return ALL_ATTENTION_FUNCTIONS[usual](module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    return attention


# The attention that layers have otherwise -> that which they have while requests are batched, and its name. The name
# is of this module, so that each copy of the code has one that takes its own `RequestAttention`.
BY_REQUEST = {
    "sdpa": (f"sdpa_by_request_of_{__name__}", by_request("sdpa", fused=True)),
    "eager": (f"eager_by_request_of_{__name__}", by_request("paged|eager", fused=False)),
}


def register_by_request(usual: str) -> str:
    """Makes the attention by request, in place of this one, known to the library. Returns its name."""
    name, attention = BY_REQUEST[usual]
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[usual])
    return name


__all__ = ["BY_REQUEST", "RequestAttention", "register_by_request"]
