"""Molecules: their tokenizer, padded rows and their loss, samples and what RDKit says of them, runs of the runner."""

import math
import os
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import yaml
from documents import ROOT, commands, run
from support import small_model
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

from experiment import main as run_experiments
from modeling_spiralformer import SpiralFormerConfig
from train_smiles_tokenizer import SmilesTokenizerArguments
from train_smiles_tokenizer import main as write_tokenizer
from workshop.experiments import runner as experiment_runner
from workshop.experiments.hierarchy import Hierarchy, check_tallies, read_samples
from workshop.experiments.molecules_report import molecules_report
from workshop.experiments.plan import Experiment, load_experiment
from workshop.experiments.results import ExperimentResults
from workshop.experiments.run import train_run
from workshop.experiments.runner import check_molecules, make_tokenizer
from workshop.experiments.store import append_line, read_lines
from workshop.molecules import judging, sampling
from workshop.molecules.hierarchy import tally_by_validity
from workshop.molecules.judging import SAMPLE_CLASSES, classify, judge
from workshop.molecules.rows import make_rows, read_molecules
from workshop.molecules.sampling import sample
from workshop.molecules.training import make_trainer
from workshop.padded_rows import LengthGroups, row_losses
from workshop.tokenizers import split_smiles, train_smiles_tokenizer
from workshop.training_arguments import DataArguments, ModelArguments, SpiralTrainingArguments

SMILES = ROOT / "tokenization" / "smiles"
TOKENIZER = AutoTokenizer.from_pretrained(SMILES)
# Written for these tests: every kind of token that the tokenizer knows.
MOLECULES = [
    *("CCO", "CC(=O)Nc1ccc(O)cc1", "c1ccc2c(c1)cccc2Br", "FC(F)(Cl)C#N", "C[C@@H](N)C(=O)[O-]", "C/C=C\\C"),
    *("CN1CC[C@H](c2ccsc2)C1", "[NH3+]CCCP(O)O", "O=[N+]([O-])c1c[nH]cn1", "C1CC2CCC1C2", "ICc1ccco1", "CS(C)=O"),
]
DATA_DIR = os.environ.get("DATA_DIR")
needs_data = pytest.mark.skipif(DATA_DIR is None, reason="DATA_DIR does not name the folder of zinc_jtnn")
PLAN = {
    "title": "Two tiny models",
    "report": "molecules",
    "references": ["plain"],
    "text": {"train": "train.txt", "validation": "valid.txt"},
    "smiles": {"mean_length": 13, "samples": 12, "temperature": 0.8, "top_k": 40},
    "vocab_size": 30,
    "block_size": 24,
    "batch_size": 4,
    "budget": {"tokens": 416},
    "evaluation_blocks": 5,
    "learning_rates": [1e-3, 1e-2],
    "seeds": [0, 1],
    "common": {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "tie_word_embeddings": True},
    "models": {
        "plain": {"num_prelude_layers": 3, "num_core_layers": 0, "num_coda_layers": 0, "chunk_sizes": []},
        "spiral": {"num_prelude_layers": 1, "num_core_layers": 1, "num_coda_layers": 1, "chunk_sizes": [4, 2]},
    },
}


def experiment(**changes) -> Experiment:
    return Experiment(name="tiny", **(PLAN | changes))


@pytest.fixture
def data_dir(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.txt").write_text("\n".join(MOLECULES) + "\n")
    (folder / "valid.txt").write_text("\n".join(MOLECULES[::-1]) + "\n")
    return folder


# -- the tokenizer ----------------------------------------------------------------------------------------------------


def test_a_molecule_is_bos_its_tokens_and_eos_and_comes_back():
    ids = TOKENIZER("C[C@@H](Cl)c1cc[nH]c1Br")["input_ids"]
    tokens = ["C", "[C@@H]", "(", "Cl", ")", "c", "1", "c", "c", "[nH]", "c", "1", "Br"]
    assert TOKENIZER.convert_ids_to_tokens(ids) == ["<|bos|>", *tokens, "<|eos|>"]
    assert ids[0] == 1 and ids[-1] == 2 and TOKENIZER.pad_token_id == 0 and len(TOKENIZER) == 65
    padded = TOKENIZER(MOLECULES, padding=True)
    assert TOKENIZER.batch_decode(padded["input_ids"], skip_special_tokens=True) == MOLECULES


@pytest.mark.parametrize("text", ["CX", "C[Xe]", "C C", "C[", "CCOé"])
def test_text_that_is_no_known_token_is_an_error(text):
    with pytest.raises(Exception, match="Missing \\[UNK\\] token"):
        TOKENIZER(text)


def test_training_names_text_that_is_no_token():
    assert split_smiles("CBr") == ["C", "Br"]
    with pytest.raises(ValueError, match="'CCX'"):
        train_smiles_tokenizer(["CC", "CCX"])


def test_it_loads_without_the_package():
    code = (
        f"from transformers import AutoTokenizer; t = AutoTokenizer.from_pretrained({str(SMILES)!r}); print(t('CBr'))"
    )
    printed = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True).stdout
    assert str(TOKENIZER("CBr")["input_ids"]) in printed


def test_the_command_of_the_page_writes_a_tokenizer(data_dir):
    (command,) = (line for line in commands("tokenization/README.md") if "smiles" in line)
    run([sys.executable, *command.replace("scripts/", f"{ROOT}/scripts/").split()[1:]], data_dir)
    written = AutoTokenizer.from_pretrained(data_dir / "my_smiles_tokenizer")
    assert len(written) == 30 and written.decode(written("CCO")["input_ids"]) == "<|bos|>CCO<|eos|>"


@needs_data
def test_the_committed_tokenizer_is_that_of_the_data_and_every_molecule_comes_back(tmp_path):
    folder = Path(DATA_DIR) / "zinc_jtnn"
    write_tokenizer(SmilesTokenizerArguments(train_file=str(folder / "train.txt"), output_dir=str(tmp_path)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (SMILES / name).read_bytes()
    count = 0
    for name in ("train.txt", "valid.txt", "test.txt"):
        found = read_molecules(name, folder / name)
        for start in range(0, len(found), 10000):
            ids = TOKENIZER(found[start : start + 10000])["input_ids"]
            assert TOKENIZER.batch_decode(ids, skip_special_tokens=True) == found[start : start + 10000]
        count += len(found)
    assert count == 249455


# -- rows and their loss ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, words", [("", "empty"), ("CC\n\nCO\n", "line 2"), ("CC\nCO name\n", "line 2")])
def test_files_of_something_else_are_refused(text, words, tmp_path):
    (tmp_path / "train.txt").write_text(text)
    with pytest.raises(ValueError, match=f"`train`.*{words}"):
        read_molecules("train", tmp_path / "train.txt")


def test_a_molecule_that_does_not_fit_is_refused():
    assert max(map(len, make_rows(MOLECULES, TOKENIZER, 24)["input_ids"])) == 20
    with pytest.raises(ValueError, match="`block_size` must be at least 20"):
        make_rows(MOLECULES, TOKENIZER, 19)


def alone(model, smiles: str) -> tuple[float, int]:
    """Summed loss in nats and count of a molecule's predicted tokens, one by one, without padding."""
    ids = torch.tensor(TOKENIZER([smiles])["input_ids"])
    probabilities = model(ids).logits[0].double().log_softmax(dim=-1)
    return -sum(float(probabilities[i, ids[0, i + 1]]) for i in range(ids.shape[1] - 1)), ids.shape[1] - 1


@torch.no_grad()
def test_a_padded_row_has_the_loss_of_the_molecule_alone():
    model = small_model(vocab_size=65)
    trainer_rows = [{"input_ids": ids} for ids in TOKENIZER(MOLECULES)["input_ids"]]
    batch = DataCollatorForLanguageModeling(TOKENIZER, mlm=False)(trainer_rows)
    assert (batch["labels"] == -100).sum() == (batch["attention_mask"] == 0).sum() > 20
    losses = row_losses(model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"])
    expected = torch.tensor([alone(model, smiles) for smiles in MOLECULES])
    torch.testing.assert_close(losses, expected.to(losses), rtol=1e-5, atol=1e-5)


def test_batches_hold_molecules_of_like_length_in_an_order_of_seed_and_epoch():
    lengths = torch.randint(5, 60, (1003,), generator=torch.Generator().manual_seed(0)).tolist()

    def drawn(seed, epoch):
        sampler = LengthGroups(lengths, 10, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    indices = drawn(0, 0)
    assert sorted(indices) == list(range(1003)) and indices == drawn(0, 0)
    orders = [indices, drawn(1, 0), drawn(0, 1), drawn(1, 1)]
    assert len(set(map(tuple, orders))) == 4
    batches = [[lengths[index] for index in indices[start : start + 10]] for start in range(0, 1000, 10)]
    spread = sum(max(batch) - min(batch) for batch in batches) / len(batches)
    longest = torch.tensor([float(max(batch)) for batch in batches])
    assert spread < 10  # of 55; at random it is 45
    assert abs(torch.corrcoef(torch.stack([longest[1:], longest[:-1]]))[0, 1]) < 0.3  # sorted batches have 0.9


def test_groups_hold_the_rows_of_a_whole_step_however_it_is_split(data_dir, tmp_path, monkeypatch):
    def drawn(processes, size, parts):
        monkeypatch.setattr(SpiralTrainingArguments, "world_size", processes)
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
        trainer = small_trainer(data_dir, tmp_path, train_sampling_strategy="group_by_length", **split)
        return list(trainer._get_train_sampler())

    expected = drawn(1, 8, 1)
    assert drawn(2, 4, 1) == drawn(1, 4, 2) == drawn(2, 2, 2) == expected != drawn(1, 4, 1)


def small_trainer(data_dir: Path, tmp_path: Path, **training):
    config = SpiralFormerConfig(
        vocab_size=65, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_core_layers=1,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=24, initializer_range=0.3,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "config")
    model = ModelArguments(config_name=str(tmp_path / "config"), tokenizer_name=str(SMILES))
    files = {"train_file": str(data_dir / "train.txt"), "validation_file": str(data_dir / "valid.txt")}
    arguments = SpiralTrainingArguments(
        output_dir=str(tmp_path / "out"), report_to="none", disable_tqdm=True, use_cpu=True, **training
    )
    return make_trainer(model, DataArguments(block_size=24, **files), arguments)


def test_the_loss_is_of_tokens_not_of_batches(data_dir, tmp_path):
    """Twelve molecules of 5 to 20 tokens in batches of five: the mean of batch means is another number."""
    trainer = small_trainer(data_dir, tmp_path, per_device_eval_batch_size=5)
    found = trainer.evaluate()
    with torch.no_grad():
        sums = [alone(trainer.model, smiles) for smiles in MOLECULES]
    expected = sum(loss for loss, _ in sums) / sum(count for _, count in sums)
    assert found["eval_nats_per_token"] == pytest.approx(expected, rel=1e-5)
    assert abs(found["eval_loss"] - expected) > 1e-3


# -- samples ----------------------------------------------------------------------------------------------------------


def test_samples_start_at_bos_and_a_seed_gives_the_same(monkeypatch):
    model = small_model(vocab_size=65, dtype=torch.float32, eos_token_id=2)
    monkeypatch.setattr(sampling, "SAMPLED_AT_ONCE", 3)
    first = sample(model, TOKENIZER, 7, seed=1, temperature=0.8, top_k=40, max_length=12)
    assert len(first) == 7 and len(set(first)) > 1
    assert first == sample(model, TOKENIZER, 7, seed=1, temperature=0.8, top_k=40, max_length=12)
    assert first != sample(model, TOKENIZER, 7, seed=2, temperature=0.8, top_k=40, max_length=12)
    assert max(len(split_smiles(smiles)) for smiles in first) <= 11  # bos counts
    greedy = model.generate(torch.ones(1, 1, dtype=torch.long), do_sample=False, max_length=12)
    assert sample(model, TOKENIZER, 1, seed=1, temperature=0.8, top_k=1, max_length=12) == TOKENIZER.batch_decode(
        greedy, skip_special_tokens=True
    )


def test_the_options_reach_the_sampler():
    """Far below temperature 1 every sample is the greedy one; at 1 and all tokens they differ."""
    model = small_model(vocab_size=65, dtype=torch.float32)
    cold = sample(model, TOKENIZER, 8, seed=1, temperature=1e-4, top_k=65, max_length=8)
    assert len(set(cold)) == 1
    assert len(set(sample(model, TOKENIZER, 8, seed=1, temperature=1.0, top_k=65, max_length=8))) > 4


@pytest.mark.parametrize(
    "smiles, kind",
    [
        *((smiles, "valid") for smiles in MOLECULES),
        ("C(C", "bracket"),
        ("CC)C(C", "bracket"),
        ("C1CC(", "bracket"),
        ("C1CC", "ring"),
        ("C1CC2CC1", "ring"),
        ("C%11CC", "ring"),
        ("[NH3+]C1CC", "ring"),
        ("CC(C)(C)(C)C", "valence"),
        ("c1cccc1", "valence"),
        ("[CH2-]C(C)(C)(C)C", "valence"),  # the 2 closes no ring
        ("C11", "other"),
        ("C==C", "other"),
        ("", "other"),
        (" CC", "other"),
        ("CC\t", "other"),
        ("CC foo", "other"),
    ],
)
def test_samples_are_counted_in_the_first_class_that_fits(smiles, kind):
    pytest.importorskip("rdkit")
    from rdkit import rdBase

    with rdBase.BlockLogs():
        assert classify(smiles) == kind


def test_counts_add_up_and_two_spellings_are_one_molecule():
    pytest.importorskip("rdkit")
    found = judge(["CCO", "OCC", "CCO", "CN", "C(C", "C1CC", "CC(C)(C)(C)C", "C11", "C(C", ""])
    assert {name: found[name] for name in SAMPLE_CLASSES} == {
        **{"valid": 4, "bracket": 2, "ring": 1, "valence": 1, "other": 2}
    }
    assert found["count"] == 10 and found["unique"] == 2 and found["rdkit"]
    z = 1.959963984540054  # Wilson's interval, written out
    centre, half = 0.4 + z**2 / 20, z * math.sqrt(0.4 * 0.6 / 10 + z**2 / 400)
    expected = [(centre - half) / (1 + z**2 / 10), (centre + half) / (1 + z**2 / 10)]
    assert found["valid_interval"] == pytest.approx(expected)


def test_without_rdkit_nothing_starts(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="molecules"):
        run_experiments(runner_arguments(tmp_path, data_dir))
    assert not list((tmp_path / "runs").glob("*/*"))


# -- plans and runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"report": "table"}, "smiles"),
        ({"smiles": None, "text": PLAN["text"] | {"foreign": "f.txt"}}, "smiles"),
        ({"smiles": {"mean_length": 13}}, "smiles"),
        ({"smiles": PLAN["smiles"] | {"top_p": 0.9}}, "smiles"),
        ({"smiles": PLAN["smiles"] | {"samples": 1.5}}, "smiles"),
        ({"smiles": PLAN["smiles"] | {"temperature": 0}}, "smiles"),
        ({"smiles": PLAN["smiles"] | {"mean_length": 25}}, "mean_length"),
        ({"text": PLAN["text"] | {"foreign": "f.txt"}}, "text"),
        ({"sweep_budget": {"tokens": 1}}, "budget"),
    ],
)
def test_bad_plans_are_refused_by_name(changes, field, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(PLAN | changes), encoding="utf-8")
    with pytest.raises(ValueError, match=f"`{field}`" if field != "mean_length" else field):
        load_experiment(path)


def test_costs_and_steps_are_counted_on_a_molecule_of_mean_length():
    plan = experiment()
    assert plan.run("plain", 0, 1e-3).settings["steps"] == 416 // (4 * 13)
    costs = plan.costs("plain")
    longer = experiment(smiles=PLAN["smiles"] | {"mean_length": 24}, budget={"tokens": 384}).costs("plain")
    assert costs["kv_bytes_per_token"] == longer["kv_bytes_per_token"] == 3 * 2 * 16 * 4
    assert longer["training_flops_per_block"] > 2 * costs["training_flops_per_block"]  # attention is a square


@pytest.mark.parametrize("name, value", [("vocab_size", 29), ("mean_length", 16)])
def test_molecules_other_than_planned_are_refused(name, value, data_dir):
    changes = {name: value} if name in PLAN else {"smiles": PLAN["smiles"] | {name: value}, "batch_size": 1}
    check_molecules(experiment(), data_dir)
    with pytest.raises(ValueError, match=f"`{name}` of tiny must be {PLAN['smiles'].get(name, 30)}"):
        check_molecules(experiment(**changes), data_dir)


def without_clock(results: dict) -> dict:
    return {name: value for name, value in results.items() if name not in ("wall_seconds", "resumed_from_step")}


class Killed(Exception):
    pass


@pytest.mark.parametrize("training", [{}, {"train_sampling_strategy": "group_by_length"}])
def test_a_run_that_stopped_half_way_ends_with_the_same_loss_and_samples(training, data_dir, tmp_path):
    """It stopped in the second of three passes, after one whole one."""
    pytest.importorskip("rdkit")
    plan = experiment(training=training)
    planned = plan.run("spiral", 0, 1e-2)
    (tmp_path / "runs").mkdir()
    tokenizer = make_tokenizer(plan, data_dir, tmp_path / "runs")
    whole, flops = train_run(planned, data_dir, tmp_path / "whole", tokenizer, [].append), []

    def stop(flops_of_step):
        flops.append(flops_of_step)
        if len(flops) == 7:  # the start, and six steps of eight
            raise Killed

    with pytest.raises(Killed):
        train_run(planned, data_dir, tmp_path / "torn", tokenizer, stop)
    resumed = train_run(planned, data_dir, tmp_path / "torn", tokenizer, [].append)
    assert resumed["resumed_from_step"] == 4 and without_clock(resumed) == without_clock(whole)
    again = train_run(planned, data_dir, tmp_path / "torn", tokenizer, [].append)  # killed before its line
    assert without_clock(again) == without_clock(whole)
    samples = [(tmp_path / name / planned.key / "samples.txt").read_text() for name in ("whole", "torn")]
    assert samples[0] == samples[1] and samples[0].count("\n") == 12 == whole["samples"]["count"]


def test_a_diverged_run_is_a_result(data_dir, tmp_path):
    """Without a sample: there is nothing to draw from."""
    pytest.importorskip("rdkit")
    plan = experiment(training={"max_grad_norm": 0.0})
    run = plan.run("spiral", 0, 1e30)
    (tmp_path / "runs").mkdir()
    line = train_run(run, data_dir, tmp_path / "runs", make_tokenizer(plan, data_dir, tmp_path / "runs"), [].append)
    assert line["nats_per_token"] == {"validation": None} and line["samples"]["count"] == 0
    append_line(tmp_path / "runs.jsonl", line)  # JSON has no NaN
    samples = tmp_path / "runs" / run.key / "samples.txt"
    assert samples.read_text() == ""
    assert read_samples(samples) == [] and check_tallies(tally_by_validity([], {}), line) is None


def test_tokens_are_those_of_the_molecules_without_padding(data_dir, tmp_path):
    """Six steps of four molecules out of twelve: two whole passes."""
    pytest.importorskip("rdkit")
    plan = experiment(budget={"tokens": 6 * 4 * 13})
    (tmp_path / "runs").mkdir()
    tokenizer = make_tokenizer(plan, data_dir, tmp_path / "runs")
    results = train_run(plan.run("plain", 0, 1e-2), data_dir, tmp_path / "runs", tokenizer, [].append)
    assert results["tokens"] == 2 * sum(len(split_smiles(smiles)) + 2 for smiles in MOLECULES)
    assert results["training_curve"][-1][0] == results["tokens"] == results["validation_curve"][-1][0]


def runner_arguments(tmp_path, data_dir, **changes) -> list[str]:
    plan = tmp_path / "tiny.yaml"
    plan.write_text(yaml.safe_dump(PLAN | {"sweep_budget": {"tokens": 104}, "seeds": [0]} | changes), encoding="utf-8")
    words = ["--experiments", str(plan), "--data_dir", str(data_dir), "--lines", str(tmp_path / "runs.jsonl")]
    return [*words, "--runs_dir", str(tmp_path / "runs")]


class Here:
    """An executor that does its work at once, in this process."""

    def __init__(self, workers, context, initializer, initargs):
        experiment_runner.flops_done = initargs[0]

    __enter__, __exit__ = (lambda self: self), (lambda self, *error: None)

    def submit(self, work, *arguments) -> Future:
        future = Future()
        future.set_result(work(*arguments))
        return future


def test_the_runner_goes_on_behind_a_run_that_diverged(data_dir, tmp_path, monkeypatch):
    pytest.importorskip("rdkit")
    monkeypatch.setattr(experiment_runner, "ProcessPoolExecutor", Here)
    changes = {"learning_rates": [1e30, 1e-3], "training": {"max_grad_norm": 0.0}}
    run_experiments(runner_arguments(tmp_path, data_dir, models={"plain": PLAN["models"]["plain"]}, **changes))
    lines = read_lines(tmp_path / "runs.jsonl")
    assert [line["learning_rate"] for line in lines] == [1e30, 1e-3, 1e-3]
    assert [line["nats_per_token"]["validation"] is None for line in lines] == [True, False, False]


def test_the_runner_sweeps_shortly_and_then_trains(data_dir, tmp_path, monkeypatch):
    pytest.importorskip("rdkit")
    monkeypatch.setattr(experiment_runner, "ProcessPoolExecutor", Here)
    run_experiments(runner_arguments(tmp_path, data_dir))
    lines = read_lines(tmp_path / "runs.jsonl")
    assert [line["steps"] for line in lines] == [2] * 4 + [8] * 2
    plan = load_experiment(tmp_path / "tiny.yaml")
    for name in plan.models:
        (line,) = plan.finished(name, lines).values()
        assert line["learning_rate"] == plan.chosen_rate(name, lines) and line["samples"]["count"] == 12
        assert line["kv_bytes_per_token"] > 0 and line["decode_layer_equivalents"] > 2
        assert sum(line["samples"][kind] for kind in SAMPLE_CLASSES) == 12
    text = molecules_report(ExperimentResults.gather(plan, lines), {}, Hierarchy({}, {}))
    assert "All 2 runs finished." in text and "Runs of" in text
