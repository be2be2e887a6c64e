"""Going on from a checkpoint of `Trainer`: with the same numbers as a run that was never stopped, or not at all.

`Trainer` itself goes on without an optimizer, without random state and with any settings, and at most logs it.
"""

import hashlib
import json
import logging
import zipfile
from pathlib import Path

import numpy as np
import torch
from accelerate.utils.constants import FSDP_MODEL_NAME
from datasets import Dataset
from transformers import PreTrainedConfig, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import safe_globals

from modeling_spiralformer.files_spiralformer import check_digests, read_object
from workshop.checkpoints import CHECKPOINT_FILES, load_config
from workshop.training_arguments import SpiralTrainingArguments, rows_per_step

logger = logging.getLogger(__name__)

# What decides the numbers of a run beside model, text and rows of a step. How they are computed (devices, compilation,
# gradient checkpointing), and what is logged, evaluated and saved meanwhile, may change.
TRAJECTORY = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm", "optim"),
    *("optim_args", "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("label_smoothing_factor", "neftune_noise_alpha", "average_tokens_across_devices", "seed", "data_seed"),
    *("bf16", "fp16", "tf32", "use_liger_kernel", "accelerator_config"),
    *("train_sampling_strategy", "length_column_name", "dataloader_drop_last", "schedules"),
    *("router_learning_rate_ratio", "load_best_model_at_end"),
)
# And where the losses of evaluations choose the weights or, with these schedules, the learning rate.
LED_BY_LOSSES = ("reduce_lr_on_plateau", "greedy")
EVALUATIONS = (
    *("eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size", "save_strategy", "save_steps"),
    *("metric_for_best_model", "greater_is_better"),
)
# What a configuration says of its file and class, and what Trainer sets itself. None of it changes a training step.
NOT_COMPARED = {"_name_or_path", "architectures", "auto_map", "dtype", "transformers_version", "use_cache"}
NOT_COMPARED |= {"bos_token_id", "eos_token_id", "pad_token_id"}
SPLIT = ("rows_at_once", "processes")


def refuse(checkpoint: str | Path, allowed: str, found: str) -> None:
    """Raises the ValueError of every checkpoint that a run cannot go on from."""
    raise ValueError(f"`resume_from_checkpoint` must be {allowed}, but {str(checkpoint)!r} {found}.")


# -- which checkpoint -------------------------------------------------------------------------------------------


def read_state(checkpoint: Path) -> dict:
    """What trainer_state.json holds. Raises ValueError, naming it, where it is missing or no such JSON."""
    path = checkpoint / TRAINER_STATE_NAME
    if not path.is_file():
        refuse(checkpoint, "a whole checkpoint", f"lacks {TRAINER_STATE_NAME}")
    try:
        state = read_object(path)
        if not type(state["global_step"]) is type(state.get("max_steps", 0)) is int:
            raise ValueError("`global_step` and `max_steps` must be integers")
        return state
    except (ValueError, KeyError) as error:
        refuse(checkpoint, "a whole checkpoint", f"has a damaged {TRAINER_STATE_NAME}: {error!r}")


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint whose state can be read: Trainer writes it last, so a kill half way leaves none."""
    whole = []
    for path in folder.glob("checkpoint-*"):
        try:
            whole.append((read_state(path)["global_step"], str(path)))
        except ValueError as error:
            logger.warning("left out, cut off while it was written: %s", error)
    return max(whole)[1] if whole else None


def choose_checkpoint(training: SpiralTrainingArguments) -> str | None:
    """
    The folder to go on from: the one named, or the newest of `output_dir` where the setting is true.

    Raises FileNotFoundError where there is none.
    """
    named = training.resume_from_checkpoint
    if named is None or str(named).lower() == "false":
        return None
    if str(named).lower() == "true":
        newest = last_whole_checkpoint(Path(training.output_dir))
        if newest is None:
            raise FileNotFoundError(
                f"`resume_from_checkpoint` is {named}, so `output_dir` must hold a whole checkpoint, but "
                f"{training.output_dir!r} has none."
            )
        return newest
    if not Path(named).is_dir():
        raise FileNotFoundError(f"`resume_from_checkpoint` must be an existing folder, but got {named!r}.")
    return str(named)


# -- what is in it ----------------------------------------------------------------------------------------------


def is_sharded(checkpoint: str | Path) -> bool:
    """Whether FSDP has saved the weights in shards, which Trainer alone can load."""
    return (Path(checkpoint) / f"{FSDP_MODEL_NAME}_0").is_dir()


def random_states(processes: int) -> list[str]:
    """The files of random state, one for each process."""
    return ["rng_state.pth"] if processes == 1 else [f"rng_state_{index}.pth" for index in range(processes)]


def is_whole_archive(path: Path) -> bool:
    """Whether a file of `torch.save` holds what was written: torch reads it without a look at its checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # damage ends in many: BadZipFile, zlib.error, NotImplementedError, UnicodeDecodeError, ...
        return False


def check_pickles(checkpoint: Path, names: list[str]) -> None:
    """
    Raises ValueError, naming the file, where one holds anything but tensors and plain values: torch reads no other
    pickle, and runs nothing that stands in one. Its own error names no file. Of tensors only their place is read.
    """
    for name in names:
        try:
            with safe_globals():  # what Trainer allows of NumPy, for the random state
                torch.load(checkpoint / name, map_location="meta", weights_only=True, mmap=True)
        except Exception as error:  # of many kinds: pickle.UnpicklingError, RuntimeError, AttributeError, ...
            refuse(checkpoint, "a whole checkpoint", f"has a {name} that torch refuses to read: {error}")


def check_whole(checkpoint: Path, training: SpiralTrainingArguments) -> None:
    """
    Raises ValueError, naming each file, where the state of optimizer, schedule or random numbers is not there, or a
    file has other content than SHA256SUMS says.
    """
    saved = saved_record(checkpoint)
    scaled = training.fp16 or saved.get("mixed_precision") == "fp16"
    needed = [OPTIMIZER_NAME, SCHEDULER_NAME, *random_states(saved["processes"]), *[SCALER_NAME] * scaled]
    if any(checkpoint.glob("optimizer_*/")) or (checkpoint / "optimizer.bin").is_file():  # of FSDP
        needed.remove(OPTIMIZER_NAME)
    missing = [name for name in needed if not (checkpoint / name).is_file()]
    if missing:
        refuse(checkpoint, "a whole checkpoint", f"lacks {', '.join(missing)}, and would go on with other numbers")
    damaged = [name for name in needed if not is_whole_archive(checkpoint / name)]
    if damaged:
        refuse(checkpoint, "a whole checkpoint", f"has a damaged {', '.join(damaged)}")
    check_digests(checkpoint, CHECKPOINT_FILES)
    check_pickles(checkpoint, needed)


def compared_fields(config: PreTrainedConfig) -> dict:
    """The fields of a configuration that a training step hangs on, as JSON has them."""
    fields = {name: value for name, value in config.to_dict().items() if name not in NOT_COMPARED}
    return json.loads(json.dumps(fields, sort_keys=True))


def differences(now: dict, before: dict) -> list[str]:
    """Each value that both have and that differs, by name."""
    changed = [name for name in now if name in before and now[name] != before[name]]
    return [f"{name} {before[name]!r} in place of {now[name]!r}" for name in changed]


def check_config(checkpoint: Path, config: PreTrainedConfig) -> None:
    """Raises ValueError, naming each field, where the checkpoint is one of another model than the settings name."""
    now, before = compared_fields(config), saved_config(checkpoint)
    if found := differences(now, before):
        allowed = "of the model that `config_name`, `model_name_or_path` and `config_overrides` describe"
        refuse(checkpoint, allowed, f"has {', '.join(found)}")


def saved_config(checkpoint: Path) -> dict:
    """The configuration of a checkpoint's model, from its config.json, which one in shards does not have."""
    if is_sharded(checkpoint) and not (checkpoint / "config.json").is_file():
        return saved_record(checkpoint)["config"]
    return compared_fields(load_config(str(checkpoint), field="resume_from_checkpoint"))


# -- what its run was -------------------------------------------------------------------------------------------


def describe_rows(rows: Dataset) -> str:
    """Number, tokens and digest of the rows: what text, tokenizer and their settings make of each other."""
    digest, tokens = hashlib.sha256(), 0
    for batch in rows.with_format("numpy").iter(batch_size=1000):
        for ids in batch["input_ids"]:
            digest.update(np.concatenate([[len(ids)], ids]).tobytes())
            tokens += len(ids)
    return f"{len(rows)} rows of {tokens} tokens, sha256 {digest.hexdigest()[:16]}"


def make_record(trainer: Trainer) -> dict:
    """Everything that decides the numbers of a run, as JSON has it."""
    training, config = trainer.args, trainer.model.config
    settings = training.to_dict()
    record = {name: settings[name] for name in TRAJECTORY if name in settings}
    record["mixed_precision"] = trainer.accelerator.mixed_precision  # which `accelerate launch` sets by itself too
    if training.load_best_model_at_end or training.lr_scheduler_type in LED_BY_LOSSES:
        record |= {name: settings[name] for name in EVALUATIONS}
        record["validation text"] = None if trainer.eval_dataset is None else describe_rows(trainer.eval_dataset)
    record["data_seed"] = training.seed if training.data_seed is None else training.data_seed
    record["rows_at_once"] = training.train_batch_size
    record["processes"] = training.world_size
    record["rows_per_step"] = rows_per_step(training)
    record["training text"] = describe_rows(trainer.train_dataset)
    record["dtype"] = str(config.dtype).removeprefix("torch.")
    record["config"] = compared_fields(config)
    return json.loads(json.dumps(record, default=str))


def saved_record(checkpoint: Path) -> dict:
    """The record of the run that wrote a checkpoint. Raises ValueError where there is none."""
    try:
        record = read_state(checkpoint)["stateful_callbacks"][RunRecord.__name__]["args"]["record"]
        if isinstance(record, dict) and isinstance(record["processes"], int):
            return record
    except (KeyError, TypeError):
        pass  # no record, or one that is damaged
    refuse(
        checkpoint,
        "a checkpoint of scripts/train.py",
        f"does not say in {TRAINER_STATE_NAME} what its run was: start a new run from its weights, with "
        "`model_name_or_path`",
    )


def draws_random_numbers(config: PreTrainedConfig, training: SpiralTrainingArguments) -> bool:
    """Whether a training step hangs on random numbers, which each process or each part of a step draws."""
    # A causal language model has no classifier.
    dropouts = [value for name, value in config.to_dict().items() if "dropout" in name and "classifier" not in name]
    return any(dropouts) or training.neftune_noise_alpha is not None or training.schedules is not None


def check_record(checkpoint: Path, record: dict, draws: bool, rows: int, steps: int) -> None:
    """
    Raises ValueError, naming each setting, where a run would go on with other numbers than it began with.

    Args:
        record: of the run that goes on.
        draws: whether a step draws random numbers: its rows must then be split alike over processes and passes.
        rows: how many are trained on. Where they fill no whole number of steps, the last step of an epoch hangs on the
            split too: processes fill it up with rows that were read, each to a batch of its own, and
            `dataloader_drop_last` leaves whole batches of it.
        steps: of the whole run. One that ends before such a step does not hang on it.
    """
    # What a run was that is older than the setting.
    before = {"schedules": None, "router_learning_rate_ratio": None, "dtype": "float32", **saved_record(checkpoint)}
    cut = record["dataloader_drop_last"] or max(record["processes"], before["processes"]) > 1
    whole_steps, left = divmod(rows, record["rows_per_step"])
    same_split = draws or (cut and left > 0 and steps > whole_steps)
    ignored = {"config", *(() if same_split else SPLIT)}
    now = {name: value for name, value in record.items() if name not in ignored}
    if found := differences(now, before):
        refuse(checkpoint, "of a run with the same settings", f"has {', '.join(found)}")


class NothingLeftError(Exception):
    """A run goes on from its last step: Trainer, which would take one step more, is not to train."""


class RunRecord(TrainerCallback, ExportableState):
    """
    Keeps the record of a run in the trainer_state.json of its checkpoints, and refuses a resumed run that is to do
    less than it was planned to. NothingLeftError ends one whose last step is done.

    Args:
        record: what `make_record` gives.
    """

    def __init__(self, record: dict):
        self.record = record
        self.planned_steps: int | None = None  # of the run that is resumed

    def state(self) -> dict:
        return {"args": {"record": self.record}, "attributes": {}}

    def on_train_begin(self, args, state: TrainerState, control: TrainerControl, **kwargs):
        if self.planned_steps is None:
            return
        if state.max_steps == state.global_step == self.planned_steps:
            raise NothingLeftError
        if state.max_steps <= state.global_step:
            reached = f"{state.global_step}, the step of the checkpoint"
            raise ValueError(f"`max_steps` must be above {reached}, but got {state.max_steps}.")
        if state.max_steps < self.planned_steps:
            raise ValueError(
                f"`max_steps` must be at least {self.planned_steps}, as planned when the run began, but got "
                f"{state.max_steps}: the schedule of the learning rate would be another."
            )
        if state.max_steps > self.planned_steps:
            logger.warning(
                "the run goes on to step %d in place of %d: its learning rate now follows the longer schedule",
                state.max_steps,
                self.planned_steps,
            )
        state.compute_steps(args, state.max_steps)  # Trainer would log, evaluate and save as often as before


def resume_checks(checkpoint: str, config: PreTrainedConfig, training: SpiralTrainingArguments) -> None:
    """Everything that can be told before model and text are loaded. Without training only the weights are taken."""
    if training.do_train:
        check_whole(Path(checkpoint), training)
    elif is_sharded(checkpoint):
        refuse(checkpoint, "a checkpoint in one piece where `do_train` is off", "is in shards")
    check_config(Path(checkpoint), config)
