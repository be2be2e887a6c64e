"""Runs on synthetic tasks: plans read and refused, losses and accuracies, runs killed and resumed, a report."""

from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
import torch
import yaml
from test_molecule_runs import PLAN as MOLECULES
from test_molecule_runs import Here, Killed, without_clock
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiment import main as run_experiments
from workshop.experiments import runner as experiment_runner
from workshop.experiments.plan import Experiment, load_experiment
from workshop.experiments.results import ExperimentResults
from workshop.experiments.run import train_run
from workshop.experiments.runner import check_same_text, describe_text, make_tokenizer
from workshop.experiments.store import read_lines
from workshop.experiments.tasks_report import tasks_report
from workshop.tasks.rows import draw_rows, make_task

DYCK = {"name": "dyck", "types": 3, "depth": 4, "longest": 16, "mean_length": 9, "rows": 24}
HOPS = {"name": "hops", "hops": 2, "letters": 3, "length": 8, "rows": 24}
OF_DYCK = {"task": DYCK, "vocab_size": 9, "block_size": 34, "budget": {"tokens": 8 * 4 * 9}}
OF_HOPS = {"task": HOPS, "vocab_size": 8, "block_size": 11, "budget": {"tokens": 8 * 4 * 11}}
PLAN = {
    "title": "Two tiny models",
    "report": "task",
    "references": ["plain"],
    "batch_size": 4,
    "evaluation_blocks": 10,
    "learning_rates": [1e-3, 1e-2],
    "seeds": [0, 1],
    "training": {"train_sampling_strategy": "group_by_length"},
    "common": {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "tie_word_embeddings": True},
    "models": {
        "plain": {"num_prelude_layers": 3, "num_core_layers": 0, "num_coda_layers": 0, "chunk_sizes": []},
        "spiral": {"num_prelude_layers": 1, "num_core_layers": 1, "num_coda_layers": 1, "chunk_sizes": [4, 2]},
    },
    **OF_DYCK,
}
BOTH = pytest.mark.parametrize("changes", [OF_DYCK, OF_HOPS], ids=["dyck", "hops"])


def experiment(**changes) -> Experiment:
    return Experiment(name="tiny", **(PLAN | changes))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"report": "table"}, "`task` must go with report task"),
        ({"task": None}, "`task` must go with report task, but got None"),
        ({"task": DYCK | {"name": "dick"}}, r"`name` of `task` must be one of \['dyck', 'hops'\]"),
        ({"task": DYCK | {"depth": 0}}, "`depth` of `task` must be an integer >= 1, but got 0"),
        ({"vocab_size": 10}, "`vocab_size` must be 9, the tokens of the task, but got 10"),
        ({"block_size": 33}, "`block_size` must be at least 34, the longest row's tokens, but got 33"),
        ({"text": {"train": "a.txt"}}, "`text` and `smiles` must be left out with `task`"),
        ({"smiles": {"mean_length": 9, "samples": 1, "temperature": 1.0, "top_k": 4}}, "must be left out with `task`"),
        ({"budget": {"tokens": 1}}, "`budget` must be a multiple of 36 tokens"),
    ],
)
def test_bad_plans_are_refused_by_name(changes, words, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(PLAN | changes), encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        load_experiment(path)


def test_a_plan_without_texts_needs_a_task(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(PLAN | {"task": None, "report": "table"}), encoding="utf-8")
    with pytest.raises(ValueError, match="`text` must name a file for each of"):
        load_experiment(path)


def test_a_key_hangs_on_the_task():
    first = experiment().run("plain", 0, 1e-3)
    assert first.settings["task"] == DYCK and first.settings["steps"] == 8
    assert experiment(task=DYCK | {"rows": 25}).run("plain", 0, 1e-3).key != first.key
    assert "task" not in Experiment(name="tiny", **MOLECULES).run("plain", 0, 1e-3).settings


def alone(model, ids: np.ndarray, labels: np.ndarray) -> tuple[float, int]:
    """Summed loss and count of the labels of one row, read without padding."""
    found = model(torch.tensor(ids)[None]).logits[0].double().log_softmax(dim=-1)
    chosen = [(place, int(label)) for place, label in enumerate(labels[1:]) if label != -100]
    return -sum(float(found[place, label]) for place, label in chosen), len(chosen)


@BOTH
def test_a_run_that_stopped_half_way_ends_alike_and_its_figures_are_those_of_its_model(changes, tmp_path):
    """Killed in the second of its passes over 24 rows; loss and accuracy once more, row by row, without padding."""
    plan = experiment(**changes)
    planned, tokenizer = plan.run("spiral", 0, 1e-2), make_tokenizer(plan, tmp_path, tmp_path)
    whole, flops = train_run(planned, tmp_path, tmp_path / "whole", tokenizer, [].append), []

    def stop(flops_of_step):
        flops.append(flops_of_step)
        if len(flops) == 8:  # the start, and seven steps of eight
            raise Killed

    with pytest.raises(Killed):
        train_run(planned, tmp_path, tmp_path / "torn", tokenizer, stop)
    resumed = train_run(planned, tmp_path, tmp_path / "torn", tokenizer, [].append)
    assert resumed["resumed_from_step"] == 6 and without_clock(resumed) == without_clock(whole)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "torn" / planned.key).eval()
    assert len(AutoTokenizer.from_pretrained(tmp_path / "torn" / planned.key)) == plan.vocab_size
    task = make_task(plan.task)
    rows = draw_rows(task, 10)
    assert set(whole["accuracy"]) == set(whole["nats_per_token"]) == set(rows) - {"train"}
    for split, figures in whole["accuracy"].items():
        with torch.no_grad():
            sums = [alone(model, *row) for row in rows[split]]
            parts = [task.score(model(torch.tensor(ids)[None]).logits.numpy(), ids[None]) for ids, _ in rows[split]]
        expected = sum(loss for loss, _ in sums) / sum(count for _, count in sums)
        assert whole["nats_per_token"][split] == pytest.approx(expected, rel=1e-5)
        for name, (right, count) in figures.items():
            of_rows = [part.get(name, [0, 0]) for part in parts]
            assert [right, count] == [sum(column) for column in zip(*of_rows, strict=True)]


def test_tokens_are_those_of_the_rows_without_padding(tmp_path):
    """Six steps of four rows: all of the 24, once."""
    plan = experiment(budget={"tokens": 6 * 4 * 9})
    results = train_run(
        plan.run("plain", 0, 1e-2), tmp_path, tmp_path, make_tokenizer(plan, tmp_path, tmp_path), [].append
    )
    assert results["tokens"] == sum(len(ids) for ids, _ in draw_rows(make_task(DYCK), 10)["train"])


def test_rows_are_described_as_texts_are_and_other_ones_refused(tmp_path):
    plan = experiment()
    described = describe_text(plan, tmp_path)
    assert list(described) == ["train", "validation", "longer"]
    assert described["train"]["file"] == "Dyck-(3, 4), train" and len(described["train"]["sha256"]) == 64
    line = {"key": "a", "experiment": "tiny", "settings": plan.run("plain", 0, 1e-3).settings, "text": described}
    check_same_text(described, [line], plan)
    other = described | {"train": described["train"] | {"sha256": "0" * 64}}
    with pytest.raises(ValueError, match="other digests"):
        check_same_text(other, [line], plan)
    hops = experiment(**OF_HOPS)  # another task, and another number of rows, are other data
    check_same_text(describe_text(hops, tmp_path), [line], hops)
    with pytest.raises(ValueError, match="`mean_length` of `task` must be 9, the rounded mean of its rows, but got 8"):
        describe_text(experiment(task=DYCK | {"mean_length": 8}, budget={"tokens": 32}), tmp_path)
    fewer = experiment(evaluation_blocks=5)
    check_same_text(describe_text(fewer, tmp_path), [line], fewer)


def test_a_killed_worker_takes_others_along_and_the_error_names_all(tmp_path, monkeypatch):
    """As a pool does it: the work of every worker is lost, and none of it says which one was killed."""

    class Broken(Here):
        def submit(self, work, *arguments):
            future = Future()
            future.set_exception(BrokenProcessPool("ended abruptly"))
            return future

    monkeypatch.setattr(experiment_runner, "ProcessPoolExecutor", Broken)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(PLAN), encoding="utf-8")
    words = ["--experiments", str(tmp_path / "tiny.yaml"), "--data_dir", str(tmp_path), "--workers", "3"]
    named = [f"tiny: {run}" for run in ("plain, seed 0, rate 0.001", "plain, seed 0, rate 0.01")]
    named.append("tiny: spiral, seed 0, rate 0.001")
    with pytest.raises(RuntimeError) as raised:
        run_experiments([*words, "--lines", str(tmp_path / "runs.jsonl"), "--runs_dir", str(tmp_path / "runs")])
    assert sorted(str(raised.value).partition(" failed; ")[0].split("; ")) == named
    assert isinstance(raised.value.__cause__, BrokenProcessPool)


@BOTH
def test_the_runner_sweeps_trains_and_reports(changes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment_runner, "ProcessPoolExecutor", Here)
    shorter = {"sweep_budget": {"tokens": changes["budget"]["tokens"] // 4}, "seeds": [0]}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(PLAN | changes | shorter), encoding="utf-8")
    words = ["--experiments", str(path), "--data_dir", str(tmp_path), "--lines", str(tmp_path / "runs.jsonl")]
    run_experiments([*words, "--runs_dir", str(tmp_path / "runs")])
    printed = capsys.readouterr().out
    assert printed.count(" nats per token, ") == 6 and "bits" not in printed and "valid," not in printed
    lines = read_lines(tmp_path / "runs.jsonl")
    assert [line["steps"] for line in lines] == [2] * 4 + [8] * 2
    plan = load_experiment(path)
    results = ExperimentResults.gather(plan, lines)
    text = tasks_report(results, {})
    assert "All 2 runs finished." in text and "Runs of" in text
    for name in plan.models:
        (line,) = plan.finished(name, lines).values()
        assert line["learning_rate"] == plan.chosen_rate(name, lines) and line["kv_bytes_per_token"] > 0
        right, count = line["accuracy"]["validation"]["all"]
        assert f"{100 * right / count:.1f}%" in text
