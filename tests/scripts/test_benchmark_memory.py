"""Peaks of memory: what they hold, and that what is kept longer shows."""

import pytest
import torch

import benchmark_memory
from workshop.benchmarks import peaks
from workshop.benchmarks.measuring import Grid
from workshop.benchmarks.models import ModelSize, models_of, plain_name

SMALL = Grid("llama", ModelSize(width=64, layers=6, vocabulary=128, longest=64), "float32", (), (), 32, ())


def test_the_command_counts_every_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_memory, "small_grids", lambda family: (SMALL,))
    output = tmp_path / "counts.json"
    found = benchmark_memory.main(["--layer_family", "llama", "--output", str(output)])
    printed = capsys.readouterr().out
    names = [name for name, model in models_of("llama").items() if not model.zero_offsets]
    assert output.is_file() and all(printed.count(f"| {name} |") == 1 for name in names)
    counted = found["peaks"]
    for name in names:
        weights = found["counts"][name]["parameters"] * 4
        assert weights < counted["decode"][name] < counted["prefill"][name] < counted["training"][name], name
        assert counted["training"][name] > 4 * weights, name  # gradients and two moments
    plain = printed.splitlines()[2]
    assert plain.startswith(f"| {plain_name('llama')} |") and plain.count("| 1.000") == 3


def test_the_cache_is_in_the_peak_of_decoding_and_what_is_kept_shows():
    model = models_of("llama")["spiralformer-b"].build(SMALL.size, torch.device("cpu"), torch.float32)
    short, long = (peaks.decode_peak(model, context) for context in (32, 64 - 32))
    assert short == long  # the same context
    cache = 24 * 2 * 64 * 4  # bytes for each full-resolution layer call of 24 more tokens
    assert peaks.decode_peak(model, 8) + cache < short
    kept = []
    model.register_forward_hook(lambda module, args, output: kept.append(torch.zeros(2**20)))
    assert peaks.decode_peak(model, 32) > short + 31 * 4 * 2**20


@pytest.mark.parametrize("workload", ["prefill", "training"])
def test_longer_texts_take_more(workload):
    model = models_of("gpt_neox")["spiralformer-l"].build(SMALL.size, torch.device("cpu"), torch.float32)
    peak = getattr(peaks, f"{workload}_peak")
    assert peak(model, 64) > peak(model, 32) > peaks.weight_bytes(model)
