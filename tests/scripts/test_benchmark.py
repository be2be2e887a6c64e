"""The benchmark: what it counts is what runs, and every table and picture comes out of a small run."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from documents import ROOT
from transformers import DynamicCache

import benchmark
from benchmark import BenchmarkArguments
from modeling_spiralformer.layers_spiralformer import FAMILIES
from workshop.benchmarks.measuring import (
    ALONE,
    DecodeSetting,
    Grid,
    floored_of,
    full_grids,
    measure,
    small_grids,
    with_compiled,
    with_counts,
)
from workshop.benchmarks.models import ModelSize, deeper_name, models_of, plain_name
from workshop.benchmarks.results import GridResults, Ratio, compile_table, compiled_training_table, report
from workshop.benchmarks.workloads import Decode, Floor, TrainingStep, peak_bytes
from workshop.costs import DECODE_STEPS, call_lengths, count_flops, decode_calls, layer_equivalents

SIZE = ModelSize(width=64, layers=3, vocabulary=128, longest=128)
CPU, META = torch.device("cpu"), torch.device("meta")
# Every model with GPT-NeoX layers, and three with those of Llama, whose queries are grouped.
MODELS = models_of("gpt_neox")
LLAMAS = models_of("llama")
EVERY = [*MODELS.values(), *(LLAMAS[name] for name in ("llama", "spiralformer-b", "spiralformer-l"))]
every_model = pytest.mark.parametrize("model", EVERY, ids=lambda model: f"{model.name}, {model.family}")


@pytest.fixture(scope="module", params=["gpt_neox", "llama"])
def results(request) -> dict:
    """A run over the whole set of models of a family, as written to disk and read again."""
    floored = floored_of(request.param)
    grid = Grid(
        family=request.param,
        size=SIZE,
        dtype="float32",
        prefill_lengths=(32, 64),
        training_lengths=(32, 64),
        context=48,
        decode=(
            DecodeSetting(1, tuple(models_of(request.param)), floored),
            DecodeSetting(4, floored),
            DecodeSetting(4, floored, floored, ragged=True),
        ),
    )
    threads = torch.get_num_threads()
    try:
        return with_counts(measure((grid,), CPU, repeats=1, threads=1))
    finally:
        torch.set_num_threads(threads)


def test_tables_and_picture_hold_every_model_and_workload(results, tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    benchmark.main(["--results", str(path), "--plot", str(tmp_path / "picture.png")])
    printed = capsys.readouterr().out
    for title in (
        "Prefill",
        "Training",
        "Decode, batch 1,",
        "Decode, batch 4, ragged",
        "bare matrix",
        "MeSH over anchor",
    ):
        assert title in printed
    assert all(printed.count(f"| {name} |") >= 2 for name in models_of(results["grids"][0]["grid"]["family"]))
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    timed = GridResults(results["grids"][0]).models("training", length=64)
    assert "looped {1,1}" in timed and not any("offsets" in name for name in timed)
    assert results["machine"]["threads"] == 1 and len(results["machine"]["load"]) == 3


@pytest.mark.parametrize("name", ["benchmark", "benchmark_llama", "compiled", "compiled_llama", "compiled_training"])
def test_the_tables_of_the_docs_are_those_of_their_samples(name):
    committed = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())
    assert report(committed) == (ROOT / "docs" / "results" / f"{name}.md").read_text().strip()


def test_a_model_as_fast_as_its_counts_has_quotient_one(results):
    made = json.loads(json.dumps(results))
    grid = GridResults(made["grids"][0])
    equivalents = {name: grid.counts[name]["layer_equivalents"] for name in models_of(grid.family)}
    for sample in grid.samples:
        if sample["workload"] == "training":
            sample["seconds"] = [2e-9 * grid.flops(sample["model"], sample["length"], "training")]
        if sample["workload"] == "decode":
            sample["seconds"] = [[0.5 * equivalents[sample["model"]]] * DECODE_STEPS]
        if sample["workload"] == "bare products":
            sample["seconds"] = [[0.4 * equivalents[sample["model"]]] * DECODE_STEPS]
    key = {"batch": 1, "ragged": False, "compiled": False}
    for name in ("spiralformer-b", "spiralformer-l", deeper_name(grid.family)):
        assert grid.time_over_flops("training", name, 64).median == pytest.approx(1)
        assert grid.decode_quotient(name, **key).median == pytest.approx(1)
    assert grid.floor_speed("spiralformer-l", **key).median == pytest.approx(0.8)
    assert grid.percentiles(plain_name(grid.family), **key) == pytest.approx([1500.0] * 4)
    for name in (plain_name(grid.family), deeper_name(grid.family)):
        assert grid.peak_ratio(name, 64) == pytest.approx(1)
    assert str(Ratio.of([3.0, 2.0, 4.0], [1.0, 1.0, 1.0])) == "3.000 (2.500-3.500)"


@every_model
@pytest.mark.parametrize("padding", [None, [0, 3, 7, 12]])
def test_the_floor_runs_the_layer_calls_that_decoding_runs(model, padding):
    """The same layers on the same number of rows, step by step: a hook counts what the model does."""
    kind = FAMILIES[model.family].layer
    model = model.build(SIZE, CPU, torch.float32)
    decode = Decode(model, len(padding or [0]), 48, padding)
    seen = []
    for layer in model.modules():
        if isinstance(layer, kind):
            layer.register_forward_pre_hook(lambda layer, inputs: seen.append((layer, inputs[0].shape[0])))
    decode()
    steps = [decode_calls(model, column, padding or [0]) for column in range(48, 48 + DECODE_STEPS)]
    assert seen == [(call.layer, call.rows) for calls in steps for call in calls]
    assert len(Floor(model, len(padding or [0]), 48, padding)()) == DECODE_STEPS
    if padding is None:
        assert len(seen) / DECODE_STEPS == layer_equivalents(model.config)


@every_model
def test_flops_are_those_of_the_layers(model):
    """
    Linear layers 24 d^2 a token or latent, attention 4 n^2 d, and the head; backward is twice forward. Llama's at this
    width: 2 d^2 each for queries and output, as much for keys and values of one head of two, and three matrices d by
    320 = 2.5 d in the MLP.
    """
    is_looped, family = model.topology is not None, model.family
    model, length, size = model.build(dataclasses.replace(SIZE, width=128), META, torch.float32), 96, 128
    flops = count_flops(model, length)
    lengths = call_lengths(model.config, length)
    linear = 24 if family == "gpt_neox" else 6 + 6 * 2.5
    layers = sum(linear * n * size**2 + 4 * n**2 * size for n in lengths)
    head = 2 * size * SIZE.vocabulary
    # What a looped model adds: routers, scorers and allocators, a few numbers wide.
    assert flops["prefill"] - layers - head == pytest.approx(0, abs=0.05 * layers if is_looped else 0)
    assert flops["training"] == pytest.approx(3 * (layers + length * head), rel=0.05 if is_looped else 1e-12)
    assert flops["prefill"] - flops["prefill causal"] == sum(2 * n**2 * size for n in lengths)
    assert flops["training"] - flops["training causal"] == sum(6 * n**2 * size for n in lengths)


def test_step_bytes_are_the_weights_of_an_average_step(results):
    grid = GridResults(results["grids"][0])
    of_llama = grid.family == "llama"  # no biases, and norms with weights alone
    layer = (13 * 64**2 + 2 * 64 if of_llama else 12 * 64**2 + 13 * 64) * 4
    outside = 64 * 128 * 4 + (1 if of_llama else 2) * 64 * 4  # the head and the last norm
    plain = grid.counts[plain_name(grid.family)]
    assert plain["step_weight_bytes"] == 3 * layer + outside
    looped = grid.counts["spiralformer-b, anchor"]["step_weight_bytes"] - outside
    assert looped == pytest.approx(3.875 * layer, rel=0.02)
    cache = grid.counts["spiralformer-l"]["cache_bytes"]["128"]
    assert cache == pytest.approx(128 * 2.9375 * 2 * 64 * 4, rel=0.05)
    assert plain["cache_bytes"]["128"] == 128 * 3 * 2 * 64 * 4


def test_peak_bytes_sees_every_allocation():
    def work():
        first = torch.ones(1000)
        second = first + 1
        del first
        return torch.cat([second, second])

    assert peak_bytes(work, CPU, held=500) == 500 + 4000 + 8000


def test_a_static_cache_is_decoded_by_a_compiled_forward(monkeypatch):
    """The same tokens, step for step; Inductor is left out, so that no compiler is needed."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compiled(model, backend="aot_eager"))
    model = MODELS["looped {1,1}"].build(SIZE, CPU, torch.float32)
    static, eager = Decode(model, 1, 48, compiled=True), Decode(model, 1, 48)
    assert static.forward is not eager.forward
    eager.ids = static.ids
    eager.filled = eager.fill(DynamicCache(config=model.config))
    tokens = []
    for decode in (static, eager):
        step, chosen = decode.forward, []

        def recorded(*args, step=step, chosen=chosen, **options):
            outputs = step(*args, **options)
            chosen.append(outputs.logits[:, -1].argmax(dim=-1))
            return outputs

        decode.forward = recorded
        assert len(decode()) == DECODE_STEPS
        tokens.append(torch.stack(chosen, dim=1))
    assert tokens[0].shape == (1, DECODE_STEPS) and torch.equal(*tokens)


def test_a_compiled_training_step_trains_as_the_eager_one(monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled(model, backend="aot_eager"))
    torch._dynamo.reset()
    kept = [MODELS["looped {1,1}"].build(SIZE, CPU, torch.float64) for _ in range(2)]
    steps = [TrainingStep(model, 1, 32, compiled=how) for model, how in zip(kept, (False, True), strict=True)]
    assert steps[1].forward is not steps[1].model and steps[0].compiling is None
    steps[1].ids = steps[0].ids
    for step in steps:
        step()
        found = copy.deepcopy(step.compiling)
        step()
        assert step.compiling == found  # of the first step alone
    assert steps[1].compiling["graphs"] == 1 and steps[1].compiling["first"] > 0
    for one, other in zip(*(model.parameters() for model in kept), strict=True):
        assert torch.allclose(one, other, atol=1e-9)


def test_what_compiling_a_training_step_costs(results):
    found = copy.deepcopy(results["grids"][0])
    names, length = floored_of(found["grid"]["family"]), 64
    found["grid"]["compiled_training_lengths"] = [length]
    eager = {sample["model"]: sample["seconds"] for sample in found["samples"] if sample.get("length") == length}
    for number, name in enumerate(names, start=1):
        cell = {"workload": "compiled training", "model": name, "length": length, "seconds": eager[name]}
        found["samples"].append({**cell, "compiling": {"first": 2.0 * number, "graphs": number}})
    grid = GridResults(found)
    _, _, *rows = compiled_training_table(grid, length).splitlines()
    for number, (name, row) in enumerate(zip(names, rows, strict=True), start=1):
        assert row.strip("| ").split(" | ") == [name, str(number), f"{2 * number:.1f}", f"{number:.2f}"]
        assert grid.flops(name, length, "compiled training causal") == grid.flops(name, length, "training causal")
    assert "Compiled training, batch 1" in report({**results, "grids": [found]})


def test_a_run_that_is_cut_short_leaves_its_rounds(tmp_path, monkeypatch, capsys):
    grid = Grid("llama", SIZE, "float32", (32,), (32,), 48, (DecodeSetting(1, floored_of("llama")),))
    kept = tmp_path / "results.json"

    def save(results):
        benchmark.write_json(kept, results)
        if len(results["grids"][0]["samples"][0]["seconds"]) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    with pytest.raises(KeyboardInterrupt):
        measure((grid,), CPU, repeats=3, save=save)
    found = json.loads(kept.read_text())
    assert {len(sample["seconds"]) for sample in found["grids"][0]["samples"]} == {2}
    benchmark.main(["--results", str(kept), "--plot", str(tmp_path / "picture.png")])
    printed = capsys.readouterr().out
    assert "Prefill" in printed and "Decode, batch 1" in printed and json.loads(kept.read_text()) == found


def test_what_compiling_costs(results):
    found = copy.deepcopy(results["grids"][0])
    names = floored_of(found["grid"]["family"])
    found["grid"]["decode"].append({**found["grid"]["decode"][0], "compiled": True, "models": names, "floored": []})
    of_one = [sample for sample in found["samples"] if sample["workload"] == "decode" and sample["batch"] == 1]
    eager = {sample["model"]: sample["seconds"] for sample in of_one}
    for number, name in enumerate(names, start=1):
        faster = [[step / 2 for step in turn] for turn in eager[name]]
        compiling = {"first": 2.0 * number, "all": 3.0 * number, "graphs": number}
        cell = {"workload": "decode", "model": name, "batch": 1, "ragged": False, "compiled": True}
        found["samples"].append({**cell, "seconds": faster, "compiling": compiling})
    _, _, *rows = compile_table(GridResults(found), batch=1, ragged=False, compiled=True).splitlines()
    for number, (name, row) in enumerate(zip(names, rows, strict=True), start=1):
        saved = np.mean(eager[name]) / 2
        times = [f"{2 * number:.1f}", f"{number:.2f}", f"{3 * number:.1f}", f"{number:.2f}"]
        assert row.strip("| ").split(" | ") == [name, str(number), *times, f"{3 * number / saved:.0f}"]


@pytest.mark.parametrize("grids", [small_grids, full_grids])
def test_what_is_compiled_is_measured_where_it_is_asked_for(grids):
    for plain, longer in zip(grids("llama"), with_compiled(grids("llama")), strict=True):
        added = [setting for setting in longer.decode if setting not in plain.decode]
        assert [setting.batch for setting in added] == [1, 8, 8] and all(setting.compiled for setting in added)
        assert not any(setting.compiled for setting in plain.decode) and not plain.compiled_training_lengths
        assert longer.compiled_training_lengths == plain.training_lengths[:1]
        assert {*floored_of("llama")} <= {*longer.contenders}
    first, *wider = ALONE["compiled_decoding"](grids("llama"))
    for alone, batches in ((first, [1, 8, 8]), *((grid, [1]) for grid in wider)):
        assert not alone.timed and not alone.compiled_training_lengths
        assert [setting.batch for setting in alone.decode] == batches
        assert all(setting.compiled for setting in alone.decode)
    (alone,) = ALONE["compiled_training"](grids("llama"))
    assert not alone.decode and not alone.prefill_lengths
    assert alone.training_lengths == alone.compiled_training_lengths == grids("llama")[0].training_lengths[:1]


@pytest.mark.parametrize("options", [{"repeats": 0}, {"threads": 0}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        BenchmarkArguments(**options)


@pytest.mark.parametrize(
    "options",
    [{"repeats": 3}, {"device": "cuda"}, {"full": True}, {"only": "compiled_training"}, {"output": "other.json"}],
)
def test_what_nothing_is_measured_with_is_refused_beside_results(options, tmp_path):
    plot = str(tmp_path / "picture.png")
    assert BenchmarkArguments(results="samples.json", plot=plot).results == "samples.json"
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` must be left out with `results`"):
        BenchmarkArguments(results="samples.json", plot=plot, **options)


def test_one_thing_alone_is_asked_for_in_one_way():
    with pytest.raises(ValueError, match="`compiled` must be left out with `only`, but got True"):
        BenchmarkArguments(compiled=True, only="compiled_decoding")
    with pytest.raises(ValueError, match="`only` must be one of compiled_decoding, .*, but got 'decode'"):
        BenchmarkArguments(only="decode")


def test_the_full_grid_is_refused_on_a_cpu(monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--full"])
    with pytest.raises(ValueError, match="device"):
        benchmark.main()
