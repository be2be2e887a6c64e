"""The statistics of the reports: means over seeds, paired differences, one interval for a whole experiment.

Seeds make pairs: a seed fixes the order of the training text for every model, so a difference is taken within a seed
before anything is averaged. Few seeds tell little about the spread of one row, so a table has one standard deviation,
that of a run around the sum of a model's effect and a seed's (a two-way analysis of variance without interaction). The
reference is one of the models there, not a constant: its own noise is in every row.
"""

import functools
import math
import statistics
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
REPRODUCES, OPPOSITE, NOISE = "reproduces", "opposite", "within the noise"
LOWER, HIGHER = "lower", "higher"


@dataclass(frozen=True)
class Mean:
    """A mean over seeds; the standard error is None where there is one seed only."""

    mean: float
    standard_error: float | None
    count: int

    @classmethod
    def of(cls, values: Collection[float]) -> "Mean":
        """Mean of at least one value, with the sample's standard deviation over the root of the count."""
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(statistics.fmean(values), error, len(values))


@dataclass(frozen=True)
class Comparison:
    """
    Every other model beside the reference. `values` are model -> seed -> value, the reference among them, at the seeds
    that a model shares with it; models without such a seed are left out.
    """

    reference: str
    values: dict[str, dict[int, float]]

    @classmethod
    def of(cls, values: dict[str, dict[int, float]], reference: str) -> "Comparison":
        """From model -> seed -> value; without values of the reference there is nothing to compare."""
        base = values.get(reference, {})
        shared = {
            name: {seed: found[seed] for seed in sorted(found) if seed in base} for name, found in values.items()
        }
        return cls(reference, {name: found for name, found in shared.items() if found})

    @property
    def differences(self) -> dict[str, dict[int, float]]:
        """Model -> seed -> difference to the reference, same seed minus same seed."""
        base = self.values.get(self.reference, {})
        return {
            name: {seed: value - base[seed] for seed, value in found.items()}
            for name, found in self.values.items()
            if name != self.reference
        }

    def mean(self, name: str) -> Mean | None:
        """Mean difference of one model with the standard error of its own seeds; None without a pair."""
        found = self.differences.get(name)
        return Mean.of(found.values()) if found else None

    @functools.cached_property
    def spread(self) -> tuple[float, int]:
        """Sum of squares that a model's effect and a seed's leave over, and its degrees of freedom."""
        runs = [(name, seed, value) for name, found in self.values.items() for seed, value in found.items()]
        if not runs:
            return 0.0, 0
        names, seeds, values = (list(column) for column in zip(*runs, strict=True))
        effects = [*(np.equal(names, name) for name in self.values), *(np.equal(seeds, seed) for seed in set(seeds))]
        design = np.stack(effects, axis=1).astype(float)
        fitted, _, rank, _ = np.linalg.lstsq(design, np.array(values))
        return float(np.sum((values - design @ fitted) ** 2)), len(values) - int(rank)

    @property
    def degrees_of_freedom(self) -> int:
        """Runs less effects: (models - 1) (seeds - 1) where all have run."""
        return self.spread[1]

    @property
    def run_deviation(self) -> float | None:
        """Standard deviation of a run around its model's and its seed's effect; None without a degree of freedom."""
        squares, freedom = self.spread
        return math.sqrt(squares / freedom) if freedom else None

    @property
    def scattered(self) -> str | None:
        """
        The model whose runs scatter so much more than all others' that without it the deviation of a run is less than
        half: one deviation for the whole table then says little of the others. The reference is never left out.
        """
        if not self.run_deviation:
            return None
        found = {name: self.without(name).run_deviation for name in self.values if name != self.reference}
        smaller = {
            name: value for name, value in found.items() if value is not None and 2 * value < self.run_deviation
        }
        return min(smaller, key=smaller.__getitem__, default=None)

    def without(self, name: str) -> "Comparison":
        """The comparison with one model left out."""
        return Comparison(self.reference, {other: found for other, found in self.values.items() if other != name})

    def half_width(self, count: int) -> float | None:
        """Half of the 95% interval of a mean difference over `count` seeds: the smallest one that is resolved."""
        if self.run_deviation is None:
            return None
        quantile = stats.t.ppf((1 + CONFIDENCE) / 2, self.degrees_of_freedom)
        return float(quantile) * self.run_deviation * math.sqrt(2 / count)

    def interval(self, name: str) -> tuple[float, float] | None:
        """The 95% interval of one model's mean difference."""
        mean = self.mean(name)
        if mean is None or self.run_deviation is None:
            return None
        half = self.half_width(mean.count)
        return mean.mean - half, mean.mean + half

    def verdict(self, name: str, expected: float | None = None) -> str | None:
        """
        What the interval says: within the noise where it holds 0. Else, beside the expected difference, of which
        only the sign counts, reproduces or opposite; and lower or higher where none is expected (None or 0).
        """
        interval = self.interval(name)
        if interval is None:
            return None
        low, high = interval
        if low <= 0 <= high:
            return NOISE
        if not expected:
            return LOWER if high < 0 else HIGHER
        return REPRODUCES if (high < 0) == (expected < 0) else OPPOSITE
