"""Requests of continuous batching beside each of them alone."""

import contextlib
import math

import torch
from support import random_ids, small_model
from transformers import ContinuousBatchingConfig, GenerationConfig

LENGTHS = (1, 3, 17, 40, 61, 7, 24, 2)
NEW = 12


def make_model(implementation: str = "sdpa", dtype: torch.dtype = torch.float32, **options):
    """A model, float32 as `generate()` has it, that does not repeat one token for ever and knows no end."""
    model = small_model(implementation=implementation, dtype=dtype, **{"hidden_size": 32, **options})
    model.generation_config.eos_token_id = None
    return model


def prompts(lengths=LENGTHS) -> list[list[int]]:
    return [random_ids(1, length, seed=length)[0].tolist() for length in lengths]


def alone(model, prompt: list[int], new: int = NEW) -> tuple[list[int], torch.Tensor]:
    """The greedy text of one prompt without a cache, and the log-probabilities of its tokens."""
    how = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "use_cache": False}
    out = model.generate(torch.tensor([prompt]), **how, return_dict_in_generate=True, output_logits=True)
    tokens = out.sequences[0, len(prompt) :]
    scores = torch.cat(out.logits).log_softmax(-1)
    return tokens.tolist(), scores.gather(1, tokens[:, None])[:, 0]


def settings(**options) -> ContinuousBatchingConfig:
    """A page of 24 tokens, at most 50 new tokens a step, 6 seats."""
    return ContinuousBatchingConfig(
        **{"page_size": 24, "num_blocks": 64, "max_batch_tokens": 50, "max_requests_per_batch": 6, **options}
    )


def decoding(**options) -> GenerationConfig:
    return GenerationConfig(
        **{"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0, **options}
    )


@contextlib.contextmanager
def counting_tokens(model):
    """How many tokens the steps within it read, in a list of one."""
    read = [0]
    hook = model.model.register_forward_pre_hook(
        lambda module, args, given: read.__setitem__(0, read[0] + given["input_ids"].numel()), with_kwargs=True
    )
    yield read
    hook.remove()


def check(model, texts: list[list[int]], batching: ContinuousBatchingConfig, new: int = NEW) -> int:
    """Each request has its own text and log-probabilities; returns how many tokens the steps read."""
    batching.return_logprobs = True
    with counting_tokens(model) as read:
        results = model.generate_batch(texts, decoding(max_new_tokens=new), batching)
    assert len(results) == len(texts)
    for prompt, result in zip(texts, results.values(), strict=True):
        assert result.error is None
        tokens, logprobs = alone(model, prompt, new)
        assert result.generated_tokens == tokens
        assert (torch.tensor(result.logprobs) - logprobs).abs().max() < 1e-4
    return read[0]


def check_requests(options: dict, lengths: list[int], room: int, tokens: int, sharing: bool, new: int = 6) -> None:
    """
    Random requests to a model, in float64 so that no two tokens are equally likely.

    Args:
        options: of the model.
        lengths: of the prompts.
        room: blocks of the cache beyond those that the longest request needs alone, in so many parts of them.
        tokens: how many a step may read.
        sharing: whether requests share the blocks of an equal beginning. Every second prompt begins as the one before.
    """
    model = make_model(dtype=torch.float64, **options)
    period = math.lcm(*model.config.chunk_sizes)
    page_size = period * -(-24 // period)
    texts = prompts(lengths)
    for first, second in zip(texts[::2], texts[1::2], strict=False):
        second[: len(first)] = first[: len(second)]
    needed = -(-(max(lengths) + new) // page_size)
    check(
        model,
        texts,
        settings(
            page_size=page_size,
            num_blocks=needed * (1 + room),
            max_batch_tokens=tokens,
            allow_block_sharing=sharing,
        ),
        new,
    )
