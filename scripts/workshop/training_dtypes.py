"""Training in bfloat16 beside float32: one model from the same starts, on the same molecules in the same order."""

import statistics
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path

import torch
from transformers import Trainer

from workshop.experiments.store import append_line, drop_torn_line, read_lines
from workshop.files import ROOT, check_folder
from workshop.molecules.training import MoleculeDataArguments, MoleculeModelArguments, make_trainer
from workshop.settings import LARGEST_SEED, check_counts
from workshop.tables import markdown_table
from workshop.training_arguments import SpiralTrainingArguments

# Kind -> dtype of the weights and of the optimiser's state, and whether layers compute in bfloat16 all the same.
KINDS = {"float32": ("float32", False), "mixed": ("float32", True), "bfloat16": ("bfloat16", False)}
LINES = "losses.jsonl"


@dataclass
class TrainingDtypesArguments:
    """What is trained, how long, and how often."""

    train_file: str = field(metadata={"help": "Molecules to train on, one SMILES a line."})
    validation_file: str = field(metadata={"help": "Molecules to evaluate on, likewise."})
    output_dir: str = field(
        default=str(ROOT / "runs" / "training_dtypes"), metadata={"help": "Where a line of each finished run goes."}
    )
    config_name: str = field(default=str(ROOT / "configuration" / "smollm-53k"), metadata={"help": "The model."})
    config_overrides: str = field(
        default="num_prelude_layers=1,num_coda_layers=1,chunk_sizes=[4,2,1],topology=mesh",
        metadata={"help": "Changes to it."},
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Each a start and an order of rows."}
    )
    max_steps: int = field(default=2000, metadata={"help": "Optimiser steps of a run."})
    batch_size: int = field(default=16, metadata={"help": "Molecules of a step."})
    learning_rate: float = field(default=5e-3, metadata={"help": "Peak."})
    parts: int = field(default=20, metadata={"help": "Parts of a run whose mean losses are compared."})
    max_eval_samples: int = field(default=2048, metadata={"help": "Molecules of the evaluation at the end."})

    def __post_init__(self):
        check_counts(self, "max_steps", "batch_size", "parts", "max_eval_samples")
        if self.max_steps % self.parts:
            raise ValueError(f"`parts` must divide max_steps = {self.max_steps}, but got {self.parts}.")
        seeds = {seed for seed in self.seeds if 0 <= seed <= LARGEST_SEED}
        if not 2 <= len(seeds) == len(self.seeds):
            raise ValueError(
                f"`seeds` must be two or more different ones in [0, {LARGEST_SEED}], but got {self.seeds}."
            )
        check_folder("output_dir", self.output_dir, [LINES])


def prepare(arguments: TrainingDtypesArguments, kind: str, seed: int) -> Trainer:
    """The Trainer of a run, with nothing run yet."""
    (dtype, is_mixed), has_accelerator = KINDS[kind], torch.accelerator.is_available()
    training = SpiralTrainingArguments(
        output_dir=arguments.output_dir,
        max_steps=arguments.max_steps,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=256,
        learning_rate=arguments.learning_rate,
        warmup_steps=0.05,
        train_sampling_strategy="group_by_length",
        bf16=is_mixed,
        use_cpu=not has_accelerator,
        seed=seed,
        logging_steps=arguments.max_steps // arguments.parts,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=has_accelerator,
    )
    model = MoleculeModelArguments(
        config_name=arguments.config_name,
        config_overrides=arguments.config_overrides,
        tokenizer_name=str(ROOT / "tokenization" / "smiles"),
        dtype=dtype,
    )
    files = MoleculeDataArguments(
        arguments.train_file, arguments.validation_file, max_eval_samples=arguments.max_eval_samples
    )
    return make_trainer(model, files, training)


def train(trainer: Trainer) -> dict:
    """Mean training loss of each part of a run, and the loss on validation molecules at its end, in nats per token."""
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "validation": trainer.evaluate()["eval_nats_per_token"]}


def compare(arguments: TrainingDtypesArguments) -> dict[str, list[dict]]:
    """Kind -> a result of each seed. What another call with these settings has finished is read from its lines."""
    path = Path(arguments.output_dir) / LINES
    drop_torn_line(path)
    lines = read_lines(path)
    settings = {name: value for name, value in asdict(arguments).items() if name not in ("seeds", "output_dir")}
    found: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    for seed, kind in product(arguments.seeds, KINDS):
        named = {"settings": settings, "kind": kind, "seed": seed}
        known = [line["result"] for line in lines if {name: line[name] for name in named} == named]
        if not known:
            known = [train(prepare(arguments, kind, seed))]
            append_line(path, {**named, "result": known[0]})
        found[kind].append(known[0])
    return found


def differences(found: list[float], exact: list[float]) -> tuple[float, float]:
    """The difference to float32 of the same seed that is farthest from 0, and the deviation of float32 over seeds."""
    return max((one - other for one, other in zip(found, exact, strict=True)), key=abs), statistics.stdev(exact)


def format_table(found: dict[str, list[dict]]) -> str:
    """
    Markdown: of each kind the loss on validation molecules, and how far it is from float32, there and in the part of
    the run where that is most standard deviations of float32's seeds.
    """
    rows = []
    for kind, runs in found.items():
        exact = found["float32"]
        validation = [run["validation"] for run in runs]
        cells = [kind, f"{statistics.mean(validation):.4f} ({min(validation):.4f}-{max(validation):.4f})"]
        if kind != "float32":
            by_part = [
                differences([run["losses"][part] for run in runs], [run["losses"][part] for run in exact])
                for part in range(len(exact[0]["losses"]))
            ]
            at_end = differences(validation, [run["validation"] for run in exact])
            worst = max(by_part, key=lambda pair: abs(pair[0]) / pair[1])
            cells += [f"{difference:+.4f}, {deviation:.4f}" for difference, deviation in (at_end, worst)]
        rows.append(cells + ["-"] * (4 - len(cells)))
    head = ["weights", "validation, nats a token", "largest difference to float32, its deviation", "in the worst part"]
    return markdown_table(head, rows)
