"""The reports on molecules: every figure from made-up lines whose answer is known beforehand."""

import copy
import math

import pytest
from experiment_lines import LOOPED, PLAIN, SPIRAL_B, MadeUpExperiment, looped, make_line, make_molecule_line
from test_report import cells, section

from workshop.experiments import pictures
from workshop.experiments.hierarchy import Hierarchy
from workshop.experiments.molecules_report import molecules_report
from workshop.experiments.results import MOLECULE_FIELDS, ExperimentResults

MODELS = {"plain-3": PLAIN, "looped-mesh": looped(2, 4, LOOPED), "spiralformer-mesh": looped(2, 4, SPIRAL_B)}
NATS = {"plain-3": [0.84, 0.85, 0.85], "looped-mesh": [0.83, 0.84, 0.835], "spiralformer-mesh": [0.80, 0.81, 0.807]}
VALID = {"plain-3": [500, 510, 520], "looped-mesh": [560, 570, 574], "spiralformer-mesh": [610, 620, 633]}


def experiment() -> MadeUpExperiment:
    return MadeUpExperiment("molecules", "molecules", MODELS, ["plain-3", "looped-mesh"])


def lines(nats: dict = NATS) -> list[dict]:
    """Three seeds at the middle rate; the other rates of the sweep end 0.1 above."""
    found = []
    for name, values in nats.items():
        for seed, (value, valid) in enumerate(zip(values, VALID[name], strict=True)):
            found.append(make_molecule_line(name, seed, 0.004, value, valid))
        found += [make_molecule_line(name, 0, rate, 1.0, 300) for rate in (0.002, 0.008)]
    return found


def write(found: list[dict]) -> str:
    return molecules_report(ExperimentResults.gather(experiment(), found), {}, Hierarchy({}, {}))


@pytest.mark.parametrize(
    "field, inner", [(field, name) for field, names in MOLECULE_FIELDS.items() for name in (None, *names)]
)
def test_a_line_that_lacks_a_field_is_refused(field, inner):
    line = copy.deepcopy(make_molecule_line("plain-3", 0, 0.004, 0.8, 500))
    del (line if inner is None else line[field])[inner or field]
    with pytest.raises(ValueError, match=f"the field `{field}`" if inner is None else f"`{field}`.* lacks '{inner}'"):
        ExperimentResults.gather(experiment(), [line])


def test_a_loss_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="nats_per_token.*null"):
        ExperimentResults.gather(experiment(), [make_molecule_line("plain-3", 0, 0.004, math.nan, 500)])


def test_losses_and_shares_are_means_over_the_seeds():
    row = cells(section(write(lines()), "Results"), "spiralformer-mesh")
    assert row["nats per token"] == ["0.8057 ± 0.0030"] and row["seeds"] == ["3"] and row["width"] == ["16"]
    assert row["valid"] == ["62.1% ± 0.7"] and row["bracket"] == ["4.0% ± 0.0"]
    assert row["ring"] == ["16.4% ± 0.3"] and row["other"] == ["1.0% ± 0.0"] and row["unique"] == ["99.8% ± 0.0"]
    share, n, z = 1863 / 3000, 3000, 1.959963984540054  # Wilson's interval of all samples, written out
    centre, half = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    low, high = ((centre + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
    assert row["of all samples"] == [f"{100 * low:.1f} to {100 * high:.1f}%"] == ["60.3 to 63.8%"]


def test_differences_are_paired_and_judged_in_loss_and_validity():
    row = cells(section(write(lines()), "To `looped-mesh`"), "spiralformer-mesh")
    assert row["nats per token"] == ["-0.0293 ± 0.0007"] and row["valid"] == ["+5.3% ± 0.3"]
    assert row["verdict"] == ["lower", "higher"] and row["pairs"] == ["3"]
    low, high = (float(part) for part in row["95% interval"][1].split(" to "))
    assert low == pytest.approx(5.3 - (high - 5.3), abs=0.11) and 0 < low < 5.3


def test_a_diverged_model_has_no_share_either():
    text = write(lines(NATS | {"looped-mesh": [0.83, None, 0.83]}))
    assert "`looped-mesh` diverged with seed 1" in text
    row = cells(section(text, "Results"), "looped-mesh")
    assert row["nats per token"] == ["diverged"] and row["valid"] == row["ring"] == ["-"]
    assert row["of all samples"] == row["unique"] == ["-"]


def test_every_prefix_of_a_store_gives_a_report_and_pictures(tmp_path):
    found = lines()
    found = [*found[::3], *found[1::3], *found[2::3], make_line("other", "gpt-neox", 0, 0.004, 2.0)]
    for count in range(len(found) + 1):
        results = ExperimentResults.gather(experiment(), found[:count])
        text = molecules_report(results, {}, Hierarchy({}, {}))
        assert all(text.count(f"\n| {name} |") >= 3 for name in MODELS)
        assert len(pictures.pictures(results)) == (len(results.measured) > 0)
    assert "All 9 runs finished." in text and "Nats per token on validation molecules with seed 0" in text
    assert "foreign" not in text and "bits per byte" not in text
    (picture,) = pictures.pictures(results)
    picture.draw(tmp_path / picture.file)
    assert (tmp_path / "molecules.png").stat().st_size > 10000
