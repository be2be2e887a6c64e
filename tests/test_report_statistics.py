"""Paired differences and their pooled interval, against figures computed by hand."""

import math

import pytest
from report_statistics import HIGHER, LOWER, NOISE, OPPOSITE, REPRODUCES, Comparison, Mean

REFERENCE = {0: 2.0, 1: 2.1, 2: 2.2}


def test_a_mean_has_the_standard_error_of_its_values():
    assert Mean.of([1.0, 2.0, 4.0, 5.0]) == Mean(3.0, pytest.approx(math.sqrt(10 / 3) / 2), 4)
    assert Mean.of([1.5]) == Mean(1.5, None, 1)


def test_the_pooled_interval_is_that_computed_by_hand():
    """
    Differences of a: -0.1, -0.2, -0.3, squares around the mean 0.02; of b: 0, 0.4, squares 0.08. Pooled: sqrt(0.1 / 3)
    with 3 degrees of freedom, whose t is 3.182446. The order of the seeds and a seed without a partner change nothing.
    """
    a, b = {2: 1.9, 0: 1.9, 1: 1.9}, {1: 2.5, 0: 2.0, 7: 9.0}
    comparison = Comparison.of({"a": a, "reference": REFERENCE, "b": b, "none": {}, "other": {9: 1.0}}, "reference")
    assert comparison.differences == {
        "a": pytest.approx({0: -0.1, 1: -0.2, 2: -0.3}),
        "b": pytest.approx({0: 0, 1: 0.4}),
    }
    assert comparison.mean("a") == Mean(pytest.approx(-0.2), pytest.approx(0.1 / math.sqrt(3)), 3)
    assert comparison.degrees_of_freedom == 3
    assert comparison.pooled_deviation == pytest.approx(0.182574, abs=1e-6)
    assert comparison.half_width(3) == pytest.approx(3.182446 * 0.182574 / math.sqrt(3), abs=1e-5)
    assert comparison.interval("a") == pytest.approx((-0.535461, 0.135461), abs=1e-5)
    half = 3.182446 * 0.182574 / math.sqrt(2)
    assert comparison.interval("b") == pytest.approx((0.2 - half, 0.2 + half), abs=1e-5)


def test_without_a_degree_of_freedom_there_is_no_interval():
    comparison = Comparison.of({"reference": REFERENCE, "a": {0: 1.0}, "b": {2: 1.0}}, "reference")
    assert comparison.mean("a") == Mean(-1.0, None, 1)
    assert comparison.pooled_deviation is None and comparison.half_width(1) is None
    assert comparison.interval("a") is None and comparison.verdict("a", -1.0) is None
    assert Comparison.of({"a": {0: 1.0}}, "reference").differences == {}


@pytest.mark.parametrize(
    "differences, expected, verdict",
    [
        ([-0.31, -0.3, -0.29], -0.01, REPRODUCES),
        ([-0.31, -0.3, -0.29], 0.01, OPPOSITE),
        ([0.31, 0.3, 0.29], 0.01, REPRODUCES),
        ([0.31, 0.3, 0.29], -0.01, OPPOSITE),
        ([-0.31, -0.3, -0.29], None, LOWER),
        ([0.31, 0.3, 0.29], None, HIGHER),
        ([0.31, 0.3, 0.29], 0.0, HIGHER),
        # t of 2 degrees of freedom is 4.303: 4.303 * 0.01 / sqrt(3) = 0.0248.
        ([0.034, 0.024, 0.014], 1.0, NOISE),
        ([0.036, 0.026, 0.016], 1.0, REPRODUCES),
        ([-0.034, -0.024, -0.014], None, NOISE),
    ],
)
def test_a_verdict_asks_on_which_side_the_interval_lies(differences, expected, verdict):
    values = {seed: REFERENCE[seed] + difference for seed, difference in enumerate(differences)}
    assert Comparison.of({"reference": REFERENCE, "a": values}, "reference").verdict("a", expected) == verdict
