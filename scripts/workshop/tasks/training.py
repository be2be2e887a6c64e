"""Training on a task by the Trainer of padded rows, and what a trained model gets right."""

import torch
from datasets import Dataset
from transformers import DataCollatorForTokenClassification, set_seed

from workshop.padded_rows import RowTrainer, nats_per_token, row_losses
from workshop.tasks.rows import Rows, Task, make_dataset
from workshop.tasks.scoring import Right, add_right
from workshop.training import build_model, record_run
from workshop.training_arguments import ModelArguments, SpiralTrainingArguments


def make_trainer(
    model_arguments: ModelArguments, training: SpiralTrainingArguments, task: Task, rows: dict[str, Rows], curve: int
) -> RowTrainer:
    """
    As `training.make_trainer`, on rows of a task.

    Args:
        rows: of each split.
        curve: so many validation rows give the loss in the course of training.
    """
    set_seed(training.seed)
    model, tokenizer = build_model(model_arguments, training)
    trained = make_dataset(rows["train"])
    trainer = RowTrainer(
        model=model,
        args=training,
        train_dataset=trained,
        eval_dataset=make_dataset(rows["validation"][:curve]),
        processing_class=tokenizer,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        compute_metrics=nats_per_token,
        preprocess_logits_for_metrics=row_losses,
        training_data=f"{task.title}, {len(trained):,} rows drawn by a seed.",
        schedules=training.schedules,
        router_learning_rate_ratio=training.router_learning_rate_ratio,
    )
    trainer.add_callback(record_run(trainer))
    return trainer


@torch.no_grad()
def evaluate(trainer: RowTrainer, task: Task, rows: Dataset) -> tuple[float, Right]:
    """Loss in nats per predicted token, and what the model gets right."""
    model = trainer.model.eval()
    losses, parts = torch.zeros(2, dtype=torch.float64), []
    for batch in trainer.get_eval_dataloader(rows):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        losses += row_losses(logits, batch["labels"]).sum(dim=0).cpu()
        parts.append(task.score(logits.cpu().numpy(), batch["input_ids"].cpu().numpy()))
    return float(losses[0] / losses[1]), add_right(parts)
