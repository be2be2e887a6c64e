"""Generates for prompts of different lengths in one batch, and for each prompt alone: the tokens are the same.

Pad on the left, so that the new tokens follow the prompt. Chunks count a row's own tokens, never its padding. The
weights here are random; put the folder of your checkpoint in their place.
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from modeling_spiralformer import TOKENIZER_FOLDER, configuration_folder  # registers the Auto classes

torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_FOLDER, padding_side="left")
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(configuration_folder("tiny"))).eval()

prompts = ["def read(path):", "import", "class Tree:\n    def __init__(self, left, right"]
batch = tokenizer(prompts, return_tensors="pt", padding=True)
together = model.generate(**batch, max_new_tokens=20, do_sample=False)[:, batch["input_ids"].shape[1] :]

for prompt, new_tokens in zip(prompts, together, strict=True):
    alone = tokenizer(prompt, return_tensors="pt")
    (text,) = model.generate(**alone, max_new_tokens=20, do_sample=False)
    length = alone["input_ids"].shape[1]
    (single,) = tokenizer.batch_decode(text[None, length:], skip_special_tokens=True)
    batched = tokenizer.decode(new_tokens, skip_special_tokens=True)
    print(f"{prompt!r} -> {batched!r} ({'the same alone' if batched == single else f'alone: {single!r}'})")
