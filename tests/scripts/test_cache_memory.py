"""The command that weighs a cache: its figures against the formula, and the chart it draws."""

import sys

import pytest
import torch
from documents import ROOT, run
from support import small_config

from modeling_spiralformer import SpiralFormerConfig
from workshop.costs import cache_bytes, promised_bytes
from workshop.memory import equal_depth


@pytest.mark.parametrize(
    ("options", "width"),
    [
        ({}, 16),
        ({"layer_family": "llama", "num_attention_heads": 2, "num_key_value_heads": 1}, 8),
        ({"layer_family": "qwen3", "num_key_value_heads": 1, "head_dim": 12}, 12),
    ],
    ids=["gpt_neox", "llama", "qwen3"],
)
def test_measured_bytes_follow_the_formula_and_equal_depth_models_hold_every_token(options, width):
    """`width`: heads of keys times their size, which grouped queries make smaller than the hidden size of 16."""
    config = small_config(chunk_sizes=[8, 4, 2, 1], **options)
    held = cache_bytes(config, 2048, 2, torch.float32)
    assert list(held) == [
        "prelude",
        "iteration 0, 1/8",
        "iteration 1, 1/4",
        "iteration 2, 1/2",
        "iteration 3, 1/1",
        "coda",
    ]
    promised = 2 * 2048 * promised_bytes(config, itemsize=4)
    assert abs(sum(held.values()) / promised - 1) < 0.02
    for other in equal_depth(config).values():
        assert other.num_hidden_layers == config.num_hidden_layers
        assert sum(cache_bytes(other, 2048, 2, torch.float32).values()) == 2 * 2048 * 2 * width * 4 * 10


@pytest.mark.parametrize("path", sorted((ROOT / "configuration").iterdir()), ids=lambda path: path.name)
def test_every_published_configuration_has_models_of_equal_depth(path):
    config = SpiralFormerConfig.from_pretrained(path)
    assert {other.num_hidden_layers for other in equal_depth(config).values()} == {config.num_hidden_layers}


def test_the_command_prints_and_draws(tmp_path):
    small_config().save_pretrained(tmp_path)
    plot = tmp_path / "chart.png"
    command = ["scripts/cache_memory.py", "--config", str(tmp_path), "--context_length", "64", "--plot", str(plot)]
    printed = run([sys.executable, *command], ROOT)
    assert "iteration 0, 1/4" in printed and "equal depth" in printed and plot.stat().st_size > 1000
