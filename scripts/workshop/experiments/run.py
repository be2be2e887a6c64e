"""One run of an experiment: trained by the Trainer of `train.py`, from where a killed run stopped, and evaluated."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging as library_logging

from workshop import training
from workshop.data import make_blocks
from workshop.experiments import molecules, tasks
from workshop.experiments.plan import Run
from workshop.files import finite
from workshop.molecules import training as molecule_training
from workshop.resuming import last_whole_checkpoint
from workshop.tasks import training as task_training
from workshop.tasks.rows import draw_rows, make_task
from workshop.training_arguments import DataArguments, ModelArguments, SpiralTrainingArguments

# How often a run logs its training loss, measures its validation loss (on so many blocks), and saves itself.
LOGGED_POINTS = 64
EVALUATED_POINTS = 8
CURVE_BLOCKS = 64
CURVE_ROWS = 512
CHECKPOINTS = 4


def has_rows(settings: dict) -> bool:
    """Whether a run reads rows of unequal length, molecules or those of a task, and not blocks of text."""
    return "smiles" in settings or "task" in settings


class Progress(TrainerCallback):
    """Reports the FLOPs of every optimiser step, those before a resumed run included."""

    def __init__(self, flops_per_step: float, report: Callable[[float], None]):
        self.flops_per_step, self.report = flops_per_step, report
        self.resumed_from_step = 0

    def on_train_begin(self, args, state: TrainerState, control: TrainerControl, **kwargs):
        self.resumed_from_step = state.global_step
        self.report(self.flops_per_step * state.global_step)

    def on_step_end(self, args, state: TrainerState, control: TrainerControl, **kwargs):
        self.report(self.flops_per_step)


def training_arguments(run: Run, folder: Path) -> SpiralTrainingArguments:
    """The settings of the Trainer; equal seeds give equal batches in equal order, whatever the model."""
    settings = run.settings
    steps = settings["steps"]
    logging_steps = max(1, steps // LOGGED_POINTS)
    parts = settings["training"].get("gradient_accumulation_steps", 1)
    arguments = SpiralTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings["batch_size"] // parts,
        per_device_eval_batch_size=settings["batch_size"] // parts,
        dataloader_drop_last=True,  # every step has as many tokens
        learning_rate=settings["learning_rate"],
        seed=settings["seed"],
        data_seed=settings["seed"],
        logging_steps=logging_steps,
        eval_strategy="steps",
        eval_steps=max(1, steps // EVALUATED_POINTS),
        save_strategy="steps",
        # Where a loss is logged: its mean since the last point would otherwise start anew in a resumed run.
        save_steps=logging_steps * max(1, steps // logging_steps // CHECKPOINTS),
        save_total_limit=1,
        resume_from_checkpoint=last_whole_checkpoint(folder),
        dataloader_pin_memory=torch.accelerator.is_available(),
        report_to="none",
        disable_tqdm=True,
        # Blocks are equally long, rows are not.
        include_num_input_tokens_seen="non_padding" if has_rows(settings) else "no",
        **settings["training"],
    )
    batch_size = arguments.train_batch_size * parts * arguments.world_size
    if batch_size != settings["batch_size"]:
        raise ValueError(
            f"`batch_size` must be {settings['batch_size']}, as planned, but on {arguments.n_gpu} devices and "
            f"{arguments.world_size} processes it would be {batch_size}: let the runner see one device."
        )
    return arguments


def keep_whole_steps(trainer: Trainer, batch_size: int) -> None:
    """
    Has an epoch hold whole steps of `batch_size` rows. A loader drops the rest where a step is one of its batches.
    Where a step is several, Trainer would end an epoch with a step of fewer: there the last rows are left out.

    Raises:
        `ValueError`: where the training rows fill no step.
    """
    rows = len(trainer.train_dataset)
    if rows < batch_size:
        raise ValueError(f"`batch_size` must be at most the training rows, {rows}, but got {batch_size}.")
    if trainer.args.gradient_accumulation_steps > 1:
        trainer.train_dataset = trainer.train_dataset.select(range(rows - rows % batch_size))


def train_to_end(trainer: Trainer, progress: Progress) -> None:
    """Trains, or goes on. Past its last step a run has nothing to go on with: Trainer would take one step more."""
    checkpoint = trainer.args.resume_from_checkpoint
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        if state.global_step == trainer.args.max_steps:
            trainer.state = state
            progress.on_train_begin(trainer.args, state, trainer.control)
            return
    trainer.train(resume_from_checkpoint=checkpoint)


def bits_per_byte(trainer: Trainer, run: Run, path: str) -> float | None:
    """Of the first blocks of a file, each read with nothing before it; None where the loss is not finite."""
    data = DataArguments(validation_file=path, max_eval_samples=run.settings["evaluation_blocks"])
    blocks = make_blocks(data, trainer.processing_class, run.settings["block_size"], ["validation"])
    return finite(trainer.evaluate(blocks["validation"])["eval_bits_per_byte"])


def tokens_seen(entry: dict, tokens_per_step: int) -> int:
    """Of an entry of a Trainer's log: counted where it counts them, else as many in every step."""
    return entry.get("num_input_tokens_seen", entry["step"] * tokens_per_step)


def curve(history: list[dict], key: str, tokens_per_step: int) -> list[list]:
    """[tokens seen, value] of every entry of a Trainer's log that holds the key."""
    return [[tokens_seen(entry, tokens_per_step), finite(entry[key])] for entry in history if key in entry]


def prepare(run: Run, data_dir: Path, folder: Path, tokenizer: Path) -> tuple[Trainer, Callable[[], dict]]:
    """The Trainer of a run, and what is to be called at its end: the losses and figures of its line."""
    settings, arguments = run.settings, training_arguments(run, folder)
    configuration = folder / "start"
    configuration.mkdir(exist_ok=True)
    (configuration / "config.json").write_text(json.dumps(settings["config"]), encoding="utf-8")
    model = ModelArguments(config_name=str(configuration), tokenizer_name=str(tokenizer))
    if "task" in settings:
        task = make_task(settings["task"])
        rows = draw_rows(task, settings["evaluation_blocks"])
        trainer = task_training.make_trainer(model, arguments, task, rows, CURVE_ROWS)
        return trainer, lambda: tasks.outcome(trainer, task, rows)
    files = {name: str(data_dir / file) for name, file in settings["text"].items()}
    smiles = "smiles" in settings
    data = DataArguments(
        train_file=files["train"],
        validation_file=files["validation"],
        block_size=settings["block_size"],
        max_eval_samples=CURVE_ROWS if smiles else CURVE_BLOCKS,
    )
    if smiles:
        trainer = molecule_training.make_trainer(model, data, arguments)
        return trainer, lambda: molecules.outcome(trainer, settings, files["validation"])
    trainer = training.make_trainer(model, data, arguments)
    texts = ("validation", "foreign")
    return trainer, lambda: {"bits_per_byte": {name: bits_per_byte(trainer, run, files[name]) for name in texts}}


def train_run(run: Run, data_dir: Path, runs_folder: Path, tokenizer: Path, report: Callable[[float], None]) -> dict:
    """
    Trains and evaluates one run in `runs_folder/<key>`, where the model stays, and returns its results.

    Args:
        data_dir: where the files of the run's text are.
        runs_folder: where runs on this text are.
        tokenizer: folder of the tokenizer.
        report: is told the FLOPs of each step.
    """
    started, settings = time.time(), run.settings
    datasets.disable_progress_bars()
    library_logging.disable_progress_bar()
    folder = runs_folder / run.key
    folder.mkdir(parents=True, exist_ok=True)
    trainer, evaluate = prepare(run, data_dir, folder, tokenizer)
    keep_whole_steps(trainer, settings["batch_size"])
    progress = Progress(run.flops / settings["steps"], report)
    trainer.add_callback(progress)
    trainer.remove_callback(PrinterCallback)
    train_to_end(trainer, progress)
    trainer.save_model()
    tokens_per_step = settings["batch_size"] * settings["block_size"]
    history = list(trainer.state.log_history)  # the evaluations below are logged too
    found = evaluate()
    rows = has_rows(settings)
    return {
        "tokens": trainer.state.num_input_tokens_seen if rows else settings["steps"] * tokens_per_step,
        "steps": settings["steps"],
        "flops": run.flops,
        **found,
        "training_curve": curve(history, "loss", tokens_per_step),
        "validation_curve": curve(history, f"eval_{'nats_per_token' if rows else 'bits_per_byte'}", tokens_per_step),
        "wall_seconds": round(time.time() - started, 1),
        "resumed_from_step": progress.resumed_from_step,
    }
