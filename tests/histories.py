"""Random histories of a cache beside what they must equal: one uncached forward of the same rows.

`History` does one operation at a time on a cache and on a plain record of ids and padding, and after every feeding
compares logits. The stateful test lets hypothesis choose the operations, the mutation test a seeded generator.
"""

import copy
import random

import torch
from support import VOCAB, small_model
from transformers import DynamicCache

TOLERANCE = 1e-9


class History:
    """A model, a cache, and the rows that the cache should stand for.

    Args:
        options: of the model.
        pads: left padding of each row, in columns; a row may still be all padding after the first feedings.
    """

    def __init__(self, options: dict, pads: list[int]):
        self.model = small_model(**options)
        self.generator = torch.Generator().manual_seed(0)
        self.pads = torch.tensor(pads)
        self.ids = torch.zeros(len(pads), 0, dtype=torch.long)
        self.cache = DynamicCache(config=self.model.config)
        self.recorded_from: int | None = None

    @property
    def columns(self) -> int:
        return self.ids.shape[1]

    def mask(self) -> torch.Tensor:
        return (torch.arange(self.columns) >= self.pads[:, None]).long()

    @torch.no_grad()
    def feed(self, count: int, with_mask: bool = True) -> None:
        """Feeds `count` columns in one call and compares the logits of all its real tokens."""
        start = self.columns
        new = torch.randint(3, VOCAB, (len(self.pads), count), generator=self.generator)
        self.ids = torch.cat([self.ids, new], dim=1)
        settled = bool((self.pads < start).all()) and bool(self.model.model.grids)  # without levels nobody knows
        mask = self.mask() if with_mask or not (settled or (self.pads == 0).all()) else None
        cached = self.model(new, attention_mask=mask, past_key_values=self.cache, use_cache=True).logits
        expected = self.model(self.ids, attention_mask=self.mask(), use_cache=False).logits[:, start:]
        real = self.mask()[:, start:].bool()
        difference = (cached - expected)[real].abs()
        assert not len(difference) or difference.max() < TOLERANCE, f"off by {difference.max():.2e}"

    def record(self) -> None:
        if self.recorded_from is None:
            self.recorded_from = self.columns
        self.cache.activate_past_recording()

    def crop(self, count: int) -> None:
        """Goes back; only a point before the recorded window may be refused, and then nothing may have changed."""
        target = self.columns - count
        trial = copy.deepcopy(self.cache)
        try:
            trial.crop(-count)
        except ValueError:
            assert self.recorded_from is None or target < self.recorded_from, "refused a recorded point"
            return
        self.cache = trial
        self.ids = self.ids[:, :target]
        if self.recorded_from is not None:
            self.recorded_from = target

    def reorder(self, rows: list[int]) -> None:
        self.cache.reorder_cache(torch.tensor(rows))
        self._select(rows)

    def select(self, rows: list[int]) -> None:
        self.cache.batch_select_indices(torch.tensor(rows))
        self._select(rows)

    def repeat(self, times: int) -> None:
        self.cache.batch_repeat_interleave(times)
        self._select([row for row in range(len(self.pads)) for _ in range(times)])

    def reset(self) -> None:
        self.cache.reset()
        self.ids = self.ids[:, :0]
        if self.recorded_from is not None:
            self.recorded_from = 0

    def copy(self) -> None:
        original, self.cache = self.cache, copy.deepcopy(self.cache)
        original.reset()  # what the copy holds must be its own

    def _select(self, rows: list[int]) -> None:
        self.ids, self.pads = self.ids[rows], self.pads[rows]


def random_history(options: dict, seed: int, steps: int = 14) -> None:
    """Plays `steps` random operations on ragged rows; raises where the cache is wrong."""
    choose = random.Random(seed)
    history = History(options, [choose.choice([0, 1, 3, 7, 12]) for _ in range(choose.randint(1, 3))])
    if choose.random() < 0.6:
        history.record()
    for _ in range(steps):
        rows = len(history.pads)
        operation = choose.choice(["feed"] * 5 + ["crop"] * 2 + ["reorder", "select", "repeat", "copy", "reset"])
        if operation == "feed":
            history.feed(choose.choice([1, 1, 1, 2, 5, 11]), with_mask=choose.random() < 0.7)
        elif operation == "crop":
            history.crop(choose.randint(0, min(9, history.columns)))
        elif operation == "reorder":
            history.reorder([choose.randrange(rows) for _ in range(rows)])
        elif operation == "select":
            history.select(sorted(choose.sample(range(rows), choose.randint(1, rows))))
        elif operation == "repeat" and rows < 4:
            history.repeat(2)
        elif operation == "copy":
            history.copy()
        elif operation == "reset" and choose.random() < 0.3:
            history.reset()
    history.feed(3)
