"""train.py beside the bare step: what is counted, and that a slow data path shows."""

import time

import pytest
from short_runs import write_text

import benchmark_training
from workshop import training
from workshop.benchmarks import data_path


@pytest.fixture
def words(tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setattr(data_path, "WARM_UP", 2)
    settings = {"train_file": write_text(tmp_path), "output_dir": str(tmp_path / "run"), "block_size": "32"}
    settings |= {"per_device_train_batch_size": "2", "max_steps": "8", "disable_tqdm": "True"}
    settings |= {"config_overrides": "hidden_size=32,num_core_layers=1"}
    return [word for name, value in settings.items() for word in (f"--{name}", value)]


def test_steps_are_measured_in_turn(words, capsys):
    found = benchmark_training.main(words)
    assert found["steps"] == 6 and found["tokens of a step"] == 64
    low, high = found["quartiles"]
    assert 0 < low <= found["share"] <= high < 2
    assert f"{found['share']:.3f} (" in capsys.readouterr().out


def test_a_slow_collator_shows(words, monkeypatch):
    right = training.default_data_collator

    def slow(rows):
        time.sleep(0.5)
        return right(rows)

    monkeypatch.setattr(training, "default_data_collator", slow)
    found = benchmark_training.main(words)
    assert found["share"] < 0.5


@pytest.mark.parametrize(
    ("more", "name"),
    [(["--max_steps", "3"], "max_steps"), (["--gradient_accumulation_steps", "2"], "gradient_accumulation_steps")],
)
def test_what_cannot_be_compared_is_refused(words, more, name):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        benchmark_training.main([*words, *more])
