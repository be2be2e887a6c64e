"""Uptrains a GPT-NeoX checkpoint as a SpiralFormer: converts it, trains it with the library's Trainer, saves it.

    python examples/uptrain.py EleutherAI/pythia-160m runs/uptrained --max_steps 1000

Prelude and coda are copies of the first and last layers, the core is made of layers between them, and the routers of
MeSH start so that the model is near a plain stack of the copied layers. The text is the source of the Python standard
library, or `--train_file`.
"""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))

from checkpoints import load_config, load_model, load_tokenizer
from conversion import to_spiralformer
from files import check_folder
from training_arguments import DataArguments
from training_data import make_blocks
from transformers import (
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

parser = argparse.ArgumentParser()
parser.add_argument("source", help="GPT-NeoX checkpoint with a tokenizer, a folder or a name on the Hub")
parser.add_argument("output_dir")
parser.add_argument("--layers", type=int, nargs=3, default=(2, 4, 2), help="of prelude, core and coda")
parser.add_argument("--chunk_sizes", type=int, nargs="+", default=(8, 4, 2, 1))
parser.add_argument("--block_size", type=int, default=512)
parser.add_argument("--batch_size", type=int, default=8)
parser.add_argument("--learning_rate", type=float, default=1e-4)
parser.add_argument("--max_steps", type=int, default=1000)
parser.add_argument("--train_file", help="text to train on; default: the source of the Python standard library")
arguments = parser.parse_args()

set_seed(42)
check_folder("output_dir", arguments.output_dir)
config = load_config(arguments.source, field="source")
tokenizer = load_tokenizer(arguments.source, config, field="source")
source = load_model(arguments.source, config)
prelude, core, coda = arguments.layers
model = to_spiralformer(
    source,
    num_prelude_layers=prelude,
    num_core_layers=core,
    num_coda_layers=coda,
    chunk_sizes=arguments.chunk_sizes,
)

data = DataArguments(train_file=arguments.train_file, max_eval_samples=64)
blocks = make_blocks(data, tokenizer, arguments.block_size, ["train", "validation"])
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
    train_dataset=blocks["train"],
    eval_dataset=blocks["validation"],
    processing_class=tokenizer,
    data_collator=default_data_collator,
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]
trainer.save_model()
reference = Trainer(
    model=source, args=settings, eval_dataset=blocks["validation"], data_collator=default_data_collator
).evaluate()["eval_loss"]
print(f"held-out loss: source {reference:.3f}, converted {before:.3f}, after {arguments.max_steps} steps {after:.3f}")
