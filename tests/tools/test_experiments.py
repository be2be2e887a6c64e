"""Experiments: plans read and refused, matched models, runs that are killed and resumed, lines that add up."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from documents import commands
from transformers import AutoModelForCausalLM

from experiment import main
from modeling_spiralformer import SpiralFormerConfig
from workshop.costs import count_costs, count_parameters, meta_model
from workshop.experiments import plan as experiment_plan
from workshop.experiments import run as run_module
from workshop.experiments.matching import match_parameters, match_steps, parameters_per_unit
from workshop.experiments.plan import Experiment, Run, config_fields, load_experiment
from workshop.experiments.run import Progress, last_whole_checkpoint, train_run, training_arguments
from workshop.experiments.runner import Runner, held
from workshop.experiments.store import append_line, drop_torn_line, read_lines
from workshop.tokenizers import save_tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = sorted((ROOT / "scripts" / "experiments").glob("*.yaml"))
SMALL = {
    "title": "Two tiny models",
    "report": "table",
    "references": ["plain"],
    "text": {"train": "train.txt", "validation": "valid.txt", "foreign": "foreign.txt"},
    "vocab_size": 259,
    "block_size": 32,
    "batch_size": 2,
    "budget": {"tokens": 512},
    "evaluation_blocks": 4,
    "learning_rates": [1e-3, 1e-2],
    "seeds": [0, 1],
    "common": {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2},
    "models": {
        "plain": {"num_prelude_layers": 3, "num_core_layers": 0, "num_coda_layers": 0, "chunk_sizes": []},
        "spiral": {"num_prelude_layers": 1, "num_core_layers": 1, "num_coda_layers": 1, "chunk_sizes": [4, 2]},
    },
}


def experiment(**changes) -> Experiment:
    return Experiment(name="small", **(SMALL | changes))


@pytest.fixture
def data_dir(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for number, name in enumerate(("train.txt", "valid.txt", "foreign.txt")):
        words = [f"{word} {(word * 7 + number) % 11}" for word in range(3000 if number == 0 else 300)]
        (folder / name).write_text(" ".join(words), encoding="utf-8")
    return folder


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    save_tokenizer(train_tokenizer([], 259), tmp_path / "tokenizer", model_max_length=32)
    return tmp_path / "tokenizer"


def line_of(run, validation: float | None) -> dict:
    """A finished line, as far as a plan reads it."""
    return {"key": run.key, "bits_per_byte": {"validation": validation, "foreign": validation}}


# -- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_committed_experiments_are_matched(path):
    """Models of an experiment train on equal tokens or FLOPs, and those with a target hold it within half a unit."""
    plan = load_experiment(path)
    tokens, targets = set(), set()
    for name, entry in plan.models.items():
        run = plan.run(name, plan.seeds[0], plan.learning_rates[0])
        settings = run.settings
        if "flops" in plan.budget:
            assert abs(run.flops - plan.budget["flops"]) <= run.flops / settings["steps"] / 2
        else:
            tokens.add(settings["steps"] * settings["batch_size"] * plan.example_length)
        target = (plan.common | entry).get("non_embedding_parameters")
        if target is not None:
            config = plan.model_config(name)
            assert abs(count_parameters(config)[1] - target) <= parameters_per_unit(config) / 2
            targets.add(target)
    assert tokens == ({plan.budget["tokens"]} if "tokens" in plan.budget else set())
    for name in plan.models:  # those without a target are what the others are matched to
        config = plan.model_config(name)
        count = count_parameters(config)[1]
        assert min(abs(count - target) for target in targets) <= parameters_per_unit(config) / 2, name
    assert len(plan.seeds) >= 3 and len(plan.learning_rates) >= 3


def test_the_commands_of_the_page_take_every_experiment_and_every_line():
    """Not carried out: they take hours. The reports themselves are checked in test_report.py."""
    run, report, _ = commands("docs/experiments.md")  # the third one: test_hierarchy.py
    assert report == "make results"
    dry = subprocess.run([*run.split(), "-n"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(f"scripts/experiments/{path.name}" in dry for path in EXPERIMENTS) and '--data_dir "data"' in dry
    dry = subprocess.run([*report.split(), "-n"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "scripts/report.py" in dry


def test_the_published_row_and_ratio_0_are_runs_of_the_main_comparison():
    plans = {path.stem: load_experiment(path) for path in EXPERIMENTS}
    main = plans["main_small"]
    assert plans["ablations"].run("published", 1, 4e-3).key == main.run("spiralformer-b", 1, 4e-3).key
    assert plans["recurrence_ratio"].run("ratio-0", 1, 4e-3).key == main.run("gpt-neox", 1, 4e-3).key


@pytest.mark.parametrize("size", ["50k", "150k"])
def test_equal_flops_share_the_sweeps_and_the_model_that_they_are_taken_from(size):
    tokens, flops = (
        load_experiment(ROOT / "scripts" / "experiments" / f"molecules_{size}{end}.yaml") for end in ("", "_flops")
    )
    for name in tokens.models:
        assert flops.run(name, 0, 5e-3, sweep=True).key == tokens.run(name, 0, 5e-3, sweep=True).key
    same = {name for name in tokens.models if flops.run(name, 1, 5e-3).key == tokens.run(name, 1, 5e-3).key}
    assert same == {"spiralformer-mesh"}


def test_a_plan_takes_what_it_lacks_from_the_one_that_it_is_based_on(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(SMALL), encoding="utf-8")
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump({"based_on": "base.yaml", "batch_size": 4, "seeds": [5]}), encoding="utf-8")
    expected = Experiment("other", **(SMALL | {"batch_size": 4, "seeds": [5]}))
    assert vars(load_experiment(path)) == vars(expected)
    path.write_text(yaml.safe_dump({"based_on": "nowhere.yaml"}), encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="`based_on`"):
        load_experiment(path)


def test_a_key_hangs_on_everything_that_decides_a_run():
    first = experiment().run("spiral", 0, 1e-3)
    assert experiment(title="Other words").run("spiral", 0, 1e-3).key == first.key
    assert experiment().run("spiral", 1, 1e-3).key != first.key
    assert experiment().run("spiral", 0, 1e-2).key != first.key
    changes = [{"batch_size": 4}, {"budget": {"tokens": 1024}}, {"vocab_size": 260}, {"block_size": 64}]
    changes += [
        {"evaluation_blocks": 5},
        {"training": {"weight_decay": 0.0}},
        {"text": SMALL["text"] | {"train": "b.txt"}},
    ]
    changes += [{"common": SMALL["common"] | {"num_attention_heads": 1}}]
    assert len({first.key, *(experiment(**change).run("spiral", 0, 1e-3).key for change in changes)}) == 1 + len(
        changes
    )


def test_a_model_may_have_settings_of_its_own():
    """On top of those of all, and part of its runs' keys alone."""
    own = {"router_learning_rate_ratio": 0.1, "weight_decay": 0.5}
    models = SMALL["models"] | {"slow": SMALL["models"]["spiral"] | {"training": own}}
    training = {"weight_decay": 0.2, "warmup_steps": 0.1}
    plan, before = experiment(models=models, training=training), experiment(training=training)
    assert plan.run("slow", 0, 1e-3).settings["training"] == training | own
    assert plan.run("spiral", 0, 1e-3).key == before.run("spiral", 0, 1e-3).key != plan.run("slow", 0, 1e-3).key
    assert "training" not in plan.run("slow", 0, 1e-3).settings["config"]


def test_finished_runs_keep_their_keys():
    lines = read_lines(ROOT / "docs" / "results" / "runs.jsonl")
    assert len(lines) >= 59
    for line in lines:
        assert Run(line["experiment"], line["model"], line["settings"], 0).key == line["key"]


def test_a_field_that_came_later_is_part_of_a_key_only_where_it_differs(monkeypatch):
    """A made-up field whose default hangs on another one, as the number of key heads does on that of heads."""
    settings = experiment().run("spiral", 0, 1e-3).settings
    before = Run("small", "spiral", settings, 0).key

    def with_later(config: SpiralFormerConfig) -> dict:
        return config_fields(config) | {"num_later_heads": config.num_attention_heads}

    monkeypatch.setattr(experiment_plan, "config_fields", with_later)
    after = experiment().run("spiral", 0, 1e-3)
    assert after.settings["config"]["num_later_heads"] == 2 and after.key == before
    other = settings | {"config": after.settings["config"] | {"num_later_heads": 1}}
    assert Run("small", "spiral", other, 0).key != before
    first = settings | {"config": settings["config"] | {"share_core": False}}  # a default among the first fields
    assert Run("small", "spiral", first, 0).key != before


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"report": "pie"}, "report"),
        ({"references": ["plain", "nobody"]}, "references"),
        ({"references": []}, "references"),
        ({"references": "plain"}, "references"),
        ({"rate_of": "nobody"}, "rate_of"),
        ({"text": {"train": "a.txt"}}, "text"),
        ({"batch_size": 0}, "batch_size"),
        ({"seeds": [0, 0]}, "seeds"),
        ({"seeds": []}, "seeds"),
        ({"learning_rates": ["1e-3"]}, "learning_rates"),
        ({"training": {"learning_rate": 1e-3}}, "learning_rate"),
        ({"training": {"gradient_accumulation_steps": 3}}, "gradient_accumulation_steps"),
        ({"training": {"wheight_decay": 1e-3}}, "wheight_decay"),
        ({"models": {"plain": {"layers": 3}}}, "layers"),
        ({"models": {"plain": {"chunk_sizes": [0]}}}, "chunk_sizes"),
        ({"models": {"plain": {"non_embedding_parameters": 10}}}, "non_embedding_parameters"),
        ({"models": {"plain": {"training": {"seed": 3}}}}, "seed"),
        ({"models": {"plain": {"training": {"router_learning_rate_ratio": "slow"}}}}, "router_learning_rate_ratio"),
        ({"models": {"plain": {"training": 3}}}, "`training` of model 'plain'"),
        ({"training": {"gradient_accumulation_steps": 0}}, "gradient_accumulation_steps"),
        ({"training": {"save_only_model": True}}, "save_only_model"),
        ({"training": {"schedules": ["4"]}}, "schedules"),
        ({"training": {"prediction_loss_only": True}}, "prediction_loss_only"),
        ({"training": {"logging_strategy": "no"}}, "logging_strategy"),
        (
            {"models": {"plain": {"training": {"gradient_accumulation_steps": 2}}, "other": {}}},
            "`gradient_accumulation_steps` must be the same for all models, but got {'other': 1, 'plain': 2}",
        ),
        ({"budget": {"hours": 1}}, "budget"),
        ({"budget": {"flops": "1e9"}}, "budget"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_bad_plans_are_refused_by_name(changes, field, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(SMALL | changes), encoding="utf-8")
    with pytest.raises(ValueError, match=field):
        load_experiment(path)


def test_what_the_runner_sets_itself_is_no_setting_of_a_plan(tmp_path, monkeypatch):
    """A setting that is given twice would end each run at its start."""
    given = {}

    def keep(**settings):
        given.update(settings)
        raise InterruptedError

    monkeypatch.setattr(run_module, "SpiralTrainingArguments", keep)
    with pytest.raises(InterruptedError):
        training_arguments(experiment().run("plain", 0, 1e-3), tmp_path)
    assert len(given) > 15 and set(given) <= experiment_plan.RESERVED


def test_a_plan_without_a_key_is_refused(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in SMALL.items() if key != "seeds"}), encoding="utf-8")
    with pytest.raises(ValueError, match="seeds"):
        load_experiment(path)


def test_the_sweep_comes_first_and_chooses_the_rate_of_lowest_loss():
    plan = experiment()
    ready, waiting = plan.pending([])
    swept = [(run.model, run.settings["seed"], run.settings["learning_rate"]) for run in ready]
    assert swept == [("plain", 0, 1e-3), ("plain", 0, 1e-2), ("spiral", 0, 1e-3), ("spiral", 0, 1e-2)]
    assert [(run.model, run.settings["seed"]) for run in waiting] == [("plain", 1), ("spiral", 1)]
    lines = [line_of(run, loss) for run, loss in zip(ready, (3.0, 2.0, 2.5, None), strict=True)]
    assert plan.chosen_rate("plain", lines[:1]) is None
    assert plan.chosen_rate("plain", lines) == 1e-2
    assert plan.chosen_rate("spiral", lines) == 1e-3  # the other rate diverged
    assert plan.finished("plain", lines) == {0: lines[1]}
    ready, waiting = plan.pending(lines)
    assert [(run.model, run.settings["seed"], run.settings["learning_rate"]) for run in ready] == [
        ("plain", 1, 1e-2),
        ("spiral", 1, 1e-3),
    ]
    assert waiting == []
    assert plan.pending(lines + [line_of(run, 2.0) for run in ready]) == ([], [])


def test_a_sweep_may_have_a_budget_of_its_own():
    plan = experiment(sweep_budget={"tokens": 128})
    ready, waiting = plan.pending([])
    assert [run.settings["steps"] for run in ready] == [2] * 4 and len(waiting) == 4
    assert {run.settings["steps"] for run in waiting} == {8}
    lines = [line_of(run, loss) for run, loss in zip(ready, (3.0, 2.0, 2.5, 2.6), strict=True)]
    assert plan.chosen_rate("plain", lines) == 1e-2 and plan.finished("plain", lines) == {}
    ready, waiting = plan.pending(lines)
    planned = [(run.model, run.settings["seed"], run.settings["learning_rate"]) for run in ready]
    assert planned == [("plain", 0, 1e-2), ("spiral", 0, 1e-3), ("plain", 1, 1e-2), ("spiral", 1, 1e-3)]
    assert {run.settings["steps"] for run in ready} == {8} and waiting == []
    assert plan.pending(lines + [line_of(run, 2.0) for run in ready]) == ([], [])


def test_a_model_whose_every_rate_diverged_has_no_more_runs():
    plan = experiment()
    ready, _ = plan.pending([])
    lines = [line_of(run, None if run.model == "spiral" else 2.0) for run in ready]
    assert plan.chosen_rate("spiral", lines) is None
    ready, waiting = plan.pending(lines)
    assert [run.model for run in ready] == ["plain"]
    assert waiting == []


def test_all_models_can_take_the_rate_of_one():
    plan = experiment(rate_of="plain")
    ready, waiting = plan.pending([])
    assert {run.model for run in ready} == {"plain"}
    assert [(run.model, run.settings["seed"]) for run in waiting] == [("spiral", 0), ("plain", 1), ("spiral", 1)]
    lines = [line_of(run, run.settings["learning_rate"]) for run in ready]
    assert plan.chosen_rate("spiral", lines) == 1e-3
    assert len(plan.pending(lines)[0]) == 3


# -- matching ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share_core", [True, False])
@pytest.mark.parametrize(
    "layers, of_a_layer",
    [({}, 33), ({"layer_family": "llama"}, 48), ({"layer_family": "qwen3"}, 48)],
    ids=["with biases", "gated", "gated, qwen3"],
)
def test_parameters_are_matched_to_the_nearest_unit(layers, of_a_layer, share_core):
    """Weights in and out, of width 16, and a bias; or those of a gate too."""
    config = SpiralFormerConfig(
        vocab_size=300, hidden_size=16, intermediate_size=64, num_attention_heads=2, share_core=share_core, **layers
    )
    before = count_parameters(config)[1]
    unit = parameters_per_unit(config)
    assert unit == (2 + 4 * (1 if share_core else 4) + 2) * of_a_layer
    wider = match_parameters(config, before + 3 * unit + unit // 2 - 1)
    assert wider.intermediate_size == 67 and config.intermediate_size == 64
    assert count_parameters(wider)[1] == before + 3 * unit
    with pytest.raises(ValueError, match="non_embedding_parameters"):
        match_parameters(config, 100)


def test_parameters_are_counted_without_embedding_and_head():
    config = SpiralFormerConfig(vocab_size=300, hidden_size=16, intermediate_size=64, num_attention_heads=2)
    total, non_embedding = count_parameters(config)
    assert total - non_embedding == 2 * 300 * 16
    assert total == sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert meta_model(config).device.type == "meta"


def test_a_tied_head_is_the_embedding_and_counts_once():
    options = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 64, "num_attention_heads": 2}
    tied, untied = (SpiralFormerConfig(**options, tie_word_embeddings=tie) for tie in (True, False))
    assert count_parameters(tied)[1] == count_parameters(untied)[1]
    assert count_parameters(untied)[0] - count_parameters(tied)[0] == 300 * 16


def test_budgets_are_met():
    assert match_steps({"tokens": 640}, tokens_per_step=64, flops_per_step=5) == 10
    assert match_steps({"flops": 1e6}, tokens_per_step=64, flops_per_step=3e4) == 33
    for budget in (
        None,
        {"flops": "1e6"},
        {"tokens": 650},
        {"tokens": 0},
        {"flops": 1.0},
        {"hours": 1},
        {"tokens": 64, "flops": 1e6},
        {},
    ):
        with pytest.raises(ValueError, match="budget"):
            match_steps(budget, tokens_per_step=64, flops_per_step=30000)


def test_equal_flops_give_the_cheaper_model_more_tokens():
    plan = experiment(budget={"flops": 1e10})
    for name in plan.models:
        run = plan.run(name, 0, 1e-3)
        per_step = run.flops / run.settings["steps"]
        assert abs(run.flops - 1e10) <= per_step / 2
    steps = {name: plan.run(name, 0, 1e-3).settings["steps"] for name in plan.models}
    assert steps["spiral"] > steps["plain"]


def test_costs_of_a_plain_stack_by_hand():
    """Two products of a linear layer backward for one forward; attention twice d n^2 forward; float32 keys, values."""
    size, length = 16, 32
    costs = count_costs(experiment().model_config("plain"), length)
    linear = 3 * (4 * size * size + 2 * size * 32)
    assert costs["non_embedding_parameters"] == 3 * (linear // 3 + 4 * size + 32 + size + 4 * size) + 2 * size
    forward = 2 * length * linear + 3 * 4 * length * length * size
    assert costs["training_flops_per_block"] == pytest.approx(3 * (forward + 2 * length * size * 259))
    assert costs["prefill_flops_per_token"] == pytest.approx((forward + 2 * size * 259) / length)
    assert costs["kv_bytes_per_token"] == pytest.approx(3 * 2 * size * 4)
    assert costs["decode_layer_equivalents"] == 3
    assert count_costs(experiment().model_config("spiral"), length)["decode_layer_equivalents"] == 2.75


# -- lines ------------------------------------------------------------------------------------------------------------


def test_a_line_is_held_to_its_digest(tmp_path):
    path = tmp_path / "runs.jsonl"
    line = {"key": "a", "loss": 1.5, "inner": {"n": [1, 2.0]}}
    append_line(path, line)
    append_line(path, {"key": "b"})
    assert read_lines(path) == [line, {"key": "b"}]
    text = path.read_text("utf-8")
    for damaged in (text.replace("1.5", "1.6"), text.replace('"n"', '"m"'), text.replace('"key": "b"', '"key": "c"')):
        path.write_text(damaged, encoding="utf-8")
        number = 2 if '"c"' in damaged else 1
        with pytest.raises(ValueError, match=f"line {number}, must be .* as it was written: `sha256` is not that of"):
            read_lines(path)
    path.write_text(text.replace('"key": "b"', '"key": "b", "key": "b"'), encoding="utf-8")
    with pytest.raises(ValueError, match="line 2, .*the key 'key' stands there twice"):
        read_lines(path)
    path.write_text('{"key": "older"}\n' + text, encoding="utf-8")
    assert [line["key"] for line in read_lines(path)] == ["older", "a", "b"]


def test_lines_outlive_a_kill_in_the_middle_of_one(tmp_path):
    path = tmp_path / "folder" / "runs.jsonl"
    assert read_lines(path) == [] and drop_torn_line(path) == ""
    append_line(path, {"key": "a"})
    append_line(path, {"key": "b"})
    assert drop_torn_line(path) == ""
    with open(path, "a") as file:
        file.write('{"key": "c", "los')
    with pytest.raises(ValueError, match="line 3"):
        read_lines(path)
    assert drop_torn_line(path) == '{"key": "c", "los'
    assert [line["key"] for line in read_lines(path)] == ["a", "b"]
    with pytest.raises(ValueError):
        append_line(path, {"loss": float("nan")})
    assert len(read_lines(path)) == 2
    path.write_text(path.read_text().rstrip("\n"))  # an editor took the last newline, and nothing else
    assert drop_torn_line(path) == "" and len(read_lines(path)) == 2
    append_line(path, {"key": "c"})
    assert [line["key"] for line in read_lines(path)] == ["a", "b", "c"]


# -- runs -------------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def without_clock(results: dict) -> dict:
    return {name: value for name, value in results.items() if name not in ("wall_seconds", "resumed_from_step")}


def test_a_run_that_stopped_half_way_ends_like_one_that_did_not(data_dir, tokenizer, tmp_path):
    run = experiment().run("spiral", 0, 1e-2)
    whole, flops = train_run(run, data_dir, tmp_path / "whole", tokenizer, [].append), []

    def stop(flops_of_step):
        flops.append(flops_of_step)
        if len(flops) == 7:  # the start, and six steps of eight; checkpoints at two, four and six
            raise Killed

    with pytest.raises(Killed):
        train_run(run, data_dir, tmp_path / "torn", tokenizer, stop)
    assert last_whole_checkpoint(tmp_path / "torn" / run.key).endswith("checkpoint-4")
    reported = []
    resumed = train_run(run, data_dir, tmp_path / "torn", tokenizer, reported.append)
    assert resumed["resumed_from_step"] == 4
    assert sum(reported) == pytest.approx(run.flops) and reported[0] == pytest.approx(run.flops / 2)
    assert without_clock(resumed) == without_clock(whole)
    assert whole["tokens"] == 512 and len(whole["validation_curve"]) == 8 and whole["flops"] == run.flops
    again = train_run(run, data_dir, tmp_path / "torn", tokenizer, reported.append)  # killed before its line
    assert without_clock(again) == without_clock(whole)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "torn" / run.key)
    assert model.config.chunk_sizes == [4, 2]


def test_a_checkpoint_that_was_cut_off_is_left_out(tmp_path):
    assert last_whole_checkpoint(tmp_path) is None
    for step, text in ((2, '{"global_step": 2}'), (10, '{"global_step": 10}'), (12, '{"global_st')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-14").mkdir()  # killed before its state was written
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_a_seed_gives_all_models_the_same_batches(data_dir, tokenizer, tmp_path, monkeypatch):
    seen = {}
    for name, seed in (("plain", 0), ("spiral", 0), ("spiral", 1)):
        batches = seen.setdefault((name, seed), [])
        forward = torch.nn.Embedding.forward

        def record(module, ids, batches=batches, forward=forward):
            if module.training:
                batches.append(ids.tolist())
            return forward(module, ids)

        monkeypatch.setattr(torch.nn.Embedding, "forward", record)
        train_run(experiment().run(name, seed, 1e-3), data_dir, tmp_path / name, tokenizer, [].append)
        monkeypatch.undo()
    assert len(seen["plain", 0]) == 8
    assert seen["plain", 0] == seen["spiral", 0] != seen["spiral", 1]


def test_every_step_is_whole_and_every_evaluation_too(data_dir, tokenizer, tmp_path, monkeypatch):
    """Over several passes, whose rest of one block fills no batch; an evaluation of five blocks in batches of two."""
    (data_dir / "train.txt").write_text("0123456789 " * 21)  # 231 bytes and an end of text: 7 blocks of 32
    rows = {True: [], False: []}
    forward = torch.nn.Embedding.forward

    def record(module, ids):
        rows[module.training].append(len(ids))
        return forward(module, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", record)
    train_run(experiment(evaluation_blocks=5).run("plain", 0, 1e-3), data_dir, tmp_path, tokenizer, [].append)
    assert rows[True] == [2] * 8
    assert rows[False][-6:] == [2, 2, 1] * 2


def test_accumulated_steps_keep_the_batch_and_other_devices_do_not(tmp_path, monkeypatch):
    arguments = training_arguments(
        experiment(training={"gradient_accumulation_steps": 2}).run("plain", 0, 1e-3), tmp_path
    )
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (1, 2)
    monkeypatch.setattr(type(arguments), "n_gpu", 2)
    with pytest.raises(ValueError, match="batch_size"):
        training_arguments(experiment().run("plain", 0, 1e-3), tmp_path)


@pytest.mark.parametrize("text, blocks", [("0123456789 " * 21, 7), ("0123456789 " * 24, 8)])
def test_accumulated_steps_are_whole_in_every_pass(text, blocks, data_dir, tokenizer, tmp_path, monkeypatch):
    (data_dir / "train.txt").write_text(text)
    rows, steps = [], []
    forward, count = torch.nn.Embedding.forward, Progress.on_step_end

    def record(module, ids):
        rows.extend([len(ids)] * module.training)
        return forward(module, ids)

    def record_step(self, *arguments, **kwargs):
        steps.append(sum(rows))
        return count(self, *arguments, **kwargs)

    monkeypatch.setattr(torch.nn.Embedding, "forward", record)
    monkeypatch.setattr(Progress, "on_step_end", record_step)
    plan = experiment(batch_size=4, training={"gradient_accumulation_steps": 4}, budget={"tokens": 1024})
    results = train_run(plan.run("plain", 0, 1e-3), data_dir, tmp_path, tokenizer, [].append)
    assert blocks // 4 < 8 == results["steps"]
    assert set(rows) == {1} and steps == [4 * step for step in range(1, 9)]
    assert results["tokens"] == 32 * sum(rows) == 1024


def test_a_step_of_more_rows_than_there_are_is_refused(data_dir, tokenizer, tmp_path):
    (data_dir / "train.txt").write_text("0123456789 " * 21)
    run = experiment(batch_size=8).run("plain", 0, 1e-3)
    with pytest.raises(ValueError, match="`batch_size` must be at most the training rows, 7, but got 8"):
        train_run(run, data_dir, tmp_path, tokenizer, [].append)


def test_a_diverged_run_is_a_result(data_dir, tokenizer, tmp_path):
    run = experiment(training={"max_grad_norm": 0.0}).run("plain", 0, 1e30)
    results = train_run(run, data_dir, tmp_path / "runs", tokenizer, [].append)
    assert results["bits_per_byte"] == {"validation": None, "foreign": None}
    append_line(tmp_path / "runs.jsonl", results)


def runner_arguments(tmp_path, data_dir) -> list[str]:
    plan = tmp_path / "small.yaml"
    plan.write_text(yaml.safe_dump(SMALL | {"budget": {"tokens": 2048}}), encoding="utf-8")
    words = ["--experiments", str(plan), "--data_dir", str(data_dir), "--lines", str(tmp_path / "runs.jsonl")]
    return [*words, "--runs_dir", str(tmp_path / "runs"), "--workers", "2"]


def start_runner(tmp_path, data_dir) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "scripts" / "experiment.py"), *runner_arguments(tmp_path, data_dir)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("name, path", [("runs_dir", "runs/runner"), ("lines", "runs.jsonl")])
def test_a_runner_beside_another_is_refused(name, path, data_dir, tmp_path):
    with held(name, tmp_path / path), pytest.raises(ValueError, match=f"`{name}` must not be in use"):
        main(runner_arguments(tmp_path, data_dir))
    assert not (tmp_path / "runs.jsonl").exists() or not (tmp_path / "runs.jsonl").read_text()


@pytest.mark.parametrize("name", ["train", "validation", "foreign"])
def test_every_text_is_read_before_the_first_run(name, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(Runner, "run", lambda self: pytest.fail("the runs have begun"))
    file = SMALL["text"][name]
    (data_dir / file).write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=f"`{name}` must be text in UTF-8, but '.*{file}' is not"):
        main(runner_arguments(tmp_path, data_dir))


@pytest.mark.processes
def test_a_killed_runner_goes_on(data_dir, tmp_path):
    """The whole way: killed after its first lines, which ends its workers, and started again after a torn line."""
    path = tmp_path / "runs.jsonl"
    runner = start_runner(tmp_path, data_dir)
    deadline = time.time() + 180
    while not (path.exists() and path.read_text().count("\n") >= 2) and time.time() < deadline:
        time.sleep(0.05)
    runner.kill()  # it alone: its workers have to notice
    runner.communicate(timeout=60)  # comes back when the last process that holds its output has ended
    drop_torn_line(path)
    before = read_lines(path)
    with open(path, "a") as file:
        file.write('{"key": "torn')
    runner = start_runner(tmp_path, data_dir)
    output, _ = runner.communicate(timeout=300)
    assert runner.returncode == 0, output
    assert "cut off" in output and "0 runs left" in output
    lines = read_lines(path)
    assert lines[: len(before)] == before
    plan = load_experiment(tmp_path / "small.yaml")
    assert len(lines) == 6 == len({line["key"] for line in lines})
    assert [sorted(plan.finished(name, lines)) for name in plan.models] == [[0, 1], [0, 1]]
    for line in lines:
        assert line["tokens"] == 2048 and line["flops"] > 0 and line["bits_per_byte"]["foreign"] > 0
        assert line["commit"] and line["machine"]["torch"] == torch.__version__ and line["text"]["train"]["sha256"]
    (data_dir / "train.txt").write_text("another text " * 300)
    other = start_runner(tmp_path, data_dir)
    refusal, _ = other.communicate(timeout=180)
    assert other.returncode != 0 and "other digests" in refusal
    (data_dir / "foreign.txt").unlink()
    missing = start_runner(tmp_path, data_dir)
    refusal, _ = missing.communicate(timeout=180)
    assert missing.returncode != 0 and "`data_dir` must hold foreign.txt" in refusal
    assert json.loads(path.read_text().splitlines()[0])["key"] == lines[0]["key"]
