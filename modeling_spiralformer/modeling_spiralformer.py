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

`SpiralFormerModel.forward` is the paper's Algorithm 1, `SpiralFormerResolution.forward` the line inside its loop. pi,
rho and K(n) are methods of `ChunkGrid` (`chunking_spiralformer`), the topologies are in `topology_spiralformer`, what
is kept between calls is in `level_spiralformer` and `cache_spiralformer`; the layers are the library's own, of the
family that `layers_spiralformer` describes.

    paper                       here
    x, v = f_pre(x)             embeddings, `prelude`
    h_0 = InitTopology(x, v)    `topology(v, x)`
    Down, Up                    `down` with the scores of `scorer`, `up` with the shares of `allocator`
    f_loop                      `core`, run by `_run_core`
    shift                       `ResolutionState.shift`
    Topology                    `topology(update, h_t, carrier)`
    f_post                      `coda`

A level is a resolution with what belongs to it. Comments `CODEPATH` name the published models, folders of
`configuration/`, that take each side of a branch.

Shape letters: B batch, R rows of the batch that run, S new tokens (all L of them without a cache), K chunks (latents)
of a resolution, G tokens in a chunk, D hidden size, T iterations.
"""

import copy
import inspect
import math
import os
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.generation.configuration_utils import (
    CompileConfig,
    ContinuousBatchingConfig,
    GenerationConfig,
    GenerationMode,
)
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.requests import GenerationOutput
from transformers.generation.continuous_batching.utils import WorkloadHints
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    QuestionAnsweringModelOutput,
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
from transformers.processing_utils import Unpack
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_torchdynamo_compiling
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .adapters_spiralformer import meet_adapters
from .batch_spiralformer import BOUNDARIES, Batch, MaybeNone, Rows, read_batch
from .cache_name_spiralformer import (
    CACHE_ARGUMENT,
    CACHE_NAME,
    CHECKPOINTED_LAYERS_KEEP_CACHE,
    takes_either_cache_name,
)
from .cache_spiralformer import (
    NOT_OFFLOADED,
    IterationCache,
    MovedCache,
    begin_call,
    end_call,
    find_states,
    make_quantised,
    read_past,
)
from .chunking_spiralformer import ChunkGrid, FilledChunks
from .compiled_spiralformer import CompiledStep
from .configuration_spiralformer import SpiralFormerConfig
from .continuous_spiralformer import (
    TOKENIZER,
    PagedCall,
    SpiralFormerBatchingManager,
    check_decoding,
    check_length,
    describe_asked,
    prepare_batching,
    settle_attention,
)
from .elastic_spiralformer import check_shared, make_view, record_outputs
from .files_spiralformer import DIGESTS_NAME, checked_files, remove_replaced, write_digests
from .flex_spiralformer import check_flex, unfused_on_cpu
from .heads_spiralformer import (
    check_kept,
    check_last,
    keep_positions,
    last_tokens,
    new_tokens,
    read_labels,
    read_positions_of_span,
    read_row_labels,
)
from .layers_spiralformer import FAMILIES, make_layer, make_norm, make_rotary_embedding, name_peft_targets
from .level_spiralformer import PackedState, ResolutionState
from .paging_spiralformer import PagedState
from .request_attention_spiralformer import RequestAttention
from .static_cache_spiralformer import settle_states
from .topology_spiralformer import TOPOLOGIES, SpiralFormerConnection, SpiralFormerGate


class SpiralFormerDown(nn.Module):
    """Down-scaling: z_j = sum_i softmax_i(a . h_i + c) h_i over the members i of chunk j, or their mean.

    a and c are the `scorer` of the resolution.
    """

    def forward(
        self, members: torch.Tensor, scores: torch.Tensor | None, present: torch.Tensor | None
    ) -> torch.Tensor:
        """Latents `(R, K, D)` of chunks.

        Args:
            members: `(R, K, G, D)` token states.
            scores: a . h_i + c, `(R, K, G)`; None for the mean.
            present: `(R or 1, K, G)`, True where there is such a member; None where all are there.
        """
        if members.shape[2] == 1:
            return members.squeeze(2)
        if scores is None:
            scores = members.new_zeros(members.shape[:3])
        if present is not None:
            scores = scores.masked_fill(~present, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1)
        return (weights.unsqueeze(-2) @ members).squeeze(-2)


class SpiralFormerUp(nn.Module):
    """Up-scaling: u_i = sqrt(g) beta_(j, rho(i)) zhat_j with j = pi(i), and beta_j = softmax(B zhat_j) or 1 / g.

    B is the `allocator` of the resolution.
    """

    def __init__(self, chunk_size: int):
        super().__init__()
        self.chunk_size = chunk_size

    def forward(self, latents: torch.Tensor, shares: torch.Tensor | None) -> torch.Tensor:
        """Updates `(B, K * G, D)` of every place of every chunk in order.

        Args:
            latents: `(B, K, D)` outputs of the core.
            shares: B zhat_j, `(B, K, G)`; None for 1 / g.
        """
        if self.chunk_size == 1:
            return latents
        scale = math.sqrt(self.chunk_size)
        if shares is None:
            return (latents * (scale / self.chunk_size)).repeat_interleave(self.chunk_size, dim=1)
        shares = shares.softmax(dim=-1) * scale
        return (shares.unsqueeze(-1) * latents.unsqueeze(-2)).flatten(1, 2)


class SpiralFormerResolution(nn.Module):
    """The loop's body at iteration t: shift(Up(f_loop(Down(h_t)))), from token states to their updates.

    The chunk size g = 1 needs no scaling: a token is its own latent.
    """

    def __init__(self, config: SpiralFormerConfig, iteration: int):
        super().__init__()
        self.chunk_size = config.chunk_sizes[iteration]
        self.scorer = self.allocator = None
        # CODEPATH: every published model scores the members of a chunk; "mean" is the paper's baseline.
        if self.chunk_size > 1 and config.down_scaling == "self_aggregation":
            self.scorer = nn.Linear(config.hidden_size, 1)
            self.scorer.initial_std = 0.0  # type: ignore[assignment]  # starts as the mean
        # CODEPATH: every published model allocates; "broadcast" is the paper's baseline.
        if self.chunk_size > 1 and config.up_scaling == "allocation":
            self.allocator = nn.Linear(config.hidden_size, self.chunk_size)
            self.allocator.initial_std = 0.0  # type: ignore[assignment]  # starts as a broadcast
        self.down = SpiralFormerDown()
        self.up = SpiralFormerUp(self.chunk_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        state: ResolutionState,
        core: Callable[[torch.Tensor, FilledChunks, Cache | None], torch.Tensor],
        cache: Cache | None = None,
        run_idle: bool = False,
    ) -> torch.Tensor:
        """The updates `(B, S, D)` of the new tokens.

        Args:
            hidden_states: h_t, `(B, S, D)`.
            state: what this resolution keeps between calls; it knows pi, rho, K(n) and s.
            core: f_loop, from latents to latents, both `(R, K, D)`.
            run_idle: run the core also where the call fills no chunk (`_idle` says why).
        """
        latents: torch.Tensor | None
        length = hidden_states.shape[1]
        filled = state.feed(hidden_states)  # chunks K(past) ... K(past + S) - 1; token i is member rho(i) of pi(i)
        if filled is not None:
            latents = self.scale_down(state.members(filled), filled.present)  # z = Down(h)
            latents = core(latents, filled, cache)  # zhat = f_loop(z)
            state.store(latents.to(hidden_states.device), filled)  # the core may be on another device
        latents = state.readable(length)
        updates = None if latents is None else self.scale_up(latents)  # u = Up(zhat)
        shifted = state.shift(updates, length)  # u_(i - s) of each token i
        state.trim(length)
        if filled is None and run_idle:
            shifted = shifted + self._idle(hidden_states, core)
        return shifted

    def scale_down(self, members: torch.Tensor, present: torch.Tensor | None) -> torch.Tensor:
        """Latents `(R, K, D)` of members `(R, K, G, D)`, of which those in `present` are there; None: all."""
        scores = None
        if self.scorer is not None:  # adapters of linear layers know no input of 4 dimensions, or take it for an image
            scores = self.scorer(members.flatten(1, 2)).view(members.shape[:3])
        return self.down(members, scores, present)

    def scale_up(self, latents: torch.Tensor) -> torch.Tensor:
        """The updates `(B, K * G, D)` of every place of the chunks with these latents."""
        return self.up(latents, None if self.allocator is None else self.allocator(latents))

    def _idle(self, hidden_states: torch.Tensor, core: Callable) -> torch.Tensor:
        """Runs the body on one zero latent, for a zero that depends on every parameter.

        Data-parallel training waits for a gradient of every parameter in every step, also of a text shorter than g.
        Where FSDP shards the core, all processes have to call its layers equally often, also in evaluation.
        """
        rows = hidden_states.shape[0]  # all of them, as adapters may tell them apart
        members = hidden_states.new_zeros(rows, 1, self.chunk_size, hidden_states.shape[-1])
        position_ids = torch.zeros(1, 1, dtype=torch.long, device=hidden_states.device)
        filled = FilledChunks(first=0, end=1, position_ids=position_ids, member_columns=0)
        latents = core(self.scale_down(members, None), filled, None).to(hidden_states.device)
        # Sums of nothing: zero, whatever the values.
        return self.scale_up(latents)[:0].sum() + hidden_states[:0].sum()


def schedule_fields(config: SpiralFormerConfig) -> tuple:
    """The fields that say which iterations there are, as they stand now."""
    fields = (config.chunk_sizes, config.chunk_offsets, config.causal_shifts)
    return tuple(None if values is None else [*values] for values in fields)


def recorded_numbers(output_hidden_states: bool | int | list[int] | None, config: SpiralFormerConfig) -> Any:
    """The numbers of the states that a call is to record; None where it records all or none."""
    chosen = config.output_hidden_states if output_hidden_states is None else output_hidden_states
    return None if isinstance(chosen, bool) else chosen


def check_recorded(numbers: Any, config: SpiralFormerConfig) -> None:
    """Raises `ValueError` for numbers of states in a call with a cache: an iteration that fills no chunk has none."""
    if numbers is not None and max(config.chunk_sizes, default=1) > 1:
        raise ValueError(
            f"`output_hidden_states` must be True or False with a cache, but got {numbers}: a call records the layers "
            "that it runs, and which these are depends on the chunks that fill. Pass `use_cache=False`."
        )


def check_filled(numbers: Any, states: list[ResolutionState], inputs_embeds: torch.Tensor) -> None:
    """The same without a cache, where the text `(B, S, D)` is too short for a chunk of each size."""
    idle = [state.grid.size for state in states if copy.copy(state).feed(inputs_embeds) is None]
    if idle:
        raise ValueError(
            f"`output_hidden_states` must be True or False for a text without a chunk of size {idle[0]}, but got "
            f"{numbers}: a call records the layers that it runs, and numbers would name others than in a longer text."
        )


@auto_docstring
class SpiralFormerPreTrainedModel(PreTrainedModel):
    """What all SpiralFormer models share: validation of the configuration, initialisation, capability flags."""

    config: SpiralFormerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: set[str] | list[str] = [  # and layers
        "SpiralFormerResolution",
        "SpiralFormerMeSH",
        "SpiralFormerHyperConnections",
    ]
    _skip_keys_device_placement = [CACHE_NAME]
    _supports_sdpa = True
    _supports_flash_attn = False
    _supports_flex_attn = True
    _supports_attention_backend = False
    _can_compile_fullgraph = True
    # The embeddings are recorded where they leave the dropout: with no prelude the first layer sees latents.
    _can_record_outputs = {
        "hidden_states": [
            OutputRecorder(nn.Dropout, layer_name="emb_dropout", capture_initial_hidden_state=False),
            *(OutputRecorder(family.layer, capture_initial_hidden_state=False) for family in FAMILIES.values()),
        ],
        "attentions": [family.attention for family in FAMILIES.values()],
    }

    def post_init(self):
        super().post_init()
        # accelerate shards by these names, and refuses one that the model does not hold.
        held = {type(module).__name__ for module in self.modules() if next(module.parameters(), None) is not None}
        layer = FAMILIES[self.config.layer_family].layer.__name__
        self._no_split_modules = {*self._no_split_modules, layer} & held
        name_peft_targets(self.config.model_type)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As the library does; a damaged file of a folder is an error that names it.

        A file with other content than SHA256SUMS beside it says is damaged, too: `files_spiralformer` has the rest.
        """
        given = kwargs.get("config") is not None
        with checked_files(pretrained_model_name_or_path, kwargs.get("subfolder") or "", needs_config=not given):
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """As the library does; the weights of an earlier save do not stay beside the new ones.

        SHA256SUMS, where the folder has one, lists the new files in place of the old ones.
        """
        body: SpiralFormerModel | MaybeNone = self.base_model
        body.check_schedule()
        if body.shared:
            check_shared(body)
        super().save_pretrained(save_directory, *args, **kwargs)
        # The library writes in the first process alone, also where each has a share of the weights and calls this.
        shares = torch.distributed.is_available() and torch.distributed.is_initialized()
        if kwargs.get("is_main_process", True) and (not shares or torch.distributed.get_rank() == 0):
            remove_replaced(save_directory)
            if Path(save_directory, DIGESTS_NAME).exists():
                write_digests(save_directory)

    def _upload_modified_files(self, working_dir: str | os.PathLike, *args, **kwargs):
        """As the library does, with the digests of what is uploaded: the repository may hold those of older files."""
        remove_replaced(working_dir)
        write_digests(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Refuses the attention of engines with one paged cache per layer: SGLang can be told to ignore the flag."""
        if requested_attention in ("vllm", "sglang"):
            raise ValueError(
                f"`attn_implementation` must not be that of a serving engine, but got {requested_attention!r}: its "
                "cache has one entry per token and layer, and no place for latents."
            )
        return super().get_correct_attn_implementation(requested_attention, is_init_check)

    def set_attn_implementation(self, *args, **kwargs):
        """As the library does; for a view and its model together, since they share the layers."""
        super().set_attn_implementation(*args, **kwargs)
        body: SpiralFormerModel | MaybeNone = self.base_model
        body.layer_config._attn_implementation = self.config._attn_implementation

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """As the library does; refuses a view, whose model has the same embeddings and would not hear of it."""
        body: SpiralFormerModel | MaybeNone = self.base_model
        if body.shared:
            raise ValueError(
                "`resize_token_embeddings` must be called on the model, but got a view of it: resize the model, then "
                "call `with_schedule` again."
            )
        return super().resize_token_embeddings(*args, **kwargs)

    def with_schedule(self, chunk_sizes: list[int] | tuple[int, ...]) -> Self:
        """A view that runs the iterations of these chunk sizes alone, on the same parameters.

        It is a model of this class with a configuration and caches of its own; everything that changes a module (an
        optimiser, `.to()`, an adapter in a layer) changes it for both. `docs/elastic.md` has the rest.

        Args:
            chunk_sizes: some of the schedule's, in its order: of equal sizes the earliest.

        Raises:
            `ValueError`: for anything else, and for a model that is sharded by FSDP or offloaded, or whose topology is
                wrapped.
        """
        return make_view(self, chunk_sizes)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        # Set on the linear layers themselves: for classes outside of the library, `_init_weights` is not asked about
        # modules without parameters of their own.
        if hasattr(module, "initial_std"):
            init.normal_(module.weight, mean=0.0, std=module.initial_std)
        if hasattr(module, "initial_biases"):
            init.copy_(module.bias, torch.tensor(module.initial_biases))
        if isinstance(module, SpiralFormerGate):
            init.constant_(module.scale, module.initial_scale)
            init.constant_(module.bias, module.initial_bias)
        if isinstance(module, SpiralFormerConnection):
            init.zeros_(module.loop_vector)


@auto_docstring(custom_intro="SpiralFormer without a head: token ids or embeddings to normed states `(B, S, D)`.")
class SpiralFormerModel(SpiralFormerPreTrainedModel):
    def __init__(self, config: SpiralFormerConfig):
        # `from_pretrained(path, chunk_sizes=...)` sets overrides on a finished config, which nobody has checked yet.
        config.validate()
        super().__init__(config)
        iterations, core = config.num_iterations, config.num_core_layers
        first_core, first_coda = config.num_prelude_layers, config.num_hidden_layers - config.num_coda_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.emb_dropout = nn.Dropout(config.hidden_dropout or 0.0)  # not of every family
        # A layer knows the first of its cache entries. A shared layer has one in each iteration.
        self.prelude = nn.ModuleList(make_layer(config, entry) for entry in range(first_core))
        # CODEPATH: pythia-mesh-1.4b alone has core layers of its own in each iteration.
        step = 0 if config.share_core else core
        self.core_layers = [range(t * step, t * step + core) for t in range(iterations)]
        self.core_entries = [config.core_entries(t) for t in range(iterations)]
        num_layers = max((layers.stop for layers in self.core_layers), default=0)
        self.core = nn.ModuleList(make_layer(config, first_core + i) for i in range(num_layers))
        self.coda = nn.ModuleList(make_layer(config, first_coda + i) for i in range(config.num_coda_layers))
        self.resolutions = nn.ModuleList(SpiralFormerResolution(config, t) for t in range(iterations))
        self.topology: nn.Module | MaybeNone = None
        if iterations:
            self.topology = TOPOLOGIES[config.topology](config)
        self.norm = make_norm(config)
        self.rotary_emb = make_rotary_embedding(config)
        self.grids, self.schedule = ChunkGrid.of(config), schedule_fields(config)
        # In a view, which shares modules with another model, these are others (`elastic_spiralformer`): how far the
        # entries of core and coda are from the numbers of the layers, the configuration that the layers read, and
        # where the modules come from.
        self.core_offsets = [
            entries.start - first_core - layers.start
            for entries, layers in zip(self.core_entries, self.core_layers, strict=True)
        ]
        self.coda_offset, self.layer_config, self.records_outputs = 0, config, False
        self.shared: list[tuple[nn.Module, str, nn.Module, str]] = []
        self.cache_argument = FAMILIES[config.layer_family].cache_argument
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def _output_capturing_hooks_installed(self) -> bool:
        """The library's flag, asked for where states or attentions are wanted: whether layers have the hooks."""
        if self.shared:
            record_outputs(self)
        return self.shared != [] or self.records_outputs

    @_output_capturing_hooks_installed.setter
    def _output_capturing_hooks_installed(self, value: bool) -> None:
        self.records_outputs = value

    @takes_either_cache_name("cache")
    @merge_with_config_defaults
    @capture_outputs
    @unfused_on_cpu
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        cache (`Cache`, *optional*):
            What earlier calls computed, as `DynamicCache(config=model.config)` or `StaticCache` holds it. Up to
            transformers 5.23 the library calls it `past_key_values`; either name is taken with every release.
        """
        # x, the embeddings
        embeddings = hidden_states = self._embed(input_ids, inputs_embeds)
        read: Callable = self._read_step if isinstance(cache, PagedAttentionCache) else self._read_call
        batch, states, cache, kwargs = read(embeddings, attention_mask, position_ids, cache, use_cache, kwargs)
        token_layer = self._token_arguments(batch, cache, embeddings) | kwargs

        # v = f_pre(x)
        for layer in self.prelude:
            hidden_states = layer(hidden_states, **token_layer)

        # h_0 = InitTopology(x, v): no carrier yet
        if self.topology is not None:
            hidden_states, carrier = self.topology(hidden_states, embeddings)

        # h_(t+1) = Topology(shift(Up(f_loop(Down(h_t)))), h_t, carrier), once per resolution
        run_idle = self._runs_idle()
        for iteration, (resolution, state) in enumerate(zip(self.resolutions, states, strict=True)):
            core = partial(self._run_core, iteration, **kwargs)
            update = resolution(hidden_states, state, core, cache, run_idle)
            hidden_states, carrier = self.topology(update, hidden_states, carrier)

        # norm(f_post(h_T))
        for layer in self.coda:
            hidden_states = layer(hidden_states, **token_layer)
        end_call(cache, states)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            **{CACHE_NAME: cache},  # type: ignore[arg-type]
        )

    def _run_core(
        self, iteration: int, latents: torch.Tensor, filled: FilledChunks, cache: Cache | None, **kwargs
    ) -> torch.Tensor:
        """f_loop: causal self-attention over latents `(R, K, D)`, each at the rotary position of its chunk index."""
        view, attention_mask = self._core_cache(iteration, latents, filled, cache)
        position_embeddings = self.rotary_emb(latents, position_ids=filled.position_ids)
        for index in self.core_layers[iteration]:
            latents = self.core[index](
                latents,
                attention_mask=attention_mask,
                position_ids=filled.position_ids,
                position_embeddings=position_embeddings,
                **{self.cache_argument: view},
                **kwargs,
            )
        return latents

    # -- the arguments of a call --------------------------------------------------------------------------------

    def _embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """x `(B, S, D)`: the embeddings that are given, or those of the ids, scaled and dropped out."""
        new_tokens(input_ids, inputs_embeds, self.config.hidden_size)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        # CODEPATH: plain stacks (pythia-*) and converted checkpoints do not scale them, all others do.
        if self.config.scale_embeddings:
            inputs_embeds = inputs_embeds * math.sqrt(self.config.hidden_size)
        return self.emb_dropout(inputs_embeds)

    def _uses_cache(self, cache: Cache | None, use_cache: bool | None) -> bool:
        """Whether the call reads or writes a cache."""
        if cache is not None and not isinstance(cache, Cache):
            raise ValueError(f"{CACHE_ARGUMENT} must be a `Cache`, but got {type(cache).__name__}.")
        if (torch.jit.is_tracing() or torch.compiler.is_exporting()) and (use_cache or cache is not None):
            raise ValueError(
                f"`use_cache` must be False, and {CACHE_ARGUMENT} None, where a program is traced or exported: which "
                "levels run in a step is decided by Python integers."
            )
        if not self._checkpoints_layers():
            return bool(use_cache) or cache is not None
        if cache is not None:
            raise ValueError(
                f"{CACHE_ARGUMENT} must be None in training mode with gradient checkpointing, but got "
                f"{type(cache).__name__}: a replayed layer would write its keys twice. Call eval() first."
            )
        return False

    def _check_call(self, given: dict[str, Any]) -> None:
        """Refuses what layers would follow and levels would not, and another schedule than the model was made with."""
        if given.get("is_causal") is False:  # `merge_with_config_defaults` puts that of the configuration there
            raise ValueError(
                "`is_causal` must be True, but got False: a latent that has seen later tokens would give them away."
            )
        if not is_torchdynamo_compiling():
            self.check_schedule()

    def check_schedule(self) -> None:
        """Raises `ValueError` where the configuration names another schedule than the model was made with."""
        if schedule_fields(self.config) != self.schedule:
            raise ValueError(
                f"`chunk_sizes`, `chunk_offsets` and `causal_shifts` must stay {self.schedule}, as they were when the "
                f"model was made, but got {schedule_fields(self.config)}: load the model with the others, or take "
                "`with_schedule()`."
            )

    def _runs_idle(self) -> bool:
        """Whether an iteration that fills no chunk runs the core all the same, for the sake of the processes."""
        # The mode is that of a module which a view shares with its model. Layers that FSDP shards are gathered by all
        # processes at once, in evaluation too.
        return self.emb_dropout.training or (len(self.core) > 0 and hasattr(self.core[0], "unshard"))

    def _checkpoints_layers(self) -> bool:
        """Whether the layers of this call run under gradient checkpointing, and would drop a cache."""
        replayed = torch.is_grad_enabled() or not CHECKPOINTED_LAYERS_KEEP_CACHE
        layers = (*self.prelude, *self.core, *self.coda)
        return replayed and any(layer.gradient_checkpointing and layer.training for layer in layers)

    def _read_call(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        given_cache: Cache | None,
        use_cache: bool | None,
        given: dict[str, Any],
    ) -> tuple[Batch, list[ResolutionState], Cache | None, dict[str, Any]]:
        """What the call is about, one state per iteration, the cache, given or new, and what layers are given besides.

        Without a cache the states last for this call.
        """
        self._check_call(given)
        if str(self.layer_config._attn_implementation).startswith("paged|"):
            raise ValueError(
                "`attn_implementation` must be sdpa, eager or flex_attention, but got "
                f"{self.layer_config._attn_implementation!r}: nobody draws it a mask. `generate_batch()` sets its own."
            )
        uses_cache = self._uses_cache(given_cache, use_cache)
        boundaries = {name: given[name] for name in BOUNDARIES if given.get(name) is not None}
        if self.shared and not is_torchdynamo_compiling():
            check_shared(self)
        check_flex(self, inputs_embeds, given_cache, given)
        every_row, rows = meet_adapters(self), Rows()
        numbers = recorded_numbers(given.get("output_hidden_states"), self.config)
        if uses_cache:
            check_recorded(numbers, self.config)
            cache = DynamicCache(config=self.config) if given_cache is None else given_cache
            states = find_states(cache, self.config, self.grids, inputs_embeds)
        else:
            cache, states = None, [ResolutionState(grid, rows, cached=False) for grid in self.grids]
        past = read_past(cache, states, is_given=given_cache is not None)
        batch = read_batch(attention_mask, position_ids, boundaries, inputs_embeds, past)
        if batch.texts is not None:  # packed rows are read whole: no call goes on from them
            cache, states = None, [PackedState(grid, rows, batch.texts) for grid in self.grids]
        begin_call(cache, states, batch, every_row)
        if numbers is not None and not uses_cache and not self._runs_idle():
            check_filled(numbers, states, inputs_embeds)
        return batch, states, cache, given

    def _read_step(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: None,
        position_ids: torch.Tensor,
        cache: PagedAttentionCache,
        use_cache: bool | None,
        step: dict[str, Any],
    ) -> tuple[PagedCall, list[PagedState], PagedCall, dict[str, Any]]:
        """The same for a step of continuous batching, of which `step` says what is in its batch."""
        self._check_call(step)
        if self.shared:
            check_shared(self)
        if meet_adapters(self):
            raise ValueError("Adapters must not be chosen by row in continuous batching: its batch is one row.")
        call = PagedCall(cache, self.grids, position_ids, step)
        return call, call.states, call, {}

    def _core_cache(
        self, iteration: int, latents: torch.Tensor, filled: FilledChunks, cache: Cache | PagedCall | None
    ) -> tuple:
        """The cache as the core's layers see it in an iteration, and their mask."""
        entries, offset = self.core_entries[iteration], self.core_offsets[iteration]
        if cache is not None and not isinstance(cache, Cache):
            return cache.iteration(iteration, entries.start - offset)
        view = None if cache is None else IterationCache(cache, offset, filled)
        attention_mask = create_causal_mask(
            config=self.layer_config,
            inputs_embeds=latents,
            attention_mask=filled.valid,
            **{CACHE_NAME: view},
            position_ids=filled.position_ids if filled.packed else None,
            layer_idx=entries.start,
        )
        return view, attention_mask

    def _token_arguments(
        self, batch: Batch | PagedCall, cache: Cache | PagedCall | None, inputs_embeds: torch.Tensor
    ) -> dict:
        """What the layers of prelude and coda are given."""
        moved: Any = None
        if cache is not None and self.coda_offset:
            moved = MovedCache(cache, self.coda_offset, first=len(self.prelude))
        return {
            "attention_mask": self._token_mask(batch, cache, inputs_embeds),
            "position_ids": batch.position_ids,
            self.cache_argument: moved or cache,
            "position_embeddings": self.rotary_emb(inputs_embeds, position_ids=batch.position_ids),
        }

    def _token_mask(
        self, batch: Batch | PagedCall, cache: Cache | PagedCall | None, inputs_embeds: torch.Tensor
    ) -> torch.Tensor | RequestAttention | None:
        """The mask of prelude and coda, sized by the first cache entry at token resolution."""
        if not isinstance(batch, Batch):
            return batch.token_mask
        if not self.prelude and not self.coda:
            return None
        entry = 0 if self.prelude else self.config.num_hidden_layers - self.config.num_coda_layers
        return create_causal_mask(
            config=self.layer_config,
            inputs_embeds=inputs_embeds,
            attention_mask=batch.token_mask,
            **{CACHE_NAME: cache},
            position_ids=None if batch.texts is None else batch.texts.position_ids,
            layer_idx=entry,
        )


@auto_docstring(custom_intro="SpiralFormer with a language-modelling head: logits `(B, S, vocab_size)`.")
class SpiralFormerForCausalLM(SpiralFormerPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    compiled_step: CompiledStep | None = None

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
        inputs_embeds: torch.Tensor | None = None,
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
        # Before the cache is written to.
        tokens = new_tokens(input_ids, inputs_embeds, self.config.hidden_size)
        check_kept(logits_to_keep, tokens)
        if labels is not None:
            shifted, ignored = kwargs.get("shift_labels"), kwargs.get("ignore_index", -100)
            targets = read_labels(labels, shifted, logits_to_keep, tokens, self.config.vocab_size, ignored)
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            cache=cache,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        logits = self.lm_head(keep_positions(hidden_states, logits_to_keep))  # type: ignore[arg-type]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, vocab_size=self.config.vocab_size, **{**kwargs, **targets})
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
        """Hands on the 2-D mask, from which each resolution draws its own; as long as a static cache, or every step of
        another length would be compiled again."""
        cache = kwargs.get(CACHE_NAME)
        if attention_mask is None or cache is None or not cache.is_compileable:
            return attention_mask
        room = cache.layers[-1].get_max_length() - attention_mask.shape[1]
        return nn.functional.pad(attention_mask, (0, max(0, room)))

    def _get_name(self) -> str:
        """The name by which `Trainer` finds that labels are shifted, also in a subclass such as those of FSDP."""
        return SpiralFormerForCausalLM.__name__

    def init_continuous_batching(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        workload_hints: WorkloadHints | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> ContinuousBatchingManager:
        """As the library does, over blocks that hold latents (`continuous_spiralformer`).

        Args:
            tokenizer: that of stop strings, where a request has any.

        Raises:
            `NotImplementedError`: on a release of transformers before 5.23, whose paged cache is built otherwise.
            `ValueError`: for a decoding method, or a setting, that it cannot follow, or that a kept manager would not.
        """
        decoding = self.generation_config if generation_config is None else generation_config
        tokenizer = TOKENIZER.get() if tokenizer is None else tokenizer
        settle_attention(self)
        kept = getattr(self, "_cached_continuous_batching_manager", None)
        batching = prepare_batching(self.config, continuous_batching_config, decoding)
        check_decoding(self, decoding, tokenizer or (kept and kept.tokenizer))
        make, asked = super().init_continuous_batching, describe_asked(decoding, batching)
        return SpiralFormerBatchingManager.made_by(
            lambda: make(generation_config, batching, workload_hints), kept, asked, decoding.max_new_tokens, tokenizer
        )

    def generate_batch(
        self, inputs: list[list[int]], *args, tokenizer: PreTrainedTokenizerBase | None = None, **options
    ) -> dict[str, GenerationOutput]:
        """As the library does; with `stop_strings` in the generation configuration it takes their `tokenizer`.

        Raises:
            `NotImplementedError`, `ValueError`: as `init_continuous_batching`; for an option that has no effect.
        """
        if "cache_implementation" in options:  # generate() comes here with "paged", and with all that it was given
            kind = options["cache_implementation"]
            raise ValueError(f"`cache_implementation` must not be {kind!r} in generate(): call generate_batch().")
        unknown = [*options.keys() - inspect.signature(super().generate_batch).parameters.keys() - {"max_new_tokens"}]
        if unknown:
            raise ValueError(
                "`generate_batch` takes `max_new_tokens`, and all else of decoding in `generation_config`, but got "
                f"{unknown}."
            )
        decoding = args[0] if args else options.get("generation_config")
        check_length(self.generation_config if decoding is None else decoding, options.get("max_new_tokens"))
        given = TOKENIZER.set(tokenizer)
        try:
            return super().generate_batch(inputs, *args, **options)
        finally:
            TOKENIZER.reset(given)

    def _prepare_attention_mask_for_generation(self, inputs_tensor, generation_config, model_kwargs):
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

    def __getstate__(self) -> dict[str, Any]:
        """Without what is compiled: a copy would run it on the parameters of its original."""
        kept = super().__getstate__()
        compiled = ("compiled_step", "_compiled_call", "_last_compile_config")
        return {name: value for name, value in kept.items() if name not in compiled}

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Callable:
        """As the library does; but steps of one token over a static cache are compiled in parts (`CompiledStep`)."""
        whole = super().get_compiled_call(compile_config)
        if self.compiled_step is None or self.compiled_step.whole is not whole:
            self.compiled_step = CompiledStep(self, whole, self._last_compile_config.to_dict())
        return self.compiled_step

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                f"`assistant_early_exit` must be None, but got {generation_config.assistant_early_exit}: there are no "
                "early layers to leave at. Give an `assistant_model`."
            )
        chunk = generation_config.prefill_chunk_size
        if chunk is not None and chunk < 1:
            raise ValueError(f"`prefill_chunk_size` must be >= 1, but got {chunk}.")
        if chunk is not None and generation_mode == GenerationMode.ASSISTED_GENERATION:
            raise ValueError(
                "`prefill_chunk_size` must be None in assisted and prompt-lookup decoding, which read a prompt at "
                f"once, but got {chunk}."
            )
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """As the library does; but a quantised cache has this model's layers, as the library's hold no latents."""
        if generation_config.is_assistant:  # transformers 5.17 hands a draft the kind of its target's cache
            generation_config.cache_implementation = generation_config.cache_config = None
        kind = generation_config.cache_implementation or ""
        makes_cache = generation_config.use_cache is not False and model_kwargs.get(CACHE_NAME) is None
        if (kind != "quantized" or not makes_cache) and generation_config.cache_config:
            raise ValueError(
                "`cache_config` must be None where `cache_implementation` is not 'quantized' or generate() makes no "
                f"cache, but got {generation_config.cache_config} with {generation_config.cache_implementation!r}."
            )
        if makes_cache and "offloaded" in kind and self.model.grids:
            raise ValueError(f"`cache_implementation` must not be {kind!r}: {NOT_OFFLOADED}")
        if makes_cache and kind == "quantized":
            model_kwargs[CACHE_NAME] = make_quantised(self.config, generation_config.cache_config)
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

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
        if columns is not None and columns not in (given.shape[1], past + given.shape[1]):
            raise ValueError(
                f"`attention_mask` must have {past + given.shape[1]} columns, one for each token, but got {columns}."
            )
        static = cache is not None and cache.is_compileable
        if static and generation_config.prefill_chunk_size is not None:
            # The library compiles these calls. A graph must not allocate what later graphs write to.
            nothing = self.model.embed_tokens.weight.new_empty(given.shape[0], 0, self.config.hidden_size)
            states = find_states(cache, self.config, self.model.grids, nothing)
            if states and past == 0 and mask is not None:
                states[0].rows.make_room(given.shape[0], nothing.device)
        outputs = super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        if static:
            settle_states(cache)
        return outputs


class SpiralFormerHead:
    """What the library's generic heads lack.

    They build their body by `AutoModel`. From a folder the library loads the code of configuration and model as two
    packages, so that `config` may be of a copy of the class, which `AutoModel` has to know as well.
    """

    def __init__(self, config: SpiralFormerConfig):
        AutoModel.register(type(config), SpiralFormerModel, exist_ok=True)
        super().__init__(config)  # type: ignore[call-arg]  # the next class in line is a model


class SpiralFormerForSequenceClassification(
    SpiralFormerHead, GenericForSequenceClassification, SpiralFormerPreTrainedModel
):
    """SpiralFormer with a head for one label per row, read at its last token; the library's generic head.

    Where a mask is given, it alone says which token of a row is the last: the library asks for ids of padding.

    `num_items_in_batch`, the labels in all parts of an accumulated step, divides the loss of each part. `Trainer`
    gives it to every forward that takes `**kwargs`; the generic head hands it to no loss.
    """

    @takes_either_cache_name("cache")
    @can_return_tuple
    @wraps(GenericForSequenceClassification.forward, assigned=())
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ):
        r"""
        cache (`Cache`, *optional*):
            What earlier calls computed, as in a causal language model.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*):
            Labels in all parts of an accumulated step, by which the loss is divided. Default: those of this call.
        """
        # Before the cache is written to.
        tokens = new_tokens(input_ids, inputs_embeds, self.config.hidden_size)
        check_last(attention_mask, tokens, self.config.pad_token_id)
        if labels is not None:
            labels = read_row_labels(labels, tokens[0], self.num_labels, self.config.problem_type)
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        body = self.model(input_ids, **given, cache=cache, use_cache=use_cache, return_dict=True, **kwargs)
        logits = self.score(body.last_hidden_state)
        past = 0 if cache is None else int(cache.get_seq_length()) - logits.shape[1]
        last = last_tokens(attention_mask, input_ids, past, logits.shape[:2], self.config.pad_token_id)
        outputs = SequenceClassifierOutputWithPast(
            logits=logits[torch.arange(logits.shape[0], device=logits.device), last],
            **{CACHE_NAME: getattr(body, CACHE_NAME)},
            hidden_states=body.hidden_states,
            attentions=body.attentions,
        )
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

    @takes_either_cache_name("cache")
    @can_return_tuple
    @wraps(GenericForTokenClassification.forward, assigned=())
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ):
        r"""
        cache (`Cache`, *optional*):
            What earlier calls computed, as in a causal language model.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*):
            Labels in all parts of an accumulated step, by which the loss is divided. Default: those of this call.
        """
        if labels is not None:  # before the cache is written to
            tokens = new_tokens(input_ids, inputs_embeds, self.config.hidden_size)
            labels = read_labels(labels, None, 0, tokens, self.num_labels, -100)["labels"]
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        body = self.model(input_ids, **given, cache=cache, use_cache=use_cache, return_dict=True, **kwargs)
        logits, loss = self.score(self.dropout(body.last_hidden_state)), None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config, num_items_in_batch=num_items_in_batch)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=body.hidden_states, attentions=body.attentions
        )


class SpiralFormerForQuestionAnswering(SpiralFormerHead, GenericForQuestionAnswering, SpiralFormerPreTrainedModel):
    """SpiralFormer with a head for start and end of a span; the library's generic head."""

    @takes_either_cache_name("cache")
    @can_return_tuple
    @wraps(GenericForQuestionAnswering.forward, assigned=())
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ):
        r"""
        cache (`Cache`, *optional*):
            What earlier calls computed, as in a causal language model.
        """
        span: list[torch.Tensor] = []
        if start_positions is not None and end_positions is not None:  # before the cache is written to
            rows, _ = new_tokens(input_ids, inputs_embeds, self.config.hidden_size)
            ends = {"start_positions": start_positions, "end_positions": end_positions}
            span = [read_positions_of_span(name, positions, rows) for name, positions in ends.items()]
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        body = self.model(input_ids, **given, cache=cache, return_dict=True, **kwargs)
        start_logits, end_logits = self.qa_outputs(body.last_hidden_state).unbind(-1)
        return QuestionAnsweringModelOutput(
            loss=self.loss_function(start_logits, end_logits, *span, **kwargs) if span else None,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
        )


# The class that each Auto class stands for, here and in a saved `config.json`.
AUTO_CLASSES = {
    "AutoModel": SpiralFormerModel,
    "AutoModelForCausalLM": SpiralFormerForCausalLM,
    "AutoModelForQuestionAnswering": SpiralFormerForQuestionAnswering,
    "AutoModelForSequenceClassification": SpiralFormerForSequenceClassification,
    "AutoModelForTokenClassification": SpiralFormerForTokenClassification,
}

# `Trainer` (label smoothing), the server, the model card and lm-eval ask these lists of names what a class is for. A
# name loads nothing. docs/limits.md has every place that decides by one.
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
