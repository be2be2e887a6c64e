"""Training in bfloat16 beside float32: each kind is what its name says, and the table finds what differs."""

import json

import pytest
import torch

import compare_training_dtypes
from workshop.training_dtypes import LINES, TrainingDtypesArguments, compare, format_table, prepare, train

SMALL = "hidden_size=16,intermediate_size=32,num_attention_heads=2,num_key_value_heads=2,num_prelude_layers=1"
SMALL += ",chunk_sizes=[2,1],topology=mesh"
OPTIONS = {"max_steps": 6, "parts": 3, "batch_size": 4, "seeds": [0, 1], "config_overrides": SMALL}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("molecules") / "molecules.txt"
    path.write_text("CCO\nc1ccccc1\nCC(=O)N\nCCN(C)C\n" * 20, encoding="utf-8")
    return {"train_file": str(path), "validation_file": str(path)}


def test_every_kind_computes_in_its_dtype(files, tmp_path):
    """One after another in one process: libraries keep some of a run's settings for the next."""
    arguments, found = TrainingDtypesArguments(**files, output_dir=str(tmp_path), **OPTIONS), []
    for kind in ("float32", "mixed", "float32", "bfloat16"):
        trainer, computed = prepare(arguments, kind, 0), set()
        weight = trainer.model.model.core[0].mlp.down_proj
        weight.register_forward_hook(lambda module, inputs, output, computed=computed: computed.add(output.dtype))
        result = train(trainer)
        (state,) = {value["exp_avg"].dtype for value in trainer.optimizer.state.values()}
        found.append((weight.weight.dtype, state, computed, result))
    whole, half = torch.float32, torch.bfloat16
    assert [kept[:3] for kept in found] == [
        *((whole, whole, {whole}), (whole, whole, {half}), (whole, whole, {whole})),
        (half, half, {half}),
    ]
    results = [result for *_, result in found]
    assert results[0] == results[2] and results[1] != results[0] != results[3] != results[1]
    assert len(results[0]["losses"]) == 3 and results[0]["losses"][-1] < results[0]["losses"][0]


def test_a_stopped_comparison_goes_on_with_the_runs_that_are_missing(files, tmp_path, capsys, monkeypatch):
    arguments = TrainingDtypesArguments(**files, output_dir=str(tmp_path), **OPTIONS)
    whole = compare(arguments)
    lines = (tmp_path / LINES).read_text(encoding="utf-8").splitlines()
    assert len(lines) == 6 and whole["mixed"][1] != whole["mixed"][0]
    (tmp_path / LINES).write_text("\n".join(lines[:4]) + "\n" + lines[4][:50], encoding="utf-8")
    trained = []
    monkeypatch.setattr("workshop.training_dtypes.train", lambda trainer: trained.append(trainer) or train(trainer))
    assert compare(arguments) == whole and len(trained) == 2
    assert compare(TrainingDtypesArguments(**files, output_dir=str(tmp_path), **{**OPTIONS, "max_steps": 3})) != whole
    assert len(trained) == 8  # other settings, other runs
    given = {**files, **OPTIONS, "output_dir": tmp_path}
    words = [f"--{name}={value}" for name, value in given.items() if name != "seeds"] + ["--seeds", "0", "1"]
    assert compare_training_dtypes.main(words) == json.loads(json.dumps(whole))
    assert capsys.readouterr().out.strip().endswith(format_table(whole)) and len(trained) == 8


def test_the_table_shows_the_seed_and_the_part_that_are_farthest():
    exact = [{"losses": [2.0, 1.0], "validation": 0.9}, {"losses": [2.2, 1.4], "validation": 1.1}]
    other = [{"losses": [2.1, 1.0], "validation": 0.85}, {"losses": [2.2, 1.5], "validation": 1.12}]
    *_, first, second = format_table({"float32": exact, "mixed": other}).splitlines()
    assert first.split("|")[1:-1] == [" float32 ", " 1.0000 (0.9000-1.1000) ", " - ", " - "]
    # 0.1 is 0.71 deviations of the first part, and 0.35 of the second.
    assert second.split("|")[3:-1] == [" -0.0500, 0.1414 ", " +0.1000, 0.1414 "]


@pytest.mark.parametrize(
    "options", [{"parts": 4}, {"seeds": [0]}, {"seeds": [1, 1]}, {"seeds": [0, -1]}, {"max_steps": 0}]
)
def test_settings_that_compare_nothing_are_refused(options, files, tmp_path):
    (name,) = options
    with pytest.raises(ValueError, match=f"`{name}` must"):
        TrainingDtypesArguments(**files, output_dir=str(tmp_path), **{**OPTIONS, **options})
