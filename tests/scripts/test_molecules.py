"""Training on molecules, and what is measured of what the model writes: spellings, figures, passes, and the page."""

import contextlib
import csv
import json
import math
import random
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from documents import ROOT, commands, run
from support import small_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate_molecules
import train_molecules
from workshop.molecules import measures, passes, spelling, training
from workshop.molecules.judging import canonical, share
from workshop.molecules.measures import NO_FCD, diversity, fingerprints, frechet, measure, spread
from workshop.molecules.passes import errors_by_pass, stopped, train_head, with_own_head
from workshop.molecules.pictures import draw_passes
from workshop.molecules.rows import make_rows
from workshop.molecules.spelling import spellings, write_spellings
from workshop.molecules.tables import figures_table, passes_table
from workshop.molecules.training import MOLECULE_ARGUMENTS, MoleculeTrainingArguments
from workshop.tokenizers import split_smiles
from workshop.training_arguments import parse_arguments

pytest.importorskip("rdkit")
from rdkit import Chem  # noqa: E402

TOKENIZER = AutoTokenizer.from_pretrained(ROOT / "tokenization" / "smiles")
KNOWN = set(TOKENIZER.get_vocab()) - set(TOKENIZER.all_special_tokens)
MOLECULES = [
    *("CCO", "CC(=O)Nc1ccc(O)cc1", "c1ccc2c(c1)cccc2Br", "FC(F)(Cl)C#N", "C[C@@H](N)C(=O)[O-]", "C/C=C\\C"),
    *("CN1CC[C@H](c2ccsc2)C1", "[NH3+]CCCP(O)O", "O=[N+]([O-])c1c[nH]cn1", "C1CC2CCC1C2", "ICc1ccco1", "CS(C)=O"),
]
SMALL = "hidden_size=16,intermediate_size=32,num_attention_heads=2,num_key_value_heads=2,head_dim=8"
SMALL += ",chunk_sizes=[1,1,1]"


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.txt").write_text("\n".join(MOLECULES) + "\n")
    (folder / "valid.txt").write_text("\n".join(MOLECULES[:5]) + "\n")
    return folder


# -- spellings --------------------------------------------------------------------------------------------------------


def test_spellings_are_the_molecule_and_differ():
    for smiles in MOLECULES:
        found = list(spellings(smiles, 10, KNOWN, 30, random.Random(0)))
        assert len(found) == 10 and canonical(found) == canonical([smiles])
        assert all(set(split_smiles(spelled)) <= KNOWN for spelled in found)
    assert len(set(spellings("CC(=O)Nc1ccc(O)cc1", 50, KNOWN, 30, random.Random(0)))) > 20


def test_a_spelling_that_does_not_fit_is_drawn_again_and_at_last_the_given_one_stands():
    """Of ethanol, CCO, OCC, C(C)O and C(O)C: without parentheses two are left, of two tokens none."""
    drawn = set(spellings("CCO", 100, {"C", "O"}, 5, random.Random(0)))
    assert drawn == {"CCO", "OCC"} and len(set(spellings("CCO", 100, KNOWN, 5, random.Random(0)))) == 4
    assert set(spellings("CCO", 20, KNOWN, 2, random.Random(0))) == {"CCO"}
    assert not spelling.fits("C%10CC%10", KNOWN, 30)
    with pytest.raises(ValueError, match="`train_file`.*'C1CC'"):
        list(spellings("C1CC", 1, KNOWN, 30, random.Random(0)))


def test_the_file_of_spellings_hangs_on_what_it_is_made_of(tmp_path, monkeypatch):
    path = write_spellings(MOLECULES, tmp_path, 3, 0, KNOWN, 30, quiet=True)
    lines = path.read_text().splitlines()
    assert [canonical([line]) for line in lines] == [canonical([smiles]) for smiles in MOLECULES for _ in range(3)]
    others = [(MOLECULES[1:], 3, 0, KNOWN, 30), (MOLECULES, 2, 0, KNOWN, 30), (MOLECULES, 3, 1, KNOWN, 30)]
    others += [(MOLECULES, 3, 0, KNOWN - {"I"}, 30), (MOLECULES, 3, 0, KNOWN, 29)]
    written = [write_spellings(molecules, tmp_path, *rest, quiet=True) for molecules, *rest in others]
    assert len({path, *written}) == 6 and written[2].read_text() != path.read_text()
    monkeypatch.setattr(spelling, "spellings", None)  # the file is there: nothing is spelled again
    assert write_spellings(MOLECULES, tmp_path, 3, 0, KNOWN, 30, quiet=True) == path


# -- training ---------------------------------------------------------------------------------------------------------


def flags(data: Path, output: Path, *more: str) -> list[str]:
    return [
        *("--train_file", str(data / "train.txt"), "--validation_file", str(data / "valid.txt")),
        *("--config_overrides", SMALL, "--output_dir", str(output), "--report_to", "none", "--disable_tqdm", "True"),
        *("--per_device_train_batch_size", "4", "--learning_rate", "1e-2", "--warmup_steps", "0"),
        *("--max_steps", "9", "--save_steps", "4", "--logging_steps", "1", *more),
    ]


def losses_of(trainer) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


@pytest.mark.parametrize("more", [(), ("--spellings", "2"), ("--train_sampling_strategy", "random")])
def test_a_resumed_run_ends_like_one_that_never_stopped(more, data, tmp_path):
    """Two passes of three steps are over at step 8, or one and a third of six: dropout draws random numbers too."""
    whole = train_molecules.main(flags(data, tmp_path / "whole", *more))
    again = train_molecules.main(
        flags(data, tmp_path / "again", *more, "--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-8"))
    )
    assert losses_of(again) == losses_of(whole)
    weights = [AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "again")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    evaluation = whole.state.log_history[-2 if "train_loss" in whole.state.log_history[-1] else -1]
    assert 0 < evaluation["eval_nats_per_token"] < math.log(68)


def test_weights_alone_are_evaluated_whatever_their_run_was(data, tmp_path):
    train_molecules.main(flags(data, tmp_path))
    resumed = ("--resume_from_checkpoint", str(tmp_path / "checkpoint-8"), "--do_train", "False", "--seed", "1")
    trainer = train_molecules.main(flags(data, tmp_path, *resumed, "--max_train_samples", "4"))
    assert 0 < trainer.state.log_history[-1]["eval_nats_per_token"] < math.log(68)


def test_one_process_spells_and_the_others_find_its_file(data, tmp_path, monkeypatch):
    """Two that wrote at once would cut each other's file off."""
    inside, spelled_inside = [], []

    @contextlib.contextmanager
    def main_process_first(self, local=True, desc="work"):
        inside.append(desc)
        yield
        inside.pop()

    def write(*args, **kwargs):
        spelled_inside.append(list(inside))
        return write_spellings(*args, **kwargs)

    monkeypatch.setattr(MoleculeTrainingArguments, "main_process_first", main_process_first)
    monkeypatch.setattr(training, "write_spellings", write)
    arguments = parse_arguments(flags(data, tmp_path, "--spellings", "2"), MOLECULE_ARGUMENTS)
    training.make_trainer(*arguments)
    assert spelled_inside == [["spelling"]]


def test_another_spelling_is_another_run(data, tmp_path):
    train_molecules.main(flags(data, tmp_path, "--spellings", "2"))
    resumed = ("--resume_from_checkpoint", str(tmp_path / "checkpoint-8"))
    with pytest.raises(ValueError, match="training text"):
        train_molecules.main(flags(data, tmp_path, "--spellings", "3", *resumed))
    card = (tmp_path / "README.md").read_text()
    assert "`train.txt`, 2 random spellings of each molecule" in card and "Nats Per Token" in card


def test_the_recipe_is_that_of_the_paper():
    model, data, training = parse_arguments(["--train_file", "a", "--validation_file", "b"], MOLECULE_ARGUMENTS)
    assert (training.learning_rate, training.weight_decay, training.warmup_steps) == (5e-4, 0.1, 200)
    assert (training.adam_beta1, training.adam_beta2, training.max_grad_norm) == (0.9, 0.999, 1.0)
    assert (training.lr_scheduler_type, training.lr_scheduler_kwargs or {}) == ("cosine", {})
    assert (training.per_device_train_batch_size, training.num_train_epochs) == (256, 100)
    assert model.config_name.endswith("smollm-53k") and model.tokenizer_name.endswith("smiles")
    assert data.spellings is None
    with pytest.raises(ValueError, match="`spellings`"):
        parse_arguments(["--train_file", "a", "--validation_file", "b", "--spellings", "0"], MOLECULE_ARGUMENTS)


# -- figures ----------------------------------------------------------------------------------------------------------


def test_shares_are_of_what_their_names_say(monkeypatch):
    monkeypatch.setattr(measures, "find_spec", lambda name: None)
    samples = ["CCO", "OCC", "CCO", "CN", "C(C", "C1CC", "CC(C)(C)(C)C", "C11", "CCBr", "C(C"]
    found = measure(samples, ["OCC", "CCC"], 10, 10, 0)
    values = {name: figure["value"] for name, figure in found.items() if isinstance(figure, dict)}
    assert values == {
        **{"valid": 0.5, "bracket": 0.2, "ring": 0.1, "valence": 0.1, "other": 0.1},
        **{"unique": 3 / 5, "novel": 2 / 3, "diversity": None},  # of three molecules nothing is told
    }
    assert found["fcd"] == NO_FCD
    table = figures_table(found, len(samples))
    assert f"fcd: {NO_FCD}" in table and "of 10 samples" in table and "66.7%" in table
    with pytest.raises(ValueError, match="`train_file`.*'C1CC'"):
        measure(samples, ["C1CC"], 10, 10, 0)
    monkeypatch.setattr(measures, "find_spec", lambda name: "fcd")
    assert measure(["CCO"] * 10, ["CCC"], 10, 10, 0)["fcd"] == "not measured: fewer than 2 training molecules"


def test_an_interval_of_a_share_is_wilsons():
    z, found = 1.959963984540054, share(4, 10)
    centre, half = 0.4 + z**2 / 20, z * math.sqrt(0.4 * 0.6 / 10 + z**2 / 400)
    assert found["interval"] == pytest.approx([(centre - half) / (1 + z**2 / 10), (centre + half) / (1 + z**2 / 10)])
    assert share(0, 0) == {"value": None, "interval": None}


def test_diversity_is_over_pairs_of_different_molecules(monkeypatch):
    from rdkit import DataStructs
    from rdkit.Chem.rdFingerprintGenerator import GetMorganGenerator

    monkeypatch.setattr(measures, "ROWS_AT_ONCE", 5)
    prints = [
        GetMorganGenerator(radius=2, fpSize=1024).GetFingerprint(Chem.MolFromSmiles(smiles)) for smiles in MOLECULES
    ]
    pairs = [DataStructs.TanimotoSimilarity(a, b) for i, a in enumerate(prints) for b in prints[:i]]
    found = diversity(fingerprints(MOLECULES), resamples=400, seed=0)
    assert found["value"] == pytest.approx(1 - sum(pairs) / len(pairs), abs=1e-6)
    # The bootstrap by hand: molecules drawn with replacement, pairs of one and the same left out.
    generator = random.Random(1)
    similar = np.array([[DataStructs.TanimotoSimilarity(a, b) for b in prints] for a in prints])
    values = []
    for _ in range(400):
        drawn = [generator.randrange(12) for _ in range(12)]
        chosen = [similar[i, j] for i in drawn for j in drawn if i != j]
        values.append(1 - sum(chosen) / len(chosen))
    half = 1.96 * np.std(values)
    assert (found["interval"][1] - found["interval"][0]) / 2 == pytest.approx(half, rel=0.2)


def test_the_distance_is_that_of_two_normal_distributions():
    """In closed form where they share their axes: squared shift, and squared differences of the deviations."""
    generator = np.random.default_rng(0)
    samples = generator.normal(size=(50, 3)) * [1, 2, 3]
    reference = generator.normal(size=(70, 3)) + [0.5, 0, 0]
    found = frechet(samples, reference, resamples=50, seed=0)
    from scipy.linalg import sqrtm

    own, other = np.cov(samples.T), np.cov(reference.T)
    shift = np.square(samples.mean(axis=0) - reference.mean(axis=0)).sum()
    assert found["value"] == pytest.approx(shift + np.trace(own + other - 2 * sqrtm(own @ other).real))
    assert found["interval"][0] < found["value"] < found["interval"][1]
    assert frechet(samples, samples, 2, 0)["value"] == pytest.approx(0, abs=1e-9)
    assert spread(np.array([3.0, 1.0, 2.0, 3.0]))["interval"] == pytest.approx([3 - 1.96, 3 + 1.96], abs=1e-3)


def test_fcd_is_that_of_the_package_which_carries_the_weights():
    fcd = pytest.importorskip("fcd")
    others = ["CCC", "COC", "CNC", "CCOC", "CCNC", "CBr", "CF", "CCl", "CCCl", "CI"]
    found = measure(MOLECULES, others, 10, 3, 0)["fcd"]
    assert found["value"] == pytest.approx(fcd.get_fcd(MOLECULES, others, device="cpu"), rel=1e-3)


# -- passes -----------------------------------------------------------------------------------------------------------


def looped(**options):
    options = {"vocab_size": 65, "chunk_sizes": [1, 1, 1], "topology": "base", "max_position_embeddings": 32} | options
    return small_model(dtype=torch.float32, **options).eval()


def test_a_head_of_its_own_starts_as_the_models_and_alone_learns():
    model = looped(tie_word_embeddings=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    alone, view = with_own_head(model, 2), stopped(model, 2)
    ids = torch.tensor(TOKENIZER(["CC(=O)Nc1ccc(O)cc1"])["input_ids"])
    with torch.no_grad():
        assert torch.equal(alone(ids).logits, view(ids).logits)
        assert not torch.allclose(view(ids).logits, model(ids).logits, atol=1e-2)
    assert [name for name, weight in alone.named_parameters() if weight.requires_grad] == ["lm_head.weight"]
    rows = make_rows(MOLECULES, TOKENIZER, 32)
    with torch.no_grad():
        worse = alone(ids, labels=ids).loss.item()
    train_head(alone, TOKENIZER, rows, steps=60, seed=0)
    with torch.no_grad():
        assert alone(ids, labels=ids).loss.item() < worse - 0.5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_every_pass_is_sampled_with_the_head_that_is_asked_for(monkeypatch, tmp_path):
    model, seen = looped(), []
    monkeypatch.setattr(passes, "sample", lambda model, tokenizer, **options: seen.append(model) or ["CCO", "C(C"])
    rows = list(errors_by_pass(model, TOKENIZER, MOLECULES, 1, seed=0))
    assert [(row["head"], row["passes"]) for row in rows] == [
        (head, count) for head in ("own", "linear") for count in (1, 2, 3)
    ]
    assert [len(chosen.config.chunk_sizes) for chosen in seen] == [1, 2, 3] * 2
    assert all(chosen.lm_head is model.lm_head for chosen in seen[:3])
    assert not any(torch.equal(chosen.lm_head.weight, model.lm_head.weight) for chosen in seen[3:])
    assert all(row["valid"] == row["bracket"] == 1 for row in rows)
    assert len(list(errors_by_pass(model, TOKENIZER, MOLECULES, None, seed=0))) == 3
    assert passes_table(rows).count("50.0%") == 2 * len(rows)
    draw_passes(rows, tmp_path / "passes.png")
    assert (tmp_path / "passes.png").stat().st_size > 10000


def test_a_picture_shows_each_class_with_its_interval(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr("workshop.molecules.pictures.save", lambda figure, path: figures.append(figure))
    classes = [{"bracket": 90 - 40 * t, "ring": 5, "valence": 5, "other": 0} for t in range(3)]
    rows = [
        {"head": "own", "passes": t + 1, "count": 100, "valid": 40 * t, **found} for t, found in enumerate(classes)
    ]
    draw_passes(rows, tmp_path / "passes.png")
    (axes,) = figures[0].axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines["valid"] == [0, 0.4, 0.8] and lines["bracket"] == [0.9, 0.5, 0.1] and len(lines) == 5
    assert [list(line.get_xdata()) for line in axes.lines] == [[1, 2, 3]] * 5 and len(axes.collections) == 5


# -- the commands -----------------------------------------------------------------------------------------------------


def test_the_commands_of_the_page(data, tmp_path):
    """As they stand there, but for small: the model, and how many steps and samples."""
    (tmp_path / "data").rename(tmp_path / "molecules")
    (tmp_path / "data" / "zinc_jtnn").parent.mkdir()
    (tmp_path / "molecules").rename(tmp_path / "data" / "zinc_jtnn")
    small = {
        "train": ["--config_overrides", SMALL, "--max_steps", "2"],
        "draw": ["--samples", "20", "--pass_samples", "4", "--output_dir", "runs/drawn"],
        "keep": ["--samples", "20", "--commit", "0123abc"],
        "evaluate": ["--samples", "40", "--resamples", "5", "--pass_samples", "10", "--head_steps", "1"],
    }
    found = [shlex.split(line) for line in commands("docs/molecules.md") if line.startswith("python scripts/")]
    names = ["draw_molecules", "train_molecules", "evaluate_molecules", "keep_molecules"]
    assert [Path(words[1]).stem for words in found] == names
    for _, script, *words in found:
        changes = small[Path(script).stem.split("_")[0]]
        run([sys.executable, str(ROOT / script), *words, *changes], tmp_path)
    results = json.loads((tmp_path / "runs" / "molecules_evaluation" / "molecules.json").read_text())
    assert len(results["passes"]) == 6 and results["settings"]["samples"] == 40
    with open(tmp_path / "runs" / "molecules_evaluation" / "samples.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40 and set(rows[0]) == {"smiles", "class"}
    valid = sum(row["class"] == "valid" for row in rows)
    assert valid / 40 == results["figures"]["valid"]["value"]
    for found in results["hierarchy"].values():
        assert sum(figure["samples"] for figure in found.values()) == 40
        assert sum(figure["samples"] * (figure["valid"]["value"] or 0) for figure in found.values()) == pytest.approx(
            valid
        )
    assert (tmp_path / "runs" / "molecules_evaluation" / "passes.png").is_file()
    assert (tmp_path / "runs" / "drawn" / "passes.png").is_file()
    kept = json.loads((tmp_path / "checkpoints" / "mine" / "figures.json").read_text())
    assert kept["samples"]["count"] == 20 and kept["settings"]["steps"] == 2


@pytest.mark.parametrize(
    ("more", "field"),
    [
        (["--samples", "0"], "samples"),
        (["--max_length", "1"], "max_length"),
        (["--resamples", "1"], "resamples"),
        (["--references", "1"], "references"),
        (["--temperature", "0"], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--head_steps", "5"], "head_steps"),
        (["--seed", "-1"], "seed"),
    ],
)
def test_settings_without_sense_are_refused(more, field):
    with pytest.raises(ValueError, match=f"`{field}`"):
        evaluate_molecules.main(["--model", "m", "--train_file", "f", *more])


def test_a_picture_of_an_older_run_is_gone(data, tmp_path):
    looped(topology="mesh").save_pretrained(tmp_path / "looped")
    TOKENIZER.save_pretrained(tmp_path / "looped")
    (tmp_path / "passes.png").touch()
    words = ["--model", str(tmp_path / "looped"), "--train_file", str(data / "train.txt"), "--samples", "5"]
    evaluate_molecules.main([*words, "--output_dir", str(tmp_path)])
    assert (tmp_path / "molecules.json").is_file() and not (tmp_path / "passes.png").exists()


def test_a_model_without_a_loop_has_no_passes(data, tmp_path):
    model = looped(chunk_sizes=[], num_core_layers=0, topology="mesh")
    model.save_pretrained(tmp_path / "plain")
    TOKENIZER.save_pretrained(tmp_path / "plain")
    words = ["--model", str(tmp_path / "plain"), "--train_file", str(data / "train.txt")]
    with pytest.raises(ValueError, match="`by_pass`"):
        evaluate_molecules.main([*words, "--by_pass", "--output_dir", str(tmp_path / "out")])
