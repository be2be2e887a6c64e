"""Models of molecules that the repository keeps: each is what its card says; the commands that make and show them."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from documents import ROOT
from scipy.stats import binomtest
from transformers import AutoModelForCausalLM, AutoTokenizer

import draw_molecules
import keep_molecules
import train_molecules
from workshop.molecules import committed, passes

pytest.importorskip("rdkit")
from rdkit import Chem  # noqa: E402

CHECKPOINTS = sorted(path for path in (ROOT / "checkpoints").iterdir() if path.is_dir())
PAGE = (ROOT / "docs" / "molecules.md").read_text()
LARGEST = 4_000_000  # bytes of all checkpoints together
MOLECULES = ["CCO", "CC(=O)Nc1ccc(O)cc1", "c1ccc2c(c1)cccc2Br", "FC(F)(Cl)C#N", "CS(C)=O", "C1CC2CCC1C2"]
SMALL = "hidden_size=16,intermediate_size=32,num_attention_heads=2,num_key_value_heads=2,head_dim=8"
SMALL += ",chunk_sizes=[1,1]"


# -- the checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda folder: folder.name)
def test_a_checkpoint_is_what_its_card_says(folder):
    """500 samples agree with the share of the card; on the torch of its figures the first ones are the same."""
    figures = json.loads((folder / "figures.json").read_text())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found, samples = committed.check_of(model, tokenizer), figures["samples"]
    assert samples["count"] == 10_000
    assert binomtest(found["valid"], found["count"], samples["valid"] / samples["count"]).pvalue > 1e-3
    if torch.__version__.split("+")[0] == figures["torch"]:
        assert found["first"] == figures["check"]["first"]
    card = (folder / "README.md").read_text()
    assert f"of {model.num_parameters():,} parameters" in card
    assert f"{100 * samples['valid'] / samples['count']:.1f}% (" in card
    assert f"| {figures['validation']['nats_per_token']:.4f} |" in card
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{folder.name}` |"))
    low, high = (f"{100 * bound:.1f}%" for bound in samples["valid_interval"])
    for cell in (
        f"{model.num_parameters():,}",
        f"{figures['validation']['nats_per_token']:.4f}",
        f"({low} to {high})",
    ):
        assert f" {cell} " in row
    errors = [f"{100 * samples[kind] / samples['count']:.1f}%" for kind in ("bracket", "ring", "valence", "other")]
    assert f" {', '.join(errors)} " in row
    assert figures["command"] in card and figures["commit"] in card and figures["training_rows"] in card
    assert str(committed.card_of(model, tokenizer, figures, f"checkpoints/{folder.name}")) == card


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda folder: folder.name)
def test_the_usage_of_a_card_draws_molecules(folder, capsys, monkeypatch):
    """The tokenizer ends each text: what goes on after that end is no molecule in nine of ten."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)
    exec(code, {})
    drawn = ast.literal_eval(capsys.readouterr().out)
    assert len(drawn) == 8 and sum(Chem.MolFromSmiles(smiles) is not None for smiles in drawn) >= 6


def test_checkpoints_are_small_and_hold_no_code():
    assert CHECKPOINTS
    files = [path for folder in CHECKPOINTS for path in folder.iterdir()]
    assert sum(path.stat().st_size for path in files) <= LARGEST
    assert {path.name for path in files} == {*committed.FILES, "README.md", "figures.json", "SHA256SUMS"}


# -- keeping one ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> tuple[dict, Path, Path]:
    """A tiny model, trained and kept: what training printed last, its folder, and the one that keeps it."""
    folder = tmp_path_factory.mktemp("kept")
    (folder / "train.txt").write_text("\n".join(MOLECULES) + "\n")
    (folder / "valid.txt").write_text("\n".join(MOLECULES[:4]) + "\n")
    settings = {"train_file": folder / "train.txt", "validation_file": folder / "valid.txt"}
    settings |= {"output_dir": folder / "run", "config_overrides": SMALL, "max_steps": 3, "report_to": "none"}
    settings |= {"save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-2, "seed": 7}
    train_molecules.main([str(word) for name, value in settings.items() for word in (f"--{name}", value)])
    keeping = {"model": folder / "run", "validation_file": folder / "valid.txt", "output_dir": folder / "mine"}
    keeping |= {"command": "python scripts/train_molecules.py --seed 7", "commit": "0123abc", "samples": 30}
    keeping |= {"training_data": "Six molecules", "license": "cc0-1.0"}
    keep_molecules.main([str(word) for name, value in keeping.items() for word in (f"--{name}", value)])
    trained = json.loads((folder / "run" / "eval_results.json").read_text())
    return trained, folder / "run", folder / "mine"


def test_what_is_kept_is_the_model_its_run_and_its_figures(kept):
    trained, run, mine = kept
    figures = json.loads((mine / "figures.json").read_text())
    assert figures["settings"]["seed"] == 7 and figures["settings"]["steps"] == 3
    assert figures["training_rows"].startswith("6 rows of ") and "sha256" in figures["training_rows"]
    assert figures["validation"]["molecules"] == 4
    assert figures["validation"]["nats_per_token"] == pytest.approx(trained["eval_nats_per_token"], abs=1e-5)
    assert (figures["samples"]["count"], figures["check"]["count"]) == (30, 500)
    assert [row["passes"] for row in figures["passes"]] == [1, 2]
    assert figures["torch"] == torch.__version__.split("+")[0]
    assert "auto_map" not in json.loads((mine / "config.json").read_text())
    ids = torch.arange(3, 20)[None]
    one, two = (AutoModelForCausalLM.from_pretrained(folder) for folder in (run, mine))
    assert torch.equal(one(ids).logits, two(ids).logits)
    assert "do_sample=True, max_length=" in (run / "README.md").read_text()
    card = (mine / "README.md").read_text()
    assert "trust_remote_code" not in card and "import modeling_spiralformer" in card and "custom_code" not in card
    assert "| command | `python scripts/train_molecules.py --seed 7` |" in card and "| commit | 0123abc |" in card
    assert f"Six molecules: {figures['training_rows']}." in card and "license: cc0-1.0" in card
    assert "a looped Transformer whose shared core runs 2 times, over all tokens." in card
    assert "On molecules held out of the training data, and on samples that the model drew:" in card


def test_the_test_of_a_checkpoint_can_fail(kept, monkeypatch):
    """A model of other weights writes other samples than the first ones that are kept."""
    figures = json.loads((kept[2] / "figures.json").read_text())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(kept[2]), AutoTokenizer.from_pretrained(kept[2])
    assert committed.check_of(model, tokenizer) == figures["check"]
    with torch.no_grad():
        model.model.embed_tokens.weight[10:20].mul_(-1)
    assert committed.check_of(model, tokenizer)["first"] != figures["check"]["first"]


def test_a_commit_that_is_none_is_refused(kept, tmp_path):
    words = {"model": kept[1], "validation_file": "x", "output_dir": tmp_path, "command": "x", "commit": "main"}
    words["training_data"] = "x"
    with pytest.raises(ValueError, match="`commit` must be .* got 'main'"):
        keep_molecules.main([str(word) for name, value in words.items() for word in (f"--{name}", value)])


def test_a_run_that_has_not_finished_is_refused(kept, tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    words = {"model": tmp_path, "validation_file": "x", "output_dir": kept[2], "command": "x", "commit": "0123abc"}
    words["training_data"] = "x"
    with pytest.raises(
        ValueError, match="`model` must be the folder of a finished run, but .* lacks trainer_state.json"
    ):
        keep_molecules.main([str(word) for name, value in words.items() for word in (f"--{name}", value)])


def test_a_run_whose_state_was_changed_is_refused(kept, tmp_path):
    """The card would say other settings than those of the run."""
    folder = Path(shutil.copytree(kept[1], tmp_path / "run"))
    expected = committed.read_run(folder)
    state = (folder / "trainer_state.json").read_text()
    changed = state.replace('"weight_decay": ', '"weight_decay": 1')
    assert changed != state
    (folder / "trainer_state.json").write_text(changed)
    with pytest.raises(ValueError, match="trainer_state.json has other content"):
        committed.read_run(folder)
    (folder / "trainer_state.json").write_text(state)
    assert committed.read_run(folder) == expected


# -- drawing them -----------------------------------------------------------------------------------------------------


def pixels(path: Path) -> torch.Tensor:
    from matplotlib.image import imread

    return torch.tensor(imread(path))


def test_the_pictures_show_the_valid_ones_and_the_table_counts_all(kept, tmp_path, monkeypatch, capsys):
    written = ["CCO", "CC(=O)Nc1ccc(O)cc1", "CC(", "C1CC", "CCO", "C(C)(C)(C)(C)C", "c1ccccc1"]
    monkeypatch.setattr(draw_molecules, "sample", lambda model, tokenizer, count, **options: written[:count])
    monkeypatch.setattr(passes, "sample", lambda model, tokenizer, count, **options: ["CCO", "C1"])
    words = ["--model", str(kept[2]), "--output_dir", str(tmp_path), "--samples", "7", "--shown", "2"]
    results = draw_molecules.main(words)
    counts = results["counts"]
    assert (counts["valid"], counts["bracket"], counts["ring"], counts["valence"]) == (4, 1, 1, 1)
    assert counts["unique"] == 3 and results["shown"] == ["CCO", "CC(=O)Nc1ccc(O)cc1"]
    assert [(row["passes"], row["valid"], row["ring"]) for row in results["passes"]] == [(1, 1, 1), (2, 1, 1)]
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line for line in printed.splitlines() if line}
    assert " 57.1% " in rows["valid"] and " 75.0% " in rows["unique"]
    assert str(tmp_path / "molecules.png") in printed
    grid, curve = (pixels(tmp_path / name) for name in draw_molecules.PICTURES)
    assert grid.std() > 0.01 and curve.std() > 0.01
    assert all(Chem.MolFromSmiles(smiles) for smiles in results["shown"])


def test_where_nothing_is_valid_there_is_no_grid(kept, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(draw_molecules, "sample", lambda model, tokenizer, count, **options: ["C1"] * count)
    monkeypatch.setattr(passes, "sample", lambda model, tokenizer, count, **options: ["C1"])
    (tmp_path / "molecules.png").touch()  # of an older run
    results = draw_molecules.main(["--model", str(kept[2]), "--output_dir", str(tmp_path), "--samples", "3"])
    assert results["counts"]["valid"] == 0 and results["shown"] == []
    assert not (tmp_path / "molecules.png").exists() and "molecules.png" not in capsys.readouterr().out
