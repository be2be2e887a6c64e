"""The reports of training experiments: every figure from made-up lines whose answer is known beforehand."""

import copy
import math

import numpy as np
import pytest
from experiment_lines import ABLATIONS, MAIN, RATIOS, MadeUpExperiment, make_line, make_lines

import report
from workshop.experiments import pictures as report_plots
from workshop.experiments import report as report_tables
from workshop.experiments.plan import load_experiment
from workshop.experiments.results import FIELDS, ExperimentResults
from workshop.experiments.statistics import LOWER, NOISE, OPPOSITE, REPRODUCES
from workshop.experiments.store import read_lines
from workshop.plotting import plt
from workshop.published import PERPLEXITIES

MAIN_BITS = {
    "gpt-neox": [2.130, 2.140, 2.135],
    "gpt-neox-mesh": [2.110, 2.121, 2.114],
    "looped-anchor": [2.160, 2.169, 2.166],
    "looped-mesh": [2.120, 2.130, 2.126],
    "spiralformer-b": [2.131, 2.140, 2.136],
    "spiralformer-l": [2.150, 2.160, 2.154],
}
RATIO_BITS = {"ratio-0": [2.130] * 3, "ratio-2": [2.11, 2.12, 2.112], "ratio-4": [2.1, 2.109, 2.101]}
RATIO_BITS |= {"ratio-6": [2.101, 2.108, 2.103], "ratio-8": [2.14, 2.149, 2.142]}


def main_experiment(name: str = "main_small", **options) -> MadeUpExperiment:
    return MadeUpExperiment(name, "table", MAIN, ["gpt-neox", "looped-anchor"], **options)


def ablations() -> MadeUpExperiment:
    return MadeUpExperiment("ablations", "ablations", ABLATIONS, ["published"], rate_of="published")


def ratios() -> MadeUpExperiment:
    return MadeUpExperiment("recurrence_ratio", "ratio", RATIOS, ["ratio-0"])


def write(experiment: MadeUpExperiment, lines: list[dict]) -> str:
    results = ExperimentResults.gather(experiment, lines)
    return report_tables.report(results, {})


def section(text: str, title: str) -> str:
    """A report's section of that title, up to the next one."""
    return text.split(f"## {title}")[1].split("\n##")[0]


def cells(text: str, model: str) -> dict[str, list[str]]:
    """Column -> cells of one model's row in the only table of a text; two columns may have one name."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    (row,) = (line for line in lines if line[0] == model)
    found: dict[str, list[str]] = {}
    for column, cell in zip(lines[0], row, strict=True):
        found.setdefault(column, []).append(cell)
    return found


# -- the store --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field, inner", [(field, name) for field, names in FIELDS.items() for name in (None, *names)])
def test_a_line_that_lacks_a_field_is_refused(field, inner):
    line = copy.deepcopy(make_line("other", "model", 0, 0.004, 2.0))
    del (line if inner is None else line[field])[inner or field]
    with pytest.raises(ValueError, match=f"the field `{field}`" if inner is None else f"`{field}`.* lacks '{inner}'"):
        ExperimentResults.gather(main_experiment(), [line])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused(value):
    with pytest.raises(ValueError, match="bits_per_byte.*null"):
        ExperimentResults.gather(main_experiment(), [make_line("main_small", "gpt-neox", 0, 0.004, value)])


def test_an_empty_store_gives_dashes():
    for experiment in (main_experiment(), ablations(), ratios()):
        text = write(experiment, [])
        assert f"**0 of {3 * len(experiment.models)} runs finished.**" in text and "No run yet" in text
        row = cells(section(text, "Results"), list(experiment.models)[-1])
        assert row["seeds"] == ["0"] and row["learning rate"] == row["training FLOPs"] == row["foreign"] == ["-"]
        assert report_plots.pictures(ExperimentResults.gather(experiment, [])) == []
    assert "No ratio has a mean yet" in text and "no interval can be given" in text


def test_every_prefix_of_a_store_gives_a_report():
    """Lines in a mixed order, so that models, seeds and sweeps stop half way."""
    lines = make_lines(main_experiment(), MAIN_BITS) + make_lines(ratios(), RATIO_BITS)
    lines = lines[::3] + lines[1::3] + lines[2::3]
    for experiment in (main_experiment(), ratios()):
        counts = []
        for count in range(len(lines) + 1):
            text = write(experiment, lines[:count])
            assert all(text.count(f"\n| {name} |") >= 2 for name in experiment.models)
            results = ExperimentResults.gather(experiment, lines[:count])
            counts.append(sum(len(model.runs) for model in results.models))
            assert (f"**{counts[-1]} of" in text) == (counts[-1] < 3 * len(experiment.models))
        assert counts == sorted(counts) and f"All {counts[-1]} runs finished" in text


def test_what_is_missing_is_said_at_the_top():
    lines = make_lines(main_experiment(), {**MAIN_BITS, "looped-mesh": [2.12, 2.13]})
    lines = [line for line in lines if not (line["model"] == "spiralformer-l" and line["learning_rate"] == 0.008)]
    text = write(main_experiment(), lines)
    assert "**14 of 18 runs finished.** The sweep of `spiralformer-l` has 2 of 3 rates." in text.split("\n- ")[0]
    table = section(text, "Results")
    assert cells(table, "looped-mesh")["seeds"] == ["2"]
    assert cells(table, "looped-mesh")["bits per byte, validation"] == ["2.1250 ± 0.0050"]
    assert cells(table, "spiralformer-l")["bits per byte, validation"] == ["-"]
    assert cells(section(text, "To `gpt-neox`"), "looped-mesh")["pairs"] == ["2"]


def test_a_diverged_model_has_no_mean_and_no_part_in_the_intervals():
    whole = make_lines(main_experiment(), MAIN_BITS)
    without = [line for line in whole if line["model"] != "looped-anchor"]
    diverged = without + make_lines(main_experiment(), {"looped-anchor": [2.1, None, 9.9]})
    text = write(main_experiment(), diverged)
    assert "`looped-anchor` diverged with seed 1" in text.split("\n- ")[0]
    row = cells(section(text, "Results"), "looped-anchor")
    assert row["seeds"] == ["3"] and row["bits per byte, validation"] == row["foreign"] == ["diverged"]
    assert cells(section(text, "To `gpt-neox`"), "looped-anchor")["pairs"] == ["0"]
    deviations = [
        ExperimentResults.gather(main_experiment(), lines).compare("foreign").run_deviation
        for lines in (whole, without, diverged)
    ]
    assert deviations[1] == deviations[2] != deviations[0]


def test_a_model_that_diverged_at_every_rate_is_named():
    lines = [make_line("main_small", "gpt-neox", 0, rate, None) for rate in (0.002, 0.004, 0.008)]
    text = write(main_experiment(), lines)
    assert "`gpt-neox` diverged at every learning rate." in text
    assert cells(section(text, "Results"), "gpt-neox")["foreign"] == ["diverged"]
    assert "diverged" not in section(write(main_experiment(), lines[:2]), "Results")
    assert cells(section(text, "Sweep"), "gpt-neox")["0.008"] == ["diverged"]


# -- tables -----------------------------------------------------------------------------------------------------------


def test_the_main_table_holds_what_the_lines_say():
    costs = {"parameters": 1234567, "non_embedding_parameters": 234567, "flops": 1.234e13}
    costs |= {"prefill_flops_per_token": 7654321.0, "kv_bytes_per_token": 1472.0, "decode_layer_equivalents": 5.75}
    lines = make_lines(main_experiment(), {"spiralformer-l": MAIN_BITS["spiralformer-l"]}, 0.002, **costs)
    text = write(main_experiment(), lines)
    row = cells(section(text, "Results"), "spiralformer-l")
    assert [cell for found in row.values() for cell in found] == [
        "spiralformer-l",
        "4+4x{1/16,1/8,1/4,1/2}+4",
        *("234,567", "1.23e13", "0.002", "3"),
        # The mean of 2.150, 2.160 and 2.154; their standard deviation is 0.00503.
        *("2.1547 ± 0.0029", "2.5547 ± 0.0029"),
    ]
    row = cells(section(text, "Costs"), "spiralformer-l")
    assert [cell for found in row.values() for cell in found] == [
        "spiralformer-l",
        *("1,234,567", "2,097,152", "7,654,321", "1,472", "5.75"),
    ]


def test_provenance_names_every_run_once():
    lines = make_lines(main_experiment(), MAIN_BITS, wall_seconds=600.0)
    assert "resumed" not in write(main_experiment(), lines)
    lines[0] |= {
        "commit": "1234567890-dirty",
        "resumed_from_step": 5,
        "date": "2026-11-22",
        "machine": {**lines[0]["machine"], "cores": 64},
    }
    text = write(main_experiment(), lines + make_lines(ratios(), RATIO_BITS, date="2027-01-01"))
    for words in (
        "time: 5.0 hours, summed over 30 runs, sweep included; of 1 resumed runs, the part after the resumption",
        "commit: 1234567-dirty, abcdef0",
        "date: 2026-11-22 to 2026-11-24",
        "x86_64, 2 cores, 2 runs at a time, 1 threads in each; Python 3.11.7, torch 2.13.0, transformers 5.23.0; or",
        "x86_64, 64 cores",
        "seeds: 0, 1, 2",
        "tokens of a run: 2,097,152",
        "foreign foreign.txt (foreign)",
    ):
        assert words in text


def test_differences_and_verdicts_stand_beside_the_papers():
    text = section(write(main_experiment(), make_lines(main_experiment(), MAIN_BITS)), "To `gpt-neox`")
    row = cells(text, "looped-anchor")
    # Differences 0.030, 0.029, 0.031, ln(11.63 / 11.31) and ln(7.51 / 7.44).
    assert row["validation"] == row["foreign"] == ["+0.0300 ± 0.0006"]
    assert row["paper, 160M"] == ["+0.0279"] and row["paper, 1.4B"] == ["+0.0094"]
    verdicts = {name: cells(text, name)["verdict, validation"] for name in MAIN if name != "gpt-neox"}
    assert verdicts == {
        "gpt-neox-mesh": [REPRODUCES],
        "looped-anchor": [REPRODUCES],
        "looped-mesh": [LOWER],  # the paper's is higher at 160M and lower at 1.4B
        "spiralformer-b": [NOISE],
        "spiralformer-l": [OPPOSITE],
    }
    assert cells(text, "gpt-neox-mesh")["paper, 160M"] == ["-"]
    assert "| gpt-neox |" not in text
    # What is left of each run when the means of its model and of its seed are taken out.
    bits = np.array(list(MAIN_BITS.values()))
    left = bits - bits.mean(axis=1, keepdims=True) - bits.mean(axis=0) + bits.mean()
    deviation = math.sqrt((left**2).sum() / 10)
    assert f"is {deviation:.4f} (10 degrees of freedom)" in text
    assert f"beyond {2.228139 * deviation * math.sqrt(2 / 3):.4f} with 3 pairs" in text


def test_every_reference_has_a_table_of_its_own():
    text = section(write(main_experiment(), make_lines(main_experiment(), MAIN_BITS)), "To `looped-anchor`")
    row = cells(text, "spiralformer-b")
    assert row["validation"] == ["-0.0293 ± 0.0003"] and row["verdict, validation"] == [REPRODUCES]
    assert row["paper, 160M"] == ["-0.0297"]  # ln(11.29 / 11.63)
    assert "| looped-anchor |" not in text and "difference seen to `looped-anchor` beyond" in text


def test_sizes_are_connected_only_where_they_saw_equally_many_tokens():
    small, large, long = (main_experiment(name) for name in ("main_small", "larger", "longer"))
    tokens = {"main_small": 100, "larger": 100, "longer": 400}
    lines = [line for one in (small, large, long) for line in make_lines(one, MAIN_BITS, tokens=tokens[one.name])]
    results = [ExperimentResults.gather(one, lines) for one in (long, small, large)]
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_plots, "draw_scaling", lambda sizes, path: drawn.extend(sizes))
        (picture,) = report_plots.scaling_picture(results)
        picture.draw(None)
    assert [one.name for one in drawn] == ["main_small", "larger"]
    assert report_plots.scaling_picture(results[:2]) == []


def test_the_verdict_on_foreign_text_is_its_own():
    lines = make_lines(main_experiment(), MAIN_BITS)
    for line in lines:
        if line["model"] == "spiralformer-b":
            line["bits_per_byte"]["foreign"] -= 0.1
    row = cells(section(write(main_experiment(), lines), "To `gpt-neox`"), "spiralformer-b")
    assert row["verdict, validation"] == [NOISE] and row["verdict, foreign"] == [REPRODUCES]
    assert row["validation"][0].startswith("+0.0007") and row["foreign"][0].startswith("-0.0993")


def test_the_resolution_is_given_for_every_number_of_pairs():
    lines = make_lines(main_experiment(), {**MAIN_BITS, "looped-mesh": [2.12, 2.13]})
    text = write(main_experiment(), lines)
    comparison = ExperimentResults.gather(main_experiment(), lines).compare("validation")
    sizes = f"{comparison.half_width(2):.4f} with 2 and {comparison.half_width(3):.4f} with 3 pairs"
    assert sizes in text


def test_the_papers_changes():
    assert report_tables.paper_change(PERPLEXITIES["1.4B"], "spiralformer-l", "gpt-neox") == pytest.approx(
        -0.04116, abs=1e-5
    )
    assert report_tables.paper_change(PERPLEXITIES["160M"], "gpt-neox-mesh", "gpt-neox") is None
    assert report_tables.expected_change([0.1, None, 0.2]) == 0.1
    assert report_tables.expected_change([0.1, -0.2]) is None and report_tables.expected_change([None]) is None


def test_ablations_take_one_rate_and_keep_their_own_costs():
    bits = {
        name: [2.1 + 0.01 * index + 0.001 * seed * (index % 2) for seed in range(3)]
        for index, name in enumerate(ABLATIONS)
    }
    lines = make_lines(ablations(), bits)
    for line in lines:
        line["parameters"] = 1000 if line["model"] == "anchor" else 2000
    text = write(ablations(), lines)
    assert cells(section(text, "Costs"), "anchor")["parameters"] == ["1,000"]
    assert cells(section(text, "Results"), "anchor")["learning rate"] == ["0.004"]
    assert cells(section(text, "Results"), "fine-to-coarse")["layers"] == ["2+4x{1,1/2,1/4,1/8}+2"]
    row = cells(section(text, "To `published`"), "fine-to-coarse")
    assert row["validation"] == ["+0.0200 ± 0.0000"] and row["paper, 410M"] == ["+0.0263"]
    assert row["verdict, validation"] == row["verdict, foreign"] == [REPRODUCES]
    swept = section(text, "Sweep")
    assert "All models take the rate of `published`" in swept and "| anchor |" not in swept
    assert "26 runs" in text and "The sweep of" not in text


def test_the_sweep_marks_the_chosen_rate_and_warns_at_an_edge():
    lines = make_lines(main_experiment(), {"gpt-neox": [2.0]}) + make_lines(
        main_experiment(), {"looped-mesh": [2.0]}, 0.002
    )
    lines += make_lines(main_experiment(), {"spiralformer-b": [2.0]}, 0.008)
    lines.append(make_line("main_small", "spiralformer-l", 0, 0.002, 2.3))
    swept = section(write(main_experiment(), lines), "Sweep of learning rates")
    assert list(cells(swept, "gpt-neox").values()) == [["gpt-neox"], ["2.1000"], ["**2.0000**"], ["2.1000"]]
    assert list(cells(swept, "spiralformer-l").values()) == [["spiralformer-l"], ["2.3000"], ["-"], ["-"]]
    assert "edge of the grid: `looped-mesh` (lowest), `spiralformer-b` (highest)." in swept
    alone = main_experiment(learning_rates=[0.004])
    assert "Sweep" not in write(alone, make_lines(alone, MAIN_BITS))


def test_the_lowest_ratio_is_compared_with_all_others():
    text = write(ratios(), make_lines(ratios(), RATIO_BITS))
    assert cells(section(text, "Results"), "ratio-2")["recurrence ratio"] == ["17%"]
    found = section(text, "The lowest ratio")
    assert "`ratio-4`, recurrence ratio 33%, within the paper's 30% to 40%." in found
    assert "Its difference to ratio 0 (`ratio-0`) is resolved." in found
    assert "Resolved above it: `ratio-0`, `ratio-2`, `ratio-8`; not resolved: `ratio-6`." in found
    flat = {name: [2.1, 2.2, 2.3] for name in RATIOS} | {"ratio-8": [2.1, 2.2, 2.29], "ratio-0": [2.2, 2.1, 2.3]}
    found = section(write(ratios(), make_lines(ratios(), flat)), "The lowest ratio")
    assert "`ratio-8`, recurrence ratio 67%, outside" in found
    assert "(`ratio-0`) is not resolved" in found and "Resolved above it: none" in found


def test_where_ratio_0_is_lowest_it_is_not_compared_with_itself():
    bits = RATIO_BITS | {"ratio-0": [2.0] * 3}
    found = section(write(ratios(), make_lines(ratios(), bits)), "The lowest ratio")
    assert "`ratio-0`, recurrence ratio 0%, outside" in found and "to ratio 0" not in found
    found = section(write(ratios(), make_lines(ratios(), {"ratio-2": [2.0, 2.1]})), "The lowest ratio")
    assert (
        "`ratio-2`" in found and "to ratio 0" not in found and "Resolved above it: none; not resolved: none" in found
    )


# -- pictures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def figures(monkeypatch) -> dict:
    """File name -> figure, in place of files."""
    drawn = {}
    monkeypatch.setattr(report_plots, "save", lambda figure, path: drawn.setdefault(path, figure))
    yield drawn
    for figure in drawn.values():
        plt.close(figure)


def draw_all(experiments: list[tuple[MadeUpExperiment, list[dict]]]) -> None:
    results = [ExperimentResults.gather(experiment, lines) for experiment, lines in experiments]
    for picture in report_plots.scaling_picture(results) + [p for one in results for p in report_plots.pictures(one)]:
        picture.draw(picture.file)


def sized_lines(experiment: MadeUpExperiment, factor: float) -> list[dict]:
    """Every family at costs of its own."""
    lines = []
    for index, (name, bits) in enumerate(MAIN_BITS.items(), start=1):
        costs = {"flops": factor * index * 1e12, "non_embedding_parameters": int(factor * index * 1e5)}
        lines += make_lines(experiment, {name: [value / factor**0.1 for value in bits]}, **costs)
    return lines


def test_the_pictures_show_means_over_costs(figures):
    small, large = main_experiment(), main_experiment("larger")
    draw_all([(small, sized_lines(small, 1)), (large, sized_lines(large, 10))])
    assert set(figures) == {"scaling.png", *(f"{s}{k}.png" for s in ("main_small", "larger") for k in ("", "_curves"))}
    for axes, unit in zip(figures["main_small.png"].axes, (1e12, 1e5), strict=True):
        points = [container.lines[0].get_xydata()[0] for container in axes.containers]
        assert [point[0] / unit for point in points] == pytest.approx([1, 2, 3, 4, 5, 6])
        assert points[1][1] == pytest.approx(2.115)
    for axes in figures["scaling.png"].axes:
        families = [line for line in axes.lines if not line.get_label().startswith("_")]
        assert [line.get_label() for line in families] == list(MAIN)
        for line in families:
            x, y = line.get_xydata().T
            assert x[1] / x[0] == pytest.approx(10) and y[0] / y[1] == pytest.approx(10**0.1)


def test_a_family_has_one_colour_in_all_pictures(figures):
    small, large = main_experiment(), main_experiment("larger")
    draw_all([(small, sized_lines(small, 1)), (large, sized_lines(large, 10))])
    for figure in figures.values():
        handles, labels = figure.axes[0].get_legend_handles_labels()
        lines = [handle.lines[0] if hasattr(handle, "lines") else handle for handle in handles]
        found = {label: (line.get_color(), line.get_marker()) for label, line in zip(labels, lines, strict=True)}
        assert found == {name: report_plots.STYLES[name] for name in MAIN}
    for models in (MAIN, load_experiment("scripts/experiments/molecules_150k.yaml").models):
        assert len({report_plots.style_of(name)[0] for name in models}) == len(models)


def test_no_two_labels_of_an_axis_overlap(figures):
    small, large = main_experiment(), main_experiment("larger")
    bits = {name: [2.1 + 0.01 * index, 2.11, 2.12] for index, name in enumerate(ABLATIONS)}
    experiments = [(small, sized_lines(small, 1)), (large, sized_lines(large, 36))]
    draw_all(
        [*experiments, (ablations(), make_lines(ablations(), bits)), (ratios(), make_lines(ratios(), RATIO_BITS))]
    )
    assert len(figures) == 7
    for name, figure in figures.items():
        figure.canvas.draw()
        for axes in figure.axes:
            for axis in (axes.xaxis, axes.yaxis):
                labels = axis.get_ticklabels(which="both")
                boxes = [label.get_window_extent() for label in labels if label.get_visible() and label.get_text()]
                assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]), (name, axis)


def test_a_curve_has_the_points_that_all_seeds_have():
    lines = make_lines(main_experiment(), {"gpt-neox": [2.0, 2.1]}, flops=4 * 10**18, tokens=400)
    curves = [[[0, 8.0], [100, 4.0], [200, 3.0], [400, 2.0]], [[0, 8.0], [100, 5.0], [200, None], [400, 2.2]]]
    for line in lines:
        line["validation_curve"] = curves[line["seed"]]
    model = ExperimentResults.gather(main_experiment(), lines).models[0]
    flops, bits = report_plots.validation_curves(model)
    assert list(flops) == [1e18, 4e18] and bits.tolist() == [[4.0, 2.0], [5.0, 2.2]]


def test_the_ablations_show_intervals_and_pairs(figures):
    bits = {name: [2.1, 2.11, 2.12] for name in ABLATIONS} | {
        "anchor": [2.11, 2.12, 2.16],
        "broadcast": [2.1, None, 2.1],
    }
    lines = make_lines(ablations(), bits)
    draw_all([(ablations(), lines)])
    axes = figures["ablations.png"].axes[0]
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert rows == [name for name in ABLATIONS if name not in ("published", "broadcast")]
    interval, pairs, mean = axes.lines[:3]
    comparison = ExperimentResults.gather(ablations(), lines).compare("validation")
    assert tuple(interval.get_xdata()) == comparison.interval("anchor") and set(interval.get_ydata()) == {0}
    assert list(pairs.get_xdata()) == pytest.approx([0.01, 0.01, 0.04]) and mean.get_xdata() == pytest.approx([0.02])


def test_the_ratios_are_drawn_in_their_order(figures):
    experiment = ratios()
    experiment.models = dict(reversed(RATIOS.items()))
    draw_all([(experiment, make_lines(experiment, RATIO_BITS))])
    axes = figures["recurrence_ratio.png"].axes[0]
    x, y = axes.containers[0].lines[0].get_xydata().T
    assert list(x) == pytest.approx([0, 1 / 6, 1 / 3, 1 / 2, 2 / 3])
    assert y[0] == pytest.approx(2.13) and len(axes.lines[0].get_xdata()) == 15


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def arguments(tmp_path, monkeypatch) -> report.ReportArguments:
    """Arguments of a run over made-up experiments, whose files are their names."""
    made = {experiment.name: experiment for experiment in (main_experiment(), ratios(), ablations())}
    lines = make_lines(main_experiment(), MAIN_BITS) + make_lines(ratios(), RATIO_BITS)
    monkeypatch.setattr(report, "load_experiment", made.__getitem__)
    monkeypatch.setattr(report, "read_lines", lambda path: lines)
    return report.ReportArguments(experiments=list(made), output_dir=str(tmp_path / "results"))


def test_the_command_writes_the_pictures_that_its_text_shows(arguments, tmp_path, capsys):
    report.main(arguments)
    folder = tmp_path / "results"
    assert {path.name for path in folder.iterdir()} == {
        *("main_small.md", "main_small.png", "main_small_curves.png"),
        *("recurrence_ratio.md", "recurrence_ratio.png", "ablations.md"),
    }
    assert str(folder / "main_small.md") in capsys.readouterr().out
    shown = [file for path in folder.glob("*.md") for file in report_files(path.read_text())]
    assert sorted(shown) == sorted(path.name for path in folder.glob("*.png"))
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.glob("*.png"))


def report_files(text: str) -> list[str]:
    return [part.split(")")[0] for part in text.split("](")[1:]]


def test_the_command_writes_the_same_bytes_twice(arguments, tmp_path):
    contents = []
    for _ in range(2):
        report.main(arguments)
        contents.append({path.name: path.read_bytes() for path in (tmp_path / "results").iterdir()})
    assert contents[0] == contents[1]


def test_a_check_names_the_files_that_are_out_of_date(arguments, tmp_path):
    report.main(arguments)
    arguments.check = True
    report.main(arguments)
    folder = tmp_path / "results"
    (folder / "ablations.md").unlink()
    changed = (folder / "main_small.md").read_text().replace("2.1350", "2.1349")
    (folder / "main_small.md").write_text(changed)
    with pytest.raises(SystemExit, match="main_small.md, ablations.md") as failure:
        report.main(arguments)
    assert "recurrence_ratio" not in str(failure.value)
    assert (folder / "main_small.md").read_text() == changed and not (folder / "ablations.md").exists()


def test_the_reports_of_the_docs_are_those_of_their_lines():
    report.main(report.ReportArguments(check=True))


def test_the_page_of_results_holds_the_table_of_the_main_comparison():
    lines = read_lines(report.ROOT / "docs" / "results" / "runs.jsonl")
    experiment = load_experiment(report.ROOT / "scripts" / "experiments" / "main_small.yaml")
    table = report_tables.results_table(ExperimentResults.gather(experiment, lines))
    assert table in (report.ROOT / "docs" / "results.md").read_text(encoding="utf-8")
