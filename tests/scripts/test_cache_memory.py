"""The command that weighs a cache: its figures against the formula, and the chart it draws."""

import sys

import torch
from documents import ROOT, run
from support import small_config

from workshop.costs import cache_bytes, layer_equivalents, promised_bytes
from workshop.memory import equal_depth


def test_measured_bytes_follow_the_formula_and_equal_depth_models_hold_every_token():
    config = small_config(chunk_sizes=[8, 4, 2, 1])
    held = cache_bytes(config, 2048, 2, torch.float32)
    assert list(held) == [
        "prelude",
        "iteration 0, 1/8",
        "iteration 1, 1/4",
        "iteration 2, 1/2",
        "iteration 3, 1/1",
        "coda",
    ]
    promised = 2 * 2048 * promised_bytes(layer_equivalents(config), config.hidden_size, itemsize=4)
    assert abs(sum(held.values()) / promised - 1) < 0.02
    for other in equal_depth(config).values():
        assert other.num_hidden_layers == config.num_hidden_layers
        assert sum(cache_bytes(other, 2048, 2, torch.float32).values()) == 2 * 2048 * 2 * 16 * 4 * 10


def test_the_command_prints_and_draws(tmp_path):
    small_config().save_pretrained(tmp_path)
    plot = tmp_path / "chart.png"
    command = ["scripts/cache_memory.py", "--config", str(tmp_path), "--context_length", "64", "--plot", str(plot)]
    printed = run([sys.executable, *command], ROOT)
    assert "iteration 0, 1/4" in printed and "equal depth" in printed and plot.stat().st_size > 1000
