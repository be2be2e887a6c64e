"""What `scripts/train.py` takes beside the bare step: text, batches, logs and callbacks, measured in turn with it."""

import copy
import statistics
import time

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from workshop.benchmarks.workloads import synchronize
from workshop.tables import markdown_table

WARM_UP = 10  # steps that are not counted


class BareStep:
    """Forward, backward, clipping and AdamW on a copy of the model, on one batch that is there already."""

    def __init__(self, trainer: Trainer):
        self.model = copy.deepcopy(trainer.accelerator.unwrap_model(trainer.model)).train()
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(trainer.args, self.model)
        self.optimizer = kind(self.model.parameters(), **settings)
        self.largest_norm = trainer.args.max_grad_norm
        self.precision = trainer.accelerator.autocast
        rows = [trainer.train_dataset[row] for row in range(trainer.args.train_batch_size)]
        self.batch = {
            name: value.to(trainer.args.device) if isinstance(value, torch.Tensor) else value
            for name, value in trainer.data_collator(rows).items()
        }

    def __call__(self) -> None:
        with self.precision():
            loss = self.model(**self.batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.largest_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


class BesideBareSteps(TrainerCallback):
    """
    After each step of a Trainer takes a bare one, and keeps the seconds of both. A step of the Trainer lasts from the
    end of what was before it to its own end: its batch, its logs and the callbacks before this one are in it.
    """

    def __init__(self, trainer: Trainer):
        self.bare, self.device = BareStep(trainer), trainer.args.device
        self.seconds: list[tuple[float, float]] = []  # of a step of the Trainer, of a bare one
        self.mark = 0.0

    def now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    def on_train_begin(self, args, state: TrainerState, control: TrainerControl, **kwargs):
        self.mark = self.now()

    def on_step_end(self, args, state: TrainerState, control: TrainerControl, **kwargs):
        ended = self.now()
        self.bare()
        after = self.now()
        self.seconds.append((ended - self.mark, after - ended))
        self.mark = after


def measure(trainer: Trainer) -> dict:
    """
    Trains, and compares its steps with bare ones.

    Raises ValueError where no step is left after the warm-up, and where a step has several parts or processes.
    """
    arguments = trainer.args
    if arguments.gradient_accumulation_steps != 1 or arguments.world_size != 1:
        raise ValueError(
            "`gradient_accumulation_steps` must be 1, in one process, but got "
            f"{arguments.gradient_accumulation_steps} in {arguments.world_size}: a bare step has one part."
        )
    beside = BesideBareSteps(trainer)
    trainer.add_callback(beside)
    trainer.train()
    counted = beside.seconds[WARM_UP:]
    if len(counted) < 2:
        raise ValueError(f"`max_steps` must be at least {WARM_UP + 2}, but {len(beside.seconds)} were taken.")
    shares = [bare / own for own, bare in counted]
    tokens = beside.bare.batch["input_ids"].numel()
    own, bare = (statistics.median(seconds) for seconds in zip(*counted, strict=True))
    return {
        "steps": len(counted),
        "tokens of a step": tokens,
        "tokens/s of train.py": tokens / own,
        "tokens/s of bare steps": tokens / bare,
        "share": statistics.median(shares),
        "quartiles": statistics.quantiles(shares, n=4)[::2],
    }


def format_measure(found: dict) -> str:
    """A Markdown table of one row."""
    low, high = found["quartiles"]
    names = ("steps", "tokens of a step", "tokens/s of train.py", "tokens/s of bare steps")
    cells = [f"{found[name]:.0f}" for name in names]
    return markdown_table(
        [*names, "share (quartiles)"], [[*cells, f"{found['share']:.3f} ({low:.3f}-{high:.3f})"]], text_columns=0
    )
