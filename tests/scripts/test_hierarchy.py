"""Rings and branches of samples: counted by hand, read from finished runs, and shown in tables and pictures."""

import hashlib
import statistics
from pathlib import Path

import pytest
from documents import commands
from experiment_lines import LOOPED, PLAIN, SPIRAL_B, MadeUpExperiment, looped, make_line, make_molecule_line
from test_report import cells, section

import tally_samples
from workshop.experiments import pictures
from workshop.experiments.hierarchy import FEWEST, Hierarchy, pooled
from workshop.experiments.molecules_report import molecules_report
from workshop.experiments.results import ExperimentResults
from workshop.experiments.store import append_line, read_lines, run_folder
from workshop.molecules.hierarchy import (
    binned,
    branch_depth,
    hierarchy_figures,
    ring_bonds,
    tally,
    tally_by_validity,
)
from workshop.molecules.judging import share
from workshop.molecules.tables import hierarchy_table

# Written for these tests: rings that share a digit, sit in one another, and are joined in one atom.
RINGS = {
    **{"CCO": 0, "C1CC1": 1, "C1CC1C1CC1": 2, "C12CC1C2": 2, "c1ccc2ccccc2c1": 2, "[13CH3]C[N+]([O-])=O": 0},
    **{"C%10CC%10": 1, "C1CC2CCC1C2": 2, "C1CC1.C1CC1": 2, "C[C@@H]1CC[NH2+]1": 1},
}
BROKEN_RINGS = {"C1CC": 1, "C1CC1C1": 2, "C1C2C": 2, "1": 1, "": 0, "C12C1": 2, "CC)1(": 1}
DEPTHS = {"CCO": 0, "": 0, "C(C)C": 1, "C(C)(C)C": 1, "C(C(C)C)C": 2, "C(C(C(C": 3, "C)C(C)C": 1, "C))(C(": 2}
MODELS = {"plain-3": PLAIN, "looped-mesh": looped(2, 4, LOOPED), "spiralformer-mesh": looped(2, 4, SPIRAL_B)}
TRAINING = {"rings": {"0": 10, "2": 60, "7": 30}, "depth": {"1": 100}}
# Of 1,000 samples of each seed those with one, two, and six or more rings that are valid.
VALID = {
    "plain-3": [(10, 300, 190), (11, 310, 189), (9, 320, 191)],
    "looped-mesh": [(10, 350, 200), (9, 361, 200), (10, 364, 200)],
    "spiralformer-mesh": [(8, 400, 202), (9, 411, 200), (10, 423, 200)],
}


# -- counting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smiles, count", [*RINGS.items(), *BROKEN_RINGS.items()])
def test_ring_bonds_are_openings_outside_of_brackets(smiles, count):
    assert ring_bonds(smiles) == count


@pytest.mark.parametrize("smiles", RINGS)
def test_in_a_valid_molecule_they_are_its_rings(smiles):
    chemistry = pytest.importorskip("rdkit.Chem")
    molecule = chemistry.MolFromSmiles(smiles)
    parts = len(chemistry.GetMolFrags(molecule))
    assert ring_bonds(smiles) == molecule.GetNumBonds() - molecule.GetNumAtoms() + parts


@pytest.mark.parametrize("smiles, depth", DEPTHS.items())
def test_depth_is_the_most_parentheses_that_are_open(smiles, depth):
    assert branch_depth(smiles) == depth


def test_the_last_bin_is_open_and_tallies_add_up():
    found = tally(["C1CC1", "C1CC1", "CC(C(C(C(C(C)C)C)C)C)C", "C1C2C3C4C5C6C7C8"])
    assert found == {"rings": {"0": 1, "1": 2, "8": 1}, "depth": {"0": 3, "5": 1}}
    assert binned([found, found], "rings") == [2, 4, 0, 0, 0, 0, 2]
    assert binned([found], "depth") == [3, 0, 0, 0, 1]


def test_a_model_is_seen_beside_its_training_molecules():
    samples = ["C1CC1", "C1CC1", "C1CC", "CC(C)C", "C(C"]
    classes = {smiles: "valid" if smiles in ("C1CC1", "CC(C)C") else "ring" for smiles in samples}
    figures = hierarchy_figures(tally_by_validity(samples, classes), tally(["CCO", "C1CC1", "C1CC1", "C12CC1C2"]))
    rings, depth = figures["rings"], figures["depth"]
    assert [rings[label]["samples"] for label in rings] == [2, 3, 0, 0, 0, 0, 0] and list(rings)[-1] == "6+"
    assert rings["1"]["valid"] == share(2, 3) and rings["1"]["of_samples"]["value"] == 0.6
    assert [rings[label]["training"]["value"] for label in ("0", "1", "2")] == [0.25, 0.5, 0.25]
    assert depth["1"]["valid"] == share(1, 2) and depth["4+"]["valid"] == share(0, 0)
    rows = [line.split() for line in hierarchy_table(figures).splitlines()]
    assert ["1", "50.0%", "60.0%", "3", "66.7%", "20.8%", "to", "93.9%"] in rows
    assert ["4+", "0.0%", "0.0%", "0", "-", "-"] in rows


# -- finished runs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path) -> tuple[list[str], list[dict]]:
    """Words of the command, and the lines of a run on molecules, of one whose samples are gone, and of one on text."""
    pytest.importorskip("rdkit")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.txt").write_text("CCO\nC1CC1\n")
    digest = hashlib.sha256((tmp_path / "data" / "train.txt").read_bytes()).hexdigest()
    lines = [make_molecule_line("plain-3", seed, 0.004, 0.8, 2) for seed in (0, 1)]
    for line in lines:
        line["samples"] |= {"count": 4}
        line["text"]["train"]["sha256"] = digest
    samples = run_folder(tmp_path / "runs", lines[0]) / "samples.txt"
    samples.parent.mkdir(parents=True)
    samples.write_text("C1CC1\n\nC1CC\nCC(C)C\n")  # an empty sample is one
    for line in [*lines, make_line("main_small", "gpt-neox", 0, 0.004, 2.0)]:
        append_line(tmp_path / "lines.jsonl", line)
    words = ["--data_dir", str(tmp_path / "data"), "--runs", str(tmp_path / "lines.jsonl")]
    words += ["--runs_dir", str(tmp_path / "runs"), "--hierarchy", str(tmp_path / "hierarchy.jsonl")]
    return words, lines


def test_samples_of_finished_runs_are_read_once(finished, tmp_path, monkeypatch, capsys):
    words, lines = finished
    tally_samples.main(words)
    assert "not read" in capsys.readouterr().out.splitlines()[0]
    training, run = read_lines(tmp_path / "hierarchy.jsonl")
    assert training["samples"] == {"rings": {"0": 1, "1": 1}, "depth": {"0": 2}}
    assert run["key"] == lines[0]["key"] and run["samples"] == {
        "rings": {"0": 2, "1": 2},
        "depth": {"0": 3, "1": 1},
    }
    assert run["valid"] == {"rings": {"0": 1, "1": 1}, "depth": {"0": 1, "1": 1}}
    monkeypatch.setattr("workshop.experiments.hierarchy.classes_of", None)  # nothing is read again
    tally_samples.main(words)
    assert len(read_lines(tmp_path / "hierarchy.jsonl")) == 2
    assert "plain-3, seed 1" in capsys.readouterr().out


def test_the_command_of_the_page(finished, tmp_path):
    words, _ = finished
    *_, command = commands("docs/experiments.md")
    assert command.split()[:2] == ["python", "scripts/tally_samples.py"] and "--data_dir" in command
    tally_samples.main([*command.split()[2:], *words])  # of a word that is there twice the last counts
    assert len(read_lines(tmp_path / "hierarchy.jsonl")) == 2


def test_a_torn_line_is_read_again(finished, tmp_path):
    words, _ = finished
    tally_samples.main(words)
    whole = (tmp_path / "hierarchy.jsonl").read_text()
    (tmp_path / "hierarchy.jsonl").write_text(whole[:-20])
    tally_samples.main(words)
    assert (tmp_path / "hierarchy.jsonl").read_text() == whole


@pytest.mark.parametrize("text", ["C1CC1\n\nC1CC\n", "C1CC1\nC1CC1\nC1CC\nCC(C)C\n"], ids=["fewer", "more valid"])
def test_samples_that_the_line_did_not_count_are_refused(finished, text, tmp_path):
    words, lines = finished
    (run_folder(tmp_path / "runs", lines[0]) / "samples.txt").write_text(text)
    with pytest.raises(ValueError, match="`rings` of run molecules plain-3 0 0.004 must be of the [42] .*are of 3"):
        tally_samples.main(words)


def test_other_training_molecules_are_refused(finished, tmp_path):
    words, _ = finished
    (tmp_path / "data" / "train.txt").write_text("CCO\n")
    with pytest.raises(ValueError, match="`data_dir` must hold the train.txt that run molecules plain-3"):
        tally_samples.main(words)


# -- reports ----------------------------------------------------------------------------------------------------------


def experiment() -> MadeUpExperiment:
    return MadeUpExperiment("molecules", "molecules", MODELS, ["plain-3", "looped-mesh"])


def made_up(valid: dict = VALID) -> tuple[list[dict], Hierarchy]:
    """Three seeds at the middle rate, each of 20 samples with one ring, 600 with two, and 380 with nine."""
    lines, runs = [], {}
    for name, seeds in valid.items():
        for seed, counts in enumerate(seeds):
            line = make_molecule_line(name, seed, 0.004, 0.8, sum(counts))
            found = {"samples": {"1": 20, "2": 600, "9": 380}, "valid": dict(zip("129", counts, strict=True))}
            runs[line["key"]] = {
                part: {"rings": rings, "depth": {"1": sum(rings.values())}} for part, rings in found.items()
            }
            lines.append(line)
        lines += [make_molecule_line(name, 0, rate, 1.0, 300) for rate in (0.002, 0.008)]
    return lines, Hierarchy(runs, {"train" * 4: TRAINING})


def write(lines: list[dict], hierarchy: Hierarchy) -> str:
    return molecules_report(ExperimentResults.gather(experiment(), lines), {}, hierarchy)


def tables_of(text: str, title: str) -> list[str]:
    """The tables of a section, in order."""
    return [part for part in section(text, title).split("\n\n") if part.startswith("|")]


def test_a_bin_holds_the_samples_of_all_seeds_with_wilsons_interval():
    valid, samples, *_ = tables_of(write(*made_up()), "By ring bonds")
    low, high = share(1234, 1800)["interval"]
    assert cells(valid, "spiralformer-mesh")["2"] == [f"68.6 ({100 * low:.1f} to {100 * high:.1f})"]
    assert cells(valid, "plain-3")["6+"] == ["50.0 (47.1 to 52.9)"] and cells(valid, "plain-3")["3"] == ["-"]
    assert cells(valid, "plain-3")["seeds"] == ["3"]
    assert cells(samples, "training molecules")["6+"] == ["30.00% (30)"]
    assert cells(samples, "looped-mesh")["1"] == ["2.00% (60)"] and cells(samples, "looped-mesh")["0"] == ["0.00% (0)"]
    assert cells(tables_of(write(*made_up()), "By nesting depth")[1], "looped-mesh")["1"] == ["100.00% (3,000)"]


def test_differences_are_paired_and_bold_where_they_are_resolved():
    _, _, to_plain, to_looped = tables_of(write(*made_up()), "By ring bonds")
    row = cells(to_looped, "spiralformer-mesh")
    mean = 100 * (50 + 50 + 59) / 3 / 600
    assert row["2"][0].startswith(f"**{mean:+.1f} (") and "looped-mesh" in to_looped.splitlines()[0]
    low, high = (float(part) for part in row["2"][0].split("(")[1].rstrip(")*").split(" to "))
    assert 0 < low < mean < high and low + high == pytest.approx(2 * mean, abs=0.11)
    low, high = (float(part) for part in row["6+"][0].removeprefix("+0.2 (").rstrip(")").split(" to "))
    assert low < 0 < high  # (2 + 0 + 0) / 3 / 380, within the noise: not bold
    assert row["1"] == ["-"] and FEWEST == 30  # 20 samples: fewer than are compared
    assert cells(to_plain, "looped-mesh")["2"][0].startswith("**+8.1 (")
    assert not any(line.startswith("| looped-mesh") for line in to_looped.splitlines())


def test_validity_at_one_mix_counts_each_bin_as_the_training_molecules_do():
    """Samples have more of the last bin than those molecules have; none has no ring, a tenth of those molecules."""
    lines, hierarchy = made_up()
    (table,) = tables_of(write(lines, hierarchy), "At one mix of ring bonds")

    def mixed(name: str) -> list[float]:
        return [(60 * counts[1] / 600 + 30 * counts[2] / 380) / 90 for counts in VALID[name]]

    row = cells(table, "spiralformer-mesh")
    assert row["at one mix, %"] == [f"{100 * statistics.fmean(mixed('spiralformer-mesh')):.1f}"]
    assert row["valid, %"] == [f"{sum(map(sum, VALID['spiralformer-mesh'])) / 30:.1f}"] and row["seeds"] == ["3"]
    pairs = [one - other for one, other in zip(mixed("spiralformer-mesh"), mixed("looped-mesh"), strict=True)]
    assert row["above `looped-mesh`"][0].lstrip("*").startswith(f"{100 * statistics.fmean(pairs):+.1f} (")
    assert cells(table, "looped-mesh")["above `looped-mesh`"] == ["-"]


def test_runs_that_were_not_read_are_said_and_those_of_other_samples_refused():
    lines, hierarchy = made_up()
    text = write(lines, Hierarchy({}, {}))
    assert "**Samples of 0 of 9 finished runs were read**" in text and "By ring bonds" not in text
    assert "Rings and branches" not in write(lines[-2:], hierarchy)  # a sweep alone
    some = Hierarchy(dict(list(hierarchy.runs.items())[:4]), hierarchy.training)
    text = write(lines, some)
    assert "**Samples of 4 of 9 finished runs were read**: `python scripts/tally_samples.py`" in text
    valid = tables_of(text, "By ring bonds")[0]
    assert [cells(valid, name)["seeds"] for name in MODELS] == [["3"], ["1"], ["0"]]
    lines[0]["samples"]["valid"] += 1
    with pytest.raises(ValueError, match="`rings` of run .* valid"):
        write(lines, hierarchy)


def test_a_diverged_model_has_no_bins():
    lines, hierarchy = made_up()
    lines[1]["nats_per_token"]["validation"] = None
    text = write(lines, hierarchy)
    assert cells(tables_of(text, "By ring bonds")[0], "plain-3")["2"] == ["-"]
    assert cells(tables_of(text, "By ring bonds")[2], "looped-mesh")["2"] == ["-"]


def test_the_picture_shows_shares_with_intervals_above_the_samples(monkeypatch, tmp_path):
    lines, hierarchy = made_up()
    results = ExperimentResults.gather(experiment(), lines)
    assert not pictures.hierarchy_pictures(results, Hierarchy({}, {}))
    (picture,) = pictures.hierarchy_pictures(results, hierarchy)
    assert picture.file == "molecules_hierarchy.png"
    picture.draw(tmp_path / picture.file)
    assert (tmp_path / picture.file).stat().st_size > 10000
    figures = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: figures.append(figure))
    picture.draw(Path("unused"))
    above, _, below, _ = figures[0].axes
    counts = pooled(hierarchy.of(results.models[2]), "rings")
    points, _, (bars,) = above.containers[2].lines
    assert list(points.get_ydata()) == [valid / count for valid, count in counts if count]
    assert [round(x) for x in points.get_xdata()] == [1, 2, 6]
    for segment, (valid, count) in zip(bars.get_segments(), [found for found in counts if found[1]], strict=True):
        assert segment[:, 1].tolist() == pytest.approx(share(valid, count)["interval"])
    assert list(below.lines[2].get_ydata()) == pytest.approx([0, 0.02, 0.6, 0, 0, 0, 0.38])
    assert [bar.get_height() for bar in below.patches] == pytest.approx([0.1, 0, 0.6, 0, 0, 0, 0.3])
