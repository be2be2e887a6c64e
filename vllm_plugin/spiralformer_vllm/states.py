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
"""What a resolution keeps between steps, as a layer of vLLM's cache: one state for every block.

Shape letters: N new tokens, D hidden size.
"""

from functools import lru_cache
from typing import ClassVar

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from modeling_spiralformer.chunking_spiralformer import ChunkGrid
from modeling_spiralformer.paging_spiralformer import PagedState, PagedStep, kept_counts, plan_step

from .latents import step_counts


@lru_cache
def state_backend(grid: ChunkGrid) -> type[AttentionBackend]:
    """No attention: how vLLM's runner asks for what a layer has to know of a step, here the plan of a resolution."""

    class StateBuilder(AttentionMetadataBuilder[PagedStep]):
        _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

        def __init__(self, kv_cache_spec: AttentionSpec, layer_names, vllm_config: VllmConfig, device):
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)
            self.tokens_per_block = kv_cache_spec.block_size

        def build(self, common_prefix_len, common_attn_metadata: CommonAttentionMetadata, fast_build=False):
            return plan_step(grid, *step_counts(common_attn_metadata), self.tokens_per_block)

    class StateBackend(AttentionBackend):
        supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

        @staticmethod
        def get_name() -> str:
            return "SPIRALFORMER_STATE"

        @staticmethod
        def get_impl_cls():
            raise NotImplementedError("A state of a resolution attends to nothing.")

        @staticmethod
        def get_builder_cls():
            return StateBuilder

    # vLLM tells backends apart by their names, and calls one builder for all layers of a backend.
    StateBackend.__qualname__ = f"StateOf{grid.size}At{grid.offset}For{grid.shift}"
    return StateBackend


class StateLayer(nn.Module, AttentionLayerBase):
    """The tokens of a resolution's open chunk and its newest latents, in a slot of every block."""

    def __init__(self, grid: ChunkGrid, hidden_size: int, prefix: str):
        super().__init__()
        self.grid, self.layer_name = grid, prefix
        self.shape = (sum(kept_counts(grid)), hidden_size)
        self.kv_cache = torch.empty(0)  # (blocks, 1, 1, states * D), once vLLM has allocated it
        settings = get_current_vllm_config()
        self.longest = settings.model_config.max_model_len
        settings.compilation_config.static_forward_context[prefix] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return state_backend(self.grid)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> AttentionSpec:
        block_size, dtype = vllm_config.cache_config.block_size, vllm_config.model_config.dtype
        count, size = self.shape
        return FullAttentionSpec(
            block_size=block_size,
            tokens_per_state=block_size,
            num_kv_heads=1,
            head_size=count * size,
            head_size_v=0,
            dtype=dtype,
            state_content_bytes=count * size * dtype.itemsize,
        )

    def at_step(self, hidden_states: torch.Tensor) -> PagedState:
        """The state of all requests of this step, whose new token states are `(N, D)`.

        While vLLM measures what memory a step takes there are no blocks, and the tokens are those of new texts.
        """
        metadata = get_forward_context().attn_metadata
        if metadata is None:
            return self._of_new_texts(hidden_states)
        slots = self.kv_cache.unflatten(-1, self.shape)[:, 0, 0]
        return PagedState(self.grid, metadata[self.layer_name], slots)

    def _of_new_texts(self, hidden_states: torch.Tensor) -> PagedState:
        """As many tokens, in texts as long as a request may be; all of them in one block."""
        total = torch.tensor([len(part) for part in hidden_states.split(self.longest)], device=hidden_states.device)
        table = total.new_zeros(len(total), 1 + self.longest // self.grid.size)
        plan = plan_step(self.grid, torch.zeros_like(total), total, table, self.grid.size)
        return PagedState(self.grid, plan, hidden_states.new_zeros(1, *self.shape))


__all__ = ["StateLayer", "state_backend"]
