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
"""SpiralFormer as a model of vLLM: the paper's Algorithm 1 over the flat batch of a step.

Resolutions and topologies are the package's own modules. The layers are of vLLM's parts (`layers`), and so are the
entries of the cache (`latents`), numbered as `docs/cache.md` says; what a resolution keeps is another layer of the
cache (`states`).

Shape letters: N new tokens of all requests, K latents that fill, D hidden size, T iterations.
"""

import math
from collections.abc import Iterable
from functools import partial

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from modeling_spiralformer.chunking_spiralformer import ChunkGrid, FilledChunks
from modeling_spiralformer.configuration_spiralformer import SpiralFormerConfig
from modeling_spiralformer.layers_spiralformer import make_norm
from modeling_spiralformer.modeling_spiralformer import SpiralFormerResolution
from modeling_spiralformer.paging_spiralformer import kept_counts
from modeling_spiralformer.topology_spiralformer import TOPOLOGIES

from .latents import LatentAttention
from .layers import SpiralFormerLayer, SpiralFormerRotaryEmbedding
from .states import StateLayer
from .weights import load_weights


class SpiralFormerModel(nn.Module):
    """Embeddings to normed states, all `(N, D)`. Modules with weights have the names of a checkpoint."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config: SpiralFormerConfig = vllm_config.model_config.hf_config
        self.config, self.grids = config, ChunkGrid.of(config)
        core = config.num_core_layers
        step = 0 if config.share_core else core
        self.core_layers = [range(t * step, t * step + core) for t in range(config.num_iterations)]
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        rotary = SpiralFormerRotaryEmbedding(config, vllm_config.model_config.max_model_len)
        make_layers = partial(layers_of, config, rotary)
        self.prelude = make_layers(config.num_prelude_layers, f"{prefix}.prelude")
        num_layers = max((layers.stop for layers in self.core_layers), default=0)
        self.core = make_layers(num_layers, f"{prefix}.core")
        self.coda = make_layers(config.num_coda_layers, f"{prefix}.coda")
        self.resolutions = nn.ModuleList(SpiralFormerResolution(config, t) for t in range(config.num_iterations))
        self.topology = TOPOLOGIES[config.topology](config) if self.grids else None
        self.norm = make_norm(config)
        self.entries = make_entries(vllm_config, self.grids, prefix)
        self.states = make_states(config, self.grids, prefix)

    def forward(self, positions: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """
        Args:
            positions: `(N,)` the place of each token in its text.
            embeddings: x, `(N, D)`, not scaled yet.
        """
        if self.config.scale_embeddings:
            embeddings = embeddings * math.sqrt(self.config.hidden_size)
        hidden_states, entries = embeddings, list(self.entries)
        for layer, entry in zip(self.prelude, entries, strict=False):
            hidden_states = layer(positions, hidden_states, entry)

        # Topologies and resolutions know a batch of rows: all tokens are one.
        if self.topology is not None:
            state, carrier = self.topology(hidden_states[None], embeddings[None])
            for t in range(len(self.grids)):
                update = self._iterate(t, positions, state)
                state, carrier = self.topology(update, state, carrier)
            hidden_states = state[0]

        coda = entries[len(entries) - len(self.coda) :]
        for layer, entry in zip(self.coda, coda, strict=True):
            hidden_states = layer(positions, hidden_states, entry)
        return self.norm(hidden_states)

    def _iterate(self, iteration: int, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """The updates `(1, N, D)` of an iteration that reads `(1, N, D)`."""
        layer = self.states[iteration]
        if not isinstance(layer, StateLayer):  # every token is its own latent, and reads itself
            return self._run_core(iteration, hidden_states, positions)

        def core(latents: torch.Tensor, filled: FilledChunks, cache: None) -> torch.Tensor:
            return self._run_core(iteration, latents, filled.position_ids[0])

        return self.resolutions[iteration](hidden_states, layer.at_step(hidden_states[0]), core)

    def _run_core(self, iteration: int, latents: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """f_loop over latents `(1, K, D)` at the positions `(K,)`."""
        flat = latents[0]
        for index, entry in zip(self.core_layers[iteration], self.config.core_entries(iteration), strict=True):
            flat = self.core[index](positions, flat, self.entries[entry])
        return flat[None]


def layers_of(config: SpiralFormerConfig, rotary: nn.Module, count: int, prefix: str) -> nn.ModuleList:
    return nn.ModuleList(SpiralFormerLayer(config, rotary, f"{prefix}.{i}") for i in range(count))


def make_entries(vllm_config: VllmConfig, grids: list[ChunkGrid], prefix: str) -> nn.ModuleList:
    """The entries of the cache, one for each call of a layer; they hold no weights."""
    config: SpiralFormerConfig = vllm_config.model_config.hf_config
    ranks = get_tensor_model_parallel_world_size()
    heads, kv_heads = config.num_attention_heads, config.resolved_num_key_value_heads
    make = partial(
        LatentAttention,
        heads // ranks,
        config.resolved_head_dim,
        max(1, kv_heads // ranks),
        cache=vllm_config.cache_config,
    )
    kinds: list[ChunkGrid | None] = [None] * config.num_hidden_layers
    for t, grid in enumerate(grids):
        for entry in config.core_entries(t):
            kinds[entry] = grid
    return nn.ModuleList(make(grid=grid, prefix=f"{prefix}.entries.{entry}") for entry, grid in enumerate(kinds))


def make_states(config: SpiralFormerConfig, grids: list[ChunkGrid], prefix: str) -> nn.ModuleList:
    """What each resolution keeps; nothing where a token reads itself. vLLM wants a number of its own in each name."""
    first, size = config.num_hidden_layers, config.hidden_size
    return nn.ModuleList(
        StateLayer(grid, size, f"{prefix}.states.{first + t}") if any(kept_counts(grid)) else nn.Identity()
        for t, grid in enumerate(grids)
    )


class SpiralFormerForCausalLM(nn.Module):
    """What vLLM asks of a model that generates text."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config: SpiralFormerConfig = vllm_config.model_config.hf_config
        self.model = SpiralFormerModel(vllm_config, f"{prefix}.model" if prefix else "model")
        self.lm_head = ParallelLMHead(self.config.vocab_size, self.config.hidden_size)
        if self.config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(self.config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Normed states `(N, D)` of ids `(N,)`, or of embeddings `(N, D)` that are not scaled yet."""
        return self.model(positions, self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return load_weights(self, self.config, weights)


__all__ = ["SpiralFormerForCausalLM", "SpiralFormerModel"]
