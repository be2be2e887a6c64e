"""Changes the schedule of a saved model while loading it, and tells which weights fitted.

With means and broadcasts in place of learned scorers and allocators, and without MeSH, no weight depends on the
schedule: every one loads. Else those that have another shape are refused, or, with `ignore_mismatched_sizes=True`,
drawn anew: train on before you use such a model.
"""

import tempfile

import torch
from transformers import AutoModelForCausalLM

from modeling_spiralformer import SpiralFormerConfig, SpiralFormerForCausalLM

torch.manual_seed(0)
SIZES = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
ids = torch.randint(3, 256, (1, 24))


def change(title: str, new: dict, **settings) -> None:
    """Saves a model with the schedule {8, 4, 2, 1}, loads it with the fields of `new`, and generates."""
    config = SpiralFormerConfig(**SIZES, chunk_sizes=[8, 4, 2, 1], **settings)
    with tempfile.TemporaryDirectory() as folder:
        SpiralFormerForCausalLM(config).save_pretrained(folder)
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, **new, ignore_mismatched_sizes=True, output_loading_info=True
        )
    anew = sorted({name for name, *_ in info["mismatched_keys"]} | set(info["missing_keys"]))
    text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    print(f"{title}: now {model.config.chunk_sizes}, {text.shape[1]} tokens, drawn anew: {anew or 'nothing'}")


free = {"down_scaling": "mean", "up_scaling": "broadcast", "topology": "anchor"}
change("means, broadcasts, anchor", {"chunk_sizes": [16, 8, 2]}, **free)
change("means, broadcasts, anchor, one more iteration", {"chunk_sizes": [8, 4, 2, 1, 1]}, **free)
change("anchor, last iteration once more", {"chunk_sizes": [8, 4, 2, 1, 1]}, topology="anchor")
change("MeSH of 7 slots, other chunks", {"chunk_sizes": [4, 2, 2, 1]}, num_memory_slots=7)
