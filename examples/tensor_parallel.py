"""Generates with a model whose layers are dealt out over several processes, each with a share of the heads.

    torchrun --nproc_per_node 2 examples/tensor_parallel.py CHECKPOINT

Every process gets the same prompt and computes the same tokens; the first one prints them.
"""

import os
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

import modeling_spiralformer  # noqa: F401  registers the Auto classes

checkpoint, processes = sys.argv[1], int(os.environ["WORLD_SIZE"])
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
model = AutoModelForCausalLM.from_pretrained(checkpoint, distributed_config=DistributedConfig(tp_size=processes))
tokens = model.generate(**tokenizer("def add(a, b):", return_tensors="pt").to(model.device), max_new_tokens=20)
if os.environ["RANK"] == "0":
    held = sum(getattr(weight, "_local_tensor", weight).numel() for weight in model.parameters())
    print(f"{held} of {model.num_parameters()} parameters in each of {processes} processes")
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))
