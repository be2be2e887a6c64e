"""Views of a model beside each other: what the rows say of them, and a draft that would change the text."""

import math

import numpy as np
import pytest
import torch
from support import random_ids, small_model

from workshop import schedules


@pytest.fixture
def model():
    return small_model(chunk_sizes=[4, 2, 1], hidden_size=32)  # it says more than one word


def test_rows_say_what_views_cost_predict_and_draft(model):
    """The view of the whole schedule predicts as the model does, and drafts what it takes: 4 tokens and one a call."""
    sequences, lengths = random_ids(3, 12), np.full(61, 2)
    prompts = random_ids(2, 9, seed=1)
    whole, same, part = schedules.compare(model, [[4, 2, 1], [4]], sequences, lengths, prompts, 20, draft_tokens=4)
    assert [row["schedule"] for row in (whole, part)] == ["1+2x{1/4,1/2,1}+1", "1+2x{1/4}+1"]
    assert whole["layer_equivalents"] == 5.5 and part["layer_equivalents"] == 2.5
    loss = model(sequences, labels=sequences).loss.item()
    assert whole["bits_per_byte"] == pytest.approx(loss / math.log(2) / 2)
    assert same["bits_per_byte"] == whole["bits_per_byte"] != part["bits_per_byte"]
    assert same["accepted"] == 1 and same["tokens_per_call"] == 5
    assert part["accepted"] < 1 and part["tokens_per_call"] < 5
    assert "accepted" not in whole and all(row["tokens_per_second"] > 0 for row in (whole, same, part))


def test_a_draft_that_changes_the_text_is_refused(model, monkeypatch):
    real = schedules.time_assisted

    def changed(*args, **how):
        run, text = real(*args, **how)
        return run, text.flip(-1)

    monkeypatch.setattr(schedules, "time_assisted", changed)
    with pytest.raises(ValueError, match=r"plain decoding, but \[4, 1\] differs"):
        schedules.generate_in_turns(model, [model.with_schedule([4, 1])], random_ids(1, 9), 6)


def test_a_row_without_tokens_per_call_has_dashes():
    row = {"schedule": "a", "layer_equivalents": 1.0, "bits_per_byte": 2.0, "tokens_per_second": 3.0}
    assert schedules.format_rows([row]).splitlines()[-1] == "| a | 1.00 | 2.0000 | 3.0 | - | - | - |"


def test_sequences_in_parts_are_as_many_bits(model):
    sequences, lengths = random_ids(5, 12), np.arange(1, 62)
    found = [schedules.bits_per_byte(model, sequences, lengths, rows) for rows in (5, 2)]
    assert found[0] == pytest.approx(found[1]) and torch.isfinite(torch.tensor(found)).all()
