"""Molecules drawn from a model."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

SAMPLED_AT_ONCE = 1000
SAMPLED_AT_ONCE_BY_ACCELERATORS = 5000  # which wait for the next kernel more than for its rows
SAMPLING = {"temperature": 0.8, "top_k": 40, "max_length": 120}  # SMolLM's


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    seed: int,
    temperature: float,
    top_k: int,
    max_length: int,
) -> list[str]:
    """
    `count` SMILES drawn from bos, each of at most `max_length` tokens with bos and eos. A seed gives the same on one
    kind of device.
    """
    set_seed(seed)
    at_once = SAMPLED_AT_ONCE if model.device.type == "cpu" else SAMPLED_AT_ONCE_BY_ACCELERATORS
    model.eval()
    samples: list[str] = []
    while len(samples) < count:
        rows = min(at_once, count - len(samples))
        start = torch.full((rows, 1), tokenizer.bos_token_id, device=model.device)
        drawn = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            temperature=temperature,
            top_k=top_k,
            max_length=max_length,
        )
        samples += tokenizer.batch_decode(drawn, skip_special_tokens=True)
    return samples
