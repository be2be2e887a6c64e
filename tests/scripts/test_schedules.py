"""Training with schedules drawn per batch: a step is that of the view drawn, again the same, and each is evaluated."""

import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from support import random_ids, small_model
from transformers import AutoModelForCausalLM, LlamaConfig, TrainingArguments

import train
from workshop.checkpoints import load_config
from workshop.costs import repeated_flops
from workshop.elastic import ElasticTrainer, check_schedules
from workshop.training_arguments import SpiralTrainingArguments, parse_arguments

SMALL = "hidden_size=32,intermediate_size=64,num_attention_heads=2,num_prelude_layers=1,num_core_layers=1"
SCHEDULES = ["8,4,2,1", "8,4", "1"]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"def f{n}(a, b):\n    return a + {n} * b\n" for n in range(400)), encoding="utf-8")
    return str(path)


def run(text: str, output: Path, schedules: list[str] = SCHEDULES, **changes):
    """Trains for six steps of two parts of two rows."""
    settings = {"train_file": text, "output_dir": str(output), "config_overrides": SMALL, "block_size": "32"}
    settings |= {"per_device_train_batch_size": "2", "gradient_accumulation_steps": "2", "learning_rate": "1e-2"}
    settings |= {"max_steps": "6", "save_steps": "2", "report_to": "none", "disable_tqdm": "True"}
    settings |= {"logging_steps": "1", "max_eval_samples": "8", "do_eval": "False"} | changes
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    return train.main([*words, "--schedules", *schedules])


def elastic_trainer(tmp_path, schedules=("4,2,1", "4,1", "1"), **options) -> ElasticTrainer:
    """One that holds a small model in float32 and has nothing to train on."""
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, **options)
    return ElasticTrainer(small_model(dtype=torch.float32), arguments, schedules=list(schedules))


def test_a_step_is_that_of_the_view_it_draws(tmp_path):
    """Losses and gradients; what the view leaves out gets a gradient of zero."""
    trainer = elastic_trainer(tmp_path)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    model, ids = trainer.model, random_ids(2, 17)
    for step in range(6):
        trainer.state.global_step = step
        model.zero_grad()
        loss = trainer.training_step(model, {"input_ids": ids, "labels": ids})
        view = trainer.drawn
        found = [weight.grad.clone() for weight in model.parameters()]
        model.zero_grad()
        plain = model.with_schedule(view.config.chunk_sizes)  # without what the trainer adds to its views
        expected = plain(ids, labels=ids).loss
        expected.backward()
        assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
        assert len(model.model.resolutions) == 3  # nothing of the view stays
        for weight, gradient in zip(model.parameters(), found, strict=True):
            assert torch.allclose(gradient, torch.zeros_like(weight) if weight.grad is None else weight.grad)


def test_a_model_with_adapters_runs_the_view_that_is_drawn(tmp_path):
    config = peft.LoraConfig(target_modules=["query_key_value"], init_lora_weights=False)
    adapted = peft.get_peft_model(small_model(dtype=torch.float32), config)
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = ElasticTrainer(adapted, arguments, schedules=["1"])
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    ids = random_ids(2, 17)
    loss = trainer.training_step(adapted, {"input_ids": ids, "labels": ids})
    assert loss.item() == pytest.approx(adapted.with_schedule([1])(ids, labels=ids).loss.item(), abs=1e-6)
    assert loss.item() != pytest.approx(adapted(ids, labels=ids).loss.item(), abs=1e-3)
    trainer.eval_dataset = [{"input_ids": row, "labels": row} for row in ids]
    metrics = trainer.evaluate()
    assert metrics["eval_1_loss"] == pytest.approx(loss.item(), abs=1e-5) != metrics["eval_loss"]


def test_draws_hang_on_seed_step_and_part_alone(tmp_path):
    def draws(trainer, steps):
        found = []
        for step in steps:
            trainer.state.global_step = step
            found.append([tuple(trainer.draw().config.chunk_sizes) for _ in range(3)])
        return found

    first = draws(elastic_trainer(tmp_path), range(100))
    torch.manual_seed(5)
    assert draws(elastic_trainer(tmp_path), range(60, 100)) == first[60:]
    assert draws(elastic_trainer(tmp_path, seed=1), range(100)) != first
    counts = Counter(draw for step in first for draw in step)
    assert set(counts) == {(4, 2, 1), (4, 1), (1,)} and min(counts.values()) > 70
    assert any(len(set(step)) > 1 for step in first)
    doubled = draws(elastic_trainer(tmp_path, ["4,2,1", "1", "1", "1"]), range(100))
    assert 190 < sum(step.count((1,)) for step in doubled) < 260


def test_a_resumed_run_draws_what_it_would_have_drawn(text, tmp_path):
    whole = run(text, tmp_path / "whole")
    resumed = run(text, tmp_path / "resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    losses = [[e["loss"] for e in one.state.log_history if "loss" in e] for one in (whole, resumed)]
    assert losses[0] == losses[1]
    fixed = run(text, tmp_path / "fixed", ["8,4,2,1"])
    assert any(not torch.equal(w, fixed.model.state_dict()[name]) for name, w in whole.model.state_dict().items())
    split = {"per_device_train_batch_size": "4", "gradient_accumulation_steps": "1"}
    with pytest.raises(ValueError, match="rows_at_once 2 in place of 4"):  # other parts would draw otherwise
        run(text, tmp_path / "split", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"), **split)


def test_the_whole_schedule_alone_trains_as_without_the_option(text, tmp_path):
    one = run(text, tmp_path / "one", ["8,4,2,1"])
    words = ["--train_file", text, "--output_dir", str(tmp_path / "two"), "--config_overrides", SMALL]
    words += ["--block_size", "32", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    words += ["--learning_rate", "1e-2", "--max_steps", "6", "--report_to", "none", "--do_eval", "False"]
    two = train.main([*words, "--disable_tqdm", "True"])
    for name, weight in one.model.state_dict().items():
        assert torch.equal(weight, two.model.state_dict()[name])
    assert one.state.total_flos == two.state.total_flos > 0


def test_every_schedule_is_evaluated_by_name(text, tmp_path):
    trainer = run(text, tmp_path, ["8,4,2,1", "8,4", "1", "8,4"], do_eval="True")
    metrics = json.loads((tmp_path / "eval_results.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    blocks = torch.tensor(trainer.eval_dataset["input_ids"])
    assert {name for name in metrics if name.endswith("_loss")} == {"eval_loss", "eval_8-4_loss", "eval_1_loss"}
    for prefix, chunk_sizes in {"eval": [8, 4, 2, 1], "eval_8-4": [8, 4], "eval_1": [1]}.items():
        with torch.no_grad():
            loss = loaded.with_schedule(chunk_sizes)(blocks, labels=blocks).loss.item()
        assert metrics[f"{prefix}_loss"] == pytest.approx(loss, abs=1e-5)
        assert metrics[f"{prefix}_perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        assert metrics[f"{prefix}_bits_per_byte"] > 0
    assert "8-4" not in (tmp_path / "README.md").read_text()  # the card has the figures of what loads


def test_operations_are_those_of_the_schedules_drawn(tmp_path):
    trainer = elastic_trainer(tmp_path)
    inputs = {"input_ids": random_ids(2, 17)}
    whole = trainer.floating_point_ops(inputs)
    trainer.drawn = trainer.views[2]
    weights = trainer.drawn.num_parameters(exclude_embeddings=True)
    assert trainer.floating_point_ops(inputs) == 6 * 34 * weights + repeated_flops(trainer.drawn, 34) < whole


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "8,", "8;4", "a", "0", "-1", "8,4.0"])
def test_what_is_no_schedule_is_refused(text):
    with pytest.raises(ValueError, match="`schedules` must each be chunk sizes, such as 8,4,2,1, but got"):
        SpiralTrainingArguments(schedules=["8,4", text])


@pytest.mark.parametrize("schedules", [["8,4"], ["1", "2"]])
def test_a_model_without_a_schedule_has_no_parts(schedules):
    with pytest.raises(ValueError, match='`schedules` must be left out with a model of model_type "llama"'):
        check_schedules(schedules, LlamaConfig())
    check_schedules(None, LlamaConfig())


@pytest.mark.parametrize("schedule", ["4,8", "3", "8,4,2,1,1"])
def test_what_is_no_part_of_the_models_schedule_is_refused_before_the_text_is_read(schedule, text, tmp_path):
    allowed = r"`schedules` must each hold chunk sizes of the model's schedule \[8, 4, 2, 1\], in that order"
    with pytest.raises(ValueError, match=f"{allowed}, but got '{schedule}'"):
        run("nowhere.txt" if schedule == "3" else text, tmp_path, ["8,4", schedule])


def test_schedules_from_a_file(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("output_dir: out\nschedules: ['8,4,2,1', '8, 4', '1']\n")
    assert parse_arguments([str(path)])[2].schedules == ["8,4,2,1", "8, 4", "1"]
    check_schedules(["8,4,2,1", "8, 4", "1"], load_config("configuration/tiny"))
    path.write_text("output_dir: out\nschedules: [1]\n")
    with pytest.raises(ValueError, match="`schedules` must be a list that holds text"):
        parse_arguments([str(path)])


def test_sharding_is_refused(text, tmp_path, monkeypatch):
    sharded = SimpleNamespace(is_fsdp_enabled=True)  # which is never so on a CPU
    monkeypatch.setattr("workshop.training.make_trainer", lambda *arguments: sharded)
    with pytest.raises(ValueError, match="`schedules` must be left out with `fsdp`"):
        run(text, tmp_path)
