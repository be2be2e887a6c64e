"""What a run on a synthetic task comes to: loss and right answers on every split but that of training."""

from workshop.files import finite
from workshop.padded_rows import RowTrainer
from workshop.tasks.rows import Rows, Task, digest, draw_rows, make_dataset
from workshop.tasks.training import evaluate


def describe_rows(task: Task, evaluated: int) -> dict[str, dict[str, str]]:
    """
    What the line of a run says of its data: name and SHA-256 of each split, as of a text. Raises ValueError where the
    rows of training have not the mean length that costs and budget count on.
    """
    drawn = draw_rows(task, evaluated)
    mean = round(sum(len(ids) for ids, _ in drawn["train"]) / task.rows)
    if mean != task.mean_length:
        raise ValueError(
            f"`mean_length` of `task` must be {mean}, the rounded mean of its rows, but got {task.mean_length}."
        )
    return {split: {"file": f"{task.title}, {split}", "sha256": digest(rows)} for split, rows in drawn.items()}


def outcome(trainer: RowTrainer, task: Task, rows: dict[str, Rows]) -> dict:
    """What the line of a run holds: loss, and right answers of all answers by class, on each split."""
    found = {split: evaluate(trainer, task, make_dataset(rows[split])) for split in task.splits if split != "train"}
    return {
        "nats_per_token": {split: finite(loss) for split, (loss, _) in found.items()},
        "accuracy": {split: right for split, (_, right) in found.items()},
    }
