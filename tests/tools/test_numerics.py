"""Smaller numbers beside float64: what is measured, and that an overflow is seen."""

import math

import pytest
import torch
from documents import ROOT
from support import small_model

import compare_dtypes
from workshop.numerics import NumericsArguments, format_table, measure, states_by_level

SMALL = {"iterations": [5], "families": ["llama"], "topologies": ["mesh"], "lengths": [24], "hidden_size": 32}


def test_errors_are_those_of_the_dtype():
    found = {entry["dtype"]: entry for entry in measure(NumericsArguments(**SMALL))}
    for level in ("prelude", "1/8", "1/4", "1/2", "1", "logits"):
        errors = [found[dtype]["errors"][level] for dtype in ("float32", "float16", "bfloat16")]
        assert 0 < errors[0] < 1e-6 < 1e-5 < errors[1] < errors[2] < 0.05, (level, errors)


def test_a_level_is_read_after_its_last_iteration():
    """Errors planted behind one iteration are seen at its level and after it, and nowhere before."""
    model = small_model(chunk_sizes=[4, 2, 1], num_core_layers=1)
    ids = torch.arange(3, 27)[None]
    exact, largest = states_by_level(model, ids)
    assert [state.shape[1] for state in exact.values()] == [24, 6, 12, 24, 24]
    with torch.no_grad():
        model.model.coda[0].mlp.dense_h_to_4h.weight.mul_(1.5)
    found, _ = states_by_level(model, ids)
    assert [torch.equal(found[level], exact[level]) for level in exact] == [True] * 4 + [False]
    assert math.isfinite(largest)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_an_overflow_stays_seen(value):
    model = small_model(dtype=torch.float16)
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = value
    _, largest = states_by_level(model, torch.tensor([[5, *range(6, 20)]]))
    assert not math.isfinite(largest)
    entry = {"kind": "k", "length": 15, "dtype": "float16", "errors": {"logits": math.nan}, "largest": largest}
    assert "nan" in format_table([entry])


def test_the_command_prints_a_table_of_made_and_trained_models(capsys):
    words = ["--iterations", "4", "--families", "qwen3", "--topologies", "anchor", "hyper_connections"]
    checkpoint = str(ROOT / "checkpoints" / "spiralformer-53k")
    compare_dtypes.main([*words, "--lengths", "16", "512", "--hidden_size", "32", "--checkpoints", checkpoint])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 6 + 3 and all(line.count("|") == 11 for line in lines)  # the checkpoint ends at 128
    assert "4 iterations | 512 | float16" in lines[7] and checkpoint in lines[-1] and "-" in lines[7].split("|")[9]


@pytest.mark.parametrize("options", [{"iterations": [3]}, {"lengths": [64, 7]}, {"hidden_size": 0}])
def test_settings_that_measure_nothing_are_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        NumericsArguments(**options)
