"""Random histories of a cache beside what they must equal: one uncached forward of the same rows.

`History` does one operation at a time on a cache and on a plain record of ids and padding, and after every feeding
compares logits. The stateful test lets hypothesis choose the operations, the mutation test a seeded generator.
"""

import copy
import random
from contextlib import nullcontext

import torch
from reference import reference_logits
from rounded_keys import rounded_keys
from support import VOCAB, seeded, small_model
from transformers import DynamicCache, StaticCache
from views import fields_of, iterations_of, renamed

from modeling_spiralformer import SpiralFormerQuantizedCache

TOLERANCE = 1e-9
STATIC_COLUMNS = 61


class History:
    """A model, a cache, and the rows that the cache should stand for.

    Args:
        options: of the model.
        pads: left padding of each row, in columns; a row may still be all padding after the first feedings.
        static: a static cache of `STATIC_COLUMNS` columns; what it has no room for is not fed.
        part: chunk sizes of a view of the model, which then stands in its place. Its first logits are also compared
            with the slow reference, as its own uncached forward is made of the same modules.
        bits: of keys and values, by chunk size, in a quantised cache: logits are then compared with those of rounded
            keys, which no other reference knows.
    """

    def __init__(
        self,
        options: dict,
        pads: list[int],
        static: bool = False,
        part: list[int] | None = None,
        bits: dict[int, int] | None = None,
    ):
        self.model = small_model(**options)
        self.reference: tuple | None = None
        if part is not None:
            iterations = iterations_of(self.model.config.chunk_sizes, part)
            self.reference = fields_of(self.model.config, iterations), renamed(self.model, iterations)
            self.model = self.model.with_schedule(part)
        self.generator = seeded(0)
        self.static, self.bits = static, None if static else bits
        if self.bits is not None:
            self.reference = None
            self.cache = SpiralFormerQuantizedCache(self.model.config, self.bits)
        elif static:
            self.cache = StaticCache(config=self.model.config, max_cache_len=STATIC_COLUMNS)
        else:
            self.cache = DynamicCache(config=self.model.config)
        self.recorded_from: int | None = None
        self._start(pads)

    def _start(self, pads: list[int]) -> None:
        self.pads = torch.tensor(pads)
        self.ids = torch.zeros(len(pads), 0, dtype=torch.long)

    @property
    def columns(self) -> int:
        return self.ids.shape[1]

    def mask(self) -> torch.Tensor:
        return (torch.arange(self.columns) >= self.pads[:, None]).long()

    @torch.no_grad()
    def feed(self, count: int, with_mask: bool = True, with_positions: bool = False) -> None:
        """Feeds `count` columns in one call, pad ids among them, and compares the logits of all its real tokens."""
        start = self.columns
        if self.static and start + count > STATIC_COLUMNS:
            return
        new = torch.randint(3, VOCAB, (len(self.pads), count), generator=self.generator)
        new[torch.rand(new.shape, generator=self.generator) < 0.1] = 0
        self.ids = torch.cat([self.ids, new], dim=1)
        settled = bool((self.pads < start).all()) and bool(self.model.model.grids)  # without levels nobody knows
        mask = self.mask() if with_mask or not (settled or (self.pads == 0).all()) else None
        positions = (torch.arange(start, start + count) - self.pads[:, None]).clamp(min=0) if with_positions else None
        given = {"attention_mask": mask, "position_ids": positions, "past_key_values": self.cache}
        cached = self.model(new, **given, use_cache=True).logits
        with nullcontext() if self.bits is None else rounded_keys(self.model, self.bits):
            expected = self.model(self.ids, attention_mask=self.mask(), use_cache=False).logits[:, start:]
        real = self.mask()[:, start:].bool()
        difference = (cached - expected)[real].abs()
        assert not len(difference) or difference.max() < TOLERANCE, f"off by {difference.max():.2e}"
        if self.reference is not None and start == 0 and real.any():
            self._compare_with_reference(expected)

    def _compare_with_reference(self, logits: torch.Tensor) -> None:
        """Compares the longest row of a first call with the equations, once in a history."""
        row = int(self.pads.argmin())
        slow = reference_logits(*self.reference, self.ids[row, self.pads[row] :])
        self.reference = None
        difference = (logits[row, self.pads[row] :] - slow).abs().max()
        assert difference < TOLERANCE, f"a view is off the reference by {difference:.2e}"

    def record(self) -> None:
        if self.recorded_from is None:
            self.recorded_from = self.columns
        self.cache.activate_past_recording()

    def stop_recording(self) -> None:
        """As the library does where it hands a cache back: it sets the flag of the layers itself."""
        for layer in self.cache.layers:
            if hasattr(layer, "record_past"):
                layer.record_past = False
        self.recorded_from = None

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

    def reset(self, pads: list[int]) -> None:
        """Starts anew, with as many rows as there are `pads`."""
        self.cache.reset()
        self._start(pads)
        if self.recorded_from is not None:
            self.recorded_from = 0

    def copy(self) -> None:
        original, self.cache = self.cache, copy.deepcopy(self.cache)
        original.reset()  # what the copy holds must be its own

    def _select(self, rows: list[int]) -> None:
        self.ids, self.pads = self.ids[rows], self.pads[rows]


def random_pads(choose: random.Random) -> list[int]:
    """One to three rows, with an unpadded one among them or without."""
    return [choose.choice([0, 1, 3, 7, 12]) for _ in range(choose.randint(1, 3))]


DYNAMIC_ONLY = ["crop"] * 2 + ["select", "repeat", "record", "stop recording"]


def random_history(
    options: dict,
    seed: int,
    static: bool = False,
    part: list[int] | None = None,
    bits: dict[int, int] | None = None,
    steps: int = 14,
) -> None:
    """Plays `steps` random operations on ragged rows; raises where the cache is wrong."""
    choose = random.Random(seed)
    history = History(options, random_pads(choose), static, part, bits)
    if choose.random() < 0.6 and not static:
        history.record()
    for _ in range(steps):
        rows = len(history.pads)
        operation = choose.choice(["feed"] * 5 + ["reorder", "copy", "reset"] + ([] if static else DYNAMIC_ONLY))
        if operation == "feed":
            with_mask, with_positions = choose.random() < 0.7, choose.random() < 0.2
            history.feed(choose.choice([1, 1, 1, 2, 5, 11]), with_mask, with_positions)
        elif operation == "crop":
            history.crop(choose.randint(0, min(9, history.columns)))
        elif operation == "reorder":
            history.reorder([choose.randrange(rows) for _ in range(rows)])
        elif operation == "select":
            history.select(sorted(choose.sample(range(rows), choose.randint(1, rows))))
        elif operation == "repeat" and rows < 4:
            history.repeat(2)
        elif operation == "record" and choose.random() < 0.5:
            history.record()
        elif operation == "stop recording" and choose.random() < 0.3:
            history.stop_recording()
        elif operation == "copy":
            history.copy()
        elif operation == "reset" and choose.random() < 0.3:
            history.reset(random_pads(choose))
    history.feed(3)
