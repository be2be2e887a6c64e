"""Training on molecules: rows padded to the longest of their batch, loss per token."""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import DataCollatorForLanguageModeling, SchedulerType, Trainer, set_seed

from workshop.files import ROOT, check_folder
from workshop.molecules.rows import make_rows, read_molecules
from workshop.molecules.spelling import write_spellings
from workshop.padded_rows import RowTrainer, nats_per_token, row_losses
from workshop.resuming import choose_checkpoint
from workshop.settings import check_counts
from workshop.training import (
    OUTPUT_FILES,
    build_model,
    choose_block_size,
    describe_data,
    record_run,
    run_job,
    set_up_logging,
)
from workshop.training_arguments import DataArguments, ModelArguments, SpiralTrainingArguments


@dataclass
class MoleculeModelArguments(ModelArguments):
    """As for text; SMolLM of 53,760 parameters and the tokenizer of SMILES where none is named."""

    def __post_init__(self):
        if self.model_name_or_path is None:
            self.config_name = self.config_name or str(ROOT / "configuration" / "smollm-53k")
            self.tokenizer_name = self.tokenizer_name or str(ROOT / "tokenization" / "smiles")
        super().__post_init__()


@dataclass
class MoleculeDataArguments:
    """Which molecules, and how they are spelled."""

    train_file: str = field(metadata={"help": "Molecules to train on, one SMILES a line."})
    validation_file: str = field(metadata={"help": "Molecules to evaluate on, likewise."})
    spellings: int | None = field(
        default=None,
        metadata={"help": "Train on so many random spellings of each molecule (RDKit). Default: on the file."},
    )
    block_size: int | None = field(
        default=None, metadata={"help": "Most tokens of a molecule. Default: max_position_embeddings."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many molecules for training."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many for evaluation."})

    def __post_init__(self):
        check_counts(self, "spellings", "max_train_samples", "max_eval_samples")


@dataclass
class MoleculeTrainingArguments(SpiralTrainingArguments):
    """`TrainingArguments` with SMolLM's recipe: AdamW, cosine to 0, 200 steps of warm-up, 100 passes."""

    output_dir: str | None = field(default="runs/molecules", metadata={"help": "Where checkpoints and figures go."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Peak."})
    adam_beta2: float = field(default=0.999, metadata={"help": "Second beta of AdamW."})
    weight_decay: float = field(default=0.1, metadata={"help": "Not applied to biases and LayerNorms."})
    lr_scheduler_type: SchedulerType | str = field(default="cosine", metadata={"help": "Schedule of the rate."})
    warmup_steps: float = field(default=200, metadata={"help": "Steps of warm-up, or below 1 a share of all steps."})
    num_train_epochs: float = field(default=100.0, metadata={"help": "Passes over the training rows."})
    per_device_train_batch_size: int = field(default=256, metadata={"help": "Molecules of a step on each device."})
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Molecules of an evaluation at a time."})
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "help": "group_by_length: molecules of like length in a batch. random: as in the paper.",
            "choices": ["random", "sequential", "group_by_length"],
        },
    )


MOLECULE_ARGUMENTS = (MoleculeModelArguments, MoleculeDataArguments, MoleculeTrainingArguments)


def make_trainer(
    model_arguments: ModelArguments,
    data_arguments: DataArguments | MoleculeDataArguments,
    training: SpiralTrainingArguments,
) -> RowTrainer:
    """
    As `training.make_trainer`, with a molecule a row, padded to the longest of its batch. Random spellings, where they
    are asked for, are drawn by the seed of the data, and kept in `output_dir`.
    """
    set_seed(training.seed)
    model, tokenizer = build_model(model_arguments, training)
    block_size = choose_block_size(data_arguments.block_size, model.config)
    trained = read_molecules("train_file", data_arguments.train_file)[: data_arguments.max_train_samples]
    evaluated = read_molecules("validation_file", data_arguments.validation_file)[: data_arguments.max_eval_samples]
    described = describe_data(DataArguments(train_file=data_arguments.train_file))
    count = getattr(data_arguments, "spellings", None)
    if count is not None:
        seed = training.seed if training.data_seed is None else training.data_seed
        known = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
        folder, longest = Path(training.output_dir), block_size - 2  # bos and eos
        with training.main_process_first(desc="spelling"):  # the others find its file
            path = write_spellings(trained, folder, count, seed, known, longest, quiet=training.disable_tqdm)
        trained = read_molecules("train_file", path)
        described = f"{described[:-1]}, {count} random spellings of each molecule."
    trainer = RowTrainer(
        model=model,
        args=training,
        train_dataset=make_rows(trained, tokenizer, block_size),
        eval_dataset=make_rows(evaluated, tokenizer, block_size),
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        compute_metrics=nats_per_token,
        preprocess_logits_for_metrics=row_losses,
        training_data=described,
        schedules=training.schedules,
        router_learning_rate_ratio=training.router_learning_rate_ratio,
    )
    if training.do_train:
        trainer.add_callback(record_run(trainer))
    return trainer


def run(
    model_arguments: MoleculeModelArguments, data_arguments: MoleculeDataArguments, training: MoleculeTrainingArguments
) -> Trainer:
    """Runs the job that the settings describe, and returns its Trainer with the log in `state.log_history`."""
    set_up_logging(training)
    check_folder("output_dir", training.output_dir, OUTPUT_FILES)
    training.resume_from_checkpoint = choose_checkpoint(training)
    return run_job(make_trainer(model_arguments, data_arguments, training), training)
