"""Several processes give what one gives: DDP and FSDP2 through Trainer and accelerate, and checkpoints in shards."""

import json
import re
import shlex
import sys
from pathlib import Path

import distributed_runs
import pytest
import torch
from distributed_runs import STEPS, in_processes
from documents import ROOT, commands, run
from safetensors.torch import load_file
from support import large_weights, random_ids, small_config, small_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import train
from modeling_spiralformer import SpiralFormerForCausalLM

FSDP = {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}
OWN_CORES = {"share_core": False}
# Name of a run -> its model and what it does otherwise. Each is compared with the plain run of the same model.
RUNS = {
    "shared": ({}, {}),
    "own": (OWN_CORES, {"side": "left"}),
    "shared, replayed": ({}, {"gradient_checkpointing": True, "side": "left"}),
    "own, replayed and accumulated": (OWN_CORES, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}),
    "qwen3, replayed": ({"layer_family": "qwen3"}, {"gradient_checkpointing": True}),
    "streams": ({"topology": "hyper_connections", "num_streams": 3}, {"side": "left"}),
    "streams, drawn": ({"topology": "hyper_connections"}, {"schedules": ["4,2,1", "4", "2,1"]}),
    "own, drawn": (OWN_CORES, {"schedules": ["4,2,1", "4", "2,1"]}),
}
STRATEGIES = [("ddp", name) for name in RUNS] + [("fsdp", name) for name in RUNS if "drawn" not in name]  # is refused


def result(folder: Path) -> dict:
    """The run's losses by step, its evaluation, and what the model was wrapped into."""
    return json.loads((folder / "result.json").read_text())


def largest_difference(found: dict, expected: dict, steps=range(1, STEPS + 1)) -> float:
    """The largest difference of two runs' losses, and of their evaluations after training."""
    losses = [abs(found["losses"][str(step)] - expected["losses"][str(step)]) for step in steps]
    return max(*losses, abs(found["evaluation"] - expected["evaluation"]))


def logits(folder: Path) -> torch.Tensor:
    """What a saved model says to one row."""
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(random_ids(1, 23)).logits


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The runs of one process, with neither checkpointing nor accumulation."""
    folder = tmp_path_factory.mktemp("alone")
    for name, (model, other) in RUNS.items():
        distributed_runs.train(str(folder / name), model, schedules=other.get("schedules"))
    return folder


@pytest.fixture(scope="module")
def ddp(tmp_path_factory) -> Path:
    """The runs in two processes. DDP is not to look for unused parameters: without one gradient it fails."""
    folder = tmp_path_factory.mktemp("ddp")
    in_processes(
        2,
        [
            {"folder": str(folder / name), "model": model, "ddp_find_unused_parameters": False, **other}
            for name, (model, other) in RUNS.items()
        ],
    )
    return folder


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory) -> Path:
    """The runs in two processes that share the weights, between one that saves in one process and one that resumes."""
    folder = tmp_path_factory.mktemp("fsdp")
    saving = {"model": OWN_CORES, "save_strategy": "steps", "save_steps": STEPS // 2, **FSDP}
    in_processes(1, [{"folder": str(folder / "one"), **saving}], fsdp=True)
    resumed = {"folder": str(folder / "one to two"), "model": OWN_CORES, "resume": str(folder / "one/checkpoint-10")}
    sharded = {name: RUNS[name] for strategy, name in STRATEGIES if strategy == "fsdp"}
    runs = [{"folder": str(folder / name), "model": model, **other} for name, (model, other) in sharded.items()]
    in_processes(2, [{**a_run, **FSDP} for a_run in (resumed, *runs)], fsdp=True)
    return folder


@pytest.mark.processes
@pytest.mark.parametrize("strategy, name", STRATEGIES)
def test_two_processes_train_as_one(strategy, name, alone, request):
    folder = request.getfixturevalue(strategy)
    found, expected = result(folder / name), result(alone / name)
    wrapper = {"ddp": "DistributedDataParallel", "fsdp": "FSDPSpiralFormerForCausalLM"}
    assert found["wrapper"] == wrapper[strategy] and len(found["losses"]) == STEPS
    assert expected["losses"]["1"] - expected["losses"][str(STEPS - 1)] > 0.05  # it learns
    assert largest_difference(found, expected) < 1e-5
    assert torch.allclose(logits(folder / name), logits(alone / name), atol=1e-4)


@pytest.mark.processes
def test_two_processes_go_on_from_the_shards_of_one(fsdp):
    assert (fsdp / "one/checkpoint-10/pytorch_model_fsdp_0").is_dir()
    assert largest_difference(result(fsdp / "one to two"), result(fsdp / "one")) < 1e-5
    assert torch.allclose(logits(fsdp / "one to two"), logits(fsdp / "one"), atol=1e-4)


@pytest.mark.processes
def test_the_commands_of_the_page_run(workplace):
    printed = ""
    for command in commands("docs/distributed.md"):
        words = shlex.split(command)
        if "scripts/train.py" in words:
            words += ["--report_to", "none"]
            words[2:2] = ["--main_process_port", "0"]  # any free one
            if "scripts/launch/fsdp2.yaml" in words:
                place = words.index("scripts/train.py")
                words[place:place] = [str(ROOT / "tests" / "helpers" / "distributed_runs.py")]
                words += ["--use_cpu"]
        if words[0] == "accelerate":
            words[:1] = [sys.executable, "-m", "accelerate.commands.accelerate_cli"]
        if words[0] == "torchrun":
            words[:1] = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d"]
            words[5:5] = ["--rdzv-endpoint", "localhost:0"]  # any free port
        printed += run(words, workplace)

    runs = workplace / "runs"
    losses = {}
    for name in ("fsdp", "resumed"):
        log = json.loads((runs / name / "trainer_state.json").read_text())["log_history"]
        losses[name] = {entry["step"]: entry["loss"] for entry in log if "loss" in entry}
        assert len(losses[name]) == 4
    assert all(abs(losses["fsdp"][step] - losses["resumed"][step]) < 1e-5 for step in (3, 4))
    assert {path.name for path in (runs / "fsdp/checkpoint-2/pytorch_model_fsdp_0").glob("*.distcp")} == {
        "__0_0.distcp",
        "__1_0.distcp",
    }
    merged, saved = (load_file(runs / name / "model.safetensors") for name in ("merged", "fsdp"))
    assert merged.keys() == saved.keys() and all(torch.equal(merged[name], saved[name]) for name in saved)
    assert AutoModelForCausalLM.from_pretrained(runs / "merged").config.chunk_sizes == [8, 4, 2, 1]
    assert (runs / "ddp/model.safetensors").is_file()
    held, whole = re.search(r"(\d+) of (\d+) parameters in each of 2 processes\ndef add", printed).groups()
    assert 0.5 < int(held) / int(whole) < 0.6


def test_the_script_refuses_fsdp_on_a_cpu(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("def add(a, b):\n    return a + b\n" * 50)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    arguments = ["--train_file", str(tmp_path / "text.txt"), "--output_dir", str(tmp_path), "--block_size", "32"]
    with pytest.raises(ValueError, match="`fsdp` must be off on a CPU"):
        train.main([*arguments, "--use_cpu", "--report_to", "none"])


def test_gradient_accumulation_is_the_big_batch(tmp_path):
    """Four batches of 2 with different numbers of labels, against one of 8: the same losses, gradients and weights."""
    runs = {}
    for batch, steps in ((8, 1), (2, 4)):
        network = large_weights(SpiralFormerForCausalLM(small_config()))
        arguments = TrainingArguments(
            str(tmp_path / str(batch)),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            max_steps=6,
            learning_rate=1e-2,
            logging_steps=1,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(
            network,
            arguments,
            train_dataset=distributed_runs.rows(distributed_runs.LENGTHS),
            data_collator=lambda rows: distributed_runs.collate(rows, "left"),
        )
        assert trainer.model_accepts_loss_kwargs
        trainer.train()
        log = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
        runs[batch] = torch.tensor(log), network.eval()(random_ids(1, 23)).logits
    (whole_log, whole), (split_log, split) = runs[8], runs[2]
    assert whole_log.shape == (6, 2) and torch.allclose(split_log, whole_log, atol=1e-5)
    assert torch.allclose(split, whole, atol=1e-4)


class GatheredLayers:
    """What FSDP2 makes of a layer, as far as the model looks at it."""

    def unshard(self): ...


@pytest.mark.parametrize("cached", [False, True])
def test_sharded_layers_are_called_equally_often_for_any_text(cached, monkeypatch):
    """A call gathers the layer's weights from all processes: one with a short text must not leave a call out."""
    model = small_model(chunk_sizes=[8, 2, 1])
    calls = []
    model.model.core[0].register_forward_hook(lambda *_: calls.append(1))
    counts = {}
    for sharded in (False, True):
        if sharded:
            monkeypatch.setattr(type(model.model.core[0]), "unshard", GatheredLayers.unshard, raising=False)
        for length in (1, 19):
            calls.clear()
            counts[sharded, length] = model(random_ids(1, length), use_cache=cached).logits, len(calls)
    assert [counts[key][1] for key in ((False, 1), (False, 19), (True, 1), (True, 19))] == [2, 3, 3, 3]
    assert torch.equal(counts[False, 1][0], counts[True, 1][0])
