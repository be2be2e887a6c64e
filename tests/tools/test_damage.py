"""Damaged files and killed runs: a part of what `scripts/damage_files.py` and `scripts/kill_training.py` try."""

import faulthandler
import json
import os
from collections import Counter
from pathlib import Path
from random import Random

import pytest

import damage_files
import kill_training
from modeling_spiralformer.files_spiralformer import write_digests
from workshop.damage import kills, trials
from workshop.damage.kinds import BYTES, PLACES, TEXTS, damage, kinds_of

CONTENT = {
    "hidden_size": 32,
    "rope_parameters": {"rope_theta": 1e4},
    "chunk_sizes": [4, 1],
    "tie": False,
    "act": "gelu",
}


@pytest.mark.processes
def test_no_damage_loads_with_other_numbers(tmp_path):
    """Four in five of them are refused by name, at least; the others change nothing."""
    found = list(trials.run_trials(tmp_path, seed=1, numbers=list(range(120))))
    assert [trial for trial in found if trial.failed] == []
    assert len(found) == 120 and Counter(trial.outcome for trial in found)["refused"] > 96
    assert {trial.subject for trial in found} == set(trials.SUBJECTS)
    # The same damages without digests: it is they that tell of changed weights.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trials, "plan", only_bits_of_weights)
        (tmp_path / "home").rename(tmp_path / "kept")
        found = list(trials.run_trials(tmp_path, seed=1, numbers=[0, 1, 2, 3], digests=False))
    assert {trial.outcome for trial in found} == {"changed"}


def only_bits_of_weights(home: Path, seed: int, number: int) -> tuple[trials.Trial, Random]:
    planned = trials.Trial(number, "one", "model.safetensors", "bytes zeroed", "from_pretrained", "crashed", "")
    return planned, Random(number)


def small_home(folder: Path) -> Path:
    for subject in ("one", "shards", "run"):
        (folder / "home" / subject).mkdir(parents=True)
        (folder / "home" / subject / "config.json").write_text(json.dumps(CONTENT), encoding="utf-8")
        write_digests(folder / "home" / subject)
    (folder / "home" / "runs.jsonl").write_text('{"key": "a"}\n', encoding="utf-8")
    return folder / "home"


def raising(error: BaseException):
    def load(path: Path):
        raise error

    return load


def dying(path: Path):
    faulthandler.disable()  # which would print where
    os.abort()


def changing(path: Path, seen=[0]):  # noqa: B006 what one process has seen
    seen[0] += 1
    return seen[0]


@pytest.mark.parametrize(
    "load, outcome",
    [
        (lambda path: 1, "harmless"),
        (changing, "changed"),
        (dying, "crashed"),
    ],
)
def test_each_outcome_is_told(load, outcome, tmp_path, monkeypatch):
    home = small_home(tmp_path)
    monkeypatch.setattr(trials, "loads_of", lambda *args: {"load": load})
    monkeypatch.setattr(trials, "quiet", lambda: None)
    monkeypatch.setattr(trials, "same", lambda found, expected, subject: found == expected)
    found = list(trials.run_batch(home, tmp_path / "place", 0, [3, 4, 5]))
    assert [(trial.number, trial.outcome) for trial in found] == [(number, outcome) for number in (3, 4, 5)]
    assert all(trial.kind in (*BYTES, *PLACES, *TEXTS) for trial in found)


@pytest.mark.parametrize(
    "error, outcome",
    [
        (ValueError("`hidden_size` must be 3"), "refused"),
        (OSError("no config.json"), "refused"),
        (ValueError("hidden_size must be 3"), "unclear"),
        (ValueError("it cannot be read"), "unclear"),
        (KeyError("config.json"), "unclear"),
        (BaseException("panic in config.json"), "unclear"),
    ],
)
def test_an_error_is_clear_where_it_names_file_or_field(error, outcome, tmp_path):
    found = trials.attempt(raising(error), tmp_path, None, "one", "config.json", {"hidden_size"})
    assert found[0] == outcome and str(error) in found[1]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.safetensors", "a.pt"])
def test_every_kind_damages(name, tmp_path):
    """Nearly always another content, and equal seeds the same one."""
    text = json.dumps(CONTENT)
    header = json.dumps({"w": {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]}}).encode()
    contents = {
        "a.json": text.encode(),
        "a.jsonl": f"{text}\n{text}\n".encode(),
        "a.safetensors": len(header).to_bytes(8, "little") + header + bytes(range(256)),
        "a.pt": bytes(range(256)),
    }
    path = tmp_path / name
    kinds = kinds_of(path)
    assert set(kinds) >= {*BYTES, *PLACES} and (set(TEXTS) < set(kinds)) == (name != "a.pt")
    for kind in kinds:
        made = []
        for seed in (0, 1, 2, 0):
            if path.is_dir():
                path.rmdir()
            path.unlink(missing_ok=True)
            path.write_bytes(contents[name])
            damage(path, kind, Random(seed))
            made.append(path.read_bytes() if path.is_file() else kind)
        assert made[0] == made[3], kind
        assert any(content != contents[name] for content in made), kind


@pytest.mark.processes
def test_killed_runs_end_with_the_same_numbers(tmp_path):
    found = list(kills.run_kills(tmp_path, seed=0, count=4))
    assert [kill.differs for kill in found] == [""] * 4
    assert sum("while it writes" in kill.moment for kill in found) == 2


def test_the_commands_count_what_failed(monkeypatch, capsys, tmp_path):
    made = [
        trials.Trial(0, "one", "config.json", "emptied", "serve", "refused", "ValueError: config.json"),
        trials.Trial(1, "one", "config.json", "a bit flipped", "serve", "changed", "logits"),
    ]
    monkeypatch.setattr(damage_files, "run_trials", lambda *args: iter(made))
    lines = tmp_path / "lines.jsonl"
    assert damage_files.main(["--count", "2", "--output_file", str(lines)]) == 1
    assert "changed: Trial(number=1" in capsys.readouterr().out and len(lines.read_text("utf-8").splitlines()) == 2
    found = [kills.Kill(0, "after 30% of the time", "the start", ""), kills.Kill(1, "while", "checkpoint-4", "losses")]
    monkeypatch.setattr(kill_training, "run_kills", lambda *args: iter(found))
    assert kill_training.main(["--count", "2"]) == 1
    assert "1 of 2 ended as the run that was not killed" in capsys.readouterr().out
