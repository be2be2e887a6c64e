"""Settings in YAML and JSON: of the type of their name, or refused with the key, what came and what is allowed."""

import json

import pytest
import yaml
from documents import blocks
from test_experiments import SMALL

from workshop.experiments.plan import load_experiment
from workshop.training_arguments import parse_arguments


@pytest.mark.parametrize(
    "line, message",
    [
        ("max_steps: 1e1", "`max_steps` must be an integer, but .* has '1e1'"),
        ("max_steps: true", "`max_steps` must be an integer, but .* has True"),
        ("max_steps: 0", "`max_steps` must be an integer >= 1, but got 0"),
        ("seed: 1.5", "`seed` must be an integer, but .* has 1.5"),
        ("seed: -1", "`seed` must be in"),
        ("block_size: '64'", "`block_size` must be an integer or null, but .* has '64'"),
        ("weight_decay: null", "`weight_decay` must be a number, but .* has None"),
        ("learning_rate: fast", "`learning_rate` must be a number, but .* has 'fast'"),
        ("learning_rate: .nan", "`learning_rate` must be finite, but got nan"),
        ("learning_rate: -1.0", "`learning_rate` must be >= 0, but got -1.0"),
        ("max_grad_norm: .inf", "`max_grad_norm` must be finite, but got inf"),
        ("lr_scheduler_kwargs: {min_lr_rate: .nan}", "`lr_scheduler_kwargs` must be finite"),
        ("adam_beta2: 1.5", r"`adam_beta2` must be in \[0, 1\], but got 1.5"),
        ("fp16: 'no'", "`fp16` must be true or false, but .* has 'no'"),
        ("do_train: 'False'", "`do_train` must be true or false, but .* has 'False'"),
        (
            "save_strategy: no",
            r"`save_strategy` must be one of \['no', .*, but .* has False\. YAML reads a bare yes, no",
        ),
        ("dtype: float16", r"`dtype` must be one of \['float32', 'bfloat16'\], but got 'float16'"),
        ("eval_strategy: never", "`eval_strategy` must be one of .*'steps'.*, but .* has 'never'"),
        ("config_overrides: {hidden_size: 32}", "`config_overrides` must be text or null, but .* has {'hidden_size'"),
        ("run_name: 2024", "`run_name` must be text or null, but .* has 2024"),
        ("include_for_metrics: loss", "`include_for_metrics` must be a list that holds text .*, but .* has 'loss'"),
        ("include_for_metrics: [1]", r"`include_for_metrics` must be a list .*, but .* has \[1\]"),
        ("per_device_train_batch_size: 0", "`per_device_train_batch_size` must be an integer >= 1, but got 0"),
        ("validation_split_percentage: .nan", "`validation_split_percentage` must be finite"),
        ("seed: 1\nseed: 2", "settings.yaml' is not: the key 'seed' stands there twice"),
        ("seed: 1: 2", "`settings` must be a file of yaml, but '.*settings.yaml' is not"),
        ("- seed", "`settings` must hold settings, .* but '.*settings.yaml' holds .'seed'."),
        ("", "`settings` must hold settings, .* but '.*settings.yaml' holds None"),
        ("seeds: 1", "seeds"),
    ],
)
def test_a_value_of_another_type_is_refused_by_its_key(line, message, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        parse_arguments([str(path)])


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"seed": 1, "seed": 2}', "the key 'seed' stands there twice"),
        ('{"seed": "1"}', "`seed` must be an integer, but .* has '1'"),
        ('{"learning_rate": NaN}', "`learning_rate` must be finite"),
        ("{seed", "`settings` must be a file of json, but '.*settings.json' is not"),
        ("[]", "`settings` must hold settings"),
    ],
)
def test_the_same_of_json(text, message, tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        parse_arguments([str(path)])


def test_a_settings_file_is_utf8_and_there(tmp_path):
    path = tmp_path / "settings.yaml"
    with pytest.raises(FileNotFoundError, match="`settings` must be an existing file, but got '.*settings.yaml'"):
        parse_arguments([str(path)])
    path.write_bytes("train_file: café.txt\n".encode("latin-1"))
    with pytest.raises(ValueError, match="`settings` must be text in UTF-8, but '.*settings.yaml' is not, in line 1"):
        parse_arguments([str(path)])
    path.write_bytes("train_file: café.txt\n".encode())
    assert parse_arguments([str(path)])[1].train_file == "café.txt"


def test_what_people_write_is_read(tmp_path):
    """A number without a point, an integer for a number, booleans, lists, mappings, and true where a name may be."""
    path = tmp_path / "settings.yaml"
    lines = ["learning_rate: 6e-4", "weight_decay: 0", "max_steps: 3", "bf16: no", "report_to: [none]", "seed: 7"]
    lines += ["lr_scheduler_kwargs: {min_lr_rate: 0.2}", "resume_from_checkpoint: true", "block_size: null"]
    path.write_text("\n".join(lines), encoding="utf-8")
    _, data, training = parse_arguments([str(path)])
    assert (training.learning_rate, training.weight_decay, training.max_steps, training.seed) == (6e-4, 0.0, 3, 7)
    assert training.bf16 is False and data.block_size is None and training.resume_from_checkpoint is True
    assert training.lr_scheduler_kwargs == {"min_lr_rate": 0.2}


@pytest.mark.parametrize(
    "flag", ["learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "num_train_epochs"]
)
def test_numbers_of_the_command_line_are_finite_and_in_range(flag):
    for value in ("nan", "inf", "-1"):
        with pytest.raises(ValueError, match=f"`{flag}` must be (finite|>= 0)"):
            parse_arguments([f"--{flag}={value}"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seeds": [0, -1]}, "`seeds` must be in"),
        ({"seeds": "0"}, "`seeds` must be a list that holds an integer"),
        ({"learning_rates": ["1e-3"]}, "`learning_rates` must be a list that holds a number"),
        ({"learning_rates": [float("nan")]}, "`learning_rates` must be finite"),
        ({"learning_rates": [0.0]}, "`learning_rates` must be above 0"),
        ({"budget": {"flops": float("inf")}}, "`budget` must be finite"),
        ({"budget": 5}, "`budget` must be a mapping that holds an integer or a number"),
        ({"text": None}, "`text` must be a mapping that holds text"),
        ({"models": {"plain": None}}, "`models` must be a mapping that holds a mapping"),
        ({"models": ["plain"]}, "`models` must be a mapping"),
        ({"common": None}, "`common` must be a mapping, but .* has None"),
        ({"training": {"bf16": "no"}}, "`bf16` must be true or false, but `training` has 'no'"),
        ({"title": 5}, "`title` must be text, but .* has 5"),
        ({"block_size": 32.0}, "`block_size` must be an integer, but .* has 32.0"),
    ],
)
def test_an_experiment_is_held_to_its_types(changes, message, tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(SMALL)) | changes), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_experiment(path)


def test_the_settings_of_the_page_are_read(tmp_path):
    ((text, _),) = blocks("docs/training.md", "yaml")
    (tmp_path / "settings.yaml").write_text(text, encoding="utf-8")
    model, data, training = parse_arguments([str(tmp_path / "settings.yaml")])
    assert model.config_overrides == "chunk_sizes=[4,2,1],topology=anchor" and data.train_file == "text.txt"
    assert (training.max_steps, training.learning_rate, training.save_strategy) == (1000, 6e-4, "no")
