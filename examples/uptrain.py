"""Uptrains a checkpoint that was converted to a SpiralFormer, with the library's Trainer; `--source` beside it.

    python scripts/convert.py --model_name_or_path EleutherAI/pythia-160m --output_dir runs/converted
    python examples/uptrain.py runs/converted runs/uptrained --text text.txt --adapter_steps 200 --max_steps 1000

The first `--adapter_steps` train what the source did not have (scorers, allocators, routers) and LoRA on the core, so
that new parts find their place before old ones move. Then everything trains. `--source` names the checkpoint that was
converted: it is trained on the same text for as many steps, LoRA on all of its layers first. The held-out loss of both
goes to `curve.json` as they train. A run that was cut off goes on with the same command; another one needs a folder of
its own.
"""

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import modeling_spiralformer  # noqa: F401  registers the Auto classes


def at_least(lowest: int) -> Callable[[str], int]:
    """The type of an option that is a number of that size or larger."""

    def number(text: str) -> int:
        if int(text) < lowest:
            raise argparse.ArgumentTypeError(f"it must be {lowest} or more, but got {text}")
        return int(text)

    return number


parser = argparse.ArgumentParser()
parser.add_argument("converted", help="checkpoint of scripts/convert.py, with its tokenizer")
parser.add_argument("output_dir")
parser.add_argument("--text", required=True, help="a text file to train on")
parser.add_argument("--held_out", help="a text file to evaluate on; default: the last twentieth of --text")
parser.add_argument("--source", help="the checkpoint that was converted, to be trained in the same way")
parser.add_argument("--block_size", type=at_least(2), default=512)
parser.add_argument("--held_out_blocks", type=at_least(1), default=64, help="at most so many blocks are evaluated")
parser.add_argument("--batch_size", type=at_least(1), default=8)
parser.add_argument("--adapter_steps", type=at_least(0), default=0, help="steps of new parts and LoRA alone")
parser.add_argument("--adapter_learning_rate", type=float, default=5e-4)
parser.add_argument("--learning_rate", type=float, default=1e-4)
parser.add_argument("--max_steps", type=at_least(1), default=1000, help="steps of everything")
parser.add_argument("--eval_steps", type=at_least(1), default=200)
parser.add_argument("--bf16", action="store_true", help="mixed precision: for an accelerator")
arguments = parser.parse_args()


def load(name: str) -> PreTrainedModel:
    """The model in float32, refused where the library would draw or drop weights, and only warn."""
    model, loading = AutoModelForCausalLM.from_pretrained(name, dtype="float32", output_loading_info=True)
    if any(loading.values()):
        parser.error(f"{name} must hold the weights of its configuration, but loading it gave {loading}")
    return model


def digest(*parts: bytes) -> str:
    """What tells other content from the same, wherever it lies."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return f"sha256 {found.hexdigest()}"


def check_run(name: str, model: PreTrainedModel, path: Path) -> None:
    """Keeps what decides a run, and refuses another: it would be given the models and losses of the first."""
    config = {field: value for field, value in model.config.to_diff_dict().items() if field != "transformers_version"}
    weights = (tensor.numpy().tobytes() for tensor in model.state_dict().values())
    now = {"model": digest(json.dumps(config, default=str).encode(), *weights), **texts}
    for option, value in vars(arguments).items():
        if option not in ("converted", "source", "output_dir", "text", "held_out", "eval_steps"):
            now[f"--{option}"] = value
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(now), encoding="utf-8")
    before = json.loads(path.read_text(encoding="utf-8"))
    for field, value in now.items():
        if value != before.get(field):
            what = f"the model of {name}" if field == "model" else field
            parser.error(f"{what} must be {before.get(field)}, that of the run in {path.parent}, but got {value}")


def read_blocks(name: str) -> list[list[int]]:
    """The tokens of a text in blocks of equal length."""
    text = Path(name).read_text(encoding="utf-8")
    ids, size = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], arguments.block_size
    return [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]


class Curve(TrainerCallback):
    """Writes the held-out losses to `curve.json`: [stage, step, loss], `before` once and then as the model trains."""

    def __init__(self, path: Path, stage: str):
        self.path, self.stage = path, stage

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        points = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else []
        point = [self.stage, state.global_step, round(metrics["eval_loss"], 4)]
        if point[:2] not in [old[:2] for old in points]:
            self.path.write_text(json.dumps([*points, point]), encoding="utf-8")
            print(f"{self.path}: {self.stage}, step {point[1]}: held-out loss {point[2]:.3f}", flush=True)


def adapt(model: PreTrainedModel) -> nn.Module:
    """LoRA on the core, with the new parts whole; LoRA on every layer of a model without a core."""
    new_parts = [name for name, _ in model.named_modules() if name.endswith((".scorer", ".allocator", ".topology"))]
    layers = (".core.",) if new_parts else (".layers.", ".prelude.", ".coda.")
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(part in name for part in layers)
    ]
    lora = {"r": 16, "lora_alpha": 32, "target_modules": linear, "modules_to_save": new_parts or None}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest that is whole: the Trainer writes its state last."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def train(model: nn.Module, folder: Path, stage: str, steps: int, learning_rate: float) -> None:
    """One stage, from its last checkpoint where there is one."""
    settings = TrainingArguments(
        output_dir=str(folder / stage),
        max_steps=steps,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.batch_size,
        learning_rate=learning_rate,
        warmup_steps=min(20, steps // 10),
        lr_scheduler_type="cosine",
        eval_strategy="steps",
        eval_steps=arguments.eval_steps,
        eval_on_start=True,
        save_steps=arguments.eval_steps,
        save_total_limit=2,
        logging_steps=10,
        bf16=arguments.bf16,
        use_cpu=not torch.accelerator.is_available(),
        report_to="none",
    )
    curve = Curve(folder / "curve.json", stage)
    trainer = Trainer(model, settings, default_data_collator, data["train"], data["held out"], callbacks=[curve])
    last = last_checkpoint(folder / stage)
    if last is not None and last.name == f"checkpoint-{steps}":  # from where the Trainer would train one step more
        trainer._load_from_checkpoint(str(last))
        trainer.state.global_step = steps
    else:
        trainer.train(resume_from_checkpoint=last and str(last))
    trainer.evaluate()


def save(folder: Path, *parts: PreTrainedModel | PreTrainedTokenizerBase) -> None:
    """Under another name until all of it is there: a folder that was cut off is none."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    for part in parts:
        part.save_pretrained(unfinished)
    unfinished.rename(folder)


def uptrain(name: str, folder: Path) -> None:
    """Both stages; each leaves its model in the folder."""
    adapted, done = folder / "adapted", folder / "trained"
    if arguments.adapter_steps and not adapted.is_dir():
        model = adapt(load(name))
        train(model, folder, "new parts and LoRA", arguments.adapter_steps, arguments.adapter_learning_rate)
        save(adapted, model.merge_and_unload())
    if not done.is_dir():
        model = load(str(adapted) if arguments.adapter_steps else name)
        train(model, folder, "everything", arguments.max_steps, arguments.learning_rate)
        save(done, model, tokenizer)


set_seed(42)
tokenizer = AutoTokenizer.from_pretrained(arguments.converted)
blocks = read_blocks(arguments.text)
held_out = read_blocks(arguments.held_out) if arguments.held_out else blocks[-max(1, len(blocks) // 20) :]
needed = {"text": (blocks, 1), "held_out": (held_out, 1)} if arguments.held_out else {"text": (blocks, 2)}
for option, (found, count) in needed.items():
    if len(found) < count:
        parser.error(
            f"--{option} must hold {count} or more blocks of {arguments.block_size} tokens, but "
            f"{getattr(arguments, option)} has {len(found)}"
        )
texts = {"--text": digest(json.dumps(blocks).encode()), "--held_out": None}
if arguments.held_out:
    texts["--held_out"] = digest(json.dumps(held_out).encode())
else:
    blocks = blocks[: -len(held_out)]
data = {"train": blocks, "held out": held_out[: arguments.held_out_blocks]}
data = {name: Dataset.from_dict({"input_ids": part, "labels": part}) for name, part in data.items()}

folders = {"converted": Path(arguments.output_dir)}
if arguments.source is not None:
    folders["source"] = folders["converted"] / "source"
for name, folder in folders.items():
    check_run(name, load(getattr(arguments, name)), folder / "run.json")
for name, folder in folders.items():
    uptrain(getattr(arguments, name), folder)
for name, folder in folders.items():
    losses = [loss for _, _, loss in json.loads((folder / "curve.json").read_text(encoding="utf-8"))]
    print(f"held-out loss: {name} {losses[0]:.3f}, after training {losses[-1]:.3f}")
