"""Attention to rounded keys and values, with no cache: what a quantised cache must equal, however a text is cut."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "rounded_keys"


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounded to 8 significant bits."""
    return torch.from_numpy(values).bfloat16().double().numpy()


def rounded(states: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """The nearest of 2^bits values between lowest and highest of each group of channels, by numpy in float64."""
    if bits == 16:
        return states
    groups = states.double().cpu().numpy().reshape(*states.shape[:-1], states.shape[-1] // group_size, group_size)
    lowest, highest = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
    step = bfloat16((highest - lowest) / (2**bits - 1))
    lowest = bfloat16(lowest)
    codes = np.clip(np.rint((groups - lowest) / np.where(step == 0, 1, step)), 0, 2**bits - 1)
    return torch.from_numpy((lowest + codes * step).reshape(states.shape)).to(states)


class Rounding:
    """What the attention below does at each chunk size, and the size that runs."""

    bits: dict[int, int]
    group_size: int
    size = 1


def attention(module, query, key, value, *args, **kwargs):
    """sdpa over keys and values as they would come back from the cache."""
    bits = Rounding.bits.get(Rounding.size, 16)
    key, value = rounded(key, bits, Rounding.group_size), rounded(value, bits, Rounding.group_size)
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def enter(resolution, *_) -> None:
    Rounding.size = resolution.chunk_size


def leave(*_) -> None:
    Rounding.size = 1  # of prelude and coda


@contextmanager
def rounded_keys(model, bits: dict[int, int], group_size: int | None = None) -> Iterator[None]:
    """Within, `model` without a cache attends to keys and values of so many bits, by chunk size."""
    config = model.model.layer_config
    Rounding.bits, Rounding.group_size = bits, group_size or config.resolved_head_dim
    handles = [part.register_forward_pre_hook(enter) for part in model.model.resolutions]
    handles += [part.register_forward_hook(leave) for part in model.model.resolutions]
    implementation, config._attn_implementation = config._attn_implementation, NAME
    try:
        yield
    finally:
        config._attn_implementation = implementation
        for handle in handles:
            handle.remove()
