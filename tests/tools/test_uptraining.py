"""examples/uptrain.py: what trains in which stage, its curve, and a run that goes on where it was cut off."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from documents import ROOT, run
from support import large_weights
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM, modeling_utils

from modeling_spiralformer import TOKENIZER_FOLDER
from workshop.conversion import to_spiralformer

STAGES = ("new parts and LoRA", "everything")
OPTIONS = ["--block_size", "32", "--batch_size", "2", "--adapter_steps", "4", "--max_steps", "4", "--eval_steps", "2"]
OPTIONS += ["--adapter_learning_rate", "0.01", "--learning_rate", "0.01", "--held_out_blocks", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A source, the model that it was converted to, a text, and one whole run of the example."""
    folder = tmp_path_factory.mktemp("uptraining")
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_FOLDER)
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=24,
        num_hidden_layers=3,
        max_position_embeddings=64,
    )
    source = large_weights(GPTNeoXForCausalLM(config))
    loop = {"num_prelude_layers": 1, "num_core_layers": 1, "num_coda_layers": 1, "chunk_sizes": [2, 1]}
    converted = to_spiralformer(source, **loop)
    plain = to_spiralformer(source, chunk_sizes=[])
    base = to_spiralformer(source, **{**loop, "chunk_sizes": [1]}, topology="base")
    models = {"source": source, "converted": converted, "plain": plain, "base": base}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text("def add(a, b):\n    return a + b\n" * 400, encoding="utf-8")
    uptrain(folder, "whole", "--source", "source")
    return folder


def uptrain(folder: Path, name: str, *more: str, converted: str = "converted") -> str:
    """Runs the example into a folder of that name."""
    words = [converted, name, "--text", "text.txt", *OPTIONS, *more]
    return run([sys.executable, str(ROOT / "examples" / "uptrain.py"), *words], folder)


def curve(folder: Path) -> list:
    return json.loads((folder / "curve.json").read_text())


def changed(folder: Path, before: str, after: str) -> set[str]:
    """The parts of the model, such as core or topology, in which a weight differs."""
    old, new = (AutoModelForCausalLM.from_pretrained(folder / name).state_dict() for name in (before, after))
    assert old.keys() == new.keys()
    names = {name.removeprefix("model.") for name in old if not torch.equal(old[name], new[name])}
    return {name.split(".")[0] for name in names}


@pytest.mark.processes
def test_the_held_out_loss_of_both_models_falls(folder):
    for name in ("whole", "whole/source"):
        points = curve(folder / name)
        assert [(stage, step) for stage, step, _ in points] == [
            (stage, step) for stage in STAGES for step in (0, 2, 4)
        ]
        assert points[0][2] > points[2][2] > points[5][2]
        assert points[3][2] == pytest.approx(points[2][2], abs=1e-3)  # merged adapters are the same function


@pytest.mark.processes
def test_old_parts_outside_of_the_core_wait_for_the_second_stage(folder):
    assert changed(folder, "converted", "whole/adapted") == {"core", "resolutions", "topology"}
    trained = changed(folder, "whole/adapted", "whole/trained")
    assert trained == {"core", "resolutions", "topology", "prelude", "coda", "embed_tokens", "norm", "lm_head"}
    assert changed(folder, "source", "whole/source/adapted") == {"gpt_neox"}


@pytest.mark.processes
def test_a_run_that_was_cut_off_goes_on(folder):
    """In the middle of the second stage, from its checkpoint after two steps, while it wrote the next."""
    shutil.copytree(folder / "whole", folder / "cut", ignore=shutil.ignore_patterns("trained", "checkpoint-4"))
    assert [path.name for path in (folder / "cut" / "everything").iterdir()] == ["checkpoint-2"]
    (folder / "cut" / "everything" / "checkpoint-4").mkdir()
    points = curve(folder / "cut")
    del points[3]  # the beginning of the stage: a run that began it again would enter it once more
    (folder / "cut" / "curve.json").write_text(json.dumps(points[:4]))
    printed = uptrain(folder, "cut", "--source", "source")
    assert curve(folder / "cut") == points and "held-out loss: converted" in printed
    assert changed(folder, "whole/trained", "cut/trained") == set()


class Cut(Exception):
    """What stands for a kill."""


@pytest.mark.parametrize("name", ["adapted", "trained"])
def test_a_run_that_was_cut_off_while_it_saved_saves_again(name, folder, monkeypatch):
    """Before its last evaluation, too: half of a model lies there then, its configuration without weights."""
    left_out = {"adapted": ["adapted", "trained", "everything"], "trained": ["trained"]}[name]
    cut = folder / f"cut_{name}"
    shutil.copytree(folder / "whole", cut, ignore=shutil.ignore_patterns(*left_out, "source"))
    points = curve(cut)
    (cut / "curve.json").write_text(json.dumps(points[: 2 if name == "adapted" else 5]))

    def save_file(*args, **kwargs):
        raise Cut

    monkeypatch.setattr(modeling_utils, "safe_save_file", save_file)
    monkeypatch.setattr(sys, "argv", ["uptrain.py", "converted", cut.name, "--text", "text.txt", *OPTIONS])
    monkeypatch.chdir(folder)
    with pytest.raises(Cut):
        runpy.run_path(str(ROOT / "examples" / "uptrain.py"), run_name="__main__")
    uptrain(folder, cut.name, "--eval_steps", "2")
    assert curve(cut) == points
    assert changed(folder, f"whole/{name}", f"{cut.name}/{name}") == set()
    assert {path.name for path in cut.iterdir()} == {path.name for path in (folder / "whole").iterdir()} - {"source"}


def refused(folder: Path, monkeypatch, capsys, *more: str, converted: str = "converted") -> str:
    """What the example says of what it does not take, with the folder of the whole run."""
    monkeypatch.setattr(sys, "argv", ["uptrain.py", converted, "whole", "--text", "text.txt", *OPTIONS, *more])
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "examples" / "uptrain.py"), run_name="__main__")
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "more, message",
    [
        (("--max_steps", "5"), "--max_steps must be 4, that of the run in whole, but got 5"),
        (("--learning_rate", "0.02"), "--learning_rate must be 0.01, that of the run in whole, but got 0.02"),
        (("--text", "other.txt"), "--text must be sha256 "),
        (("--held_out", "other.txt"), "--held_out must be None, that of the run in whole, but got sha256"),
        (("--source", "converted"), "the model of source must be sha256"),
    ],
)
def test_another_run_in_the_folder_of_a_run_is_refused(more, message, folder, monkeypatch, capsys):
    (folder / "other.txt").write_text("def sub(a, b):\n    return a - b\n" * 400, encoding="utf-8")
    before = curve(folder / "whole")
    assert message in refused(folder, monkeypatch, capsys, *more)
    assert curve(folder / "whole") == before


@pytest.mark.parametrize(
    "more, message",
    [
        (("--text", "short.txt"), "--text must hold 2 or more blocks of 32 tokens, but short.txt has 0"),
        (
            ("--text", "short.txt", "--held_out", "text.txt"),
            "--text must hold 1 or more blocks of 32 tokens, but short.txt",
        ),
        (("--held_out", "short.txt"), "--held_out must hold 1 or more blocks of 32 tokens, but short.txt has 0"),
        (("--max_steps", "0"), "argument --max_steps: it must be 1 or more, but got 0"),
        (("--held_out_blocks", "0"), "argument --held_out_blocks: it must be 1 or more, but got 0"),
        (("--block_size", "1"), "argument --block_size: it must be 2 or more, but got 1"),
        (("--adapter_steps", "-1"), "argument --adapter_steps: it must be 0 or more, but got -1"),
    ],
)
def test_a_text_that_is_too_short_and_numbers_that_train_nothing_are_named(more, message, folder, monkeypatch, capsys):
    (folder / "short.txt").write_text("a = 1", encoding="utf-8")
    assert message in refused(folder, monkeypatch, capsys, *more)


@pytest.mark.parametrize("part", ["weights", "loop"])
def test_another_checkpoint_is_refused(part, folder, monkeypatch, capsys):
    """It has the name of the first, or another one: the content decides."""
    options = {"chunk_offsets": [0, 0]} if part == "loop" else {}
    other = AutoModelForCausalLM.from_pretrained(folder / "converted", **options)
    if part == "weights":
        other.lm_head.weight.data[0, 0] += 1
    shutil.copytree(folder / "converted", folder / part, dirs_exist_ok=True)
    other.save_pretrained(folder / part)
    assert "the model of converted must be sha256" in refused(folder, monkeypatch, capsys, converted=part)


@pytest.mark.parametrize("name", ["plain", "base"])
def test_a_model_without_new_parts_is_adapted_too(name, folder):
    """A plain stack in all of its layers, a looped base in its core."""
    uptrain(folder, f"of_{name}", converted=name)
    adapted = {"plain": {"prelude"}, "base": {"core"}}[name]
    assert changed(folder, name, f"of_{name}/adapted") == adapted


def test_half_precision_trains_in_float32(folder):
    """bfloat16 keeps 8 bits: a norm would not move at these rates."""
    half = AutoModelForCausalLM.from_pretrained(folder / "converted", dtype=torch.bfloat16)
    shutil.copytree(folder / "converted", folder / "half")
    half.save_pretrained(folder / "half")
    uptrain(folder, "of_half", "--learning_rate", "0.0001", converted="half")
    before, after = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("half", "of_half/trained"))
    assert before.dtype == torch.bfloat16 and after.dtype == torch.float32
    assert (after.model.norm.weight != before.model.norm.weight.float()).all()


def test_mixed_precision(folder):
    uptrain(folder, "mixed", "--bf16")
    whole, mixed = (torch.tensor([loss for *_, loss in curve(folder / name)]) for name in ("whole", "mixed"))
    assert len(whole) == len(mixed) and not torch.equal(whole, mixed)
    assert (whole - mixed).abs().max() < 0.1
