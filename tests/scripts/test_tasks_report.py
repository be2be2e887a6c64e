"""The reports on synthetic tasks: every figure from made-up lines whose answer is known beforehand."""

import copy

import pytest
from experiment_lines import LOOPED, PLAIN, SPIRAL_B, MadeUpExperiment, looped, make_line, make_task_line
from test_report import cells, section

from report import writer_of
from workshop.experiments import pictures
from workshop.experiments.results import TASK_FIELDS, ExperimentResults
from workshop.experiments.tasks_report import tasks_report

MODELS = {"plain-3": PLAIN, "looped-mesh": looped(2, 4, LOOPED), "spiralformer-mesh": looped(2, 4, SPIRAL_B)}
NATS = {"plain-3": [0.84, 0.85, 0.85], "looped-mesh": [0.83, 0.84, 0.835], "spiralformer-mesh": [0.80, 0.81, 0.807]}
# Of 1000 answers in "validation", half of them at depth 1, the rest at depth 10.
SHALLOW = {"plain-3": [400, 410, 405], "looped-mesh": [401, 409, 406], "spiralformer-mesh": [450, 461, 456]}
DEEP = {"plain-3": [100, 110, 104], "looped-mesh": [130, 141, 133], "spiralformer-mesh": [100, 109, 106]}


def experiment() -> MadeUpExperiment:
    return MadeUpExperiment("dyck", "task", MODELS, ["plain-3", "looped-mesh"])


def lines(nats: dict = NATS) -> list[dict]:
    """Three seeds at the middle rate; the other rates of the sweep end above."""
    found = []
    for name, values in nats.items():
        for seed, value in enumerate(values):
            found.append(make_task_line(name, seed, 0.004, value, SHALLOW[name][seed], DEEP[name][seed]))
        found += [make_task_line(name, 0, rate, 1.0, 5, 5) for rate in (0.002, 0.008)]
    return found


def write(found: list[dict]) -> str:
    return tasks_report(ExperimentResults.gather(experiment(), found), {})


@pytest.mark.parametrize(
    "field, inner", [(field, name) for field, names in TASK_FIELDS.items() for name in (None, *names)]
)
def test_a_line_that_lacks_a_field_is_refused(field, inner):
    line = copy.deepcopy(make_task_line("plain-3", 0, 0.004, 0.8, 400, 100))
    del (line if inner is None else line[field])[inner or field]
    with pytest.raises(ValueError, match=f"the field `{field}`" if inner is None else f"`{field}`.* lacks '{inner}'"):
        ExperimentResults.gather(experiment(), [line])


def test_a_loss_that_is_not_finite_is_refused():
    line = make_task_line("plain-3", 0, 0.004, float("inf"), 400, 100)
    with pytest.raises(ValueError, match="nats_per_token.*null"):
        ExperimentResults.gather(experiment(), [line])


def test_losses_and_accuracies_are_means_over_the_seeds():
    text = write(lines())
    row = cells(section(text, "Results"), "spiralformer-mesh")
    assert row["nats per token"] == ["0.8057 ± 0.0030"] and row["seeds"] == ["3"]
    assert row["accuracy, validation"] == ["56.1% ± 0.6"]  # 550, 570 and 562 of 1000
    assert row["accuracy, longer"] == ["28.0% ± 0.3"]  # half of that
    by_depth = cells(section(text, "Validation, by depth"), "spiralformer-mesh")
    assert by_depth["1"] == ["91.1% ± 0.6"] and by_depth["10"] == ["21.0% ± 0.5"]  # of 500 answers each


def test_differences_are_paired_and_judged_in_loss_accuracy_and_by_class():
    text = section(write(lines()), "To `plain-3`")
    main, by_class = text.split("Validation, by depth:")
    row = cells(main, "spiralformer-mesh")
    assert row["nats per token"] == ["-0.0410 ± 0.0010"] and row["accuracy, validation"] == ["+5.1% ± 0.1"]
    assert row["verdict"] == ["lower", "higher", "higher"] and row["pairs"] == ["3"]
    low, high = (float(part) for part in row["95% interval"][1].split(" to "))
    assert low < 5.1 < high and low == pytest.approx(10.13 - high, abs=0.11)
    row = cells(by_class.split("Longer")[0], "spiralformer-mesh")
    assert row["1"] == ["**+10.1% ± 0.1**"] and row["10"] == ["+0.1% ± 0.2"]
    assert cells(by_class.split("Longer")[0], "looped-mesh")["10"] == ["**+6.0% ± 0.1**"]
    assert "On validation loss the standard deviation" in text and "On accuracy, longer, the standard" in text


def test_a_difference_that_rounds_to_nothing_is_not_bold():
    """Where nearly all answers are right nothing scatters, and the interval is as narrow as its difference."""
    found = lines()
    for line in found:
        missing = 10 if line["model"] == "spiralformer-mesh" else 0
        line["accuracy"]["validation"]["depth 10"] = [50_000 - missing, 50_000]
        line["accuracy"]["longer"]["depth 10"] = [50_000 - 10 * missing, 50_000]
    short, longer = section(write(found), "To `plain-3`").split("Validation, by depth:")[1].split("Longer, by depth:")
    assert cells(short, "spiralformer-mesh")["10"] == ["-0.0% ± 0.0"]
    assert cells(longer, "spiralformer-mesh")["10"] == ["**-0.2% ± 0.0**"]


def test_a_diverged_model_has_no_accuracy_either():
    text = write(lines(NATS | {"looped-mesh": [0.83, None, 0.83]}))
    assert "`looped-mesh` diverged with seed 1" in text
    row = cells(section(text, "Results"), "looped-mesh")
    assert row["nats per token"] == ["diverged"] and row["accuracy, validation"] == ["-"]
    assert cells(section(text, "Longer, by depth"), "looped-mesh")["10"] == ["-"]


def test_every_prefix_of_a_store_gives_a_report_and_pictures(tmp_path):
    found = lines()
    found = [*found[::3], *found[1::3], *found[2::3], make_line("other", "gpt-neox", 0, 0.004, 2.0)]
    for count in range(len(found) + 1):
        results = ExperimentResults.gather(experiment(), found[:count])
        text = tasks_report(results, {})
        assert all(text.count(f"\n| {name} |") >= 3 for name in MODELS)
        assert len(pictures.pictures(results)) == (len(results.measured) > 0)
    assert "All 9 runs finished." in text and "Nats per token on validation rows with seed 0" in text
    assert "longer Made-up, longer (longer" in text and "foreign" not in text and "bits per byte" not in text
    (picture,) = pictures.pictures(results)
    picture.draw(tmp_path / picture.file)
    assert (tmp_path / "dyck.png").stat().st_size > 10000


def test_the_command_writes_a_report_of_each_kind_with_its_own():
    assert writer_of("task", hierarchy=None) is tasks_report
