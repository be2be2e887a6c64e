"""The settings of `train.py`: flags of `run_clm` where it has them, defaults of the paper where it gives them."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser, SchedulerType, TrainingArguments

from workshop.files import ROOT
from workshop.settings import LARGEST_SEED, check_counts, check_numbers, check_types, read_settings, types_of

MIN_LR_RATE = 0.1
# float16 is none of them: gradients below 6e-8 would be 0, and its loss scaling wants float32 weights.
WEIGHT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Settings of a name that may also be true: the newest checkpoint of output_dir, sharding with what fsdp_config says.
SWITCHES = ("resume_from_checkpoint", "fsdp")


def read_schedule(text: str) -> list[int]:
    """The chunk sizes of "8,4,2,1". Raises ValueError for anything but integers >= 1 with commas between them."""
    sizes = text.split(",")
    if not all(size.strip().isdecimal() and int(size) >= 1 for size in sizes):
        raise ValueError(f"`schedules` must each be chunk sizes, such as 8,4,2,1, but got {text!r}.")
    return [int(size) for size in sizes]


@dataclass
class ModelArguments:
    """Which model: a checkpoint to go on from, or a configuration to start from scratch."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint whose weights to start from. Without it: random weights."}
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of the configuration. Default: configuration/tiny."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Default: the checkpoint's own tokenizer, else tokenization/."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": 'Changes to the configuration, such as "chunk_sizes=[4,2,1],topology=anchor".'},
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Of weights and optimiser. With float32, `bf16` computes in bfloat16 all the same.",
            "choices": [*WEIGHT_DTYPES],
        },
    )

    def __post_init__(self):
        if self.model_name_or_path is not None and self.config_name is not None:
            raise ValueError(
                f"`config_name` must be left out where `model_name_or_path` is given, but got {self.config_name!r}: "
                "the checkpoint holds its own configuration; change it with `config_overrides`."
            )
        if self.model_name_or_path is None:
            self.config_name = self.config_name or str(ROOT / "configuration" / "tiny")
        if self.dtype not in WEIGHT_DTYPES:
            raise ValueError(f"`dtype` must be one of {[*WEIGHT_DTYPES]}, but got {self.dtype!r}.")
        self.tokenizer_name = self.tokenizer_name or self.model_name_or_path or str(ROOT / "tokenization")


@dataclass
class DataArguments:
    """Which text: a data set, files, or (none named) the source of the Python standard library."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set of the `datasets` library, with a `text` column."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that data set."})
    train_file: str | None = field(
        default=None,
        metadata={"help": "A .txt file (one document), or .json, .jsonl, .csv (one document a row, column `text`)."},
    )
    validation_file: str | None = field(default=None, metadata={"help": "Like train_file."})
    block_size: int | None = field(
        default=None, metadata={"help": "Tokens per example. Default: max_position_embeddings, at most 1024."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many blocks for training."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many blocks for evaluation."})
    validation_split_percentage: float = field(
        default=5, metadata={"help": "Share of the training text held out where no validation text is named."}
    )

    def __post_init__(self):
        if self.dataset_name is not None and (self.train_file or self.validation_file):
            raise ValueError(
                f"`dataset_name` must be left out where a file is given, but got {self.dataset_name!r} with "
                f"train_file={self.train_file!r} and validation_file={self.validation_file!r}."
            )
        if self.dataset_config_name is not None and self.dataset_name is None:
            raise ValueError(
                f"`dataset_config_name` must go with `dataset_name`, but got only {self.dataset_config_name!r}."
            )
        check_numbers(self)
        if not 0 < self.validation_split_percentage < 100:
            raise ValueError(
                "`validation_split_percentage` must be between 0 and 100, both excluded, but got "
                f"{self.validation_split_percentage}."
            )
        check_counts(self, "max_train_samples", "max_eval_samples")


@dataclass
class SpiralTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the optimiser of the paper: AdamW, cosine to a tenth of the peak, 1% warm-up."""

    output_dir: str | None = field(default="runs/train", metadata={"help": "Where checkpoints and figures go."})
    do_train: bool = field(default=True, metadata={"help": "Whether to train."})
    do_eval: bool = field(default=True, metadata={"help": "Whether to evaluate at the end."})
    learning_rate: float = field(default=6e-4, metadata={"help": "Peak: 6e-4 at 160M to 2e-4 at 1.4B parameters."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Second beta of AdamW."})
    weight_decay: float = field(default=0.01, metadata={"help": "Not applied to biases and LayerNorms."})
    lr_scheduler_type: SchedulerType | str = field(
        default="cosine_with_min_lr", metadata={"help": "Schedule of the learning rate."}
    )
    warmup_steps: float = field(default=0.01, metadata={"help": "Steps of warm-up, or below 1 a share of all steps."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the training text."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    schedules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Parts of the model's schedule to draw from for each batch, such as 8,4,2,1 8,4 1. One that is "
            "named twice is drawn twice as often. Default: the whole schedule always."
        },
    )
    router_learning_rate_ratio: float | None = field(
        default=None,
        metadata={
            "help": "The routers of MeSH train at so many times the learning rate, and without weight decay. Default: "
            "like all other parameters."
        },
    )
    # The library would leave non-finite losses out of its averages: a diverged run must show.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide losses that are not finite."})

    def __post_init__(self):
        # From YAML by way of an experiment: 6e-4, without a point, is text there.
        for name in ("learning_rate", "weight_decay", "adam_epsilon", "warmup_steps"):
            setattr(self, name, float(getattr(self, name)))
        check_numbers(
            self,
            **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "warmup_steps"), (0, math.inf)),
            **dict.fromkeys(("max_grad_norm", "num_train_epochs", "router_learning_rate_ratio"), (0, math.inf)),
            **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), (0, 1)),
            **dict.fromkeys(("seed", "data_seed"), (0, LARGEST_SEED)),
        )
        if self.max_steps != -1:  # which leaves the steps to num_train_epochs
            check_counts(self, "max_steps")
        check_counts(self, "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        for schedule in self.schedules or []:
            read_schedule(schedule)
        if self.auto_find_batch_size:
            raise ValueError(
                "`auto_find_batch_size` must be off, but got True: the rows of a step decide the numbers of a run. "
                "Set a smaller `per_device_train_batch_size`."
            )
        for name in ("bf16_full_eval", "fp16_full_eval"):
            if self.push_to_hub and getattr(self, name):
                raise ValueError(
                    f"`{name}` must be off with `push_to_hub`, but got True: an evaluation would round the weights "
                    "that are pushed."
                )
        if self.lr_scheduler_type == "cosine_with_min_lr" and self.lr_scheduler_kwargs is None:
            self.lr_scheduler_kwargs = {"min_lr_rate": MIN_LR_RATE}
        # Perplexity and bits per byte are computed from the losses.
        if "loss" not in self.include_for_metrics:
            self.include_for_metrics = [*self.include_for_metrics, "loss"]
        super().__post_init__()


def rows_per_step(training: TrainingArguments) -> int:
    """Rows of an optimiser step, over all processes and parts of it."""
    return training.train_batch_size * training.gradient_accumulation_steps * training.world_size


def planned_steps(training: TrainingArguments, rows: int) -> int:
    """Optimiser steps of a run over so many rows: `max_steps`, or those of `num_train_epochs`."""
    if training.max_steps > 0:
        return training.max_steps
    per_batch = training.train_batch_size * training.world_size
    batches = rows // per_batch if training.dataloader_drop_last else math.ceil(rows / per_batch)
    return math.ceil(training.num_train_epochs * max(1, math.ceil(batches / training.gradient_accumulation_steps)))


def check_steps(training: TrainingArguments, rows: int) -> None:
    """Raises ValueError where a run over so many rows would train no step, and Trainer would not say so."""
    if training.max_steps <= 0 and training.num_train_epochs == 0:
        raise ValueError(f"`num_train_epochs` must be above 0, but got {training.num_train_epochs}.")
    per_batch = training.train_batch_size * training.world_size
    if training.dataloader_drop_last and rows < per_batch:
        raise ValueError(
            f"`dataloader_drop_last` must be off where the training rows fill no batch, but got True with {rows} rows "
            f"for a batch of {per_batch}."
        )


def parse_arguments(
    argv: list[str], classes: tuple[type, ...] = (ModelArguments, DataArguments, SpiralTrainingArguments)
) -> tuple:
    """
    Reads the command line, or the one .yaml, .yml or .json file that it names: one object of each class.

    Raises ValueError for an unknown key of such a file, and for a value of a type that its setting does not have.
    """
    parser = HfArgumentParser(classes)
    if len(argv) != 1 or Path(argv[0]).suffix not in (".yaml", ".yml", ".json"):
        return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    kinds = types_of(*classes) | {
        name: kind | bool for name, kind in types_of(SpiralTrainingArguments).items() if name in SWITCHES
    }
    return parser.parse_dict(check_types(read_settings("settings", argv[0]), kinds, argv[0]))
