"""The command that times attention back ends: rows of whole texts, both back ends run, one table."""

import pytest
import torch

import compare_attention
from modeling_spiralformer import SpiralFormerModel


def test_rows_hold_texts_of_about_the_length_that_was_asked_for():
    positions = compare_attention.packed_positions(rows=3, length=100, text_length=16)
    assert positions.shape == (3, 100)
    for row in positions:
        starts = (row == 0).nonzero().flatten().tolist()
        lengths = [end - start for start, end in zip(starts, starts[1:], strict=False)]
        assert starts[0] == 0 and lengths and all(12 <= length <= 20 for length in lengths)
        assert torch.equal(torch.cat([torch.arange(n) for n in [*lengths, 100 - starts[-1]]]), row)


def test_both_back_ends_read_the_texts_and_stand_in_the_table(monkeypatch, capsys):
    read, forward = [], SpiralFormerModel.forward

    def watch(self, *args, **kwargs):
        read.append((self.config._attn_implementation, kwargs["position_ids"].tolist()))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(SpiralFormerModel, "forward", watch)
    found = compare_attention.main(["--rows", "2", "--length", "48", "--text_length", "12", "--repeats", "2"])
    assert [name for name, _ in read] == ["sdpa", "flex_attention"] * 3
    assert all(positions == read[0][1] for _, positions in read) and read[0][1][0].count(0) > 2
    logits = found["logits"]
    assert 0 < (logits["flex_attention"] - logits["sdpa"]).abs().max() < 1e-5
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2].startswith("| sdpa |") and " 1.00 | 0.0e+00 |" in printed[-2]
    assert printed[-1].startswith("| flex_attention |") and len(found["seconds"]["flex_attention"]) == 2


def test_counts_are_at_least_one():
    with pytest.raises(ValueError, match="`text_length` must be an integer >= 1"):
        compare_attention.AttentionArguments(text_length=0)
