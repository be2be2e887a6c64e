"""What a run on a synthetic task comes to: loss, and what the model gets right, on every split but that of training."""

from workshop.files import finite
from workshop.padded_rows import RowTrainer
from workshop.tasks.rows import Rows, Task, digest, draw_rows, make_dataset
from workshop.tasks.training import evaluate


def describe_rows(task: Task, evaluated: int) -> dict[str, dict[str, str]]:
    """What the line of a run says of its data: name and SHA-256 of each split, as of a text."""
    return {
        split: {"file": f"{task.title}, {split}", "sha256": digest(rows)}
        for split, rows in draw_rows(task, evaluated).items()
    }


def outcome(trainer: RowTrainer, task: Task, rows: dict[str, Rows]) -> dict:
    """What the line of a run holds: loss, and right answers of all answers by class, on each split."""
    found = {split: evaluate(trainer, task, make_dataset(rows[split])) for split in task.splits if split != "train"}
    return {
        "nats_per_token": {split: finite(loss) for split, (loss, _) in found.items()},
        "accuracy": {split: right for split, (_, right) in found.items()},
    }
