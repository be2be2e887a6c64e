"""A damaged config.json: each damage of each field is named, or the configuration holds exactly what the file says."""

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError
from support import small_config
from transformers import AutoConfig, GenerationConfig, GPTNeoXConfig, LlamaConfig
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from modeling_spiralformer import SpiralFormerConfig
from workshop.checkpoints import load_config

LIBRARY = logging.get_logger("transformers")
# No field at its default, so that none that falls back to it looks unharmed.
OPTIONS = {
    **{"chunk_offsets": [1, 1, 0], "causal_shifts": [4, 2, 1], "num_memory_slots": 5, "layer_norm_eps": 1e-3},
    **{"use_parallel_residual": False, "scale_embeddings": False, "hidden_act": "relu", "hidden_dropout": 0.2},
    **{"attention_dropout": 0.3, "classifier_dropout": 0.4, "initializer_range": 0.03, "share_core": False},
    **{"down_scaling": "mean", "up_scaling": "broadcast", "attention_bias": False, "tie_word_embeddings": True},
    **{"use_cache": False, "num_labels": 3, "dtype": "float64"},
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
}
# What the other families have in place of GPT-NeoX's fields.
FAMILIES = {
    "gpt_neox": OPTIONS,
    "qwen3": {
        name: value for name, value in OPTIONS.items() if not name.startswith(("use_par", "layer_norm", "hidden_d"))
    }
    | {"layer_family": "qwen3", "rms_norm_eps": 1e-3, "attention_bias": True, "num_key_value_heads": 1, "head_dim": 10}
    | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}},
}
# Fields that are not in every saved configuration, and do not change what a model computes.
NOT_ALWAYS_WRITTEN = ("architectures", "dtype", "transformers_version")


def saved(folder: Path, **options) -> dict:
    """What a saved configuration holds."""
    config = small_config(**options)
    config.architectures = ["SpiralFormerForCausalLM"]
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def fields_of(stored: dict, parents: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every key, of dictionaries too; all but those by which `AutoConfig` finds the class."""
    for name, value in stored.items():
        if name not in ("auto_map", "model_type"):
            yield (*parents, name)
            if isinstance(value, dict):
                yield from fields_of(value, (*parents, name))


def misspelt(name: str) -> set[str]:
    """A letter more, less, exchanged; another style."""
    shorter = {name[1:], name[:-1], name[:2] + name[3:]}
    swapped = name[:1] + name[2:3] + name[1:2] + name[3:]
    return {name + "_", name + "s", swapped, name.upper(), name.replace("_", "-"), *shorter} - {name, ""}


def wrong_values(value: object) -> Iterator[object]:
    for other in (
        None,
        math.nan,
        math.inf,
        -1,
        -1.5,
        0,
        0.5,
        10**4,
        True,
        "",
        "x",
        str(value),
        [],
        {},
        [None],
        [value],
    ):
        if other != value or type(other) is not type(value):
            yield other


def damages(stored: dict) -> Iterator[tuple[tuple[str, ...], str, dict]]:
    """Every damaged configuration, with the path of the damage and what it is."""
    for path in fields_of(stored):
        *parents, name = path

        def damaged(change, parents=parents) -> dict:
            whole = copy.deepcopy(stored)
            part = whole
            for parent in parents:
                part = part[parent]
            change(part)
            return whole

        yield path, "dropped", damaged(lambda part, name=name: part.pop(name))
        for other in misspelt(name):
            yield (
                path,
                f"spelt {other}",
                damaged(lambda part, name=name, other=other: part.update({other: part.pop(name)})),
            )
        value = stored
        for parent in path:
            value = value[parent]
        for other in wrong_values(value):
            yield path, f"set to {other!r}", damaged(lambda part, name=name, other=other: part.update({name: other}))


def load(folder: Path, stored: dict) -> tuple[SpiralFormerConfig | None, str]:
    """The configuration, None where it is refused; and what the library's logger or the error says."""
    (folder / "config.json").write_text(json.dumps(stored))
    LIBRARY.warning_once.cache_clear()
    config, error = None, ""
    with CaptureLogger(LIBRARY) as said:
        try:
            config = AutoConfig.from_pretrained(folder)
        except (ValueError, StrictDataclassError, KeyError) as refusal:  # the last is the library's
            error = str(refusal)
    return config, said.out + error


def holds(config: SpiralFormerConfig, stored: dict, field: str) -> bool:
    """Whether a field of the configuration is what the file says."""
    found = json.loads(config.to_json_string(use_diff=False)).get(field)
    return json.dumps(found) == json.dumps(stored.get(field))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_damage_is_named_or_is_what_the_file_says(family, tmp_path):
    stored = saved(tmp_path, **FAMILIES[family])
    whole = AutoConfig.from_pretrained(tmp_path).to_dict()
    silent, count = [], 0
    for path, damage, broken in damages(stored):
        if path[0] in NOT_ALWAYS_WRITTEN and not (path[0] == "dtype" and damage.startswith("set")):
            continue
        count += 1
        config, said = load(tmp_path, broken)
        named = path[0] in said and path[-1 if path[0] == "rope_parameters" else 0] in said
        harmless = config is not None and config.to_dict() == whole
        if not (named or harmless or (damage.startswith("set") and config and holds(config, broken, path[0]))):
            silent.append((path, damage, said))
    assert not silent and count > 900


@pytest.mark.parametrize("damage", ["misspelt", "missing"])
@pytest.mark.parametrize("field", ["causal_shifts", "layer_norm_eps", "rope_parameters", "hidden_act"])
def test_commands_refuse_a_damaged_configuration(field, damage, tmp_path):
    stored = saved(tmp_path, **OPTIONS)
    assert load_config(str(tmp_path)).to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()
    value = stored.pop(field)
    if damage == "misspelt":
        stored[field + "_"] = value
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=f"`{field}_?` is {'no field' if damage == 'misspelt' else 'missing'}"):
        load_config(str(tmp_path))


def test_what_is_saved_or_committed_says_nothing(tmp_path):
    for options in (
        {},
        *FAMILIES.values(),
        {"layer_family": "llama"},
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
        {"num_labels": 1},
    ):
        config, said = load(tmp_path, saved(tmp_path, **options))
        assert config is not None and said == "", options
    for folder in Path("configuration").iterdir():
        with CaptureLogger(LIBRARY) as said:
            load_config(str(folder))
        assert said.out == "", folder


def test_names_that_the_library_knows_are_not_taken_for_slips():
    known = {*GenerationConfig().to_dict(), *GPTNeoXConfig().to_dict(), *LlamaConfig().to_dict()}
    known |= {"torch_dtype", "num_labels", "quantization_config", "tokenizer_class", "is_decoder", "sep_token_id"}
    known |= {"attn_implementation", "output_attentions", "_name_or_path", "trust_remote_code", "revision", "token"}
    assert SpiralFormerConfig.misspelt_fields(known) == []


def test_misspelt_arguments_are_named(tmp_path):
    saved(tmp_path)
    with CaptureLogger(LIBRARY) as said:
        small_config(chunk_size=[4, 2])
    assert "`chunk_size` is no field and changes nothing; `chunk_sizes` is one." in said.out
    with CaptureLogger(LIBRARY) as said:
        AutoConfig.from_pretrained(tmp_path, topolgy="anchor")
    assert "`topolgy` is no field" in said.out
    with CaptureLogger(LIBRARY) as said:
        AutoConfig.from_pretrained(tmp_path, topology="anchor", num_labels=4, id2label={0: "a", 1: "b"})
    assert said.out == ""


# -- older spellings of rotary parameters --------------------------------------------------------------------------

LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0, "partial_rotary_factor": 0.25}
OLDER_SPELLINGS = [
    {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5000.0},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rotary_emb_base": 5000.0},
    {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}},
    {"rope_parameters": {"type": "linear", "factor": 2.0, "rope_theta": 5000.0}},
    {"rope_parameters": {"rope_theta": 5000.0}, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_parameters": {"rotary_emb_base": 5000.0, "rotary_pct": 0.25, "type": "linear", "factor": 2.0}},
]


@pytest.mark.parametrize("spelling", OLDER_SPELLINGS)
def test_older_spellings_of_rotary_parameters_mean_the_same(spelling, tmp_path):
    assert small_config(**spelling).rope_parameters == LINEAR
    stored = {name: value for name, value in saved(tmp_path).items() if name != "rope_parameters"}
    config, _ = load(tmp_path, stored | spelling)
    assert config.rope_parameters == LINEAR and not hasattr(config, "type") and not hasattr(config, "factor")


@pytest.mark.parametrize("spelling", ["type", "rope_type"])
def test_rope_scaling_beside_other_rope_parameters_is_refused(spelling, tmp_path):
    config, said = load(tmp_path, saved(tmp_path) | {"rope_scaling": {spelling: "linear", "factor": 2.0}})
    assert config is None and "`rope_scaling['rope_type']` must be given once, and was 'default' before" in said
    with pytest.raises(ValueError, match="rope_theta.* must be given once"):
        AutoConfig.from_pretrained(saved(tmp_path) and tmp_path, rope_theta=5000.0)
    config, said = load(tmp_path, saved(tmp_path) | {"rope_scaling": "linear"})
    assert config is None and "`rope_scaling` must be None or a dict, but got 'linear'" in said


@pytest.mark.parametrize(
    "given", [{"factr": 2.0}, {"factor": 2.0}, {"rope_type": "linear", "factor": 2.0, "beta_fast": 1}]
)
def test_a_rotary_parameter_that_its_type_lacks_is_refused(given):
    with pytest.raises(StrictDataclassError, match=rf"`rope_parameters\['{list(given)[-1]}'\]` must be left out"):
        small_config(rope_parameters=given)
