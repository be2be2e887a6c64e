"""The benchmark of many requests: what it serves, and the table that the docs show."""

import json

import pytest
import torch
import transformers
from documents import ROOT
from packaging import version

from benchmark_batching import BatchingArguments
from workshop.benchmarks.batching import Workload, measure_batching, report_batching
from workshop.benchmarks.models import ModelSize

RESULTS = ROOT / "docs" / "results"


@pytest.mark.skipif(version.parse(transformers.__version__) < version.parse("5.23"), reason="needs transformers 5.23")
def test_a_small_run():
    """Every way serves every request, and continuous batching gives the texts of generate()."""
    size = ModelSize(width=64, layers=3, vocabulary=128, longest=128)
    workload = Workload(requests=6, prompts=(3, 20), new=(2, 12), padded=4, step_tokens=32)
    threads = torch.get_num_threads()
    try:
        results = json.loads(json.dumps(measure_batching("llama", size, workload, torch.device("cpu"), 2, 1)))
    finally:
        torch.set_num_threads(threads)
    requests = workload.draw(size.vocabulary)
    assert results["tokens"] == {"prompts": sum(len(p) for p, _ in requests), "new": sum(new for _, new in requests)}
    assert results["equal_texts"] == 6 and {len(seconds) for seconds in results["seconds"].values()} == {2}
    held, promised = results["block_bytes"].values()
    assert promised < held < 1.5 * promised
    report = report_batching(results)
    assert report.count("generate_batch") == 3 and "6 of 6" in report


def test_requests_are_of_unequal_length_and_always_the_same():
    drawn = Workload().draw(4096)
    assert drawn == Workload().draw(4096) and len(drawn) == 64
    prompts, new = [len(prompt) for prompt, _ in drawn], [count for _, count in drawn]
    assert 16 <= min(prompts) < 25 and 400 < max(prompts) <= 512 and 16 <= min(new) < 25 and 200 < max(new) <= 256


def test_the_docs_show_the_table_of_the_samples():
    results = json.loads((RESULTS / "batching.json").read_text())
    assert (RESULTS / "batching.md").read_text().endswith(report_batching(results) + "\n")


def test_samples_that_are_there_take_no_other_settings():
    with pytest.raises(ValueError, match="`width` must be left out with `results`, but got 64"):
        BatchingArguments(results="runs/batching.json", width=64)


@pytest.mark.parametrize("options", [{"width": 100}, {"requests": 0}, {"repeats": 0}], ids=str)
def test_settings_that_cannot_be_are_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        BatchingArguments(**options)
