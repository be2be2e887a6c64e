"""The long run of random histories: what it records, that it goes on, and that it would see a fault."""

import json

import fuzz_long
import pytest
import transformers
from packaging import version

from modeling_spiralformer import cache_spiralformer


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(fuzz_long, "HISTORIES", {"cache": 3, "requests": 2})
    monkeypatch.setattr(fuzz_long, "EVERY", 2)


@pytest.mark.skipif(version.parse(transformers.__version__) < version.parse("5.23"), reason="no continuous batching")
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
    """Keys of prelude and coda are kept a little off."""
    right = cache_spiralformer.append_columns
    monkeypatch.setattr(cache_spiralformer, "append_columns", lambda kept, new: right(kept, new * 1.001))
    monkeypatch.setattr(fuzz_long, "PHASES", (fuzz_long.Phase.generate,))  # as it comes: the shortest takes minutes
    with pytest.raises(AssertionError, match="off by"):
        fuzz_long.play_batch(("cache", 0, 60))
