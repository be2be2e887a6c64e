"""The rows of a task: drawn by a seed, the same on every machine, and told apart by a digest."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset

from workshop.tasks.dyck import Dyck
from workshop.tasks.hops import Hops

TASKS: dict[str, type[Dyck] | type[Hops]] = {"dyck": Dyck, "hops": Hops}
Task = Dyck | Hops
Rows = list[tuple[np.ndarray, np.ndarray]]


def make_task(settings: Mapping[str, Any]) -> Task:
    """The task that `name` names, with the integers that it takes. Raises ValueError for every other setting."""
    kind = TASKS.get(settings.get("name", ""))
    if kind is None:
        raise ValueError(f"`name` of `task` must be one of {list(TASKS)}, but got {settings.get('name')!r}.")
    numbers = {name: value for name, value in settings.items() if name != "name"}
    fields = [item.name for item in dataclasses.fields(kind)]
    if sorted(numbers) != sorted(fields):
        raise ValueError(f"`task` {settings['name']} must hold exactly {fields}, but got {list(numbers)}.")
    for name, value in numbers.items():
        if type(value) is not int or value < kind.smallest[name]:
            raise ValueError(f"`{name}` of `task` must be an integer >= {kind.smallest[name]}, but got {value!r}.")
    return kind(**numbers)


def draw_rows(task: Task, evaluated: int) -> dict[str, Rows]:
    """
    Split -> rows, ids and labels each: `task.rows` to train on, and `evaluated` of each other split, no row of which
    is one of training. Raises ValueError where there are no others.
    """
    drawn: dict[str, Rows] = {}
    seen: set[bytes] = set()
    for index, split in enumerate(task.splits):
        generator = np.random.default_rng(index)
        count = task.rows if split == "train" else evaluated
        rows: Rows = []
        while len(rows) < count:
            found = [row for row in task.draw(split, generator) if row[0].tobytes() not in seen]
            if not found:
                raise ValueError(f"`rows` of `task` must leave other rows for {split}, but got {task.rows}.")
            rows += found
        drawn[split] = rows[:count]
        if split == "train":
            seen = {ids.tobytes() for ids, _ in drawn[split]}
    return drawn


def digest(rows: Rows) -> str:
    """SHA-256 of all ids and labels."""
    found = hashlib.sha256()
    for ids, labels in rows:
        found.update(np.array([len(ids), *ids, *labels], "<i8").tobytes())
    return found.hexdigest()


def make_dataset(rows: Rows) -> Dataset:
    """Rows as the Trainer reads them."""
    ids, labels = zip(*rows, strict=True)
    return Dataset.from_dict({"input_ids": list(ids), "labels": list(labels)})
