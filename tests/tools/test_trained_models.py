"""Commands that ask the trained models of an experiment: which they find, their probes, their quantised weights."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from documents import commands
from support import large_weights
from test_molecule_runs import MOLECULES, PLAN, TOKENIZER, alone
from torchao.utils import TorchAOBaseTensor

import compare_probes
import compare_quantised
from modeling_spiralformer import SpiralFormerForCausalLM
from modeling_spiralformer.files_spiralformer import digest
from workshop import padded_rows
from workshop.experiments import trained
from workshop.experiments.plan import load_experiment
from workshop.experiments.probing import join_seeds
from workshop.experiments.quantised import change_cell
from workshop.experiments.store import append_line, run_folder
from workshop.experiments.trained import TrainedArguments, describe_trained, load_trained
from workshop.molecules import quantising
from workshop.molecules.quantising import Weights, linear_layers, parts_of, quantise, ratio
from workshop.molecules.quantising import compare_quantised as compare_quantised_
from workshop.molecules.rows import make_rows
from workshop.padded_rows import losses_of_rows
from workshop.probes.measures import METRICS, choose_molecules, collect

LOOP = {"num_prelude_layers": 1, "num_core_layers": 1, "num_coda_layers": 1}
MODELS = {
    "plain": {"num_prelude_layers": 3, "num_core_layers": 0, "num_coda_layers": 0, "chunk_sizes": []},
    "looped": LOOP | {"chunk_sizes": [1, 1], "topology": "anchor"},
    "spiral": LOOP | {"chunk_sizes": [4, 2]},
    "hyperloop": LOOP | {"chunk_sizes": [2, 1], "topology": "hyper_connections"},
}
PARTS = {
    "plain": ["prelude"],
    "looped": ["prelude", "core", "coda"],
    "spiral": ["prelude", "core", "coda", "resolutions", "topology"],
    "hyperloop": ["prelude", "core", "coda", "resolutions", "topology"],
}
load_once = functools.cache(load_experiment)  # it counts FLOPs
SWEPT = {1e-3: 2.0, 1e-2: 1.5}  # rate -> loss


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """An experiment, its text, the lines of its sweep and of two seeds, and random models in place of trained ones."""
    folder = tmp_path_factory.mktemp("workshop")
    plan = PLAN | {"models": MODELS, "vocab_size": 65, "sweep_budget": {"tokens": 104}, "common": {}}
    plan["common"] = {
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_attention_heads": 2,
        "tie_word_embeddings": True,
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(plan, sort_keys=False), encoding="utf-8")
    (folder / "data").mkdir()
    (folder / "data" / "valid.txt").write_text("\n".join(MOLECULES) + "\n")
    experiment = load_once(str(folder / "tiny.yaml"))
    runs = [(name, 0, rate, True) for name in MODELS for rate in SWEPT]
    runs += [(name, seed, 1e-2, False) for name in MODELS for seed in (0, 1)]
    text = {"train": {}, "validation": {"sha256": digest(folder / "data" / "valid.txt")}}
    for index, (name, seed, rate, sweep) in enumerate(runs):
        run = experiment.run(name, seed, rate, sweep)
        line = {"key": run.key, "model": name, "seed": seed, "text": text, "tokens": 104 if sweep else 416}
        line |= {"nats_per_token": {"validation": SWEPT[rate]}, "commit": "abcdef0123"}
        append_line(folder / "lines.jsonl", line)
        model = large_weights(SpiralFormerForCausalLM(experiment.model_config(name)), seed=index).float()
        model.save_pretrained(run_folder(folder / "runs", line))
        TOKENIZER.save_pretrained(run_folder(folder / "runs", line))
    return folder


@pytest.fixture(autouse=True)
def counted_once(monkeypatch):
    monkeypatch.setattr(trained, "load_experiment", load_once)


def words(folder: Path, *more: str) -> list[str]:
    found = ["--experiment", str(folder / "tiny.yaml"), "--data_dir", str(folder / "data")]
    return [*found, "--runs", str(folder / "lines.jsonl"), "--runs_dir", str(folder / "runs"), *more]


def asked(folder: Path, **more) -> TrainedArguments:
    places = {"experiment": "tiny.yaml", "data_dir": "data", "runs": "lines.jsonl", "runs_dir": "runs"}
    return TrainedArguments(**{name: str(folder / place) for name, place in places.items()} | more)


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


# -- which models -----------------------------------------------------------------------------------------------------


def test_whole_runs_or_those_of_the_sweep_at_the_chosen_rate_are_found(workshop):
    experiment, path, whole = load_trained(asked(workshop))
    assert path == workshop / "data" / "valid.txt"
    assert [(item.model, item.seed) for item in whole] == [(name, seed) for name in MODELS for seed in (0, 1)]
    assert all(item.line["key"] == experiment.run(item.model, item.seed, 1e-2).key for item in whole)
    _, _, swept = load_trained(asked(workshop, sweep=True, models=["spiral"]))
    assert [item.line["key"] for item in swept] == [experiment.run("spiral", 0, 1e-2, True).key]
    assert swept[0].folder.name == swept[0].line["key"] and (swept[0].folder / "config.json").is_file()
    assert describe_trained(swept) == "Trained on 104 tokens, code of abcdef0. Seeds: `spiral` 0."
    both = describe_trained([*swept, *whole[5:6]])
    assert both == "Trained on 104 to 416 tokens, code of abcdef0. Seeds: `spiral` 0, 1."


def test_what_is_not_there_is_refused(workshop, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="`models` must be of .*but got .'spirals'"):
        load_trained(asked(workshop, models=["spirals"]))
    with pytest.raises(FileNotFoundError, match="`runs_dir` must hold the model of plain, seed 0"):
        load_trained(asked(workshop, runs_dir=str(tmp_path)))
    lines = (workshop / "lines.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "lines.jsonl").write_text("".join(lines[1:2]))
    with pytest.raises(ValueError, match="`runs` must hold runs of a whole sweep"):
        load_trained(asked(workshop, runs=str(tmp_path / "lines.jsonl"), sweep=True))
    with pytest.raises(FileNotFoundError, match="`data_dir` must hold valid.txt"):
        load_trained(asked(workshop, data_dir=str(tmp_path)))
    (tmp_path / "valid.txt").write_text("CCO\n")
    with pytest.raises(ValueError, match="`data_dir` must hold the validation molecules of plain, seed 0"):
        load_trained(asked(workshop, data_dir=str(tmp_path)))
    monkeypatch.setattr(trained, "load_experiment", lambda path: SimpleNamespace(smiles=None))
    with pytest.raises(ValueError, match="`experiment` must be on molecules"):
        load_trained(asked(workshop))


# -- probes -----------------------------------------------------------------------------------------------------------


def test_looped_models_are_probed_and_seeds_joined(workshop, tmp_path, capsys):
    how = ("--sequences", "1", "--length", "20", "--local_tokens", "6", "--output_dir", str(tmp_path))
    results = compare_probes.main(words(workshop, *how))
    assert [(found["model"], found["seed"]) for found in results] == [
        (name, seed) for name in ("looped", "spiral", "hyperloop") for seed in (0, 1)
    ]
    _, _, found = load_trained(asked(workshop, models=["spiral"]))
    ids = choose_molecules(MOLECULES, TOKENIZER, 1, 20)
    alone_ = [collect(SpiralFormerForCausalLM.from_pretrained(item.folder), ids, 2, 6) for item in found]
    for found, expected in zip(results[2:4], alone_, strict=True):
        assert found["metrics"][METRICS[1]]["values"] == expected["metrics"][METRICS[1]]["values"]
        assert found["windows"] == [2, 3] and "samples" not in found["metrics"][METRICS[0]]
    joined = join_seeds(results)["spiral"]
    values = [found["metrics"][METRICS[0]]["values"] for found in alone_]
    assert joined["metrics"][METRICS[0]]["values"] == [values[0][t] + values[1][t] for t in (0, 1)]
    assert joined["updates"]["coda"] == pytest.approx(np.mean([found["updates"]["coda"] for found in alone_]))
    coefficients = [found["routers"]["coefficients"] for found in alone_]
    assert joined["routers"]["coefficients"][2] == pytest.approx(np.mean([c[2] for c in coefficients], axis=0))
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "probes.md").read_text() and "1 validation molecules of 20 tokens" in printed
    rows = {row[0]: row for row in rows_of(printed)}
    heads = np.array(joined["metrics"][METRICS[0]]["values"]).reshape(2, 4)
    assert rows["spiral"][1] == f"{np.median(heads[1] - heads[0]):+.3f}" and rows["spiral"][3].endswith(" of 4")
    assert "spiral, cycle 2" in rows and "looped, cycle 0" not in rows and "plain" not in rows
    assert len(json.loads((tmp_path / "probes.json").read_text())) == 6


def test_a_model_without_a_loop_is_refused_by_name_and_lengths_by_field(workshop, tmp_path):
    with pytest.raises(ValueError, match="`chunk_sizes` must have two iterations or more"):
        compare_probes.main(words(workshop, "--models", "plain", "--length", "20", "--sequences", "1"))
    with pytest.raises(ValueError, match="`text` must hold 9 molecules of 13 tokens"):  # the mean length
        compare_probes.main(words(workshop, "--sequences", "9", "--output_dir", str(tmp_path)))
    with pytest.raises(ValueError, match="`local_tokens`"):
        compare_probes.main(words(workshop, "--local_tokens", "0"))


@pytest.mark.parametrize(
    "script, page", [(compare_probes, "docs/probes.md"), (compare_quantised, "docs/deployment.md")]
)
def test_the_commands_of_the_pages(workshop, tmp_path, script, page):
    """On the tiny experiment: of a word that is there twice the last counts."""
    *_, command = commands(page)
    python, path, *given = command.split()
    assert (python, path) == ("python", f"scripts/{script.__name__}.py") and given[::2] == [
        "--experiment",
        "--data_dir",
    ]
    small = ["--length", "20", "--sequences", "1"] if script is compare_probes else ["--molecules", "2"]
    own = words(workshop, "--models", "spiral", "--output_dir", str(tmp_path), *small)
    assert [found["seed"] for found in script.main([*given, *own])] == [0, 1]


# -- quantised weights ------------------------------------------------------------------------------------------------


def trained_model(workshop: Path, name: str) -> SpiralFormerForCausalLM:
    _, _, (item, *_) = load_trained(asked(workshop, models=[name]))
    return SpiralFormerForCausalLM.from_pretrained(item.folder).eval()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", [Weights(8), Weights(4), Weights(4, 8), Weights(4, 7)], ids=lambda way: way.name)
def test_every_matrix_is_quantised_and_counted(workshop, name, way):
    """Rows have 16 weights, those of the output of an MLP 20, and a gate's 64: 8 divides all but 20."""
    model = trained_model(workshop, name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    quantised, shares = quantise(model, way)
    total, sizes = sum(weight.numel() for weight in model.parameters()), {"quantised": 0, "grouped": 0}
    for key, layer in linear_layers(quantised).items():
        assert isinstance(layer.weight, TorchAOBaseTensor)
        weight, original = layer.weight.dequantize(), model.get_submodule(key).weight
        grouped = way.group_size is not None and weight.shape[1] % way.group_size == 0
        groups = weight.unflatten(1, (-1, way.group_size if grouped else weight.shape[1]))
        assert max(len(group.unique()) for group in groups.flatten(0, 1)) <= 2**way.bits
        error = (weight - original).abs().unflatten(1, groups.shape[1:]).amax(dim=-1)
        largest = original.abs().unflatten(1, groups.shape[1:]).amax(dim=-1)
        assert (error <= largest / (2 ** (way.bits - 1) - 1)).all()  # of one step at most
        sizes["quantised"] += weight.numel()
        sizes["grouped"] += weight.numel() * grouped
    assert shares == {key: size / total for key, size in sizes.items()} and 0.5 < shares["quantised"] < 1
    assert (0 < shares["grouped"] < shares["quantised"]) == (way.group_size == 8)
    kept = [key for key, weight in quantised.named_parameters() if not isinstance(weight, TorchAOBaseTensor)]
    assert [key for key in kept if quantised.get_parameter(key).ndim > 1] == ["model.embed_tokens.weight"]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_a_part_is_quantised_and_the_others_are_not(workshop, name):
    model = trained_model(workshop, name)
    rows = make_rows(MOLECULES, TOKENIZER, 24)
    whole, _ = quantise(model, Weights(4))
    figures, _ = compare_quantised_(model, TOKENIZER, rows, [Weights(4)])
    assert list(figures["parts"]) == parts_of(model) == list(PARTS[name])
    layers = []
    for part in PARTS[name]:
        quantised, shares = quantise(model, Weights(4), part)
        changed = {key for key, weight in quantised.named_parameters() if isinstance(weight, TorchAOBaseTensor)}
        assert changed == {f"{key}.weight" for key in linear_layers(model, part)} and 0 < shares["quantised"] < 1
        assert all(
            torch.equal(quantised.get_parameter(key).dequantize(), whole.get_parameter(key).dequantize())
            for key in changed
        )
        before, after = (losses_of_rows(chosen, TOKENIZER, rows) for chosen in (model, quantised))
        assert figures["parts"][part] == ratio(after[:, 0] - before[:, 0], before[:, 1])
        layers += changed
    assert sorted(layers) == sorted(f"{key}.weight" for key in linear_layers(model))


def test_a_matrix_of_the_part_that_stays_as_it_was_is_an_error(workshop, monkeypatch):
    monkeypatch.setattr("torchao.quantization.quantize_", lambda model, config, filter_fn: None)
    with pytest.raises(ValueError, match="Every matrix but embeddings and head .* but model.core.0.attention"):
        quantise(trained_model(workshop, "spiral"), Weights(4), "core")


def test_a_matrix_that_stays_as_it_was_is_an_error(workshop, monkeypatch):
    monkeypatch.setattr("torchao.quantization.quantize_", lambda model, config, filter_fn: None)
    with pytest.raises(ValueError, match="Every matrix but embeddings and head .* but model.prelude.0.attention"):
        quantise(trained_model(workshop, "spiral"), Weights(4))


def test_losses_are_those_of_each_molecule_alone(workshop, monkeypatch):
    monkeypatch.setattr(padded_rows, "ROWS_AT_ONCE", 5)
    quantised, _ = quantise(trained_model(workshop, "spiral"), Weights(4))
    with torch.no_grad():
        expected = [alone(quantised, smiles) for smiles in MOLECULES]
    found = losses_of_rows(quantised, TOKENIZER, make_rows(MOLECULES, TOKENIZER, 24))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_ratio_has_the_spread_of_draws_of_molecules():
    found = ratio(np.array([1.0, 2.0, 3.0]), np.array([2, 2, 2]))
    assert found["value"] == 1 and found["interval"] == pytest.approx(
        [1 - 1.96 / 12**0.5, 1 + 1.96 / 12**0.5], abs=1e-4
    )
    generator = np.random.default_rng(0)
    counts = generator.integers(5, 60, 300)
    sums = 0.01 * counts + generator.normal(size=300)
    drawn = generator.integers(0, 300, (4000, 300))
    half = 1.96 * (sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)).std()
    low, high = ratio(sums, counts)["interval"]
    assert (high - low) / 2 == pytest.approx(half, rel=0.05)


def test_models_are_compared_on_the_same_molecules(workshop, tmp_path, capsys):
    words_ = words(workshop, "--sweep", "--molecules", "9", "--group_size", "8", "--output_dir", str(tmp_path / "out"))
    results = compare_quantised.main(words_)
    assert [found["model"] for found in results] == list(MODELS)
    rows = make_rows(MOLECULES[:9], TOKENIZER, 24)
    losses = {}
    for item in load_trained(asked(workshop, sweep=True))[2]:
        model = SpiralFormerForCausalLM.from_pretrained(item.folder).eval()
        quantised, _ = quantise(model, Weights(4))
        losses[item.model] = [losses_of_rows(chosen, TOKENIZER, rows) for chosen in (model, quantised)]
    for found in results:
        before, after = losses[found["model"]]
        counts, way = before[:, 1], found["ways"]["int4, rows"]
        assert found["nats_per_token"] == pytest.approx(before[:, 0].sum() / counts.sum())
        assert way["nats_per_token"] == pytest.approx(after[:, 0].sum() / counts.sum())
        assert way["difference"]["value"] == pytest.approx(way["nats_per_token"] - found["nats_per_token"])
        assert abs(way["difference"]["value"]) > abs(found["ways"]["int8, rows"]["difference"]["value"])
        if found["model"] == "plain":
            assert way["beside"] == {}
            continue
        gains = [after - before for before, after in (losses[found["model"]], losses["plain"])]
        expected = ratio(gains[0][:, 0] - gains[1][:, 0], counts)
        assert way["beside"]["plain"]["value"] == pytest.approx(expected["value"])
        assert way["beside"]["plain"]["interval"] == pytest.approx(expected["interval"])
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "out" / "quantised.md").read_text() and "Loss on 9 validation molecules" in printed
    table = rows_of(printed)
    assert sum(row[0] == "spiral" for row in table) == 4 and sum(row[0] == "plain" for row in table) == 3
    header = ["perplexity, %, int4, rows, one part", "seed", "prelude", "core", "coda", "resolutions", "topology"]
    of_parts = table[table.index(header) + 2 :][: len(MODELS)]
    cells = [[change_cell(change) for change in found["parts"].values()] for found in results]
    assert [row[2:] for row in of_parts] == [
        [*cells[0], "-", "-", "-", "-"],
        [*cells[1], "-", "-"],
        cells[2],
        cells[3],
    ]
    assert ["perplexity, % beyond `plain`", "seed", "int8, rows", "int4, rows", "int4, groups of 8"] in table
    assert change_cell(results[2]["ways"]["int4, rows"]["difference"]) in [row[3] for row in table]
    assert json.loads((tmp_path / "out" / "quantised.json").read_text())[3]["model"] == "hyperloop"
    assert change_cell({"value": 0.01, "interval": [-0.02, 0.04]}) == "+1.01 (-1.98 to +4.08)"


def test_a_report_counts_the_molecules_that_the_file_has(workshop, tmp_path, capsys):
    words_ = words(workshop, "--sweep", "--models", "plain", "--molecules", "1000", "--output_dir", str(tmp_path))
    compare_quantised.main(words_)
    assert f"Loss on {len(MOLECULES)} validation molecules" in capsys.readouterr().out


def test_without_torchao_nothing_starts(workshop, monkeypatch):
    monkeypatch.setattr(quantising, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "\.\[molecules\]"'):
        compare_quantised.main(words(workshop))


@pytest.mark.parametrize("name, value", [("group_size", "0"), ("molecules", "1")])
def test_settings_of_quantising_are_checked(workshop, name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        compare_quantised.main(words(workshop, f"--{name}", value))
