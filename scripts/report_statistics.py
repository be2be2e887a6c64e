"""The statistics of the reports: means over seeds, paired differences, one pooled interval for a whole experiment.

Seeds make pairs: a seed fixes the order of the training text for every model, so a difference is taken within a seed
before anything is averaged. Few seeds tell little about the spread of one row, so all rows of an experiment share one
standard deviation of paired differences, as in a one-way analysis of variance.
"""

import math
import statistics
from collections.abc import Collection
from dataclasses import dataclass

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
    Differences of every other model to the reference: model -> seed -> difference, same seed minus same seed.

    Models without a seed in common with the reference are left out.
    """

    reference: str
    differences: dict[str, dict[int, float]]

    @classmethod
    def of(cls, values: dict[str, dict[int, float]], reference: str) -> "Comparison":
        """From model -> seed -> value; without values of the reference there is nothing to compare."""
        base = values.get(reference, {})
        differences = {}
        for name, found in values.items():
            paired = {seed: found[seed] - base[seed] for seed in sorted(found) if seed in base}
            if name != reference and paired:
                differences[name] = paired
        return cls(reference, differences)

    def mean(self, name: str) -> Mean | None:
        """Mean difference of one model with the standard error of its own seeds; None without a pair."""
        found = self.differences.get(name)
        return Mean.of(found.values()) if found else None

    @property
    def degrees_of_freedom(self) -> int:
        """Sum of n - 1 over the models."""
        return sum(len(found) - 1 for found in self.differences.values())

    @property
    def pooled_deviation(self) -> float | None:
        """Standard deviation of a paired difference around its model's mean; None without a degree of freedom."""
        if not self.degrees_of_freedom:
            return None
        squares = 0.0
        for found in self.differences.values():
            mean = statistics.fmean(found.values())
            squares += sum((value - mean) ** 2 for value in found.values())
        return math.sqrt(squares / self.degrees_of_freedom)

    def half_width(self, count: int) -> float | None:
        """Half of the pooled 95% interval of a mean over `count` seeds: the smallest difference that is resolved."""
        if self.pooled_deviation is None:
            return None
        quantile = stats.t.ppf((1 + CONFIDENCE) / 2, self.degrees_of_freedom)
        return float(quantile) * self.pooled_deviation / math.sqrt(count)

    def interval(self, name: str) -> tuple[float, float] | None:
        """The pooled 95% interval of one model's mean difference."""
        mean = self.mean(name)
        if mean is None or self.pooled_deviation is None:
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
