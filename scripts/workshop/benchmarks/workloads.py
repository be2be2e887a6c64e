"""What the benchmark times: prefill, training step, decode steps, and the bare matrix products below a decode step."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import CacheLayerMixin
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer

from modeling_spiralformer.chunking_spiralformer import ChunkGrid

# More steps than any pattern of filling levels is long, and a multiple of every published one.
DECODE_STEPS = 32


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, work of an accelerator included."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Waits for the accelerator; nothing to wait for on a CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def random_ids(model: PreTrainedModel, batch: int, length: int) -> torch.Tensor:
    """Token ids `(batch, length)` on the model's device."""
    return torch.randint(3, model.config.vocab_size, (batch, length), device=model.device)


class Prefill:
    """A prompt into a new cache, with the logits of its last token."""

    def __init__(self, model: PreTrainedModel, batch: int, length: int):
        self.model, self.ids = model, random_ids(model, batch, length)

    @torch.no_grad()
    def __call__(self) -> None:
        cache = DynamicCache(config=self.model.config)
        self.model(self.ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


class TrainingStep:
    """Forward with a loss on all tokens, backward, and AdamW."""

    def __init__(
        self, model: PreTrainedModel, batch: int, length: int, optimizer: torch.optim.Optimizer | None = None
    ):
        self.model, self.ids = model, random_ids(model, batch, length)
        self.optimizer = torch.optim.AdamW(model.parameters(), fused=True) if optimizer is None else optimizer

    def __call__(self) -> None:
        self.model.train()
        self.model(self.ids, labels=self.ids, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.eval()


class Decode:
    """
    DECODE_STEPS single tokens after a context, greedily, in the way of `generate()`.

    Args:
        padding: columns of left padding of each row; None for rows that agree.
        compiled: a static cache and a compiled forward in place of the dynamic cache.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch: int,
        context: int,
        padding: list[int] | None = None,
        compiled: bool = False,
    ):
        self.model, self.batch, self.context, self.compiled = model, batch, context, compiled
        self.mask = None
        if padding is not None:
            columns = torch.arange(context + DECODE_STEPS, device=model.device)
            self.mask = (columns >= torch.tensor(padding, device=model.device)[:, None]).long()
        self.forward = torch.compile(model, fullgraph=True) if compiled else model
        self.ids = random_ids(model, batch, context)
        self.filled = self.fill()

    @torch.no_grad()
    def fill(self) -> Cache:
        """A new cache that holds the context."""
        longest = self.context + DECODE_STEPS
        config = self.model.config
        cache = StaticCache(config=config, max_cache_len=longest) if self.compiled else DynamicCache(config=config)
        mask = None if self.mask is None else self.mask[:, : self.context]
        self.model(self.ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
        return cache

    @torch.no_grad()
    def __call__(self) -> list[float]:
        """Seconds of each step."""
        cache = self.fill() if self.compiled else copy.deepcopy(self.filled)
        token, taken = self.ids[:, -1:], []
        for column in range(self.context, self.context + DECODE_STEPS):
            mask = None if self.mask is None else self.mask[:, : column + 1]
            position_ids = None if mask is None else mask.sum(dim=-1, keepdim=True) - 1

            def step(token=token, mask=mask, position_ids=position_ids):
                logits = self.forward(
                    token, attention_mask=mask, position_ids=position_ids, past_key_values=cache, use_cache=True
                ).logits
                return logits[:, -1].argmax(dim=-1, keepdim=True)

            synchronize(self.model.device)
            started = time.perf_counter()
            token = step()
            synchronize(self.model.device)
            taken.append(time.perf_counter() - started)
        return taken


@dataclass(frozen=True)
class LayerCall:
    """One layer in one decode step: which weights, how many rows run, how many keys each of them reads."""

    layer: torch.nn.Module
    rows: int
    keys: int


def decode_calls(model: PreTrainedModel, column: int, padding: list[int]) -> list[LayerCall]:
    """The layer calls that a decode step at that column of the batch needs, one entry of `padding` for each row."""
    rows = len(padding)
    if not hasattr(model, "model"):
        return [LayerCall(layer, rows, column + 1) for layer in model.gpt_neox.layers]
    body, config = model.model, model.config
    calls = [LayerCall(layer, rows, column + 1) for layer in body.prelude]
    for size, offset, shift in zip(
        config.chunk_sizes, config.resolved_chunk_offsets, config.resolved_causal_shifts, strict=True
    ):
        grid = ChunkGrid(size, offset, shift)
        filling = sum(column % size == grid.phase(pads) for pads in padding)
        if filling:
            calls += [LayerCall(layer, filling, column // size + 1) for layer in body.core]
    return calls + [LayerCall(layer, rows, column + 1) for layer in body.coda]


class Floor:
    """
    The bare matrix products of the same decode steps: the linear layers of every layer call and the head on as many
    rows, and queries with keys and values of the cache's shapes. No norms, biases, rotations, masks or sums, and no
    routers, scorers or allocators.
    """

    def __init__(self, model: PreTrainedModel, batch: int, context: int, padding: list[int] | None = None):
        self.steps = [
            decode_calls(model, column, padding or [0] * batch) for column in range(context, context + DECODE_STEPS)
        ]
        self.model, self.head = model, model.get_output_embeddings().weight
        size, heads = model.config.hidden_size, model.config.num_attention_heads
        like = {"device": self.head.device, "dtype": self.head.dtype}
        self.states = torch.randn(batch, size, **like)
        self.inner = torch.randn(batch, model.config.intermediate_size, **like)
        # A store for every layer call of a step, so that keys come from memory here as they do in the model.
        most = max(len(calls) for calls in self.steps)
        shape = (batch, heads, context + DECODE_STEPS, size // heads)
        self.stores = [(torch.randn(shape, **like), torch.randn(shape, **like)) for _ in range(most)]
        self.query = torch.randn(batch, heads, 1, size // heads, **like)

    @torch.no_grad()
    def __call__(self) -> list[float]:
        """Seconds of each step."""
        taken = []
        for calls in self.steps:
            taken.append(seconds(lambda calls=calls: self._products(calls), self.states.device))
        return taken

    def _products(self, calls: list[LayerCall]) -> None:
        linear = torch.nn.functional.linear
        for call, (keys, values) in zip(calls, self.stores, strict=False):
            attention, mlp, states = call.layer.attention, call.layer.mlp, self.states[: call.rows]
            linear(states, attention.query_key_value.weight)
            scores = self.query[: call.rows] @ keys[: call.rows, :, : call.keys].mT
            scores @ values[: call.rows, :, : call.keys]
            linear(states, attention.dense.weight)
            linear(states, mlp.dense_h_to_4h.weight)
            linear(self.inner[: call.rows], mlp.dense_4h_to_h.weight)
        linear(self.states, self.head)


# -- counted, not timed -------------------------------------------------------------------------------------------


def call_lengths(model: PreTrainedModel, length: int) -> list[int]:
    """How many tokens or latents each layer call of a forward over `length` tokens attends over."""
    config = model.config
    if not hasattr(model, "model"):
        return [length] * config.num_hidden_layers
    levels = zip(config.chunk_sizes, config.resolved_chunk_offsets, strict=True)
    latents = [(length + offset) // size for size, offset in levels for _ in range(config.num_core_layers)]
    return [length] * (config.num_prelude_layers + config.num_coda_layers) + latents


def count_flops(model: PreTrainedModel, length: int) -> dict[str, int]:
    """
    FLOPs (2 per multiply-add) of a prefill, and of forward and backward of a training step, batch 1, of a model on the
    meta device. Attention counts the whole square of queries and keys, as the paper's figures do; the entries
    "... causal" count the half of it that a causal kernel computes.
    """
    model.set_attn_implementation("eager")
    prefill = Prefill(model, 1, length)
    with FlopCounterMode(display=False) as counter:
        prefill()
    counts = {"prefill": counter.get_total_flops()}
    ids = random_ids(model, 1, length)
    cache = DynamicCache(config=model.config)  # without one GPT-NeoX reads position ids, which have no values here
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids, past_key_values=cache).loss.backward()
    counts["training"] = counter.get_total_flops()
    # Two products of queries, keys and values forward, four backward.
    square = sum(4 * n * n * model.config.hidden_size for n in call_lengths(model, length))
    counts["prefill causal"] = counts["prefill"] - square // 2
    counts["training causal"] = counts["training"] - 3 * square // 2
    return counts


def step_weight_bytes(model: PreTrainedModel, context: int) -> float:
    """Bytes of weights that an average decode step reads: layers once a call, everything outside of them once."""
    embedding = model.get_input_embeddings().weight
    in_layers = {id(p) for layer in model.modules() if isinstance(layer, GPTNeoXLayer) for p in layer.parameters()}
    outside = sum(p.nbytes for p in model.parameters() if id(p) not in in_layers and p is not embedding)
    steps = [decode_calls(model, column, [0]) for column in range(context, context + DECODE_STEPS)]
    called = sum(p.nbytes for calls in steps for call in calls for p in call.layer.parameters())
    return outside + called / DECODE_STEPS


def layer_bytes(layer: CacheLayerMixin) -> int:
    """Bytes of memory behind the states of a cache layer, what is spare of it included."""
    states = [layer.keys, layer.values]
    if getattr(layer, "owns_level", False):
        states += [layer.level.tokens, layer.level.latents]
    return sum(state.untyped_storage().nbytes() for state in states if state is not None)


def held_bytes(model: PreTrainedModel, length: int) -> int:
    """Bytes that the cache of one row holds after a prefill of `length` tokens; works on the meta device."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(random_ids(model, 1, length), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return sum(map(layer_bytes, cache.layers))


def peak_bytes(work: Callable[[], object], device: torch.device, held: int) -> int:
    """
    Most memory in use at any time of `work`, in bytes, with the `held` bytes that are in use before it.

    On a CPU every allocation and release is taken from torch's profiler: the figure is exact and repeatable.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return held + torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    in_use = most = held
    for event in sorted(events, key=lambda event: event.start_ns()):
        in_use += event.nbytes()
        most = max(most, in_use)
    return most


def training_peak_bytes(step: TrainingStep) -> int:
    """Peak of a training step that has run before: weights, gradients, both moments of AdamW, activations."""
    states = (value for state in step.optimizer.state.values() for value in state.values())
    held = sum(p.nbytes for p in step.model.parameters()) + sum(value.nbytes for value in states)
    return peak_bytes(step, step.model.device, held)
