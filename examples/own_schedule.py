"""A schedule of one's own: three iterations over chunks of 6, 3 and 1 tokens, trained for some steps, then generating.

`chunk_sizes` has one entry per iteration, coarse or fine in any order. Offsets (where the first chunk ends) and shifts
(how far updates move to the right) have defaults; a shift that would leak the future is refused.
"""

import torch
from transformers import AutoTokenizer, set_seed

from modeling_spiralformer import TOKENIZER_FOLDER, SpiralFormerConfig, SpiralFormerForCausalLM

set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_FOLDER)
config = SpiralFormerConfig(
    vocab_size=len(tokenizer),
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=4,
    num_prelude_layers=1,
    num_core_layers=2,
    num_coda_layers=1,
    chunk_sizes=[6, 3, 1],
    chunk_offsets=[0, 1, 0],  # the first chunks have 6, 2 and 1 tokens
    causal_shifts=[5, 2, 0],  # the smallest allowed: g - 1
    bos_token_id=tokenizer.bos_token_id,
    eos_token_id=tokenizer.eos_token_id,
    pad_token_id=tokenizer.pad_token_id,
)
model = SpiralFormerForCausalLM(config)

text = "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n\n\n" * 8
ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :128]
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(60):
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0 or step == 59:
        print(f"step {step}: loss {loss.item():.3f}")

prompt = tokenizer("def add(a, b):", return_tensors="pt")
new = model.eval().generate(**prompt, max_new_tokens=30, do_sample=False)
print(tokenizer.decode(new[0], skip_special_tokens=True))
