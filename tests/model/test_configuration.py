"""The configuration: every field checked, JSON round trip, nothing derived is stored, overrides on loading."""

import copy
import json
import pickle
import re

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from support import random_ids, small_config, small_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from modeling_spiralformer import SpiralFormerConfig, SpiralFormerForCausalLM
from modeling_spiralformer.cache_name_spiralformer import CACHE_NAME
from modeling_spiralformer.configuration_spiralformer import LATENT_LAYER_TYPE, TOKEN_LAYER_TYPE


def test_defaults_are_the_160m_spiralformer_b():
    config = SpiralFormerConfig()
    assert config.chunk_sizes == [8, 4, 2, 1] and config.resolved_chunk_offsets == [4, 2, 1, 0]
    assert config.resolved_causal_shifts == [7, 3, 1, 0] and config.resolved_num_memory_slots == 7
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (768, 12, 3072)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    assert config.keys_to_ignore_at_inference == [CACHE_NAME]
    assert (config.vocab_size, config.max_position_embeddings, config.initializer_range) == (50304, 4096, 0.02)
    assert (config.num_prelude_layers, config.num_core_layers, config.num_coda_layers) == (2, 4, 2)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 0, None)
    assert (config.attention_dropout, config.hidden_dropout, config.classifier_dropout) == (0.0, 0.0, 0.1)
    assert config.scale_embeddings and config.share_core and not config.tie_word_embeddings


def test_help_says_what_each_field_is():
    """Of a field without a description the library gives one that it has, which may be of another model's field."""
    entries = dict(re.findall(r"^    (\w+) \(.*\):\n\s+(.*)$", SpiralFormerConfig.__doc__, re.MULTILINE))
    assert set(SpiralFormerConfig.__annotations__) <= set(entries) | {"model_type", "keys_to_ignore_at_inference"}
    assert entries["dtype"].startswith("Floating-point dtype of the weights.")


def test_derived_values_follow_the_schedule_and_cannot_be_set():
    config = small_config(num_prelude_layers=2, num_core_layers=3, num_coda_layers=1, chunk_sizes=[4, 2])
    assert config.num_hidden_layers == len(config.layer_types) == 2 + 2 * 3 + 1
    assert config.layer_types[0] == config.layer_types[-1] == TOKEN_LAYER_TYPE
    assert len(set(config.layer_types[2:8])) == 1 and TOKEN_LAYER_TYPE not in config.layer_types[2:8]
    for field, value in (("num_hidden_layers", 4), ("layer_types", ["full_attention"])):
        with pytest.raises(ValueError, match=field):
            setattr(config, field, value)
        with pytest.raises(ValueError, match=field):
            small_config(**{field: value})


def test_entries_of_core_layers_are_the_latent_ones_in_order():
    config = small_config(num_prelude_layers=2, num_core_layers=3, num_coda_layers=1, chunk_sizes=[4, 2])
    assert [list(config.core_entries(t)) for t in range(2)] == [[2, 3, 4], [5, 6, 7]]
    latents = [entry for entry, kind in enumerate(config.layer_types) if kind == LATENT_LAYER_TYPE]
    assert [*config.core_entries(0), *config.core_entries(1)] == latents
    for iteration in (-1, 2):
        with pytest.raises(ValueError, match=f"`iteration` must be one of the 2 .* but got {iteration}"):
            config.core_entries(iteration)


def test_json_round_trip_keeps_none_and_stores_nothing_derived(tmp_path):
    config = small_config(chunk_sizes=[5, 3], causal_shifts=[6, 9])
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert "num_hidden_layers" not in stored and "layer_types" not in stored
    assert stored["chunk_offsets"] is None and stored["num_memory_slots"] is None
    assert stored["causal_shifts"] == [6, 9]
    again = SpiralFormerConfig.from_pretrained(tmp_path)
    assert again.to_diff_dict() == config.to_diff_dict() and isinstance(again, SpiralFormerConfig)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), SpiralFormerConfig)
    assert copy.deepcopy(config).to_dict() == pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()


def test_tuples_become_lists():
    assert small_config(chunk_sizes=(4, 1), chunk_offsets=(0, 0)).to_dict()["chunk_offsets"] == [0, 0]


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        ({"vocab_size": 0}, "vocab_size", "0"),
        ({"hidden_size": 15}, "hidden_size", "15"),
        ({"hidden_size": "16"}, "hidden_size", "16"),
        ({"num_attention_heads": -2}, "num_attention_heads", "-2"),
        ({"num_prelude_layers": -1}, "num_prelude_layers", "-1"),
        ({"num_prelude_layers": 0}, "num_prelude_layers", "0"),  # the schedule starts coarse
        ({"num_core_layers": 0}, "num_core_layers", "0"),
        ({"chunk_sizes": []}, "num_core_layers", "2"),
        ({"chunk_sizes": [4, 0]}, "chunk_sizes", "0"),
        ({"chunk_sizes": [4, 1.5]}, "chunk_sizes", "1.5"),
        ({"chunk_sizes": "421"}, "chunk_sizes", "421"),
        ({"chunk_offsets": [4, 0, 0]}, "chunk_offsets", "4"),
        ({"chunk_offsets": [-1, 0, 0]}, "chunk_offsets", "-1"),
        ({"chunk_offsets": [0]}, "chunk_offsets", "0"),
        ({"causal_shifts": [2, 1, 0]}, "causal_shifts", "2"),
        ({"causal_shifts": [3, 1]}, "causal_shifts", "3"),
        ({"down_scaling": "max"}, "down_scaling", "max"),
        ({"up_scaling": "copy"}, "up_scaling", "copy"),
        ({"topology": "ring"}, "topology", "ring"),
        ({"hidden_act": "sharp"}, "hidden_act", "sharp"),
        ({"num_memory_slots": 0}, "num_memory_slots", "0"),
        ({"num_memory_slots": 4, "topology": "anchor"}, "num_memory_slots", "4"),
        ({"router_start": "zero"}, "router_start", "zero"),
        ({"router_start": "uniform", "topology": "base"}, "router_start", "uniform"),
        ({"first_routers": "coda"}, "first_routers", "coda"),
        ({"first_routers": "prelude", "topology": "hyper_connections"}, "first_routers", "prelude"),
        ({"chunk_sizes": [], "num_core_layers": 0, "router_start": "uniform"}, "router_start", "uniform"),
        ({"num_streams": 4}, "num_streams", "4"),
        ({"gate_start": "blend", "topology": "anchor"}, "gate_start", "blend"),
        ({"num_memory_slots": 4, "topology": "hyper_connections"}, "num_memory_slots", "4"),
        ({"num_streams": 1, "topology": "hyper_connections"}, "num_streams", "1"),
        ({"num_streams": 9, "topology": "hyper_connections"}, "num_streams", "9"),
        ({"gate_start": "one", "topology": "hyper_connections"}, "gate_start", "one"),
        (
            {"topology": "hyper_connections", "chunk_sizes": [], "num_core_layers": 0, "num_streams": 4},
            "num_streams",
            "4",
        ),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type", "dynamic"),
        ({"rope_parameters": {"partial_rotary_factor": 0.1}}, "partial_rotary_factor", "0.1"),
        ({"hidden_dropout": 1.0}, "hidden_dropout", "1.0"),
        ({"initializer_range": 0.0}, "initializer_range", "0.0"),
        ({"initializer_range": float("nan")}, "initializer_range", "nan"),
        ({"layer_norm_eps": float("inf")}, "layer_norm_eps", "inf"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta", "-1.0"),
        ({"rope_parameters": {"rope_theta": "a"}}, "rope_theta", "a"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.0}}, "factor", "0.0"),
        ({"rope_parameters": {"partial_rotary_factor": "0.5"}}, "partial_rotary_factor", "0.5"),
        ({"chunk_sizes": [], "num_core_layers": 0, "num_memory_slots": 4}, "num_memory_slots", "4"),
        ({"max_position_embeddings": 0}, "max_position_embeddings", "0"),
    ],
)
def test_impossible_values_are_refused_by_name(options, field, value):
    with pytest.raises(StrictDataclassError) as error:
        small_config(**options)
    assert field in str(error.value) and value in str(error.value)


# A value of each field that no model can have, or more where there is more than one way to be wrong.
WRONG = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"), [0, -1, "16", 1.5]),
    **dict.fromkeys(("num_prelude_layers", "num_core_layers", "num_coda_layers"), [-1, None, True]),
    **dict.fromkeys(
        ("attention_dropout", "hidden_dropout", "classifier_dropout"), [2.0, 1, -0.1, float("nan"), "0.1"]
    ),
    **dict.fromkeys(
        ("layer_norm_eps", "rms_norm_eps", "initializer_range", "output_initializer_range"),
        [0.0, -1.0, float("inf"), float("nan"), "1e-5"],
    ),
    **dict.fromkeys(("share_core", "scale_embeddings", "use_parallel_residual", "attention_bias"), ["no", 0]),
    **dict.fromkeys(("tie_word_embeddings", "use_cache", "mlp_bias"), ["no", 0]),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), ["0", 0.5]),
    "num_attention_heads": [0, -2],
    **dict.fromkeys(("num_key_value_heads", "head_dim"), [0, -2, 2.0]),
    "layer_family": ["gpt", None],
    "norm": ["batch_norm", 1],
    "chunk_sizes": [[0], [4, 1.5], "421", None],
    "chunk_offsets": [[-1, 0, 0], ["1"], 2],
    "causal_shifts": [[3, -1, 0], (True,)],
    "down_scaling": ["max", None],
    "up_scaling": ["copy"],
    "topology": ["ring", ""],
    "hidden_act": ["sharp", 3],
    "num_memory_slots": [0, -3, 2.0],
    "router_start": ["half", 4],
    "first_routers": ["both", True],
    "num_streams": [1, 9, 4.0],
    "gate_start": ["half", 4],
    "rope_parameters": [{"rope_type": "dynamic"}, {"type": "longrope"}, {"rope_theta": -1.0}, {"rotary_pct": "a"}, 4],
    "dtype": ["float33", "int8", torch.int8, 16],
    "id2label": [{}, {1: "a"}, {0: "a", 2: "b"}, ["a"]],
    "label2id": [["a"], {"a": 0.5}],
    "problem_type": ["ranking"],
}


def test_a_wrong_value_is_known_of_every_field():
    assert set(WRONG) == set(SpiralFormerConfig.__annotations__)


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_a_wrong_value_set_later_is_refused_and_changes_nothing(field, value):
    config = small_config()
    before = config.to_dict()
    with pytest.raises(StrictDataclassError) as error:
        setattr(config, field, value)
    came = list(value.values())[-1] if value and isinstance(value, dict) else value
    assert f"'{field}'" in str(error.value) and str(came) in str(error.value)
    assert config.to_dict() == before
    with pytest.raises(StrictDataclassError, match=field):
        small_config(**{field: value})


def test_no_labels_at_all_are_refused_too():
    config = small_config()
    with pytest.raises(StrictDataclassError, match="(?s)id2label.*the names of the labels 0, 1, 2.*got {}"):
        config.num_labels = 0
    assert config.num_labels == 2


def test_fields_that_go_together_change_one_after_the_other(tmp_path):
    config = small_config(chunk_sizes=[4, 2, 1], num_memory_slots=5)
    config.chunk_offsets = [0, 0]
    for use in (SpiralFormerForCausalLM, lambda config: config.save_pretrained(tmp_path)):
        with pytest.raises(StrictDataclassError, match=r"chunk_offsets.* but got \[0, 0\]"):
            use(config)
    assert not (tmp_path / "config.json").exists()
    config.chunk_sizes = [4, 2]
    config.topology = "residual"
    with pytest.raises(StrictDataclassError, match="num_memory_slots.* but got 5"):
        SpiralFormerForCausalLM(config)
    config.num_memory_slots = None
    SpiralFormerForCausalLM(config).save_pretrained(tmp_path)
    assert SpiralFormerConfig.from_pretrained(tmp_path).chunk_offsets == [0, 0]


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("chunk_sizes", lambda sizes: sizes.__setitem__(0, 0), "chunk_sizes.*>= 1.*0, 2, 1"),
        ("chunk_offsets", lambda offsets: offsets.__setitem__(0, -1), "chunk_offsets.*>= 0.*-1, 0, 0"),
        ("chunk_sizes", lambda sizes: sizes.append(2.5), "chunk_sizes.*2.5"),
        ("rope_parameters", lambda parameters: parameters.update(rope_theta=-1.0), "rope_theta.*> 0.*-1.0"),
    ],
)
def test_a_list_or_dictionary_changed_in_place_is_refused_by_model_and_file(field, change, message, tmp_path):
    config = small_config(chunk_sizes=[4, 2, 1], chunk_offsets=[0, 0, 0])
    change(getattr(config, field))
    for use in (SpiralFormerForCausalLM, lambda config: config.save_pretrained(tmp_path)):
        with pytest.raises(StrictDataclassError, match=f"(?s){message}"):
            use(config)


def test_rotary_quarter_survives_parameters_that_do_not_name_it():
    assert small_config(rope_parameters={"rope_theta": 500.0}).rope_parameters["partial_rotary_factor"] == 0.25


@pytest.mark.parametrize(
    "options",
    [
        {"rope_theta": 500.0, "rotary_pct": 0.5},
        {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}},
        {"rope_parameters": {"rope_theta": 500.0}, "partial_rotary_factor": 0.5},
    ],
)
def test_rotary_parameters_under_their_older_names(options):
    config = small_config(**options)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    assert "rotary_pct" not in config.to_dict()


def test_contradicting_rotary_parameters_are_refused():
    with pytest.raises(ValueError, match="rope_theta"):
        small_config(rope_parameters={"rope_theta": 500.0}, rope_theta=700.0)
    with pytest.raises(ValueError, match="full_attention"):
        small_config(rope_parameters={"full_attention": {"rope_theta": 500.0}})


@pytest.mark.parametrize("name", ["partial_rotary_factor", "rotary_pct", "rope_theta"])
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_a_rotary_parameter_that_contradicts_a_checkpoint_is_named_once(family, name, tmp_path):
    """Also where the family has no such thing: a Llama turns whole heads."""
    config = small_config(layer_family=family)
    config.save_pretrained(tmp_path)
    was = config.rope_parameters[name.replace("rotary_pct", "partial_rotary_factor")]
    with pytest.raises(ValueError) as error:
        SpiralFormerConfig.from_pretrained(tmp_path, **{name: 0.5})
    assert str(error.value) == f"`{name}` must be given once, and was {was} before, but got 0.5."


def test_rope_scaling_given_on_loading(tmp_path):
    small_model(dtype=torch.float32).save_pretrained(tmp_path)
    scaled = SpiralFormerForCausalLM.from_pretrained(tmp_path, rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert scaled.config.rope_parameters["partial_rotary_factor"] == 0.25
    assert scaled.config.rope_parameters["rope_theta"] == 10000.0


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
def test_rotary_parameters_given_on_loading_keep_theta_and_share(name, tmp_path):
    """Of a checkpoint with others than the defaults; a factor of 1 changes nothing."""
    saved = {"rope_type": "linear", "factor": 1.0, "rope_theta": 1e6, "partial_rotary_factor": 0.5}
    model, ids = small_model(dtype=torch.float32, rope_parameters=saved), random_ids(1, 17)
    model.save_pretrained(tmp_path)
    for given in ({"rope_type": "linear", "factor": 1.0}, {"rope_type": "default"}):
        loaded = SpiralFormerForCausalLM.from_pretrained(tmp_path, **{name: given})
        assert loaded.config.rope_parameters == {**given, "rope_theta": 1e6, "partial_rotary_factor": 0.5}
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert AutoConfig.from_pretrained(tmp_path, **{name: given}).rope_parameters["rope_theta"] == 1e6
    given = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    stretched = SpiralFormerForCausalLM.from_pretrained(tmp_path, **{name: given}).config.rope_parameters
    assert stretched == {**given, "partial_rotary_factor": 0.5}


def test_empty_schedule_builds_no_topology():
    model = small_model(chunk_sizes=[], num_core_layers=0)
    assert model.model.topology is None and not any("topology" in name for name in model.state_dict())


# -- overrides at from_pretrained: the config changes after it was checked ----------------------------------------


def test_an_override_is_checked_by_the_model(tmp_path):
    small_model(dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match="chunk_offsets"):
        SpiralFormerForCausalLM.from_pretrained(tmp_path, chunk_sizes=[2, 1], chunk_offsets=[2, 0])
    with pytest.raises(ValueError, match="num_hidden_layers"):
        SpiralFormerForCausalLM.from_pretrained(tmp_path, num_hidden_layers=3)


def test_rotary_parameters_given_on_loading_keep_the_quarter(tmp_path):
    small_model(dtype=torch.float32).save_pretrained(tmp_path)
    model = SpiralFormerForCausalLM.from_pretrained(tmp_path, rope_parameters={"rope_type": "linear", "factor": 2.0})
    assert model.config.rope_parameters["partial_rotary_factor"] == 0.25
    assert model.model.rotary_emb.inv_freq.shape == (1,)


def test_an_added_token_iteration_loads_under_anchor(tmp_path):
    model = small_model(dtype=torch.float32, topology="anchor", chunk_sizes=[4, 2])
    model.save_pretrained(tmp_path)
    longer, report = SpiralFormerForCausalLM.from_pretrained(tmp_path, chunk_sizes=[4, 2, 1], output_loading_info=True)
    assert longer.config.num_hidden_layers == model.config.num_hidden_layers + 2 and not report["missing_keys"]
    expected = small_model(dtype=torch.float32, topology="anchor", chunk_sizes=[4, 2, 1])
    expected.load_state_dict(model.state_dict())
    ids = random_ids(1, 17)
    assert (longer(ids).logits - expected(ids).logits).abs().max() < 1e-5
    assert (longer.generate(ids, max_new_tokens=3, eos_token_id=None)).shape == (1, 20)


def test_mean_and_broadcast_load_into_any_schedule(tmp_path):
    options = {"topology": "residual", "down_scaling": "mean", "up_scaling": "broadcast"}
    small_model(dtype=torch.float32, **options).save_pretrained(tmp_path)
    model, report = SpiralFormerForCausalLM.from_pretrained(tmp_path, chunk_sizes=[16, 5, 3], output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert model.generate(random_ids(1, 5), max_new_tokens=3, eos_token_id=None).shape == (1, 8)


def test_shapes_that_do_not_fit_are_the_librarys_error_or_reinitialised(tmp_path):
    small_model(dtype=torch.float32, num_memory_slots=5).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):
        SpiralFormerForCausalLM.from_pretrained(tmp_path, chunk_sizes=[8, 2, 1])
    model, report = SpiralFormerForCausalLM.from_pretrained(
        tmp_path, chunk_sizes=[8, 2, 1], ignore_mismatched_sizes=True, output_loading_info=True
    )
    names = {entry[0] for entry in report["mismatched_keys"]}
    assert names == {"model.resolutions.0.allocator.weight", "model.resolutions.0.allocator.bias"}
    assert model.model.resolutions[0].allocator.weight.eq(0).all()
    assert model.model.resolutions[1].allocator.weight.abs().max() > 0


def test_slots_that_are_set_keep_router_shapes_across_schedules(tmp_path):
    small_model(dtype=torch.float32, num_memory_slots=5, chunk_sizes=[2, 1]).save_pretrained(tmp_path)
    _, report = SpiralFormerForCausalLM.from_pretrained(tmp_path, chunk_sizes=[2, 1, 1], output_loading_info=True)
    assert {name.rsplit(".", 1)[0] for name in report["missing_keys"]} == {
        "model.topology.write.3",
        "model.topology.read.3",
    }
    assert not report["mismatched_keys"]


# -- saved models -------------------------------------------------------------------------------------------------


def test_auto_classes_load_what_was_saved(tmp_path):
    model = small_model(dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is SpiralFormerForCausalLM
    assert torch.equal(again(random_ids(1, 9)).logits, model(random_ids(1, 9)).logits)
    assert torch.equal(
        AutoModel.from_pretrained(tmp_path)(random_ids(1, 9)).last_hidden_state,
        model.model(random_ids(1, 9)).last_hidden_state,
    )


def test_a_damaged_or_missing_weights_file_is_an_error(tmp_path):
    small_model(dtype=torch.float32).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(Exception, match="(?i)header|safetensor|incomplete|deserializ"):
        SpiralFormerForCausalLM.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(OSError, match="model.safetensors"):
        SpiralFormerForCausalLM.from_pretrained(tmp_path)


def test_the_dtype_that_a_checkpoint_decides_may_be_asked_for(tmp_path):
    """ "auto" goes through `from_pretrained` of configuration and model, and is no dtype to start with."""
    small_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, dtype="auto").dtype in ("auto", torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="`dtype` must be .* but got 'auto'"):
        SpiralFormerConfig(dtype="auto")
