"""Fine-tunes LoRA adapters with PEFT, saves them, and merges them into the weights.

The core has one adapter, which acts in every iteration, like the weights that it adapts. "all-linear" covers prelude,
core and coda, and also scorers, allocators and MeSH routers, but not the head.

    python examples/lora.py --model my_model --text text.txt --output_dir runs/lora --max_steps 20
"""

import argparse
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)

import modeling_spiralformer  # noqa: F401  registers the Auto classes

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True, help="a saved model with its tokenizer")
parser.add_argument("--text", required=True, help="a text file, one example a line")
parser.add_argument("--output_dir", default="runs/lora")
parser.add_argument("--max_steps", type=int, default=200)
parser.add_argument("--rank", type=int, default=8)
arguments = parser.parse_args()
# Before the work: `save_pretrained` writes nothing, and only logs it, where a file is in the way.
merged_dir = Path(arguments.output_dir) / "merged"
merged_dir.mkdir(parents=True, exist_ok=True)
set_seed(0)

tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="right")
model, loading = AutoModelForCausalLM.from_pretrained(arguments.model, output_loading_info=True)
if any(loading.values()):  # the library would draw or drop these weights, and warn
    parser.error(f"--model must hold the weights of its configuration, but loading it gave {loading}")
adapted = get_peft_model(
    model,
    LoraConfig(
        task_type="CAUSAL_LM",
        r=arguments.rank,
        lora_alpha=2 * arguments.rank,
        # Only the layers: ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
        target_modules="all-linear",
    ),
)
adapted.print_trainable_parameters()

lines = [
    line + tokenizer.eos_token
    for line in Path(arguments.text).read_text(encoding="utf-8").splitlines()
    if line.strip()
]
if not lines:
    parser.error(f"--text must hold a line of text, but {arguments.text} has none")
trainer = Trainer(
    adapted,
    TrainingArguments(
        arguments.output_dir,
        max_steps=arguments.max_steps,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=Dataset.from_dict(tokenizer(lines, truncation=True, max_length=256)),
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model()  # the adapters alone

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss: first {losses[0]:.3f}, last {losses[-1]:.3f}")

# Later, elsewhere: the base model, the adapters on it, and one model of both.
base = AutoModelForCausalLM.from_pretrained(arguments.model)
merged = PeftModel.from_pretrained(base, arguments.output_dir).merge_and_unload()
merged.save_pretrained(merged_dir)
tokenizer.save_pretrained(merged_dir)
