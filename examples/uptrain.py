"""Uptrains a GPT-NeoX checkpoint that was converted to a SpiralFormer, with the library's Trainer.

    python scripts/convert.py --model_name_or_path EleutherAI/pythia-160m --output_dir runs/converted
    python examples/uptrain.py runs/converted runs/uptrained --text text.txt --max_steps 1000

Prelude and coda are copies of the first and last layers, the core is made of layers between them, and the routers of
MeSH start so that the model is near a plain stack of the copied layers. `--source` names the GPT-NeoX to compare with.
"""

import argparse
from pathlib import Path

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import modeling_spiralformer  # noqa: F401  registers the Auto classes

HELD_OUT = 0.05  # of the text

parser = argparse.ArgumentParser()
parser.add_argument("converted", help="checkpoint of scripts/convert.py, with its tokenizer")
parser.add_argument("output_dir")
parser.add_argument("--text", required=True, help="a text file; its end is held out")
parser.add_argument("--source", help="the GPT-NeoX checkpoint that was converted")
parser.add_argument("--block_size", type=int, default=512)
parser.add_argument("--batch_size", type=int, default=8)
parser.add_argument("--learning_rate", type=float, default=1e-4)
parser.add_argument("--max_steps", type=int, default=1000)
arguments = parser.parse_args()


def load(name: str):
    """The model, refused where the library would draw or drop weights, and only warn."""
    model, loading = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True)
    if any(loading.values()):
        parser.error(f"{name} must hold the weights of its configuration, but loading it gave {loading}")
    return model


set_seed(42)
model, tokenizer = load(arguments.converted), AutoTokenizer.from_pretrained(arguments.converted)
ids = tokenizer(Path(arguments.text).read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
size = arguments.block_size
blocks = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
if len(blocks) < 2:
    parser.error(f"--text must hold two blocks of {size} tokens, but {arguments.text} has {len(ids)} tokens")
held_out = max(1, round(HELD_OUT * len(blocks)))
data = {"train": blocks[:-held_out], "held out": blocks[-held_out:]}
data = {name: Dataset.from_dict({"input_ids": part, "labels": part}) for name, part in data.items()}

settings = TrainingArguments(
    output_dir=arguments.output_dir,
    max_steps=arguments.max_steps,
    per_device_train_batch_size=arguments.batch_size,
    learning_rate=arguments.learning_rate,
    lr_scheduler_type="cosine",
    save_strategy="no",
    report_to="none",
)
trainer = Trainer(
    model=model,
    args=settings,
    train_dataset=data["train"],
    eval_dataset=data["held out"],
    processing_class=tokenizer,
    data_collator=default_data_collator,
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]
trainer.save_model()
print(f"held-out loss: converted {before:.3f}, after {arguments.max_steps} steps {after:.3f}")
if arguments.source is not None:
    trainer = Trainer(load(arguments.source), settings, default_data_collator, eval_dataset=data["held out"])
    print(f"held-out loss: source {trainer.evaluate()['eval_loss']:.3f}")
