"""What the benchmark times: prefill, training step, decode steps, and the bare matrix products below a decode step."""

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.profiler import ProfilerActivity, profile
from transformers import Cache, CompileConfig, DynamicCache, PreTrainedModel, StaticCache

from modeling_spiralformer.cache_name_spiralformer import CACHE_NAME
from workshop.costs import DECODE_STEPS, LayerCall, decode_calls, heads_of_keys, token_ids


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Wall time of one call, work of an accelerator included, and what it returned."""
    synchronize(device)
    started = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - started, result


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call."""
    return timed(work, device)[0]


def count_graphs() -> int:
    """How many graphs this process has compiled."""
    return counters["stats"]["unique_graphs"]


def synchronize(device: torch.device) -> None:
    """Waits for the accelerator; nothing to wait for on a CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class Prefill:
    """A prompt into a new cache, with the logits of its last token."""

    def __init__(self, model: PreTrainedModel, batch: int, length: int):
        self.model, self.ids = model, token_ids(model, batch, length)

    @torch.no_grad()
    def __call__(self) -> None:
        cache = DynamicCache(config=self.model.config)
        self.model(self.ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


class TrainingStep:
    """
    Forward with a loss on all tokens, backward, and AdamW.

    Args:
        compiled: the forward compiled, and with it the backward, as Trainer does with `torch_compile=True`. The first
            step compiles; `compiling` then says how long it took and how many graphs it made.
    """

    compiling: dict[str, float] | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        batch: int,
        length: int,
        optimizer: torch.optim.Optimizer | None = None,
        compiled: bool = False,
    ):
        self.model, self.ids = model, token_ids(model, batch, length)
        self.optimizer = torch.optim.AdamW(model.parameters(), fused=True) if optimizer is None else optimizer
        self.compiled, self.forward = compiled, torch.compile(model) if compiled else model

    def __call__(self) -> None:
        if self.compiled and self.compiling is None:
            graphs = count_graphs()
            with fresh_cache():  # nothing of what earlier runs have compiled
                self.compiling = {"first": seconds(self._step, self.model.device)}
            self.compiling["graphs"] = count_graphs() - graphs
        else:
            self._step()

    def _step(self) -> None:
        self.model.train()
        self.forward(self.ids, labels=self.ids, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.eval()


class Decode:
    """
    DECODE_STEPS single tokens after a context, greedily, in the way of `generate()`.

    Args:
        padding: columns of left padding of each row; None for rows that agree.
        compiled: a static cache and the compiled call that `generate()` takes, in place of the dynamic cache. The
            first round compiles; `compiling` then says how long it took and how many graphs it made.
    """

    compiling: dict[str, float] | None = None

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
        self.forward = model
        if compiled:  # CUDA graphs, the default, are of accelerators
            mode = "default" if model.device.type == "cpu" else "reduce-overhead"
            self.forward = model.get_compiled_call(CompileConfig(fullgraph=True, dynamic=False, mode=mode))
        self.ids = token_ids(model, batch, context)
        longest, config = context + DECODE_STEPS, model.config
        new = StaticCache(config=config, max_cache_len=longest) if compiled else DynamicCache(config=config)
        self.filled = self.fill(new)

    @torch.no_grad()
    def fill(self, cache: Cache) -> Cache:
        """The cache with the context in it."""
        mask = None if self.mask is None else self.mask[:, : self.context]
        self.model(self.ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
        return cache

    @torch.no_grad()
    def __call__(self) -> list[float]:
        """Seconds of each step."""
        if self.compiled:  # in the same tensors: graphs know their addresses
            self.filled.reset()
        cache = self.fill(self.filled) if self.compiled else copy.deepcopy(self.filled)
        if self.compiled and self.compiling is None:
            graphs, started = count_graphs(), time.perf_counter()
            with fresh_cache():  # nothing of what earlier runs have compiled
                taken = self._steps(cache)
            self.compiling = {"first": taken[0], "all": time.perf_counter() - started}
            self.compiling["graphs"] = count_graphs() - graphs
            return taken
        return self._steps(cache)

    def _steps(self, cache: Cache) -> list[float]:
        token, taken = self.ids[:, -1:].clone(), []  # no view: a graph is compiled anew for one
        for column in range(self.context, self.context + DECODE_STEPS):
            columns = None if self.compiled else column + 1  # a compiled step is given all, as generate() does
            mask = None if self.mask is None else self.mask[:, :columns]
            position_ids = None if mask is None else mask[:, : column + 1].sum(dim=-1, keepdim=True) - 1

            def step(token=token, mask=mask, position_ids=position_ids):
                logits = self.forward(
                    input_ids=token,
                    attention_mask=mask,
                    position_ids=position_ids,
                    use_cache=True,
                    **{CACHE_NAME: cache},
                ).logits
                return logits[:, -1].argmax(dim=-1, keepdim=True)

            duration, token = timed(step, self.model.device)
            taken.append(duration)
        return taken


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
        heads, size = heads_of_keys(model.config)
        like = {"device": self.head.device, "dtype": self.head.dtype}
        widths = {matrix.shape[1] for step in self.steps for call in step for matrix in matrices(call.layer)}
        self.inputs = {width: torch.randn(batch, width, **like) for width in widths | {self.head.shape[1]}}
        # A store for every layer call of a step, so that keys come from memory here as they do in the model.
        most = max(len(calls) for calls in self.steps)
        shape = (batch, heads, context + DECODE_STEPS, size)
        self.stores = [(torch.randn(shape, **like), torch.randn(shape, **like)) for _ in range(most)]
        self.query = torch.randn(batch, heads, model.config.num_attention_heads // heads, size, **like)

    @torch.no_grad()
    def __call__(self) -> list[float]:
        """Seconds of each step."""
        taken = []
        for calls in self.steps:
            taken.append(seconds(lambda calls=calls: self._products(calls), self.head.device))
        return taken

    def _products(self, calls: list[LayerCall]) -> None:
        linear = torch.nn.functional.linear
        for call, (keys, values) in zip(calls, self.stores, strict=False):
            scores = self.query[: call.rows] @ keys[: call.rows, :, : call.keys].mT
            scores @ values[: call.rows, :, : call.keys]
            for matrix in matrices(call.layer):
                linear(self.inputs[matrix.shape[1]][: call.rows], matrix)
        linear(self.inputs[self.head.shape[1]], self.head)


def matrices(layer: torch.nn.Module) -> list[torch.Tensor]:
    """The weights of a layer's linear layers, in the order in which it holds them."""
    return [module.weight for module in layer.modules() if isinstance(module, torch.nn.Linear)]


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


def weight_bytes(model: PreTrainedModel) -> int:
    """Of all parameters, a shared one once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def training_peak_bytes(step: TrainingStep) -> int:
    """Peak of a training step that has run before: weights, gradients, both moments of AdamW, activations."""
    states = (value for state in step.optimizer.state.values() for value in state.values())
    held = weight_bytes(step.model) + sum(value.nbytes for value in states)
    return peak_bytes(step, step.model.device, held)
