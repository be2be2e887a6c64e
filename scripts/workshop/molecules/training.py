"""Training on molecules: rows padded to the longest of their batch, loss per token."""

import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, EvalPrediction, Trainer, set_seed

from workshop.molecules.rows import LengthGroups, make_rows, read_molecules
from workshop.training import build_model, choose_block_size, record_run
from workshop.training_arguments import DataArguments, ModelArguments, SpiralTrainingArguments


def row_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed loss in nats and count of the predicted tokens of each row, `(B, 2)`; padding is not predicted."""
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].mT.float(), labels[:, 1:], reduction="none")
    return torch.stack([losses.sum(dim=1), (labels[:, 1:] != -100).sum(dim=1).float()], dim=1)


def nats_per_token(prediction: EvalPrediction) -> dict[str, float]:
    """Loss over all tokens that are predicted: rows of more tokens count more, whatever the batches."""
    losses, counts = prediction.predictions.astype("float64").sum(axis=0)
    return {"nats_per_token": float(losses / counts)}


class MoleculeTrainer(Trainer):
    """A Trainer whose grouping by length goes on as it began where a run is resumed."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroups([len(ids) for ids in rows["input_ids"]], batch_size, seed)


def make_trainer(
    model_arguments: ModelArguments, data_arguments: DataArguments, training: SpiralTrainingArguments
) -> Trainer:
    """As `training.make_trainer`, with a molecule a row, padded to the longest of its batch."""
    set_seed(training.seed)
    model, tokenizer = build_model(model_arguments, training)
    block_size = choose_block_size(data_arguments.block_size, model.config)
    files = {"train_file": data_arguments.train_file, "validation_file": data_arguments.validation_file}
    rows = {field: make_rows(read_molecules(field, path), tokenizer, block_size) for field, path in files.items()}
    evaluated = rows["validation_file"]
    trainer = MoleculeTrainer(
        model=model,
        args=training,
        train_dataset=rows["train_file"],
        eval_dataset=evaluated.select(range(min(len(evaluated), data_arguments.max_eval_samples or len(evaluated)))),
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        compute_metrics=nats_per_token,
        preprocess_logits_for_metrics=row_losses,
    )
    trainer.add_callback(record_run(model.config, training, rows["train_file"]))
    return trainer
