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
"""SpiralFormer (arXiv 2602.11698): a looped Transformer whose shared core runs once per resolution, coarse to fine.

`SpiralFormerModel.forward` is the paper's Algorithm 1. Chunk geometry lives in `chunking_spiralformer`, what is kept
between calls in `level_spiralformer` and `cache_spiralformer`; the layers are GPT-NeoX's own.

Shape letters: B batch, R rows of the batch that run, S new tokens (all L of them without a cache), K chunks (latents)
of a level, G tokens in a chunk, D hidden size, T iterations, N slots of MeSH.
"""

import math
import sys
from functools import wraps

import torch
from torch import nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention, GPTNeoXLayer, GPTNeoXRotaryEmbedding
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_torchdynamo_compiling
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .adapters_spiralformer import meet_adapters
from .cache_name_spiralformer import (
    CACHE_ARGUMENT,
    CACHE_NAME,
    CHECKPOINTED_LAYERS_KEEP_CACHE,
    takes_either_cache_name,
)
from .cache_spiralformer import SlotView, bind_levels, settle_levels
from .chunking_spiralformer import (
    BOUNDARIES,
    READ_AGAIN,
    ChunkGrid,
    Documents,
    Filling,
    LeftPadding,
    check_boundaries,
    read_left_padding,
    wrong_positions,
)
from .configuration_spiralformer import SpiralFormerConfig
from .level_spiralformer import Level, PackedLevel


class SpiralFormerResolution(nn.Module):
    """Down- and up-scaling of iteration t: between the tokens of a chunk and its latent (paper, section 1).

    The chunk size g = 1 needs neither: a token is its own latent.
    """

    def __init__(self, config: SpiralFormerConfig, iteration: int):
        super().__init__()
        self.chunk_size = config.chunk_sizes[iteration]
        self.scorer = self.allocator = None
        # CODEPATH: every published model scores the members of a chunk; "mean" is the paper's baseline.
        if self.chunk_size > 1 and config.down_scaling == "self_aggregation":
            self.scorer = nn.Linear(config.hidden_size, 1)
            self.scorer.initial_std = 0.0  # starts as the mean
        # CODEPATH: every published model allocates; "broadcast" is the paper's baseline.
        if self.chunk_size > 1 and config.up_scaling == "allocation":
            self.allocator = nn.Linear(config.hidden_size, self.chunk_size)
            self.allocator.initial_std = 0.0  # starts as a broadcast

    def down(self, members: torch.Tensor, present: torch.Tensor | None) -> torch.Tensor:
        """z_j = sum_i softmax_i(a . h_i + c) h_i over the chunk's members i, or their mean.

        Args:
            members: `(R, K, G, D)` token states.
            present: `(R or 1, K, G)`, True where there is such a member; None where all are there.

        Returns:
            `(R, K, D)` latents.
        """
        if self.chunk_size == 1:
            return members.squeeze(2)
        if self.scorer is None:
            scores = members.new_zeros(members.shape[:3])
        else:  # adapters of linear layers know no input of 4 dimensions, or take it for an image
            scores = self.scorer(members.flatten(1, 2)).view(members.shape[:3])
        if present is not None:
            scores = scores.masked_fill(~present, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1)
        return (weights.unsqueeze(-2) @ members).squeeze(-2)

    def up(self, latents: torch.Tensor) -> torch.Tensor:
        """u_i = sqrt(g) beta_(j, slot of i) zhat_j with beta_j = softmax(B zhat_j), or 1 / g.

        Args:
            latents: `(B, K, D)` outputs of the core.

        Returns:
            `(B, K * G, D)`, the updates of every slot of every chunk in order.
        """
        if self.chunk_size == 1:
            return latents
        scale = math.sqrt(self.chunk_size)
        if self.allocator is None:
            return (latents * (scale / self.chunk_size)).repeat_interleave(self.chunk_size, dim=1)
        shares = self.allocator(latents).softmax(dim=-1) * scale
        return (shares.unsqueeze(-1) * latents.unsqueeze(-2)).flatten(1, 2)


class SpiralFormerRecurrence(nn.Module):
    """The recurrences without parameters: base h' = u, residual h' = u + h, anchor h' = u + h_0, with h_0 = v."""

    def __init__(self, config: SpiralFormerConfig):
        super().__init__()
        self.topology = config.topology

    def start(self, embeddings: torch.Tensor, prelude: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """h_0 and what is carried along, from x and v = f_pre(x), all `(B, S, D)`."""
        return prelude, prelude

    def advance(self, iteration: int, update: torch.Tensor, state: torch.Tensor, carrier: torch.Tensor):
        """h_(t+1) from the shifted update and h_t, all `(B, S, D)`; returns it with the carrier."""
        if self.topology == "base":
            return update, carrier
        return update + (state if self.topology == "residual" else carrier), carrier


class SpiralFormerMeSH(nn.Module):
    """MeSH (arXiv 2510.07739): T + 1 write-read cycles on N memory slots per token, each with routers of its own.

    Slot 0 starts as x, the others empty. Cycle k writes m_n += w_(k,n) new_k and reads sum_n r_(k,n) m_n, where new_0
    is v and new_(t+1) the update of iteration t; its routers look at the state that entered the block. No slot is ever
    built: what cycle k reads is r_(k,0) x + sum_(i <= k) (w_i . r_k) new_i, with one number w_i . r_k per token.
    """

    def __init__(self, config: SpiralFormerConfig):
        super().__init__()
        size, slots = config.hidden_size, config.resolved_num_memory_slots
        self.write = nn.ModuleList(nn.Linear(size, slots) for _ in range(config.num_iterations + 1))
        self.read = nn.ModuleList(nn.Linear(size, slots) for _ in range(config.num_iterations + 1))

    def start(self, embeddings: torch.Tensor, prelude: torch.Tensor):
        """Cycle 0: writes v, routed by x; returns h_0 and what has been written so far."""
        return self._cycle(0, prelude, embeddings, [(None, embeddings)])

    def advance(self, iteration: int, update: torch.Tensor, state: torch.Tensor, carrier: list):
        """Cycle t + 1: writes the shifted update, routed by h_t; returns h_(t+1) and what has been written."""
        return self._cycle(iteration + 1, update, state, carrier)

    def _cycle(self, cycle: int, new: torch.Tensor, state: torch.Tensor, written: list):
        """`written` holds (write weights `(B, S, N)`, what was written `(B, S, D)`), x first with weights None."""
        write = self.write[cycle](state).softmax(dim=-1)
        read = self.read[cycle](state).softmax(dim=-1)
        written = [*written, (write, new)]
        hidden = read[..., :1] * written[0][1]
        for weights, content in written[1:]:
            hidden = torch.addcmul(hidden, (weights * read).sum(dim=-1, keepdim=True), content)
        return hidden, written


def name_peft_targets(model_type: str) -> None:
    """Gives `model_type` the default `target_modules` of GPT-NeoX, whose layers these are, in every tuner of PEFT.

    Nothing where PEFT is not loaded, and nothing is loaded for it: PEFT then asks for `target_modules`.
    """
    constants = sys.modules.get("peft.utils.constants")
    for mapping in vars(constants).values() if constants else ():
        if isinstance(mapping, dict) and "gpt_neox" in mapping:
            mapping.setdefault(model_type, mapping["gpt_neox"])


@auto_docstring
class SpiralFormerPreTrainedModel(PreTrainedModel):
    """What all SpiralFormer models share: validation of the configuration, initialisation, capability flags."""

    config: SpiralFormerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # Device maps keep the model whole: Down, Up and the topology are methods, which no device hook wraps.
    _no_split_modules = ["SpiralFormerModel"]
    _skip_keys_device_placement = [CACHE_NAME]
    _supports_sdpa = True
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False
    _can_compile_fullgraph = True
    # The embeddings are recorded where they leave the dropout: with no prelude the first layer sees latents.
    _can_record_outputs = {
        "hidden_states": [
            OutputRecorder(nn.Dropout, layer_name="emb_dropout", capture_initial_hidden_state=False),
            OutputRecorder(GPTNeoXLayer, capture_initial_hidden_state=False),
        ],
        "attentions": GPTNeoXAttention,
    }

    def post_init(self):
        super().post_init()
        name_peft_targets(self.config.model_type)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Refuses the attention of engines with one paged cache per layer: SGLang can be told to ignore the flag."""
        if requested_attention in ("vllm", "sglang"):
            raise ValueError(
                f"`attn_implementation` must not be that of a serving engine, but got {requested_attention!r}: its "
                "cache has one entry per token and layer, and no place for latents."
            )
        return super().get_correct_attn_implementation(requested_attention, is_init_check)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        # Set on the linear layers themselves: for classes outside of the library, `_init_weights` is not asked about
        # modules without parameters of their own.
        if hasattr(module, "initial_std"):
            init.normal_(module.weight, mean=0.0, std=module.initial_std)


@auto_docstring(custom_intro="SpiralFormer without a head: token ids or embeddings to normed states `(B, S, D)`.")
class SpiralFormerModel(SpiralFormerPreTrainedModel):
    def __init__(self, config: SpiralFormerConfig):
        # `from_pretrained(path, chunk_sizes=...)` sets overrides on a finished config, which nobody has checked yet.
        config.validate()
        super().__init__(config)
        iterations, core = config.num_iterations, config.num_core_layers
        core_slot = config.num_prelude_layers
        coda_slot = core_slot + iterations * core
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.emb_dropout = nn.Dropout(config.hidden_dropout)
        self.prelude = nn.ModuleList(GPTNeoXLayer(config, slot) for slot in range(core_slot))
        # CODEPATH: pythia-mesh-1.4b alone has core layers of its own in each iteration.
        core_layers = core if config.share_core else iterations * core
        self.core = nn.ModuleList(GPTNeoXLayer(config, core_slot + i) for i in range(core_layers))
        self.coda = nn.ModuleList(GPTNeoXLayer(config, coda_slot + i) for i in range(config.num_coda_layers))
        self.resolutions = nn.ModuleList(SpiralFormerResolution(config, t) for t in range(iterations))
        self.topology = None
        if iterations:
            # CODEPATH: *-mesh-* have MeSH, *-anchor-* a recurrence without parameters.
            self.topology = (SpiralFormerMeSH if config.topology == "mesh" else SpiralFormerRecurrence)(config)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.rotary_emb = GPTNeoXRotaryEmbedding(config=config)
        self.grids = [
            ChunkGrid(size, offset, shift)
            for size, offset, shift in zip(
                config.chunk_sizes, config.resolved_chunk_offsets, config.resolved_causal_shifts, strict=True
            )
        ]
        for layer in (*self.prelude, *self.core, *self.coda):
            for output in (layer.attention.dense, layer.mlp.dense_4h_to_h):
                output.initial_std = config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
        self.gradient_checkpointing = False
        self.post_init()

    @takes_either_cache_name("cache")
    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        cache (`Cache`, *optional*):
            What earlier calls computed, as `DynamicCache(config=model.config)` or `StaticCache` holds it. Up to
            transformers 5.23 the library calls it `past_key_values`; either name is taken with every release.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of `input_ids` and `inputs_embeds` must be given.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if inputs_embeds.dim() != 3 or 0 in inputs_embeds.shape[:2]:
            name = "inputs_embeds" if input_ids is None else "input_ids"
            shape = tuple(inputs_embeds.shape[:2])
            raise ValueError(f"`{name}` must hold at least one row and one token, but got shape {shape}.")
        every_row = meet_adapters(self)
        if cache is not None and not isinstance(cache, Cache):
            raise ValueError(f"{CACHE_ARGUMENT} must be a `Cache`, but got {type(cache).__name__}.")
        if (torch.jit.is_tracing() or torch.compiler.is_exporting()) and (use_cache or cache is not None):
            raise ValueError(
                f"`use_cache` must be False, and {CACHE_ARGUMENT} None, where a program is traced or exported: which "
                "levels run in a step is decided by Python integers."
            )
        if self._checkpoints_layers():
            if cache is not None:
                raise ValueError(
                    f"{CACHE_ARGUMENT} must be None in training mode with gradient checkpointing, but got "
                    f"{type(cache).__name__}: a replayed layer would write its keys twice. Call eval() first."
                )
            use_cache = False
        given_cache = cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        levels = self._levels(cache, inputs_embeds)
        padding, token_mask, right_padded, past = self._read_mask(attention_mask, cache, levels, inputs_embeds)
        counted = self._position_ids(padding, past, inputs_embeds)
        boundaries = {name: kwargs[name] for name in BOUNDARIES if kwargs.get(name) is not None}
        documents = self._read_positions(
            position_ids, counted, token_mask, past, given_cache, inputs_embeds, boundaries
        )
        position_ids = counted
        if documents is not None:  # packed rows are read whole: no call goes on from them
            use_cache, cache, position_ids = False, None, documents.position_ids
            levels = [PackedLevel(grid, documents) for grid in self.grids]
        token_layer = {
            "attention_mask": self._token_mask(token_mask, documents, cache, inputs_embeds),
            "position_ids": position_ids,
            "layer_past": cache,
            "use_cache": use_cache,
            "position_embeddings": self.rotary_emb(inputs_embeds, position_ids=position_ids),
            **kwargs,
        }

        for level in levels:
            level.begin(inputs_embeds.shape[1], padding, right_padded, every_row)

        # x, the embeddings
        # CODEPATH: plain stacks (pythia-*) and converted checkpoints do not scale them, all others do.
        if self.config.scale_embeddings:
            inputs_embeds = inputs_embeds * math.sqrt(self.config.hidden_size)
        embeddings = hidden_states = self.emb_dropout(inputs_embeds)

        # v = f_pre(x)
        for layer in self.prelude:
            hidden_states = layer(hidden_states, **token_layer)

        # h_(t+1) = Topology(shift(Up(f_loop(Down(h_t)))), h_t), once per resolution
        if self.topology is not None:
            hidden_states, carrier = self.topology.start(embeddings, hidden_states)
        for iteration, level in enumerate(levels):
            update = self._iterate(iteration, hidden_states, level, cache, use_cache=use_cache, **kwargs)
            hidden_states, carrier = self.topology.advance(iteration, update, hidden_states, carrier)

        # norm(f_post(h_T))
        for layer in self.coda:
            hidden_states = layer(hidden_states, **token_layer)
        for level in levels:
            level.unfinished = False
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE_NAME: cache})

    def _iterate(
        self, iteration: int, hidden_states: torch.Tensor, level: Level, cache: Cache | None, **kwargs
    ) -> torch.Tensor:
        """shift(Up(f_loop(Down(h_t)))): the update `(B, S, D)` of the tokens, from their states `(B, S, D)`."""
        resolution = self.resolutions[iteration]
        filling = level.feed(hidden_states)
        if filling is not None:
            latents = resolution.down(level.members(filling), filling.present)
            level.store(self._run_core(iteration, latents, filling, cache, **kwargs), filling)
        update = level.read(hidden_states.shape[1], resolution.up)
        # Layers that FSDP shards are gathered by all processes at once, in evaluation too.
        if filling is None and (self.training or hasattr(self.core[0], "unshard")):
            update = update + self._idle_core(iteration, hidden_states, **kwargs)
        return update

    def _idle_core(self, iteration: int, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """Runs an iteration that filled nothing on one zero latent, for a zero that depends on every parameter.

        Data-parallel training waits for a gradient of every parameter in every step, also of a text shorter than g.
        Where FSDP shards the core, all processes have to call its layers equally often, also in evaluation.
        """
        resolution = self.resolutions[iteration]
        rows = hidden_states.shape[0]  # all of them, as adapters may tell them apart
        members = hidden_states.new_zeros(rows, 1, resolution.chunk_size, hidden_states.shape[-1])
        position_ids = torch.zeros(1, 1, dtype=torch.long, device=hidden_states.device)
        filling = Filling(first=0, last=1, position_ids=position_ids, member_columns=0)
        latents = self._run_core(iteration, resolution.down(members, None), filling, None, **kwargs)
        return resolution.up(latents)[:0].sum() + hidden_states[:0].sum()  # sums of nothing: zero, whatever the values

    def _run_core(
        self, iteration: int, latents: torch.Tensor, filling: Filling, cache: Cache | None, **kwargs
    ) -> torch.Tensor:
        """f_loop: causal self-attention over latents `(R, K, D)`, each at the rotary position of its chunk index."""
        count = self.config.num_core_layers
        # CODEPATH: pythia-mesh-1.4b alone does not share its core, and knows its cache slots without an offset.
        layers = self.core if self.config.share_core else self.core[iteration * count : (iteration + 1) * count]
        slot_offset = iteration * count if self.config.share_core else 0  # CODEPATH: as above
        view = None if cache is None else SlotView(cache, slot_offset, filling)
        attention_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=latents,
            attention_mask=filling.valid,
            **{CACHE_NAME: view},
            position_ids=filling.position_ids if filling.packed else None,
            layer_idx=self.config.num_prelude_layers + iteration * count,
        )
        position_embeddings = self.rotary_emb(latents, position_ids=filling.position_ids)
        for layer in layers:
            latents = layer(
                latents,
                attention_mask=attention_mask,
                position_ids=filling.position_ids,
                layer_past=view,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        return latents

    def _checkpoints_layers(self) -> bool:
        """Whether the layers of this call run under gradient checkpointing, and would drop a cache."""
        replayed = torch.is_grad_enabled() or not CHECKPOINTED_LAYERS_KEEP_CACHE
        return self.gradient_checkpointing and self.training and replayed

    # -- inputs -------------------------------------------------------------------------------------------------

    def _levels(self, cache: Cache | None, inputs_embeds: torch.Tensor) -> list[Level]:
        """One level per iteration: the cache's, or fresh ones that last for this call."""
        if cache is None:
            return [Level(grid, cached=False) for grid in self.grids]
        return bind_levels(cache, self.config, self.grids, inputs_embeds)

    def _read_mask(
        self,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        levels: list[Level],
        inputs_embeds: torch.Tensor,
    ) -> tuple[LeftPadding | None, torch.Tensor | None, bool, int]:
        """What the mask says of the `(B, past + S)` columns of the batch.

        Returns:
            the left padding, None where there is none; the 2-D mask for the token layers, None where every column is
            real; whether a row ends in padding; the number of past columns.
        """
        batch, length = inputs_embeds.shape[:2]
        if cache is None:
            past = 0
        elif levels:
            past = levels[0].past
        else:
            past = cache.get_seq_length()
            if isinstance(past, torch.Tensor):  # the static cache of a plain GPT-NeoX stack
                if is_torchdynamo_compiling():
                    padding = None if attention_mask is None else LeftPadding(read_left_padding(attention_mask))
                    return padding, attention_mask, False, past
                past = int(past)
        known, settled = (levels[0].padding, levels[0].settled) if levels else (None, False)
        static = cache is not None and cache.is_compileable
        if attention_mask is not None:
            most = cache.layers[-1].get_max_length() if static else past + length
            attention_mask = self._check_mask_shape(attention_mask, batch, past, length, most)
            attention_mask = attention_mask.to(inputs_embeds.device)
        if any(level.right_padded for level in levels):
            raise ValueError(f"{CACHE_ARGUMENT} holds right-padded rows: nothing can be appended to them. Pad left.")
        compiling = is_torchdynamo_compiling() or torch.jit.is_tracing()
        trusted = settled and length == 1 and (compiling or not levels[0].mask_unchecked)
        if attention_mask is None or trusted:
            # The masks of a static cache have the length of its store.
            columns = cache.layers[-1].get_max_length() if static else past + length
            return known, None if known is None else known.real_columns(columns), False, past
        if compiling:
            for level in levels:
                level.mask_unchecked = True
            if not settled:
                known = LeftPadding(read_left_padding(attention_mask).clamp(max=past + length))
            return known, attention_mask, False, past

        real = attention_mask.bool()
        pads = read_left_padding(attention_mask)
        after_first = torch.arange(past + length, device=real.device) >= pads[:, None]
        trailing = real.flip(-1).cumsum(dim=-1).flip(-1) == 0
        holes = (after_first & ~real & ~trailing).any()
        right_padded = (after_first & trailing).any()
        padded = (pads > 0).any()
        padded, right_padded, holes = torch.stack([padded, right_padded, holes]).tolist()
        if holes:
            raise ValueError("`attention_mask` must be zero only before or after a row's tokens, but got holes.")
        if past and right_padded:
            raise ValueError("`attention_mask` must not end a row before its newest token when a cache is continued.")
        before = [0] * batch if known is None else known.on_host
        if levels and past and pads.clamp(max=past).tolist() != before:
            raise ValueError(
                f"`attention_mask` must keep the {before} columns of padding that the cached rows were started with, "
                f"but got {pads.tolist()}."
            )
        for level in levels:
            level.mask_unchecked = False
        if not settled:
            known = LeftPadding(pads) if padded else None
        return known, attention_mask if padded or right_padded else None, right_padded, past

    def _check_mask_shape(
        self, attention_mask: torch.Tensor, batch: int, past: int | torch.Tensor, length: int, most: int
    ) -> torch.Tensor:
        """The mask `(batch, past + length)`, also out of one that has all the `most` columns of a static cache."""
        if not isinstance(attention_mask, torch.Tensor):
            raise ValueError(f"`attention_mask` must be a tensor, but got {type(attention_mask).__name__}.")
        shape, columns = tuple(attention_mask.shape), past + length
        counted = isinstance(past, int)  # a compiled call with a static cache does not look at how many there are
        if len(shape) != 2 or shape[0] != batch or (counted and shape[1] not in (columns, most)):
            wanted = (batch, columns if counted else most)
            raise ValueError(
                f"`attention_mask` must have shape {wanted} (rows, past and new tokens), but got {shape}. Masks of 4 "
                "dimensions are not supported: chunks need to know which tokens are real, not who attends to whom. "
                f"{READ_AGAIN if counted and past else ''}".rstrip()
            )
        return attention_mask[:, :columns] if counted else attention_mask

    def _read_positions(
        self,
        position_ids: torch.Tensor | None,
        counted: torch.Tensor,
        token_mask: torch.Tensor | None,
        past: int | torch.Tensor,
        given_cache: Cache | None,
        inputs_embeds: torch.Tensor,
        boundaries: dict[str, torch.Tensor],
    ) -> Documents | None:
        """What `position_ids` of shape `(B or 1, S)` say of packed rows: a text starts where they restart.

        They say nothing else: rows that are not packed have the positions `counted`, and others are refused. They
        would turn prelude and coda, and leave the chunks where they are.

        Returns:
            None where no row is packed. To look, a compiled call without a cache leaves the graph (an error with
            `fullgraph=True`, where no positions can be given). With a cache, compiled calls and steps of one token do
            not wait for the device: there it is the device that refuses.
        """
        if position_ids is None:
            if boundaries:
                name = next(iter(boundaries))
                raise ValueError(f"`position_ids` must say where texts start, but got `{name}` without them.")
            return None
        batch, length = inputs_embeds.shape[:2]
        shape, allowed = tuple(position_ids.shape), ((1, length), (batch, length))
        if shape not in allowed:
            raise ValueError(f"`position_ids` must have shape {allowed[1]} or {allowed[0]}, but got {shape}.")
        position_ids = position_ids.to(counted.device)
        wrong, restarts = position_ids != counted, position_ids.diff(dim=-1) <= 0
        if token_mask is not None:
            real = token_mask[:, past + torch.arange(length, device=token_mask.device)].bool()
            wrong, restarts = wrong & real, restarts & real[:, :-1] & real[:, 1:]
        compiling = (is_torchdynamo_compiling() and given_cache is not None) or torch.jit.is_tracing()
        if compiling or (length == 1 and counted.device.type != "cpu"):
            torch._assert_async(~wrong.any(), "`position_ids` must go on from the cache")
            return None
        check_boundaries(boundaries, position_ids.expand(batch, -1))
        is_wrong, is_packed = torch.stack([wrong.any(), restarts.any()]).tolist()
        if not is_wrong:
            return None
        if not is_packed:
            raise ValueError(wrong_positions(position_ids, counted, wrong))
        packed = "`position_ids` restart in a row (packed rows)"
        if given_cache is not None:
            raise ValueError(f"{packed}, but {CACHE_ARGUMENT} must be None then: nothing can be appended to them.")
        if token_mask is not None:
            raise ValueError(f"{packed}, but `attention_mask` must be all ones then: give padding the position 0.")
        return Documents(position_ids)

    def _position_ids(
        self, padding: LeftPadding | None, past: int | torch.Tensor, inputs_embeds: torch.Tensor
    ) -> torch.Tensor:
        """Rotary positions of the new tokens, `(B or 1, S)`: a row's first real token is 0."""
        columns = past + torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        return columns if padding is None else (columns - padding.columns[:, None]).clamp(min=0)

    def _token_mask(
        self,
        token_mask: torch.Tensor | None,
        documents: Documents | None,
        cache: Cache | None,
        inputs_embeds: torch.Tensor,
    ) -> torch.Tensor | None:
        """The mask of prelude and coda, sized by the first cache slot at token resolution."""
        if not self.prelude and not self.coda:
            return None
        slot = 0 if self.prelude else self.config.num_hidden_layers - self.config.num_coda_layers
        return create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=token_mask,
            **{CACHE_NAME: cache},
            position_ids=None if documents is None else documents.position_ids,
            layer_idx=slot,
        )


def keep_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The states whose logits are asked for, out of `(B, S, D)`.

    Args:
        logits_to_keep: an integer, that many of the last positions, 0 for all; a 1-D tensor of positions for all rows;
            a 2-D tensor of integers `(B, K)`, positions of each row; or of booleans `(B, S)`.

    Returns:
        `(B, K, D)`; of 2-D booleans `(positions, D)`.
    """
    if isinstance(logits_to_keep, int):
        if logits_to_keep < 0:
            raise ValueError(f"`logits_to_keep` must be 0 or more, or a tensor, but got {logits_to_keep}.")
        return hidden_states[:, -logits_to_keep:]
    if logits_to_keep.dim() != 2:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)


@auto_docstring(custom_intro="SpiralFormer with a language-modelling head: logits `(B, S, vocab_size)`.")
class SpiralFormerForCausalLM(SpiralFormerPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SpiralFormerConfig):
        super().__init__(config)
        self.model = SpiralFormerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @takes_either_cache_name("cache")
    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        cache: Cache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        cache (`Cache`, *optional*):
            What earlier calls computed, as `DynamicCache(config=model.config)` or `StaticCache` holds it. Up to
            transformers 5.23 the library calls it `past_key_values`; either name is taken with every release.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            cache=cache,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(keep_positions(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    generate = takes_either_cache_name(CACHE_NAME)(GenerationMixin.generate)

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor | None:
        """Hands on the 2-D mask, from which each level draws its own; as long as a static cache, or every step of
        another length would be compiled again."""
        cache = kwargs.get(CACHE_NAME)
        if attention_mask is None or cache is None or not cache.is_compileable:
            return attention_mask
        room = cache.layers[-1].get_max_length() - attention_mask.shape[1]
        return nn.functional.pad(attention_mask, (0, max(0, room)))

    def _get_name(self) -> str:
        """The name by which `Trainer` finds that labels are shifted, also in a subclass such as those of FSDP."""
        return SpiralFormerForCausalLM.__name__

    def init_continuous_batching(self, *args, **kwargs):
        """Refused: paged attention packs rows into one, chunks would span them, and its cache has no latents."""
        raise NotImplementedError(
            "Continuous batching is not supported: its paged cache has no place for latents. Use generate() on a "
            "left-padded batch."
        )

    def _prepare_attention_mask_for_generation(self, inputs_tensor, generation_config, model_kwargs) -> torch.Tensor:
        """Infers a mask from pad ids as the library does, and refuses pad ids after a row's first token.

        The draft of assisted decoding runs `generate()` again and again on the text of its target, without the mask
        where that is all ones: the pad ids in there are tokens like any other.
        """
        mask = super()._prepare_attention_mask_for_generation(inputs_tensor, generation_config, model_kwargs)
        if generation_config.is_assistant:
            return torch.ones_like(mask)
        holes = (mask.cumsum(dim=-1) > 0) & (mask == 0)
        if holes.any():
            row, column = holes.nonzero()[0].tolist()
            raise ValueError(
                f"`attention_mask` must be given where a row holds the pad id (`pad_token_id` "
                f"{generation_config.pad_token_id}) after its first token, but got None, and row {row} does in column "
                f"{column}: ones where it is text. Padding belongs before a row's first token."
            )
        return mask

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                f"`assistant_early_exit` must be None, but got {generation_config.assistant_early_exit}: there are no "
                "early layers to leave at. Give an `assistant_model`."
            )
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        """As the library does; what it cannot make a first call of is refused here, in the words of `generate()`."""
        cache, embeddings = model_kwargs.get(CACHE_NAME), model_kwargs.get("inputs_embeds")
        if embeddings is not None and generation_config.prefill_chunk_size is not None:
            raise ValueError(
                "`prefill_chunk_size` must be None with `inputs_embeds`, since generate() cuts ids alone, but got "
                f"{generation_config.prefill_chunk_size}."
            )
        past = 0 if cache is None else cache.get_seq_length()
        name, given = ("input_ids", input_ids) if embeddings is None else ("inputs_embeds", embeddings)
        mask = model_kwargs.get("attention_mask")
        columns = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
        is_new_alone = embeddings is None and columns is not None and columns > given.shape[1]
        if past >= given.shape[1] and past > 0 and not is_new_alone:
            raise ValueError(
                f"`{name}` must hold the {past} tokens of {CACHE_ARGUMENT} and at least one more, but got "
                f"{given.shape[1]}. Ids of new tokens alone need an `attention_mask` of all columns, cached and new. "
                "Where the cache holds the whole text, crop(-1) leaves its last token to be read."
            )
        static = cache is not None and cache.is_compileable
        if static and generation_config.prefill_chunk_size is not None:
            # The library compiles these calls. A graph must not allocate what later graphs write to.
            nothing = self.get_input_embeddings().weight.new_empty(given.shape[0], 0, self.config.hidden_size)
            bind_levels(cache, self.config, self.model.grids, nothing)
        outputs = super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        if static:
            settle_levels(cache)
        return outputs


class SpiralFormerHead:
    """What the library's generic heads lack.

    They build their body by `AutoModel`. From a folder the library loads the code of configuration and model as two
    packages, so that `config` may be of a copy of the class, which `AutoModel` has to know as well.
    """

    def __init__(self, config: SpiralFormerConfig):
        AutoModel.register(type(config), SpiralFormerModel, exist_ok=True)
        super().__init__(config)


class SpiralFormerForSequenceClassification(
    SpiralFormerHead, GenericForSequenceClassification, SpiralFormerPreTrainedModel
):
    """SpiralFormer with a head for one label per row, read at its last token; the library's generic head.

    `num_items_in_batch`, the labels in all parts of an accumulated step, divides the loss of each part. `Trainer`
    gives it to every forward that takes `**kwargs`; the generic head hands it to no loss.
    """

    @can_return_tuple
    @wraps(GenericForSequenceClassification.forward, assigned=())
    @auto_docstring
    def forward(
        self,
        *inputs,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ):
        r"""
        num_items_in_batch (`torch.Tensor` or `int`, *optional*):
            Labels in all parts of an accumulated step, by which the loss is divided. Default: those of this call.
        """
        outputs = super().forward(*inputs, **kwargs, return_dict=True)
        if labels is None:
            return outputs
        options = {"labels": labels, "pooled_logits": outputs.logits, "config": self.config}
        loss = self.loss_function(**options, num_items_in_batch=num_items_in_batch)
        # The library divides the loss of one label per row; a regression and several labels stay means of their part.
        if num_items_in_batch is not None and self.config.problem_type != "single_label_classification":
            counted = labels.ne(-100).sum()  # as Trainer counts
            if counted < labels.numel() and counted != num_items_in_batch:
                raise ValueError(
                    f"`labels` must not hold -100 for a {self.config.problem_type} in a step of several parts, since "
                    "Trainer counts that as no label. Shift or scale the labels."
                )
            loss = loss * counted / num_items_in_batch
        return SequenceClassifierOutputWithPast(loss=loss, **outputs)


class SpiralFormerForTokenClassification(SpiralFormerHead, GenericForTokenClassification, SpiralFormerPreTrainedModel):
    """SpiralFormer with a head for one label per token; the library's generic head, `num_items_in_batch` as above."""

    @can_return_tuple
    @wraps(GenericForTokenClassification.forward, assigned=())
    @auto_docstring
    def forward(
        self,
        *inputs,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ):
        r"""
        num_items_in_batch (`torch.Tensor` or `int`, *optional*):
            Labels in all parts of an accumulated step, by which the loss is divided. Default: those of this call.
        """
        outputs = super().forward(*inputs, **kwargs, return_dict=True)
        if labels is None:
            return outputs
        loss = self.loss_function(outputs.logits, labels, self.config, num_items_in_batch=num_items_in_batch)
        return TokenClassifierOutput(loss=loss, **outputs)


class SpiralFormerForQuestionAnswering(SpiralFormerHead, GenericForQuestionAnswering, SpiralFormerPreTrainedModel):
    """SpiralFormer with a head for start and end of a span; the library's generic head."""


# The class that each Auto class stands for, here and in a saved `config.json`.
AUTO_CLASSES = {
    "AutoModel": SpiralFormerModel,
    "AutoModelForCausalLM": SpiralFormerForCausalLM,
    "AutoModelForQuestionAnswering": SpiralFormerForQuestionAnswering,
    "AutoModelForSequenceClassification": SpiralFormerForSequenceClassification,
    "AutoModelForTokenClassification": SpiralFormerForTokenClassification,
}

# `Trainer` (label smoothing), the server, the model card and lm-eval ask these lists of names what a class is for. A
# name loads nothing. docs/finetuning.md has every place that decides by one.
for names, model_class in (
    (MODEL_MAPPING_NAMES, SpiralFormerModel),
    (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, SpiralFormerForCausalLM),
    (MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, SpiralFormerForQuestionAnswering),
    (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, SpiralFormerForSequenceClassification),
    (MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, SpiralFormerForTokenClassification),
):
    names[SpiralFormerConfig.model_type] = model_class.__name__

__all__ = [
    "AUTO_CLASSES",
    "SpiralFormerForCausalLM",
    "SpiralFormerForQuestionAnswering",
    "SpiralFormerForSequenceClassification",
    "SpiralFormerForTokenClassification",
    "SpiralFormerModel",
    "SpiralFormerPreTrainedModel",
]
