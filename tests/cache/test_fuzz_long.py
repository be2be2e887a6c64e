"""The long run of random histories: what it records, that it goes on, and that it would see a fault."""

import json

import fuzz_long
import pytest
import torch
from support import random_ids, small_model
from transformers import DynamicCache

from modeling_spiralformer.level_spiralformer import LatentEntry


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(fuzz_long, "HISTORIES", {"cache": 3, "requests": 2})
    monkeypatch.setattr(fuzz_long, "EVERY", 2)


@pytest.mark.processes
def test_batches_are_recorded_once_and_the_rest_is_run(short, tmp_path):
    record = tmp_path / "fuzz.jsonl"
    for histories in (1, 4, 4):
        fuzz_long.main(["--histories", str(histories), "--workers", "1", "--record", str(record)])
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [(line["kind"], line["seed"]) for line in lines] == [("cache", 0), ("requests", 1)]
    assert sum(lines[0]["histories"].values()) >= 3 and lines[1]["histories"] == {"continuous": 2}
    assert all(line["commit"] for line in lines)


def test_a_fault_ends_a_batch(monkeypatch):
    """The rows of what a resolution holds stay where they were."""
    monkeypatch.setattr(fuzz_long, "PHASES", (fuzz_long.Phase.generate,))  # as it comes: the shortest takes minutes
    monkeypatch.setattr(LatentEntry, "reorder_cache", lambda state, rows: None)
    model = small_model(chunk_sizes=[4, 1])
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(random_ids(2, 9), past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))  # the fault itself raises nothing
    with pytest.raises(AssertionError, match="off by"):
        fuzz_long.play_batch(("cache", 0, 60))
