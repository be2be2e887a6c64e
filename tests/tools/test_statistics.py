"""Paired differences and their interval, against figures computed by hand."""

import math

import pytest

from workshop.experiments.report import resolution
from workshop.experiments.statistics import HIGHER, LOWER, NOISE, OPPOSITE, REPRODUCES, Comparison, Mean

REFERENCE = {0: 2.0, 1: 2.1, 2: 2.2}


def test_a_mean_has_the_standard_error_of_its_values():
    assert Mean.of([1.0, 2.0, 4.0, 5.0]) == Mean(3.0, pytest.approx(math.sqrt(10 / 3) / 2), 4)
    assert Mean.of([1.5]) == Mean(1.5, None, 1)


def test_the_interval_is_that_computed_by_hand():
    """
    Means: 2.1 of all and of the reference, 1.9 and 2.3 of a and b, 1.9667, 2.1667 and 2.1667 of the seeds. Left
    over, in thirtieths: 1, -2, 1; 4, -2, -2; -5, 4, 1: squares of 72 / 900 with 4 degrees of freedom, whose t is
    2.776445. The order of the seeds and seeds without a partner change nothing.
    """
    a, b = {2: 1.9, 0: 1.9, 1: 1.9}, {1: 2.5, 0: 2.0, 2: 2.4, 7: 9.0}
    comparison = Comparison.of({"a": a, "reference": REFERENCE, "b": b, "none": {}, "other": {9: 1.0}}, "reference")
    assert comparison.differences == {
        "a": pytest.approx({0: -0.1, 1: -0.2, 2: -0.3}),
        "b": pytest.approx({0: 0, 1: 0.4, 2: 0.2}),
    }
    assert comparison.mean("a") == Mean(pytest.approx(-0.2), pytest.approx(0.1 / math.sqrt(3)), 3)
    assert comparison.degrees_of_freedom == 4
    assert comparison.run_deviation == pytest.approx(math.sqrt(72 / 900 / 4))
    half = 2.776445 * math.sqrt(72 / 900 / 4) * math.sqrt(2 / 3)
    assert comparison.half_width(3) == pytest.approx(half, abs=1e-6)
    assert comparison.interval("a") == pytest.approx((-0.2 - half, -0.2 + half), abs=1e-6)


def test_a_report_says_what_is_resolved_in_the_unit_of_its_table():
    """The figures of the test above: a deviation of sqrt(72 / 900 / 4) = 0.14142, and a half width of 0.32060."""
    a, b = {0: 1.9, 1: 1.9, 2: 1.9}, {0: 2.0, 1: 2.5, 2: 2.4}
    comparison = Comparison.of({"reference": REFERENCE, "a": a, "b": b}, "reference")
    loss = resolution(comparison, "validation loss")
    assert loss.startswith("On validation loss the standard deviation of a run, ") and "is 0.1414 (4 degrees" in loss
    assert "beyond 0.3206 with 3 pairs is resolved" in loss
    share = resolution(comparison, "validity", in_points=True)
    assert "is 14.14 points (4 degrees" in share and "beyond 32.06 points with 3 pairs is resolved" in share


def test_a_model_that_scatters_alone_is_named_and_left_out():
    """The reference and a model agree but for 0.01; another one's runs are 1 apart."""
    steady = {"reference": {0: 1.0, 1: 1.0, 2: 1.01}, "a": {0: 2.0, 1: 2.01, 2: 2.0}, "b": {0: 3.0, 1: 3.0, 2: 3.01}}
    comparison = Comparison.of({**steady, "wild": {0: 5.0, 1: 6.0, 2: 5.0}}, "reference")
    others = Comparison.of(steady, "reference")
    assert comparison.scattered == "wild" and comparison.without("wild") == others
    text = resolution(comparison, "validation loss")
    assert "Leaving out `wild`, whose runs scatter more than all others', which was not planned, it is" in text
    assert f" planned, it is {others.run_deviation:.4f} (4 degrees of freedom)" in text
    assert f"beyond {others.half_width(3):.4f} with 3 pairs is resolved." in text
    a, b = {0: 1.9, 1: 1.9, 2: 1.9}, {0: 2.0, 1: 2.5, 2: 2.4}
    calm = Comparison.of({"reference": REFERENCE, "a": a, "b": b}, "reference")
    assert calm.scattered is None and "Leaving out" not in resolution(calm, "validation loss")
    wild_reference = Comparison.of(
        {"reference": {0: 5.0, 1: 6.0, 2: 5.0}, **{n: steady[n] for n in "ab"}}, "reference"
    )
    assert wild_reference.scattered is None
    assert Comparison.of({"reference": {0: 1.0}, "a": {0: 2.0}}, "reference").scattered is None


def test_a_model_of_one_seed_has_an_interval_but_tells_nothing_about_the_spread():
    both = Comparison.of({"reference": REFERENCE, "a": {0: 1.0, 1: 1.2, 2: 1.1}}, "reference")
    more = Comparison.of({"reference": REFERENCE, "a": {0: 1.0, 1: 1.2, 2: 1.1}, "b": {1: 2.5}}, "reference")
    assert (both.degrees_of_freedom, more.degrees_of_freedom) == (2, 2)
    assert more.run_deviation == pytest.approx(both.run_deviation)
    low, high = more.interval("b")
    assert (low + high) / 2 == pytest.approx(0.4) and (high - low) / 2 == pytest.approx(both.half_width(1))


def test_the_noise_of_the_reference_is_in_every_row():
    """Nine models that agree to the last digit and a reference that does not: no row's own spread shows less of it."""
    steady = {f"model {number}": {0: 1.0, 1: 1.0, 2: 1.0} for number in range(9)}
    comparison = Comparison.of({"reference": {0: 1.0, 1: 1.3, 2: 0.7}, **steady}, "reference")
    assert comparison.degrees_of_freedom == 18
    assert comparison.run_deviation == pytest.approx(math.sqrt(0.18 * 0.9 / 18))


def test_without_a_degree_of_freedom_there_is_no_interval():
    comparison = Comparison.of({"reference": REFERENCE, "a": {0: 1.0}, "b": {2: 1.0}}, "reference")
    assert comparison.mean("a") == Mean(-1.0, None, 1)
    assert comparison.run_deviation is None and comparison.half_width(1) is None
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
