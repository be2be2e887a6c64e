"""What generation costs checkpoints with one tokenizer: cache, prefill, decode steps, and drafts of one for another.

Models take turns, so that what else the machine does meets all of them. A draft is a token that the assistant of
assisted decoding proposes; it is accepted where the target would have taken the same.
"""

import statistics
from collections.abc import Callable

import torch
from transformers import CompileConfig, DynamicCache, PreTrainedModel

from modeling_spiralformer.cache_name_spiralformer import CACHE_NAME
from workshop.benchmarks.workloads import timed
from workshop.costs import layer_bytes

Models = dict[str, PreTrainedModel]


@torch.inference_mode()
def time_context(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int) -> dict[str, float]:
    """Bytes of the cache after `ids`, seconds of their prefill, and seconds of the median greedy step after it."""
    cache = DynamicCache(config=model.config)

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        return model(tokens, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)

    prefill, token = timed(lambda: forward(ids), model.device)
    held = sum(map(layer_bytes, cache.layers))
    steps = []
    for _ in range(new_tokens):
        step, token = timed(lambda: forward(token), model.device)  # noqa: B023  called at once
        steps.append(step)
    return {"bytes": held, "prefill": prefill, "step": statistics.median(steps)}


def compare_contexts(models: Models, ids: torch.Tensor, lengths: list[int], new_tokens: int, rounds: int) -> dict:
    """Length -> name -> medians over the rounds of `time_context`; a round that is not counted comes first."""
    found: dict = {length: {name: [] for name in models} for length in lengths}
    for _ in range(rounds + 1):
        for length in lengths:
            for name, model in models.items():
                found[length][name].append(time_context(model, ids[:, :length], new_tokens))
    return {
        length: {
            name: {key: statistics.median(run[key] for run in runs[1:]) for key in runs[0]}
            for name, runs in by_name.items()
        }
        for length, by_name in found.items()
    }


def time_generate(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int, **how) -> tuple[float, torch.Tensor]:
    """Seconds and new tokens of a greedy `generate()`."""
    options = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None, **how}
    mask = torch.ones_like(ids)
    duration, tokens = timed(lambda: model.generate(ids, attention_mask=mask, **options), model.device)
    return duration, tokens[:, ids.shape[1] :]


def time_assisted(
    target: PreTrainedModel, assistant: PreTrainedModel, ids: torch.Tensor, new_tokens: int, **how
) -> tuple[dict[str, float], torch.Tensor]:
    """Seconds, the number of new tokens, calls of the target and drafts of the assistant; and the new tokens.

    A call of the target accepts some drafts and adds a token of its own; a call of the assistant makes a draft.
    """
    calls = {"target": 0, "assistant": 0}

    def count(name: str) -> Callable:
        def hook(*_) -> None:
            calls[name] += 1

        return hook

    hooks = [model.register_forward_hook(count(name)) for name, model in zip(calls, (target, assistant), strict=True)]
    try:
        duration, tokens = time_generate(target, ids, new_tokens, assistant_model=assistant, **how)
    finally:
        for hook in hooks:
            hook.remove()
    run = {"seconds": duration, "made": tokens.shape[1], "calls": calls["target"], "drafts": calls["assistant"]}
    return run, tokens


def drafting(runs: list[dict[str, float]]) -> dict[str, float]:
    """The share of all drafts of such runs that was accepted, and tokens per call of the target."""
    made, calls, drafts = (sum(run[key] for run in runs) for key in ("made", "calls", "drafts"))
    return {"accepted": (made - calls) / drafts, "tokens_per_call": made / calls}


def compare_assisted(models: Models, prompts: list[torch.Tensor], new_tokens: int, rounds: int) -> dict:
    """
    (target, assistant) -> the share of all drafts that was accepted, tokens per call of the target, and the median of
    the time over that of the target alone.
    """
    names = [*models]
    pairs = [(target, assistant) for target in names for assistant in names if target != assistant]
    found: dict = {pair: [] for pair in pairs}
    for _ in range(rounds):
        for ids in prompts:
            for target, assistant in pairs:
                alone, _ = time_generate(models[target], ids, new_tokens)
                with_draft, _ = time_assisted(models[target], models[assistant], ids, new_tokens)
                found[target, assistant].append({**with_draft, "ratio": with_draft["seconds"] / alone})
    return {
        pair: {**drafting(runs), "ratio": statistics.median(run["ratio"] for run in runs)}
        for pair, runs in found.items()
    }


def time_compiled(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int, rounds: int) -> dict[str, float]:
    """Median seconds of `generate()` with a static cache, compiled and not; compiling itself comes before.

    Raises RuntimeError where both do not give the same tokens.
    """
    compiling = CompileConfig(fullgraph=True, mode=None)
    compiling._compile_all_devices = True  # the library compiles on accelerators alone, if nobody asks
    ways = {"eager": {"disable_compile": True}, "compiled": {"compile_config": compiling}}
    found: dict = {name: [] for name in ways}
    for _ in range(rounds + 1):
        texts = []
        for name, how in ways.items():
            duration, tokens = time_generate(model, ids, new_tokens, cache_implementation="static", **how)
            found[name].append(duration)
            texts.append(tokens)
        if not torch.equal(*texts):
            raise RuntimeError("compiled and eager steps must give the same tokens, but they differ")
    return {name: statistics.median(runs[1:]) for name, runs in found.items()}
