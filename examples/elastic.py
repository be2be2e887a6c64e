"""Spends less on a token without other weights: views that run some iterations of a checkpoint's schedule.

    python examples/elastic.py CHECKPOINT --prompt "def add(a, b):" --schedules 8,4 1

For the model and each view it prints the layer calls for a token, the loss of the prompt, and the text that follows.
Then each view drafts for the model: the text is the model's own, whatever the view would have written.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_spiralformer  # noqa: F401  registers the Auto classes

parser = argparse.ArgumentParser()
parser.add_argument("checkpoint", help="a SpiralFormer with its tokenizer")
parser.add_argument("--prompt", default="def add(a, b):\n    return")
parser.add_argument(
    "--schedules", nargs="+", help="parts of its schedule, such as 8,4. Default: it without its last ones"
)
parser.add_argument("--max_new_tokens", type=int, default=20)
arguments = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint)
schedule = list(model.config.chunk_sizes)
parts = [schedule[:count] for count in range(len(schedule) - 1, 0, -1)]
if arguments.schedules is not None:
    parts = [[int(size) for size in part.split(",")] for part in arguments.schedules]
if not parts:
    parser.error(f"the schedule of {arguments.checkpoint} must have at least two iterations, but it is {schedule}")
prompt = tokenizer(arguments.prompt, return_tensors="pt")
if prompt["input_ids"].shape[1] < 2:
    parser.error(f"the prompt must have at least two tokens, but got {arguments.prompt!r}")


def continued(one, **settings) -> str:
    """The greedy text after the prompt."""
    tokens = one.generate(**prompt, max_new_tokens=arguments.max_new_tokens, do_sample=False, **settings)
    return tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


views = [model.with_schedule(part) for part in parts]
for one in (model, *views):
    config = one.config
    calls = config.num_prelude_layers + config.num_coda_layers
    calls += config.num_core_layers * sum(1 / size for size in config.chunk_sizes)
    with torch.no_grad():
        loss = one(**prompt, labels=prompt["input_ids"]).loss
    print(f"{config.chunk_sizes}: {calls:.2f} layers for a token, loss {loss:.3f}, {continued(one)!r}")

text = continued(model)
for view in views:
    drafted = continued(model, assistant_model=view)
    same = "the model's text" if drafted == text else f"not the model's text, but {drafted!r}"
    print(f"drafted by {view.config.chunk_sizes}: {same}")
