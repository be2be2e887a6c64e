"""Resumed runs: the numbers of a run that was never stopped, or a refusal that names what would change them."""

import contextlib
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from short_runs import train_shortly, write_text
from support import small_model
from transformers import AutoTokenizer, Trainer

from modeling_spiralformer import TOKENIZER_FOLDER
from modeling_spiralformer.files_spiralformer import DIGESTS_NAME, read_digests
from workshop import resuming
from workshop.experiments.run import last_whole_checkpoint
from workshop.training_arguments import SpiralTrainingArguments, planned_steps

SMALL = "hidden_size=32,intermediate_size=64,num_attention_heads=2,num_prelude_layers=1,num_core_layers=1"
# Dropout draws random numbers in every step; without a topology that has weights, another one would fit them.
MODEL = f"{SMALL},topology=anchor,hidden_dropout=0.1"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return write_text(tmp_path_factory.mktemp("text"))


def run(text: str, output: Path, overrides: str = MODEL, **changes):
    return train_shortly(text, output, overrides, **changes)


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """A run that was never stopped, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return run(text, folder).model.state_dict(), folder


@pytest.fixture
def checkpoint(whole, tmp_path) -> Path:
    """A copy of its checkpoint after two steps, without the digests that would tell every change."""
    without = shutil.ignore_patterns(DIGESTS_NAME)
    return Path(shutil.copytree(whole[1] / "checkpoint-2", tmp_path / "checkpoint-2", ignore=without))


def resume(text: str, checkpoint: Path, overrides: str = MODEL, **changes):
    return run(
        text, checkpoint.parent / "resumed", overrides, **{"resume_from_checkpoint": str(checkpoint), **changes}
    )


def change_record(checkpoint: Path, **changes) -> dict:
    """Writes other values into the record of a checkpoint, and returns the record as it was."""
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text("utf-8"))
    arguments = state["stateful_callbacks"]["RunRecord"]["args"]
    before, arguments["record"] = arguments["record"], arguments["record"] | changes
    path.write_text(json.dumps(state), encoding="utf-8")
    return before


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_whole_checkpoint_gives_the_same_weights(text, whole, checkpoint):
    """Also with settings that do not change the numbers, and where another processes' work is not touched."""
    resumed = resume(text, checkpoint, logging_steps="2", save_steps="1", dataloader_num_workers="1").model
    for name, value in whole[0].items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_weights_in_bfloat16_go_on_in_bfloat16(text, tmp_path):
    whole = run(text, tmp_path, dtype="bfloat16").model.state_dict()
    resumed = resume(text, tmp_path / "checkpoint-2", dtype="bfloat16").model.state_dict()
    assert {value.dtype for value in resumed.values()} == {torch.bfloat16}
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_evaluations_change_no_number_of_a_run(text, whole, tmp_path):
    """Of one with dropout, also where only a part of it is evaluated."""
    evaluated = {"eval_strategy": "steps", "eval_steps": "1", "validation_file": text, "max_eval_samples": "2"}
    found = run(text, tmp_path, eval_on_start="True", **evaluated)
    assert sum("eval_loss" in entry for entry in found.state.log_history) == 6  # before, and at the end
    later = resume(text, tmp_path / "checkpoint-2")
    for name, value in whole[0].items():
        assert torch.equal(value, found.model.state_dict()[name]), name
        assert torch.equal(value, later.model.state_dict()[name]), name


def test_what_is_logged_evaluated_and_saved_follows_the_settings_of_the_run_that_goes_on(text, checkpoint):
    evaluated = {"eval_strategy": "steps", "eval_steps": "1", "validation_file": text, "max_eval_samples": "1"}
    first = resume(text, checkpoint, save_steps="1", **evaluated)
    assert [entry["step"] for entry in first.state.log_history if "eval_loss" in entry] == [3, 4, 4]
    saved = {path.name for path in (checkpoint.parent / "resumed").glob("checkpoint-*")}
    assert saved == {"checkpoint-3", "checkpoint-4"}
    second = resume(text, checkpoint, logging_steps="2")
    assert [entry["step"] for entry in second.state.log_history if "loss" in entry] == [1, 2, 4]


@pytest.mark.parametrize("value", ["true", "True"])
def test_the_newest_checkpoint_of_the_folder(value, text, whole, checkpoint):
    for name in ("checkpoint-3", "checkpoint-10"):  # killed while they were written
        (checkpoint.parent / name).mkdir()
    (checkpoint.parent / "checkpoint-10" / "trainer_state.json").write_text('{"global_st', encoding="utf-8")
    resumed = run(text, checkpoint.parent, resume_from_checkpoint=value)
    assert all(torch.equal(value, resumed.model.state_dict()[name]) for name, value in whole[0].items())
    shutil.rmtree(checkpoint)
    for folder in checkpoint.parent.glob("checkpoint-*"):
        shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="`resume_from_checkpoint` is .*`output_dir` must hold a whole checkp"):
        run(text, checkpoint.parent, resume_from_checkpoint=value)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_a_checkpoint_without_a_part_is_refused_by_its_name(name, text, checkpoint):
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).unlink()
    with pytest.raises(ValueError, match=f"`resume_from_checkpoint` must be a whole checkpoint, but .* lacks {name}"):
        resume(text, checkpoint)
    (checkpoint / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"must be a whole checkpoint, but .* has a damaged {name}"):
        resume(text, checkpoint)
    if name != "trainer_state.json":  # which is what tells that a checkpoint is whole
        shutil.copytree(checkpoint, checkpoint.parent / "resumed" / "checkpoint-2")
        with pytest.raises(ValueError, match=f"has a damaged {name}"):
            resume(text, checkpoint, resume_from_checkpoint="true")


def test_a_changed_byte_is_told_by_the_checksums_of_an_archive(text, checkpoint):
    """torch reads the data of a tensor, and a state, without a look at them."""
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        whole = (checkpoint / name).read_bytes()
        with zipfile.ZipFile(checkpoint / name) as archive:
            largest = max(archive.infolist(), key=lambda item: item.file_size)
        start = whole.index(whole[largest.header_offset : largest.header_offset + 30]) + 30 + largest.file_size // 2
        (checkpoint / name).write_bytes(whole[:start] + bytes([whole[start] ^ 1]) + whole[start + 1 :])
        with pytest.raises(ValueError, match=f"must be a whole checkpoint, but .* has a damaged {name}"):
            resume(text, checkpoint)
        (checkpoint / name).write_bytes(whole)


def test_every_file_of_a_checkpoint_is_held_to_its_digest(text, whole, tmp_path):
    checkpoint = Path(shutil.copytree(whole[1] / "checkpoint-2", tmp_path / "checkpoint-2"))
    listed = read_digests(checkpoint)
    assert {"config.json", "model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"} < set(listed)
    for name, old, new in (
        ("trainer_state.json", '"global_step": 2', '"global_step": 1'),
        ("config.json", '"layer_norm_eps": 1e-05', '"layer_norm_eps": 1e-04'),
        ("tokenizer.json", '"add_prefix_space": false', '"add_prefix_space": true'),
    ):
        content = (checkpoint / name).read_text("utf-8")
        assert old in content or old.replace(": ", ":") in content, name
        changed = content.replace(old, new).replace(old.replace(": ", ":"), new.replace(": ", ":"))
        (checkpoint / name).write_text(changed, encoding="utf-8")
        with pytest.raises(ValueError, match=f"must be as its SHA256SUMS says, but {name} has other content"):
            resume(text, checkpoint)
        (checkpoint / name).write_text(content, encoding="utf-8")
    resumed = resume(text, checkpoint).model.state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in whole[0].items())


class Harmful:
    """A pickle that runs code where it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["archive", "bare"])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_code_in_a_pickle_is_not_run(name, form, text, whole, checkpoint, tmp_path):
    trap = tmp_path / "ran"
    if form == "archive":
        torch.save({"state": Harmful(trap)}, checkpoint / name)
    else:
        (checkpoint / name).write_bytes(pickle.dumps(Harmful(trap)))
    if name == "training_args.bin":  # which nothing reads
        resumed = resume(text, checkpoint).model.state_dict()
        assert all(torch.equal(value, resumed[key]) for key, value in whole[0].items())
    else:
        found = "torch refuses to read" if form == "archive" else "damaged"
        with pytest.raises(ValueError, match=f"must be a whole checkpoint, but .*{name}|{found}"):
            resume(text, checkpoint)
    assert not trap.exists()
    with pytest.raises(FileExistsError):  # the trap works
        trap.mkdir()
        torch.load(checkpoint / name, weights_only=False) if form == "archive" else pickle.loads(
            (checkpoint / name).read_bytes()
        )


@pytest.mark.parametrize("asked", [True, False], ids=["asked for", "recorded"])
def test_half_precision_goes_on_with_its_scale(asked, checkpoint):
    """`accelerate launch` may have asked for it."""
    change_record(checkpoint, mixed_precision="no" if asked else "fp16")
    with pytest.raises(ValueError, match="must be a whole checkpoint, but .* lacks scaler.pt"):
        resuming.check_whole(checkpoint, SimpleNamespace(fp16=asked))


def test_a_checkpoint_without_weights_or_folder_is_refused_by_its_name(text, checkpoint):
    (checkpoint / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="`resume_from_checkpoint` must be a folder with config.json"):
        resume(text, checkpoint)
    shutil.rmtree(checkpoint)
    with pytest.raises(FileNotFoundError, match="`resume_from_checkpoint` must be an existing folder, but got"):
        resume(text, checkpoint)


@pytest.mark.parametrize(
    "changed, found",
    [
        ("topology=residual", "topology 'anchor' in place of 'residual'"),
        ("chunk_offsets=[0,0,0,0]", r"chunk_offsets None in place of \[0, 0, 0, 0\]"),
        ("hidden_dropout=0.0", "hidden_dropout 0.1 in place of 0.0"),
        ("hidden_act=relu", "hidden_act 'gelu' in place of 'relu'"),
        ("rope_parameters={'rope_theta':500.0}", "rope_parameters"),
        ("num_coda_layers=1", "num_coda_layers 2 in place of 1"),
    ],
)
def test_another_model_is_refused_by_its_field(changed, found, text, checkpoint):
    name = changed.partition("=")[0]
    kept = ",".join(item for item in MODEL.split(",") if not item.startswith(f"{name}="))
    with pytest.raises(ValueError, match=f"`resume_from_checkpoint` must be of the model that .* has {found}"):
        resume(text, checkpoint, f"{kept},{changed}")


def test_a_configuration_that_was_changed_in_the_checkpoint_is_refused(text, checkpoint):
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    (checkpoint / "config.json").write_text(json.dumps(config | {"topology": "base"}), encoding="utf-8")
    with pytest.raises(ValueError, match="has topology 'base' in place of 'anchor'"):
        resume(text, checkpoint)


@pytest.mark.parametrize(
    "changes, found",
    [
        ({"learning_rate": "2e-2"}, "learning_rate 0.01 in place of 0.02"),
        ({"seed": "1"}, "seed 42 in place of 1, data_seed 42 in place of 1"),
        ({"data_seed": "7"}, "data_seed 42 in place of 7"),
        ({"weight_decay": "0"}, "weight_decay 0.01 in place of 0.0"),
        ({"lr_scheduler_type": "linear"}, "lr_scheduler_type 'cosine_with_min_lr' in place of 'linear'"),
        ({"warmup_steps": "2"}, "warmup_steps 0.01 in place of 2.0"),
        ({"adam_beta2": "0.9"}, "adam_beta2 0.95 in place of 0.9"),
        ({"max_grad_norm": "5"}, "max_grad_norm 1.0 in place of 5.0"),
        ({"optim": "sgd"}, "optim 'adamw_torch[a-z_]*' in place of 'sgd'"),
        ({"bf16": "True", "use_cpu": "True"}, "bf16 False in place of True"),
        ({"dtype": "bfloat16"}, "dtype 'float32' in place of 'bfloat16'"),
        ({"per_device_train_batch_size": "4"}, "rows_per_step 2 in place of 4"),
        ({"gradient_accumulation_steps": "2"}, "rows_per_step 2 in place of 4"),
        # The rows of a step are the same, and each pass draws its own dropout.
        ({"per_device_train_batch_size": "1", "gradient_accumulation_steps": "2"}, "rows_at_once 2 in place of 1"),
        ({"schedules": "4,1"}, r"schedules None in place of \['4,1'\]"),
        ({"router_learning_rate_ratio": "0.5"}, "router_learning_rate_ratio None in place of 0.5"),
        (
            {"load_best_model_at_end": "True", "eval_strategy": "steps", "eval_steps": "2"},
            "load_best_model_at_end False in place of True",
        ),
        ({"max_train_samples": "5"}, "training text .* in place of '5 rows of 320 tokens"),
    ],
)
def test_settings_that_change_the_numbers_are_refused_by_name(changes, found, text, checkpoint):
    with pytest.raises(ValueError, match=f"`resume_from_checkpoint` must be of a run with the same settings.*{found}"):
        resume(text, checkpoint, **changes)


def test_a_precision_that_accelerate_launch_sets_is_refused(text, checkpoint, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="has mixed_precision 'no' in place of 'bf16'"):
        resume(text, checkpoint, use_cpu="True")


@pytest.mark.parametrize(
    "first, refused",
    [
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "eval_loss"}, True),
        ({"load_best_model_at_end": "True"}, True),
        ({}, False),
    ],
    ids=["rate", "weights", "nothing"],
)
def test_where_evaluations_decide_they_stay_as_they_were(first, refused, text, tmp_path):
    evaluated = {
        "validation_file": text,
        "eval_strategy": "steps",
        "eval_steps": "1",
        "max_eval_samples": "2",
        **first,
    }
    run(text, tmp_path, f"{SMALL},topology=anchor", **evaluated)
    for changes, found in (
        ({"max_eval_samples": "1"}, "validation text '2 rows .* in place of '1 rows"),
        ({"eval_steps": "2"}, "eval_steps 1.0 in place of 2"),
    ):
        refusal = pytest.raises(ValueError, match=found)
        with refusal if refused else contextlib.nullcontext():
            resume(text, tmp_path / "checkpoint-2", f"{SMALL},topology=anchor", **{**evaluated, **changes})
    resume(text, tmp_path / "checkpoint-2", f"{SMALL},topology=anchor", **evaluated)


def test_rows_of_another_length_are_refused_by_their_number(text, checkpoint):
    """Counted in the text: a file of the standard library has another length in another Python."""
    tokens = len(AutoTokenizer.from_pretrained(TOKENIZER_FOLDER)(Path(text).read_text("utf-8"))["input_ids"])
    kept, asked = (f"{tokens // size} rows of {tokens // size * size} tokens" for size in (64, 32))
    refusal = "`resume_from_checkpoint` must be of a run with the same settings"
    with pytest.raises(ValueError, match=f"{refusal}.*training text '{kept}.* in place of '{asked}"):
        resume(text, checkpoint, block_size="32")


def test_another_text_in_the_same_file_is_refused(text, checkpoint, tmp_path):
    """As long as the first, one letter changed."""
    changed = tmp_path / "text.txt"
    content = Path(text).read_text("utf-8")
    changed.write_text(content.replace("Wrap", "Warp", 1), encoding="utf-8")
    assert changed.read_text("utf-8") != content
    with pytest.raises(ValueError, match="has training text"):
        resume(str(changed), checkpoint)


def test_without_dropout_the_rows_of_a_step_may_be_split_otherwise(text, tmp_path):
    plain = MODEL.replace("0.1", "0.0")
    expected = losses(run(text, tmp_path / "whole", plain))
    split = {"per_device_train_batch_size": "1", "gradient_accumulation_steps": "2"}
    found = losses(resume(text, tmp_path / "whole" / "checkpoint-2", plain, **split))
    assert len(expected) == 4 and found == pytest.approx(expected, rel=1e-5)  # sums in another order


@pytest.mark.parametrize(
    "rows, steps, changed, refused",
    [
        (8, 9, {"processes": 2, "rows_at_once": 1}, False),
        (9, 5, {"processes": 2, "rows_at_once": 1}, True),  # two processes take ten rows, and the first one twice
        (9, 4, {"processes": 2, "rows_at_once": 1}, False),  # the run ends before
        (9, 9, {"rows_at_once": 1}, False),
        (8, 9, {"rows_at_once": 1, "dataloader_drop_last": True}, False),
        (9, 5, {"rows_at_once": 1, "dataloader_drop_last": True}, True),  # one batch of one row would be left
    ],
)
@pytest.mark.parametrize("first", [False, True], ids=["then", "before"])
def test_where_rows_fill_no_whole_number_of_steps_their_split_counts(rows, steps, changed, refused, first, checkpoint):
    """Two rows a step, in the run that goes on or in the one before; without dropout."""
    dropped = {"dataloader_drop_last": changed.get("dataloader_drop_last", False)}
    record = change_record(checkpoint, **(dropped | (changed if first else {}))) | dropped
    other = {**record, **changed}
    refusal = pytest.raises(ValueError, match="rows_at_once [12] in place of [12]")
    with refusal if refused else contextlib.nullcontext():
        resuming.check_record(checkpoint, record if first else other, draws=False, rows=rows, steps=steps)


@pytest.mark.parametrize(
    "settings, steps",
    [
        ({"max_steps": 7}, 7),
        ({"num_train_epochs": 2}, 10),
        ({"num_train_epochs": 0.5}, 3),
        ({"num_train_epochs": 2, "dataloader_drop_last": True}, 10),
        ({"num_train_epochs": 2, "dataloader_drop_last": True, "per_device_train_batch_size": 2}, 4),
    ],
)
def test_the_steps_of_a_run_are_counted_as_trainer_counts_them(settings, steps, tmp_path):
    """Nine rows, two parts a step."""
    training = SpiralTrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to="none",
        gradient_accumulation_steps=2,
        **{"per_device_train_batch_size": 1, **settings},
    )
    rows = [{"input_ids": [1, 2], "labels": [1, 2]}] * 9
    trainer = Trainer(small_model(), training, train_dataset=rows)
    trainer.train()
    assert planned_steps(training, len(rows)) == steps == trainer.state.global_step


def test_blocks_are_not_grouped_by_length(text, tmp_path):
    with pytest.raises(ValueError, match="`train_sampling_strategy` must be 'random' or 'sequential'"):
        run(text, tmp_path, train_sampling_strategy="group_by_length")


def test_a_run_goes_on_longer_and_never_shorter(text, checkpoint, caplog):
    with pytest.raises(ValueError, match="`max_steps` must be above 2, the step of the checkpoint, but got 2"):
        resume(text, checkpoint, max_steps="2")
    with pytest.raises(ValueError, match="`max_steps` must be at least 4, as planned when the run began, but got 3"):
        resume(text, checkpoint, max_steps="3")
    assert resume(text, checkpoint, max_steps="5").state.global_step == 5
    assert "the run goes on to step 5 in place of 4" in caplog.text
    final = checkpoint.parent / "resumed" / "checkpoint-5"
    with pytest.raises(ValueError, match="`max_steps` must be above 5, the step of the checkpoint, but got 4"):
        resume(text, final, max_steps="4")


def test_a_run_that_was_stopped_after_its_last_step_is_saved_and_evaluated(text, whole, tmp_path):
    """By a kill while it wrote the finished model, say."""
    last = shutil.copytree(whole[1] / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    evaluated = {"do_eval": "True", "validation_file": text, "max_eval_samples": "1"}
    finished = run(text, tmp_path / "run", resume_from_checkpoint="true", **evaluated)
    assert finished.state.global_step == 4
    assert (tmp_path / "run" / "eval_results.json").is_file() and (tmp_path / "run" / "README.md").is_file()
    assert not (tmp_path / "run" / "train_results.json").exists()  # nothing was trained
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "run" / name).read_bytes() == (whole[1] / name).read_bytes(), name
    with pytest.raises(ValueError, match="`max_steps` must be above 4, the step of the checkpoint, but got 3"):
        resume(text, last, max_steps="3")


def test_a_run_that_was_stopped_after_its_last_step_saves_its_best_weights(text, tmp_path):
    """Where the largest loss is called the best, it is the first."""
    settings = {"load_best_model_at_end": "True", "eval_strategy": "steps", "eval_steps": "2"}
    settings |= {"greater_is_better": "True", "validation_file": text, "max_eval_samples": "2"}
    whole = run(text, tmp_path, **settings)
    assert whole.state.best_global_step == 2 < whole.state.global_step
    (tmp_path / "model.safetensors").unlink()
    found = run(text, tmp_path, **settings, resume_from_checkpoint="true")
    assert all(torch.equal(value, found.model.state_dict()[name]) for name, value in whole.model.state_dict().items())
    saved, best = (tmp_path / name / "model.safetensors" for name in ("", "checkpoint-2"))
    assert saved.read_bytes() == best.read_bytes()


def test_a_checkpoint_of_another_trainer_is_refused(text, checkpoint):
    """Only the record of scripts/train.py says what the run was."""
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text("utf-8"))
    del state["stateful_callbacks"]["RunRecord"]
    path.write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(ValueError, match="must be a checkpoint of scripts/train.py, but .*`model_name_or_path`"):
        resume(text, checkpoint)


def test_the_record_survives_when_callbacks_are_restored(text, whole, checkpoint):
    resumed = resume(text, checkpoint, restore_callback_states_from_checkpoint="True")
    assert all(torch.equal(value, resumed.model.state_dict()[name]) for name, value in whole[0].items())
    assert resume(text, checkpoint.parent / "resumed" / "checkpoint-4", max_steps="5").state.global_step == 5


def test_rows_are_told_apart_by_their_tokens():
    first = Dataset.from_dict({"input_ids": [[1, 2], [3, 4]]})
    assert resuming.describe_rows(first) == resuming.describe_rows(Dataset.from_dict(first[:]))
    for other in ([[1, 2], [4, 3]], [[3, 4], [1, 2]], [[1, 2, 3, 4]], [[1], [2, 3, 4]], [[1, 2]]):
        assert resuming.describe_rows(Dataset.from_dict({"input_ids": other})) != resuming.describe_rows(first)


def test_weights_alone_are_evaluated_without_the_rest(text, checkpoint):
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (checkpoint / name).unlink()
    trainer = resume(text, checkpoint, do_train="False", do_eval="True", max_eval_samples="1")
    assert trainer.state.log_history[-1]["eval_bits_per_byte"] > 0
    with pytest.raises(ValueError, match="must be of the model"):
        resume(text, checkpoint, SMALL, do_train="False", do_eval="True")


def test_the_newest_whole_checkpoint_is_found_whatever_lies_beside_it(tmp_path):
    assert last_whole_checkpoint(tmp_path) is None
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}), "utf-8")
    (tmp_path / "checkpoint-11").mkdir()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
