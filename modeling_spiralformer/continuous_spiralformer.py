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
"""Continuous batching (`generate_batch`): many requests in one flat batch, over blocks of the library's paged cache.

The library schedules requests, and allocates, shares, copies and frees blocks; `paging_spiralformer` says what lies
where in them. A block has the pages of the token layers, as the library lays them out, and behind them the keys and
values of every latent layer and a state for each resolution.

Shape letters: N new tokens of all requests, K latents that fill, G tokens in a chunk, H heads, E size of a head.
"""

import copy
import math
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, cast
from weakref import WeakSet

import torch
from transformers.generation.configuration_utils import ContinuousBatchingConfig, GenerationConfig, GenerationMode
from transformers.generation.continuous_batching import ContinuousBatchingManager, initialization
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.requests import RequestState
from transformers.generation.continuous_batching.scheduler import Scheduler
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .cache_name_spiralformer import EAGER_READS_PAGES
from .chunking_spiralformer import ChunkGrid
from .configuration_spiralformer import SpiralFormerConfig, processes_of, refuse
from .flex_spiralformer import FLEX, uses_flex
from .paging_spiralformer import PagedState, PagedStep, kept_counts, plan_step
from .request_attention_spiralformer import BY_REQUEST, RequestAttention, register_by_request
from .stopping_spiralformer import StoppingRouter

library_cache = sys.modules[PagedAttentionCache.__module__]
TOKEN_LAYERS = "full_attention"  # the library's name of the layers that these blocks are for
# Two names of the library's modules `cache` and `initialization` say of which class a paged cache builds its blocks.
# Another of `cache` says how many.
ALLOCATORS, GROUPS, MEMORY = "ATTN_TYPE_TO_ALLOCATOR", "group_layers_by_attn_type", "PagedAttentionMemoryHandler"
# What this file and `stopping_spiralformer` read or replace of the library's classes, and no page documents.
# tests/model/test_continuous_batching.py tells when one of them moves.
PRIVATE = {
    "ContinuousBatchingManager": ("_create_batch_processor", "switch_to_cb_friendly_attn"),
    "Scheduler": ("add_waiting_request", "clear_cancelled_requests"),
    "RequestState": ("__post_init__", "initial_tokens", "max_new_tokens"),
    "GenerationOutput": ("prompt_ids", "generated_tokens", "lifespan", "status"),
    "OutputRouter": ("deliver", "deliver_batch", "result_handlers"),
    "StopStringCriteria": ("maximum_token_len",),
    "GenerationMixin": ("_prepare_special_tokens", "_get_logits_processor"),
}
BUILDING = threading.Lock()
# What the library keeps without saying that it may: these look at scores alone, others at the text of each row too,
# and the rows of a flat batch are no texts.
SCORES_ALONE = (
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    "MinPLogitsWarper",
    "SuppressTokensLogitsProcessor",
    "TopHLogitsWarper",
    "TypicalLogitsWarper",
)
# The tokenizer that the call of generate_batch() in this thread was given: the library hands it to nobody.
TOKENIZER: ContextVar[PreTrainedTokenizerBase | None] = ContextVar("tokenizer", default=None)
# What the library has for other models; releases before 5.23 build their cache otherwise.
LibraryAllocator: Any = getattr(library_cache, "FullAttentionCacheAllocator", object)
LibraryMemory: Any = getattr(library_cache, MEMORY, object)


class SpiralFormerAllocator(LibraryAllocator):
    """Blocks with room for latents and states behind the pages of the token layers.

    `parts` has a view of each part of all blocks: `t, layer` is keys and values of a core layer in iteration t,
    `(blocks, latents, 2, H, E)`; `t` is the state of its resolution, `(blocks, tokens and latents, D)`.
    """

    supports_block_table = False  # latents are gathered: a kernel that reads blocks has no place for them

    def __init__(self, config: Any, **kwargs):
        super().__init__(config=config, **kwargs)
        shapes: dict[Any, tuple[int, ...]] = {}
        for t, grid in enumerate(ChunkGrid.of(config)):
            latents = self.tokens_per_page // grid.size
            heads = (self.num_key_value_heads, self.head_dim)
            shapes |= {(t, layer): (latents, 2, *heads) for layer in range(config.num_core_layers)}
            shapes[t] = (sum(kept_counts(grid)), config.hidden_size)
        self.shapes, numbers = shapes, sum(map(math.prod, shapes.values()))
        self.token_bytes = self.bytes_per_page * len(self.layer_indices)
        self.pages_per_block = len(self.layer_indices) - (-numbers * self.cache_dtype.itemsize // self.bytes_per_page)
        self.tokens_per_block = self.tokens_per_page * self.pages_per_block
        self.block_physical_stride = self.rows_per_token * self.tokens_per_block
        self.bytes_per_block = self.bytes_per_page * self.pages_per_block

    def register_cache_tensor(self, bytes_per_sector: int, non_trash_bytes: int, cache_tensor: torch.Tensor, pool):
        """As the library does, and cuts the views."""
        super().register_cache_tensor(bytes_per_sector, non_trash_bytes, cache_tensor, pool)
        rest = cache_tensor.view(-1, self.bytes_per_block)[:, self.token_bytes :].view(self.cache_dtype)
        counts = [math.prod(shape) for shape in self.shapes.values()]
        parts = rest.split_with_sizes([*counts, rest.shape[1] - sum(counts)], dim=1)
        self.parts = {
            key: part.unflatten(1, shape) for (key, shape), part in zip(self.shapes.items(), parts[:-1], strict=True)
        }


class SpiralFormerMemory(LibraryMemory):
    """Counts `num_blocks` in blocks as they are; the library's own count has a whole page for each cache entry."""

    def __init__(self, **given):
        bytes_per_block = given["bytes_per_sector"] * given["cb_config"].page_size // given["tokens_per_sector"]
        super().__init__(**given | {"bytes_per_block": bytes_per_block})


# -- building -----------------------------------------------------------------------------------------------------


def default_batching(config: SpiralFormerConfig) -> ContinuousBatchingConfig:
    """The library's settings, with the next larger page that cuts no chunk."""
    period, page_size = math.lcm(*config.chunk_sizes), ContinuousBatchingConfig().page_size
    return ContinuousBatchingConfig(page_size=-(-page_size // period) * period)


# Settings that ask for graphs, or for compilation; each interval of padding turns CUDA graphs on.
GRAPHS = (
    *("use_cuda_graph", "q_padding_interval_size", "kv_padding_interval_size"),
    *("varlen_compile_config", "decode_compile_config", "default_compile_level"),
)


def prepare_batching(
    config: SpiralFormerConfig, batching: ContinuousBatchingConfig | None, generation: GenerationConfig
) -> ContinuousBatchingConfig:
    """The settings of continuous batching: those given, those in the generation configuration, or `default_batching`.

    Raises:
        `NotImplementedError`: on a release of transformers before 5.23.
        `ValueError`: for a page that cuts a chunk, CUDA graphs and compilation, or several processes.
    """
    if uses_flex(config):
        refuse("attn_implementation", FLEX, "sdpa or eager in continuous batching, where a step has no mask")
    if not hasattr(library_cache, ALLOCATORS):
        raise NotImplementedError(
            "Continuous batching needs transformers 5.23 or later: the paged cache of earlier releases has no place "
            "for latents. Use generate() on a left-padded batch."
        )
    if EAGER_READS_PAGES and "eager" in str(config._attn_implementation):
        raise ValueError(
            "`attn_implementation` must be sdpa in continuous batching before transformers 5.24, but got "
            f"{config._attn_implementation!r}."
        )
    if processes_of(config) > 1:
        raise ValueError(f"`tp_size` must be 1 in continuous batching, but got {processes_of(config)}.")
    if batching is None:  # the library still reads them there, and says that they belong elsewhere
        batching = getattr(generation, "continuous_batching_config", None)
    if batching is None:
        return default_batching(config)
    period = math.lcm(*config.chunk_sizes)  # 1 without a loop
    if batching.page_size % period:
        raise ValueError(
            f"`page_size` must be a multiple of all chunk sizes {list(config.chunk_sizes)}, that is of {period}, but "
            f"got {batching.page_size}."
        )
    for field in GRAPHS:
        value = getattr(batching, field)
        if value not in (None, False, 0, (False, False)):
            raise ValueError(
                f"`{field}` must be left out, but got {value}: how many latents a step fills depends on its requests, "
                "and a graph has fixed shapes."
            )
    return batching


# Fields of a generation configuration that the library would not look at, and what they may be. `use_cache` is none of
# them: the library's server sets it to False.
NOT_LOOKED_AT: dict[str, tuple] = {
    "max_time": (None,),
    "cache_implementation": (None, "paged"),
    "output_scores": (None, False),
    "output_logits": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "token_healing": (None, False),
    "compile_config": (None,),
}


def check_length(generation: GenerationConfig, max_new_tokens: int | None) -> None:
    """Refuses a `max_length`, which the library would not look at, where nothing else says how long to go on."""
    if generation.max_length is not None and generation.max_new_tokens is None and max_new_tokens is None:
        raise ValueError(
            f"`max_length` must be None in continuous batching, but got {generation.max_length}: give "
            "`max_new_tokens`."
        )


def check_decoding(model: Any, generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Refuses what the library would not look at, or would do with the flat batch as with rows of texts.

    Args:
        model: a `SpiralFormerForCausalLM`.
        tokenizer: that of stop strings, where there are any.

    Raises:
        `ValueError`: naming it.
    """
    mode = generation.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(f"Continuous batching decodes greedily or by sampling, but got {mode.value}: use generate().")
    for name, allowed in NOT_LOOKED_AT.items():
        if (value := getattr(generation, name)) not in allowed:
            words = " or ".join(map(repr, allowed))
            raise ValueError(f"`{name}` must be {words} in continuous batching, but got {value!r}.")
    if generation.stop_strings and tokenizer is None:
        raise ValueError("`tokenizer` must be given with `stop_strings`, but got None.")
    seen = copy.deepcopy(generation)  # the library makes some processors only where special tokens are prepared
    seen.eos_token_id = None if seen.eos_token_id == -1 else seen.eos_token_id  # its word for none, here
    model._prepare_special_tokens(seen, kwargs_has_attention_mask=True, device=model.device)
    for processor in model._get_logits_processor(seen, input_ids_seq_length=1):
        name = type(processor).__name__
        if not processor.supports_continuous_batching and name not in SCORES_ALONE:
            raise ValueError(
                f"The logits processors of continuous batching must look at scores alone, but got {name}, which looks "
                "at the text of a row: use generate()."
            )


@contextmanager
def these_blocks() -> Iterator[None]:
    """Within it a paged cache for a SpiralFormer is built of the blocks above, and any other as ever."""
    make_allocator = by_model(SpiralFormerAllocator, LibraryAllocator)
    make_allocator.supports_block_table = False  # type: ignore[attr-defined]  # as the class says it

    def group_layers(config) -> dict[str, list[int]]:
        return {TOKEN_LAYERS: token_layers(config)} if is_spiralformer(config) else library_groups(config)

    with BUILDING:
        library_groups = getattr(library_cache, GROUPS)
        allocators = getattr(library_cache, ALLOCATORS) | {TOKEN_LAYERS: make_allocator}
        ours = {(library_cache, MEMORY): by_model(SpiralFormerMemory, LibraryMemory)}
        for module in (library_cache, initialization):
            ours |= {(module, ALLOCATORS): allocators, (module, GROUPS): group_layers}
        theirs = {place: getattr(*place) for place in ours}
        try:
            for place, value in ours.items():
                setattr(*place, value)
            yield
        finally:
            for place, value in theirs.items():
                setattr(*place, value)


def by_model(own: Callable, library: Callable) -> Callable:
    """What makes an `own` for a SpiralFormer, and for any other model what the library makes."""

    def make(config, **given):
        return (own if is_spiralformer(config) else library)(config=config, **given)

    return make


def is_spiralformer(config: Any) -> bool:
    """Whether it is a configuration of this class, or of another copy of its code."""
    return getattr(config, "model_type", None) == SpiralFormerConfig.model_type


def token_layers(config: SpiralFormerConfig) -> list[int]:
    """The cache entries of prelude and coda."""
    coda = config.num_hidden_layers - config.num_coda_layers
    return [*range(config.num_prelude_layers), *range(coda, config.num_hidden_layers)]


class SpiralFormerBatchingManager(ContinuousBatchingManager):
    """The library's manager, whose paged cache is built of these blocks, and whose requests may have stop strings.

    The library makes it, as one of its own class, for it does more before that than a constructor. Then it becomes one
    of this class.
    """

    output_router: StoppingRouter
    tokenizer: PreTrainedTokenizerBase | None
    asked: dict[str, dict]  # what it was made for

    @classmethod
    def made_by(
        cls,
        make: Callable[[], ContinuousBatchingManager],
        kept: "SpiralFormerBatchingManager | None",
        asked: dict[str, dict],
        new_tokens: int | None,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> "SpiralFormerBatchingManager":
        """The manager that the library makes, or the one that it had kept.

        Args:
            asked: what `describe_asked` gives.
            new_tokens: those of a request that does not say how many.
            tokenizer: that of stop strings; None for the one that the kept manager has.

        Raises:
            `ValueError`: where the kept manager was made with other settings.
        """
        if kept is not None:
            check_kept_manager(kept, asked)
            tokenizer = kept.tokenizer if tokenizer is None else tokenizer
        with these_blocks():
            manager: Any = make()
        if not isinstance(manager, cls):
            manager.__class__ = cls
            manager.output_router = StoppingRouter(super(cls, manager).cancel_request)
            manager.asked = asked
            MANAGERS.add(manager)
        manager.generation_config = copy.copy(manager.generation_config)
        manager.generation_config.max_new_tokens = new_tokens
        manager.switch_to_cb_friendly_attn(manager.model)
        manager.tokenizer = tokenizer
        return manager

    def switch_to_cb_friendly_attn(self, model, auto_switch_to_flash: bool = True) -> None:
        """Has the layers attend request by request, until the library puts back what they had."""
        usual = self._original_attn_impl or model.config._attn_implementation
        if usual in BY_REQUEST:
            self._original_attn_impl = usual
            model.set_attn_implementation(register_by_request(usual))

    def _create_batch_processor(self):
        with these_blocks():
            processor = super()._create_batch_processor()
        cache: Any = processor.cache
        (allocator,) = cache.cache_allocators.values()
        cache.num_blocks = self.continuous_batching_config.num_blocks = allocator.num_blocks
        scheduler: Any = processor.scheduler
        kind, room = type(scheduler), cache.max_tokens_read
        add, vocab_size = kind.add_waiting_request, cast(SpiralFormerConfig, self.model.config).vocab_size
        scheduler.add_waiting_request = partial(add_if_it_fits, add, scheduler, room, vocab_size)
        scheduler.clear_cancelled_requests = partial(
            drop_cancelled, kind.clear_cancelled_requests, scheduler, self.output_router
        )
        return processor

    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        *args,
        stop_strings: str | list[str] | None = None,
        **kwargs,
    ) -> str | None:
        """As the library does; `stop_strings` are those of this request, or of the generation configuration.

        Raises:
            `ValueError`: for an id that another request has, for stop strings where the manager has no tokenizer, for
                the `max_length` of a generation configuration that gives no count of new tokens.
        """
        check_length(self.generation_config, max_new_tokens)
        stop_strings = self.generation_config.stop_strings if stop_strings is None else stop_strings
        request_id = request_id or f"req_{uuid.uuid4().hex}"
        texts = [request_id, *(f"{request_id}__child#{i}" for i in range(self.num_return_sequences - 1))]
        self.output_router.take(texts, stop_strings, self.tokenizer, streaming)
        streaming, added = streaming or bool(stop_strings), None
        try:
            added = super().add_request(input_ids, request_id, max_new_tokens, streaming, *args, **kwargs)
        finally:
            if added is None:  # the library takes no more, and has said so
                self.output_router.forget(texts)
        return added

    def stop(self, *args, **kwargs) -> None:
        """As the library does, which may lose a request that a hard stop meets on its way to the loop."""
        super().stop(*args, **kwargs)
        if self.input_queue.empty() and not self.is_running():
            self.output_router.taken.clear()


MANAGERS: WeakSet[SpiralFormerBatchingManager] = WeakSet()  # those that were made, of all models


def describe_asked(generation: GenerationConfig, batching: ContinuousBatchingConfig) -> dict[str, dict]:
    """What a manager is asked for, before the library writes what it finds into the settings.

    How many new tokens there shall be is said to it with each request.
    """
    decoding = generation.to_dict() | {"max_new_tokens": None}
    if decoding.get("eos_token_id") == -1:  # what the library writes for none
        decoding["eos_token_id"] = None
    return {"generation_config": decoding, "continuous_batching_config": dict(vars(batching))}


def check_kept_manager(kept: SpiralFormerBatchingManager, asked: dict[str, dict]) -> None:
    """Raises `ValueError` for settings that a kept manager would not follow."""
    found = vars(kept.continuous_batching_config)  # the settings of the first call, with what the library found
    for name, values in asked.items():
        before = kept.asked[name]
        if values != before and not (name == "continuous_batching_config" and values == found):
            differing = sorted(
                field for field in values.keys() | before.keys() if values.get(field) != before.get(field)
            )
            raise ValueError(
                f"`{name}` must stay as it was where a manager is kept (`persistent_manager=True`), but differs in "
                f"{differing}: call `destroy_cached_continuous_batching_manager()` first."
            )


def settle_attention(model: Any) -> None:
    """Has the configuration of a model, or of a view, say how its layers attend, with no manager at work.

    One that was not stopped leaves its attention by request, and a view's configuration may be out of date.

    Raises:
        `ValueError`: where one is at work, whose layers would attend otherwise from here on.
    """
    layer_config = model.base_model.layer_config
    at_work: list[Any] = [manager.model for manager in MANAGERS if manager.is_running()]
    if any(other.base_model.layer_config is layer_config for other in at_work):
        raise ValueError("A model must have one manager of continuous batching at work, but another runs: stop() it.")
    names = {by_request: usual for usual, (by_request, _) in BY_REQUEST.items()}
    held = layer_config._attn_implementation
    model.set_attn_implementation(names.get(held, held))


def add_if_it_fits(add: Callable, scheduler: Scheduler, room: int, vocab_size: int, state: RequestState) -> None:
    """Adds a request that a cache of so many tokens holds alone: another would end the loop, and all requests with it.

    A request without a count of new tokens ends where the cache does. The library fails the request of an error here.

    Raises:
        `ValueError`: for a request that does not fit, without a token, or with one that the model lacks.
    """
    prompt = len(state.initial_tokens)
    if prompt == 0:  # it would be answered with the next token of another request
        raise ValueError(
            f"`input_ids` must hold at least one token, but those of request {state.request_id} are empty."
        )
    wrong = [token for token in state.initial_tokens if not 0 <= token < vocab_size]
    if wrong:
        raise ValueError(
            f"`input_ids` must be in [0, {vocab_size - 1}], but request {state.request_id} has {wrong[0]}."
        )
    if state.max_new_tokens is None:
        state.max_new_tokens = max(1, room + 1 - prompt)
        state.__post_init__()  # reads the count
    needed = prompt + state.max_new_tokens - 1  # nothing attends to the last one
    if needed > room:
        raise ValueError(
            f"The cache of continuous batching must hold a whole request, but holds {room} tokens, and request "
            f"{state.request_id} of {prompt} tokens and {state.max_new_tokens} new ones needs {needed}: raise "
            "`num_blocks`, or lower `max_new_tokens`."
        )
    add(scheduler, state)


def drop_cancelled(clear: Callable, scheduler: Scheduler, router: StoppingRouter) -> list[RequestState]:
    """Clears cancelled requests, and what the router has of them: the library keeps a client that has gone."""
    states = clear(scheduler)
    for state in states:
        router.drop(state.request_id)
    return states


# -- one step -----------------------------------------------------------------------------------------------------


class PagedCall:
    """One step of all requests: how many tokens each had and has, and where its blocks are; the cache of its layers.

    Args:
        cache: the library's paged cache.
        grids: those of the schedule, which has a state for each.
        position_ids: `(1, N)` the place of each new token in its text.
        step: what else the library says of its batch.
    """

    def __init__(
        self,
        cache: PagedAttentionCache,
        grids: list[ChunkGrid],
        position_ids: torch.Tensor,
        step: dict[str, Any],
    ):
        self.position_ids = position_ids
        self.allocator: Any = cache.cache_allocators[TOKEN_LAYERS]  # a `SpiralFormerAllocator`
        self.read_index, self.write_index = step["read_index"][0], step["write_index"][0]
        ends = step["cu_seq_lens_k"][TOKEN_LAYERS].long()
        self.total = ends.diff()
        new = step["cu_seq_lens_q"].long().diff()
        self.past = self.total - new
        self.token_mask = RequestAttention(new, self.total, cache.dtype)
        # The places of all tokens, request after request; where no request goes on, all tokens are new.
        places = (self.read_index if self.read_index.numel() else self.write_index).long()
        pages = torch.arange(0, int(self.total.max()), self.allocator.tokens_per_page, device=ends.device)
        first_tokens = (ends[:-1, None] + pages).clamp(max=len(places) - 1)
        self.table = places[first_tokens] // self.allocator.block_physical_stride
        self.states = [self._state(t, grid) for t, grid in enumerate(grids)]

    def _state(self, iteration: int, grid: ChunkGrid) -> PagedState:
        plan = plan_step(grid, self.past, self.total, self.table, self.allocator.tokens_per_page)
        return PagedState(grid, plan, self.allocator.parts[iteration])

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """As `Cache.update`: keys and values `(1, H, N, E)` of a token layer, and those of all tokens."""
        new = [states[0].transpose(0, 1) for states in (key_states, value_states)]
        held = self.allocator.update(*new, layer_idx, self.read_index, self.write_index)
        return tuple(states.transpose(0, 1)[None] for states in held)

    def iteration(self, iteration: int, first_layer: int) -> "tuple[PagedIteration, RequestAttention]":
        """The cache of the core's layers in an iteration, the first of which has that number, and their attention."""
        state = self.states[iteration]
        plan, parts = state.plan, self.allocator.parts
        attention = RequestAttention(plan.counts, plan.held_counts, state.slots.dtype)
        return PagedIteration(iteration, plan, parts, first_layer), attention


class PagedIteration:
    """The latents of an iteration as the core's layers see them: a cache, whose first layer has that number."""

    def __init__(self, iteration: int, plan: PagedStep, parts: dict[Any, torch.Tensor], first_layer: int):
        self.iteration, self.plan, self.parts, self.first_layer = iteration, plan, parts, first_layer

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """As `Cache.update`: keys and values `(1, H, K, E)`, and those of all latents that are attended to."""
        store = self.parts[self.iteration, layer_idx - self.first_layer]
        store[self.plan.slots] = torch.stack([key_states[0], value_states[0]]).permute(2, 0, 1, 3)
        return tuple(states.transpose(0, 1)[None] for states in store[self.plan.held_slots].unbind(1))


__all__ = [
    "PagedCall",
    "SpiralFormerBatchingManager",
    "check_decoding",
    "check_length",
    "default_batching",
    "describe_asked",
    "prepare_batching",
    "settle_attention",
    "these_blocks",
]
