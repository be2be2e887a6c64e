"""Pushes a model and its tokenizer to the Hub, tags that state, and pulls it back by the Auto classes.

    python examples/push_and_pull.py me/my-spiralformer

It needs a token that may write, in HF_TOKEN or from `hf auth login`; HF_ENDPOINT names a Hub of your own.
The repository is made private, and holds the model's code: a machine without this package loads it by
`AutoModelForCausalLM.from_pretrained(repo_id, revision="COMMIT", trust_remote_code=True)`, COMMIT being the id of the
commit whose code has been read there.
"""

import sys

import torch
from huggingface_hub import create_tag
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from modeling_spiralformer import TOKENIZER_FOLDER, configuration_folder  # registers the Auto classes

repo_id = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_FOLDER, padding_side="left")
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(configuration_folder("tiny"))).eval()

model.push_to_hub(repo_id, private=True, max_shard_size="1MB")
tokenizer.push_to_hub(repo_id)
create_tag(repo_id, tag="v1", exist_ok=True)

pulled = AutoModelForCausalLM.from_pretrained(repo_id, revision="v1")
assert all(map(torch.equal, pulled.state_dict().values(), model.state_dict().values()))
prompts = AutoTokenizer.from_pretrained(repo_id, revision="v1")(["def read(path):", "import"], padding=True)
prompts = prompts.convert_to_tensors("pt")
with torch.no_grad():
    assert torch.allclose(pulled(**prompts).logits, model(**prompts).logits, atol=1e-5)
print(tokenizer.batch_decode(pulled.generate(**prompts, max_new_tokens=10), skip_special_tokens=True))
