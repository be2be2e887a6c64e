"""Molecules drawn from a model."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

SAMPLED_AT_ONCE = 1000
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
    """`count` SMILES drawn from bos, each of at most `max_length` tokens with bos and eos. A seed gives the same."""
    set_seed(seed)
    model.eval()
    samples: list[str] = []
    while len(samples) < count:
        rows = min(SAMPLED_AT_ONCE, count - len(samples))
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
