"""Fine-tunes a causal language model on a text file with the library's Trainer, then continues a line with it.

The model and the text are arguments. Rows are padded on the right, each to the longest of its batch: chunks count real
tokens, so padding changes nothing. Without `--model` it starts from random weights of the size of configuration/tiny.

    python examples/finetune.py --text text.txt --output_dir runs/finetuned --max_steps 20
"""

import argparse
import sys
from pathlib import Path

from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)

from modeling_spiralformer import TOKENIZER_FOLDER, configuration_folder  # registers the Auto classes

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a saved model with its tokenizer")
parser.add_argument("--text", required=True, help="a text file, one example a line")
parser.add_argument("--output_dir", default="runs/finetuned")
parser.add_argument("--max_steps", type=int, default=200)
parser.add_argument("--learning_rate", type=float, default=1e-3)
arguments = parser.parse_args()
sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop
set_seed(0)

tokenizer = AutoTokenizer.from_pretrained(arguments.model or TOKENIZER_FOLDER, padding_side="right")
if arguments.model:
    model, loading = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32", output_loading_info=True)
    if any(loading.values()):  # the library would draw or drop these weights, and warn
        parser.error(f"--model must hold the weights of its configuration, but loading it gave {loading}")
else:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(configuration_folder("tiny")))

lines = [
    line + tokenizer.eos_token
    for line in Path(arguments.text).read_text(encoding="utf-8").splitlines()
    if line.strip()
]
if not lines:
    parser.error(f"--text must hold a line of text, but {arguments.text} has none")
data = Dataset.from_dict(tokenizer(lines, truncation=True, max_length=256))

trainer = Trainer(
    model,
    TrainingArguments(
        arguments.output_dir,
        max_steps=arguments.max_steps,
        learning_rate=arguments.learning_rate,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=data,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    processing_class=tokenizer,
)
trainer.train()
trainer.save_model()

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss: first {losses[0]:.3f}, last {losses[-1]:.3f}")
prompt = tokenizer(lines[0][:8], return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=10)[0]))
