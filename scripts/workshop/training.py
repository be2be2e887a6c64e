"""Training of a causal language model with the library's own Trainer, and its perplexity and bits per byte."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import parse_flag_from_env
from transformers import (
    AutoModelForCausalLM,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    default_data_collator,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME

from modeling_spiralformer.files_spiralformer import DIGESTS_NAME, write_digests
from workshop.checkpoints import load_config, load_model, load_tokenizer, parse_overrides
from workshop.data import check_bytes, make_blocks, token_byte_lengths
from workshop.elastic import ElasticTrainer, check_schedules
from workshop.files import check_folder, finite, write_json
from workshop.model_card import CardTrainer
from workshop.resuming import (
    NothingLeftError,
    RunRecord,
    check_record,
    choose_checkpoint,
    draws_random_numbers,
    is_sharded,
    make_record,
    read_state,
    resume_checks,
)
from workshop.training_arguments import (
    WEIGHT_DTYPES,
    DataArguments,
    ModelArguments,
    SpiralTrainingArguments,
    check_steps,
    planned_steps,
)

logger = logging.getLogger(__name__)

LARGEST_DEFAULT_BLOCK = 1024
# Of what a run leaves in its folder, what it would fail to write only at its end.
OUTPUT_FILES = ("model.safetensors", "config.json", "README.md", TRAINER_STATE_NAME)
OUTPUT_FILES += ("all_results.json", "train_results.json", "eval_results.json")


def choose_block_size(block_size: int | None, config: PreTrainedConfig) -> int:
    """Tokens per example; a model is not trained on positions that it does not claim."""
    longest = config.max_position_embeddings
    if block_size is None:
        return min(LARGEST_DEFAULT_BLOCK, longest)
    if not 2 <= block_size <= longest:
        raise ValueError(f"`block_size` must be in [2, max_position_embeddings = {longest}], but got {block_size}.")
    return block_size


def build_model(
    arguments: ModelArguments, training: SpiralTrainingArguments
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model (weights of the run to resume, else of the checkpoint named, else random) and its tokenizer."""
    overrides = parse_overrides(arguments.config_overrides)
    field = "model_name_or_path" if arguments.model_name_or_path else "config_name"
    config = load_config(arguments.model_name_or_path or arguments.config_name, overrides, field)
    check_schedules(training.schedules, config)
    tokenizer, dtype = load_tokenizer(arguments.tokenizer_name, config), WEIGHT_DTYPES[arguments.dtype]
    # Trainer loads the weights of a run to resume once more, but it would only warn of missing ones. Where FSDP has
    # saved them in shards, Trainer alone loads them, and stops at a missing one.
    resumed = training.resume_from_checkpoint
    if resumed is not None:
        resume_checks(resumed, config, training)
    checkpoint = arguments.model_name_or_path if resumed is None or is_sharded(resumed) else resumed
    if checkpoint is not None:
        return load_model(checkpoint, config, dtype=dtype), tokenizer
    return AutoModelForCausalLM.from_config(config, dtype=dtype), tokenizer


def make_compute_metrics(byte_lengths: np.ndarray | None) -> Callable[[EvalPrediction], dict[str, float]]:
    """
    Perplexity, and bits per byte where the bytes of every token are known.

    bits per byte = summed loss of the predicted tokens / ln 2 / UTF-8 bytes that these tokens stand for. The first
    token of a block is not predicted and counts in neither sum. Special tokens count in the loss but have no bytes.
    """

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        loss = float(np.mean(prediction.losses, dtype=np.float64))
        # exp(710) overflows a float.
        metrics = {"perplexity": math.exp(loss) if loss < 700 else math.inf}
        if byte_lengths is not None:
            predicted = prediction.label_ids[:, 1:]
            metrics["bytes"] = int(byte_lengths[predicted].sum())
            metrics["bits_per_byte"] = loss * predicted.size / math.log(2) / metrics["bytes"]
        return metrics

    return compute_metrics


def drop_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Keeps Trainer from collecting all logits: the metrics need only losses and labels."""
    return labels[:, :1]


def describe_data(data: DataArguments) -> str:
    """The training text in words, for the model card."""
    if data.dataset_name is not None:
        return " ".join(["The data set", f"`{data.dataset_name}`", data.dataset_config_name or ""]).strip() + "."
    if data.train_file is not None:
        return f"The file `{Path(data.train_file).name}`."
    return "The source of the Python standard library."


def set_up_logging(training: SpiralTrainingArguments):
    level = logging.INFO if training.should_log else logging.WARNING
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    for name in (__name__, "workshop.data"):
        logging.getLogger(name).setLevel(level)


def run_training(trainer: Trainer, training: SpiralTrainingArguments):
    """
    Trains, then saves weights, tokenizer, figures and state to output_dir. A run that was stopped after its last step,
    while it saved, has nothing left to train: its figures of time and mean loss are gone.
    """
    if training.should_save:
        (Path(training.output_dir) / DIGESTS_NAME).unlink(missing_ok=True)  # of files that will be replaced
    try:
        metrics = trainer.train(resume_from_checkpoint=training.resume_from_checkpoint).metrics
    except NothingLeftError:
        logger.info("step %d was the last: what it left is saved again", trainer.state.global_step)
        trainer.is_in_train, metrics = False, None
        if training.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
            trainer._load_best_model()
    if trainer.is_fsdp_enabled:  # checkpoints may be in shards, which `save_model` would leave at that
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
    if metrics is not None:
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", finite(metrics))
    trainer.save_state()
    if trainer.args.should_save:  # strict JSON, also of a run that diverged
        path = Path(trainer.args.output_dir) / TRAINER_STATE_NAME
        write_json(path, json.loads(path.read_text(encoding="utf-8")), indent=2)
        write_digests(trainer.args.output_dir, (TRAINER_STATE_NAME,))  # `save_model` has listed the others


def run_evaluation(trainer: Trainer) -> dict[str, float]:
    """Evaluates and saves the figures to output_dir."""
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", finite(metrics))
    return metrics


def make_trainer(
    model_arguments: ModelArguments, data_arguments: DataArguments, training: SpiralTrainingArguments
) -> ElasticTrainer:
    """The Trainer of the job, with model and data in place and nothing run yet."""
    check_folder("output_dir", training.output_dir, OUTPUT_FILES)
    if training.train_sampling_strategy == "group_by_length":  # its sampler would not go on as it began, besides
        raise ValueError(
            "`train_sampling_strategy` must be 'random' or 'sequential', but got 'group_by_length': all blocks are "
            "equally long."
        )
    training.resume_from_checkpoint = choose_checkpoint(training)
    set_seed(training.seed)
    model, tokenizer = build_model(model_arguments, training)
    block_size = choose_block_size(data_arguments.block_size, model.config)
    needed = ["train"] * training.do_train + ["validation"] * training.do_eval
    with training.main_process_first(desc="tokenizing and packing"):
        blocks = make_blocks(data_arguments, tokenizer, block_size, needed)
    for split, data in blocks.items():
        logger.info("%s: %d blocks of %d tokens", split, len(data), block_size)
    byte_lengths = token_byte_lengths(tokenizer)
    if byte_lengths is None:
        found = "is not a byte-level tokenizer, or puts a space before a text"
        logger.warning("bits per byte is left out: %r %s", tokenizer.name_or_path, found)
    elif training.do_eval:
        check_bytes("validation_file", blocks["validation"], byte_lengths)
    trainer = ElasticTrainer(
        model=model,
        args=training,
        train_dataset=blocks.get("train"),
        eval_dataset=blocks.get("validation"),
        processing_class=tokenizer,
        data_collator=default_data_collator,
        compute_metrics=make_compute_metrics(byte_lengths),
        preprocess_logits_for_metrics=drop_logits,
        training_data=describe_data(data_arguments),
        schedules=training.schedules,
        router_learning_rate_ratio=training.router_learning_rate_ratio,
    )
    if training.do_train:
        trainer.add_callback(record_run(trainer))
    return trainer


def record_run(trainer: CardTrainer) -> RunRecord:
    """What the run is, for its checkpoints; refused where it should go on from one of another run."""
    record, training, rows = RunRecord(make_record(trainer)), trainer.args, len(trainer.train_dataset)
    if training.resume_from_checkpoint is not None:
        checkpoint = Path(training.resume_from_checkpoint)
        draws = draws_random_numbers(trainer.model.config, training)
        check_record(checkpoint, record.record, draws, rows, planned_steps(training, rows))
        record.planned_steps = read_state(checkpoint)["max_steps"]
    return record


def run(model_arguments: ModelArguments, data_arguments: DataArguments, training: SpiralTrainingArguments) -> Trainer:
    """Runs the job that the settings describe, and returns its Trainer with the log in `state.log_history`."""
    set_up_logging(training)
    return run_job(make_trainer(model_arguments, data_arguments, training), training)


def run_job(trainer: CardTrainer, training: SpiralTrainingArguments) -> Trainer:
    """Trains, evaluates and saves as the settings say, with a Trainer that is ready."""
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and not trainer.is_fsdp_enabled:
        raise ValueError("`fsdp` must be off on a CPU: accelerate shards on accelerators only, and would run DDP.")
    if training.schedules and trainer.is_fsdp_enabled:
        raise ValueError("`schedules` must be left out with `fsdp`: the parts of a model cannot be sharded for each.")
    if training.do_train:
        check_steps(training, len(trainer.train_dataset))
        run_training(trainer, training)
    if training.do_eval:
        run_evaluation(trainer)
    if training.push_to_hub:
        trainer.push_to_hub()
    elif training.do_train:
        trainer.create_model_card()
    if training.should_save:
        logger.info("written to %s", Path(training.output_dir).resolve())
    return trainer
