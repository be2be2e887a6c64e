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
"""The layers of every family, of vLLM's parallel linears and rotary embedding.

A layer has no cache of its own: it is given an entry, since a core layer has one in each iteration.

Shape letters: N new tokens or latents, D hidden size.
"""

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

from modeling_spiralformer.configuration_spiralformer import SpiralFormerConfig
from modeling_spiralformer.layers_spiralformer import FAMILIES, make_norm, make_rotary_embedding


class SpiralFormerRotaryEmbedding(RotaryEmbedding):
    """vLLM's rotation of queries and keys, by the angles of the package.

    vLLM's own angles of some types end before `max_position_embeddings`: at factor times the original length.

    Args:
        longest: tokens of the longest text.
    """

    def __init__(self, config: SpiralFormerConfig, longest: int):
        self.config = config
        size, parameters = config.resolved_head_dim, config.rope_parameters or {}
        share = int(size * parameters["partial_rotary_factor"])
        super().__init__(size, share, longest, parameters["rope_theta"], True, torch.get_default_dtype())

    def _compute_cos_sin_cache(self) -> torch.Tensor:
        """`(longest, rotary dimensions)`: the cosines of a position, and its sines."""
        positions = torch.arange(self.max_position_embeddings)[None]
        angles = make_rotary_embedding(self.config)(torch.empty(0), position_ids=positions)
        return torch.cat([values[0].chunk(2, dim=-1)[0] for values in angles], dim=-1)  # the library has each twice


class SpiralFormerAttention(nn.Module):
    """Queries, keys and values of one product, with norms where the family has them; `qkv` and `out` hold a rank's
    heads."""

    def __init__(self, config: SpiralFormerConfig, rotary: nn.Module, prefix: str):
        super().__init__()
        size, heads = config.resolved_head_dim, config.num_attention_heads
        bias = bool(config.attention_bias)
        self.head_size, self.rotary = size, rotary
        self.qkv = QKVParallelLinear(
            config.hidden_size,
            size,
            heads,
            config.resolved_num_key_value_heads,
            bias=bias,
            prefix=f"{prefix}.qkv",
            return_bias=False,
        )
        self.out = RowParallelLinear(
            heads * size, config.hidden_size, bias=bias, prefix=f"{prefix}.out", return_bias=False
        )
        self.query_norm = self.key_norm = None
        if FAMILIES[config.layer_family].norms_heads:
            eps: Any = config.rms_norm_eps
            self.query_norm, self.key_norm = LlamaRMSNorm(size, eps=eps), LlamaRMSNorm(size, eps=eps)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor, entry: Attention) -> torch.Tensor:
        """`(N, D)` from `(N, D)` at the positions `(N,)`, whose keys and values go to an entry of the cache."""
        keys = self.qkv.num_kv_heads * self.head_size
        query, key, value = self.qkv(hidden_states).split([self.qkv.num_heads * self.head_size, keys, keys], dim=-1)
        if self.query_norm is not None:
            query, key = self._by_head(self.query_norm, query), self._by_head(self.key_norm, key)
        query, key = self.rotary(positions, query, key)
        return self.out(entry(query, key, value))

    def _by_head(self, norm, states: torch.Tensor) -> torch.Tensor:
        return norm(states.unflatten(-1, (-1, self.head_size))).flatten(-2)


class SpiralFormerMLP(nn.Module):
    """act(W x) or act(W x) * (V x), and back to D."""

    def __init__(self, config: SpiralFormerConfig, prefix: str):
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.gated = "mlp.gate_proj" in FAMILIES[config.layer_family].layer_tp_plan
        bias = bool(config.mlp_bias) if self.gated else True
        options = {"bias": bias, "return_bias": False}
        self.into: nn.Module
        if self.gated:
            self.into = MergedColumnParallelLinear(size, [inner, inner], prefix=f"{prefix}.into", **options)
        else:
            self.into = ColumnParallelLinear(size, inner, prefix=f"{prefix}.into", **options)
        self.out = RowParallelLinear(inner, size, prefix=f"{prefix}.out", **options)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inner = self.into(hidden_states)
        if not self.gated:
            return self.out(self.act(inner))
        gate, other = inner.chunk(2, dim=-1)
        return self.out(self.act(gate) * other)


class SpiralFormerLayer(nn.Module):
    """Attention and MLP with a norm before each, one after the other or side by side."""

    def __init__(self, config: SpiralFormerConfig, rotary: nn.Module, prefix: str):
        super().__init__()
        self.parallel = bool(config.use_parallel_residual)
        self.input_layernorm, self.post_attention_layernorm = make_norm(config), make_norm(config)
        self.attention = SpiralFormerAttention(config, rotary, f"{prefix}.attention")
        self.mlp = SpiralFormerMLP(config, f"{prefix}.mlp")

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor, entry: Attention) -> torch.Tensor:
        """As that of the attention."""
        attended = hidden_states + self.attention(positions, self.input_layernorm(hidden_states), entry)
        read = hidden_states if self.parallel else attended
        return attended + self.mlp(self.post_attention_layernorm(read))


__all__ = ["SpiralFormerAttention", "SpiralFormerLayer", "SpiralFormerMLP", "SpiralFormerRotaryEmbedding"]
