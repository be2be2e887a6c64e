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
"""Attention over latents: vLLM's own, whose keys and values have a slot for every g tokens.

vLLM tells an attention of tokens. Between its scheduler and the kernel stands a builder of metadata; the one here
gives the kernel the same step in latents. Blocks stay those of tokens: one holds B tokens, and B / g latents.

Shape letters: R requests, K latents that fill.
"""

from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from vllm.config import CacheConfig, VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    CommonAttentionMetadata,
    MultipleOf,
    subclass_attention_backend_with_overrides,
)
from vllm.v1.attention.selector import get_attn_backend
from vllm.v1.kv_cache_interface import AttentionSpec

from modeling_spiralformer.chunking_spiralformer import ChunkGrid
from modeling_spiralformer.paging_spiralformer import plan_latents

from .refusals import check_block_size, check_head_size, least_slots


def step_counts(step: CommonAttentionMetadata) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each request, as `plan_step` takes them: tokens before and after the step `(R,)`, ids of its blocks."""
    total = step.seq_lens.long()
    return total - step.query_start_loc.long().diff(), total, step.block_table_tensor.long()


def in_latents(grid: ChunkGrid, step: CommonAttentionMetadata, block_size: int) -> CommonAttentionMetadata | None:
    """The step as attention over the latents of a resolution sees it; None where no latent fills."""
    filling = plan_latents(grid, *step_counts(step), block_size)
    if not len(filling.latents):
        return None
    busy = filling.counts.nonzero().squeeze(-1)  # a kernel wants a query of every request that it is told of
    counts, has = filling.counts[busy], filling.has[busy].to(step.seq_lens.dtype)
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(step.query_start_loc.dtype)
    blocks, slots = filling.slots
    return step.replace(
        query_start_loc=starts,
        query_start_loc_cpu=starts.cpu(),
        seq_lens=has,
        seq_lens_cpu_upper_bound=has.cpu(),
        num_reqs=len(busy),
        num_actual_tokens=len(filling.latents),
        max_query_len=int(counts.max()),
        max_seq_len=int(has.max()),
        block_table_tensor=step.block_table_tensor[busy].contiguous(),
        slot_mapping=blocks * filling.per_block + slots,
        positions=filling.latents,
        is_prefilling=None if step.is_prefilling is None else step.is_prefilling[busy.cpu()],
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


@lru_cache
def latent_backend(underlying: type[AttentionBackend], grid: ChunkGrid) -> type[AttentionBackend]:
    """The attention of a platform, over the latents of a resolution."""
    builder_class: Any = underlying.get_builder_cls()
    attention_class: Any = underlying.get_impl_cls()

    class LatentBuilder(builder_class):
        _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER
        supports_update_block_table = False

        def __init__(self, kv_cache_spec: AttentionSpec, layer_names, vllm_config: VllmConfig, device):
            self.tokens_per_block = kv_cache_spec.block_size
            latents = replace(kv_cache_spec, block_size=kv_cache_spec.num_states, tokens_per_state=1)
            super().__init__(latents, layer_names, vllm_config, device)

        def build(self, common_prefix_len, common_attn_metadata: CommonAttentionMetadata, fast_build=False):
            step = in_latents(grid, common_attn_metadata, self.tokens_per_block)
            return None if step is None else super().build(0, step, fast_build)

    class LatentImplementation(attention_class):
        """Writes keys and values itself: vLLM would put them into the slots of tokens."""

        def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs):
            if attn_metadata is not None and not underlying.forward_includes_kv_cache_update:
                self.do_kv_cache_update(layer, key, value, kv_cache, attn_metadata.slot_mapping)
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)

    def block_sizes(kv_cache_spec=None) -> list[MultipleOf]:
        return [MultipleOf(least_slots(underlying, of_latents=True) * grid.size)]

    return subclass_attention_backend_with_overrides(
        f"Latents{grid.size}At{grid.offset}For{grid.shift}",
        underlying,
        {
            "get_builder_cls": staticmethod(lambda: LatentBuilder),
            "get_impl_cls": staticmethod(lambda: LatentImplementation),
            "get_supported_kernel_block_sizes": staticmethod(block_sizes),
            "forward_includes_kv_cache_update": True,
        },
    )


class LatentAttention(Attention):
    """One entry of the cache: vLLM's attention over tokens, or over the latents of a resolution.

    Args:
        grid: the chunks of that resolution; None for tokens.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        num_kv_heads: int,
        grid: ChunkGrid | None,
        cache: CacheConfig,
        prefix: str,
    ):
        backend = get_attn_backend(head_size, torch.get_default_dtype(), cache.cache_dtype)
        check_head_size(head_size, backend)
        self.underlying, self.grid = backend, grid
        if grid is not None and grid.size > 1:  # a chunk of one token is a token
            backend = latent_backend(backend, grid)
        options: dict[str, Any] = {"cache_config": cache, "attn_backend": backend, "prefix": prefix}
        super().__init__(num_heads, head_size, head_size**-0.5, num_kv_heads, **options)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> AttentionSpec:
        """
        Raises:
            `ValueError`: for blocks that do not fit. It is here that vLLM has settled their size.
        """
        spec: Any = super().get_kv_cache_spec(vllm_config)
        if self.grid is None:
            return spec
        check_block_size(ChunkGrid.of(vllm_config.model_config.hf_config), spec.block_size, self.underlying)
        return replace(spec, tokens_per_state=self.grid.size)


__all__ = ["LatentAttention", "in_latents", "latent_backend", "step_counts"]
