"""Layer families: each an ordinary model of the library without a loop; each field counts or is refused by name."""

import dataclasses
import json

import pytest
import torch
import transformers
from documents import ROOT
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from reference import reference_logits
from safetensors.torch import load_file
from support import HEADS, ROPE_TYPES, family_options, large_weights, random_ids, small_config, small_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from modeling_spiralformer import SpiralFormerConfig, SpiralFormerForCausalLM, modeling_spiralformer
from modeling_spiralformer.layers_spiralformer import FAMILIES, FAMILY_FIELDS
from modeling_spiralformer.modeling_spiralformer import SpiralFormerPreTrainedModel

families = pytest.mark.parametrize("family", FAMILIES)
LIBRARY = logging.get_logger("transformers")
NO_LOOP = {"chunk_sizes": [], "num_core_layers": 0, "num_prelude_layers": 2, "scale_embeddings": False}
MODELS = {"gpt_neox": GPTNeoXForCausalLM, "llama": LlamaForCausalLM, "qwen3": Qwen3ForCausalLM}


@torch.no_grad()
def logits_of(model, ids):
    return model(ids, use_cache=False).logits


def test_a_drawn_model_may_be_of_every_family_with_every_field():
    """What the tests of `model_options` meet: each family, and each of its fields at its default and not."""
    met: dict[str, set] = {family: set() for family in FAMILIES}

    @settings(max_examples=200, database=None, derandomize=True)
    @given(options=family_options())
    def draw(options):
        small_config(**options)
        met[options["layer_family"]] |= {(name, str(value)) for name, value in options.items()}

    draw()
    for family, known in FAMILIES.items():
        values = {name: {value for field, value in met[family] if field == name} for name, _ in met[family]}
        fields = {*known.fields(), "rope_parameters"} - {"hidden_dropout"}  # of training
        assert fields <= values.keys() and all(len(values[name]) > 1 for name in fields), family
        assert len(values["rope_parameters"]) >= len(ROPE_TYPES) + 1


# -- the library's own models ---------------------------------------------------------------------------------------


def library_model(ours: SpiralFormerForCausalLM) -> torch.nn.Module:
    """The library's model of the family, its weights those of `ours`, which has no loop."""
    model_class = MODELS[ours.config.layer_family]
    given = {name: getattr(ours.config, name, None) for name in model_class.config_class().to_dict()}
    derived = ("layer_types", "architectures", "model_type", "transformers_version")
    given = {name: value for name, value in given.items() if value is not None and name not in derived}
    theirs = model_class(model_class.config_class(**given, attn_implementation=ours.config._attn_implementation))
    blocks = [f"{block}.{i}" for block in ("prelude", "coda") for i in range(len(getattr(ours.model, block)))]
    rename = {f"model.{name}.": f"model.layers.{index}." for index, name in enumerate(blocks)}
    if ours.config.layer_family == "gpt_neox":
        rename = {old: new.replace("model", "gpt_neox") for old, new in rename.items()}
        rename |= {"model.embed_tokens.": "gpt_neox.embed_in.", "model.norm.": "gpt_neox.final_layer_norm."}
    state = {}
    for name, weight in ours.state_dict().items():
        prefix = next((old for old in rename if name.startswith(old)), "")
        state[rename.get(prefix, "") + name.removeprefix(prefix)] = weight
    theirs.load_state_dict(state)
    return theirs.to(ours.dtype).eval()


ROPES = [{"rope_parameters": rope} for rope in ROPE_TYPES if rope["rope_type"] != "default"]
OPTIONS = {
    "gpt_neox": [
        {},
        {"use_parallel_residual": False, "attention_bias": False},
        {"hidden_act": "gelu_new", "layer_norm_eps": 0.1, "tie_word_embeddings": True},
        {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 1.0}},
        *({"rope_parameters": rope | {"partial_rotary_factor": 0.5}} for rope in ROPE_TYPES),
    ],
    "llama": [
        {},
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": None, "head_dim": 10},
        {"num_key_value_heads": 1, "hidden_act": "relu", "rms_norm_eps": 0.1, "tie_word_embeddings": True},
        *ROPES,
    ],
    "qwen3": [
        {},
        {"attention_bias": True, "num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": None},
        {"hidden_act": "relu", "rms_norm_eps": 0.1, "tie_word_embeddings": True},
        *ROPES,
    ],
}
CASES = [(family, options) for family in FAMILIES for options in OPTIONS[family]]


@pytest.mark.parametrize(("family", "options"), CASES, ids=[f"{family} {options}" for family, options in CASES])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_empty_schedule_is_the_librarys_model(family, options, dtype):
    """Norms are the library's here, with their cast to float32."""
    ours = large_weights(SpiralFormerForCausalLM(small_config(layer_family=family, **NO_LOOP, **options)))
    ours = ours.to(dtype).eval()
    theirs = library_model(ours)
    ids = random_ids(2, 19)
    expected = logits_of(theirs, ids)
    assert torch.equal(logits_of(ours, ids), expected)
    if not options:
        how = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert torch.equal(ours.generate(ids, **how), theirs.generate(ids, **how))
    if dtype == torch.float64:
        plain = logits_of(large_weights(type(ours)(small_config(layer_family=family, **NO_LOOP))).double().eval(), ids)
        assert not options or (expected - plain).abs().max() > 1e-6  # the option counts


@families
def test_a_loop_of_the_librarys_own_norms_is_near_the_reference(family):
    """`small_model` makes norms exact, which this one does not: float32 is what is left of the difference."""
    model = large_weights(SpiralFormerForCausalLM(small_config(layer_family=family))).double().eval()
    ids = random_ids(1, 19)
    assert (logits_of(model, ids)[0] - reference_logits(model.config, model.state_dict(), ids[0])).abs().max() < 1e-5


# -- checkpoints ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_from_before_the_families_loads_as_it_did(tmp_path):
    folder = ROOT / "tests" / "helpers" / "checkpoint_before_families"
    weights, expected = (
        load_file(folder / f"{name}.safetensors", str(torch.get_default_device())) for name in ("model", "expected")
    )
    for place in (folder, tmp_path):
        with CaptureLogger(LIBRARY) as said:
            model, report = AutoModelForCausalLM.from_pretrained(place, output_loading_info=True)
        assert said.out == "" and not any(report.values())
        assert model.config.layer_family == "gpt_neox" and model.config.norm == "layer_norm"
        assert model.state_dict().keys() == weights.keys()
        assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
        torch.testing.assert_close(logits_of(model, expected["input_ids"]), expected["logits"], atol=1e-5, rtol=1e-5)
        model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    before = json.loads((folder / "config.json").read_text())
    added = {"layer_family": "gpt_neox", "norm": "layer_norm", "transformers_version": transformers.__version__}
    assert {name: stored[name] for name in {*before, *added}} == before | added
    assert not {"num_key_value_heads", "head_dim", "mlp_bias", "rms_norm_eps"} & stored.keys()


@torch.no_grad()
def test_a_llama_from_before_its_dropout_has_none_and_is_told_nothing(tmp_path):
    small_model(dtype=torch.float32, layer_family="llama").save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored.pop("hidden_dropout") == 0.0 and "output_initializer_range" not in stored
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with CaptureLogger(LIBRARY) as said:
        model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert said.out == "" and not any(report.values()) and model.config.hidden_dropout == 0.0
    assert all(type(module).__module__.startswith("transformers.") for module in model.model.core[0].children())


@families
def test_a_saved_model_loads_as_it_was(family, tmp_path):
    model = small_model(dtype=torch.float32, layer_family=family, num_labels=3)
    model.save_pretrained(tmp_path)
    with CaptureLogger(LIBRARY) as said:
        again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert said.out == "" and not any(report.values())
    assert again.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict()
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in again.state_dict().items())
    ids = random_ids(1, 9)
    torch.testing.assert_close(logits_of(again, ids), logits_of(model, ids), atol=1e-5, rtol=1e-5)


CHANGES = [(old, new) for old in FAMILIES for new in FAMILIES if old != new]


@pytest.mark.parametrize(("old", "new"), CHANGES)
def test_a_saved_model_is_not_read_as_another_family(old, new, tmp_path):
    small_model(dtype=torch.float32, layer_family=old).save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match=f'must be (None|set) with layer_family "{new}"'):
        AutoModelForCausalLM.from_pretrained(tmp_path, layer_family=new)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | {"layer_family": new}))
    if (old, new) != ("qwen3", "llama"):
        with pytest.raises(StrictDataclassError, match=f'must be (None|set) with layer_family "{new}"'):
            AutoModelForCausalLM.from_pretrained(tmp_path)
        return
    with CaptureLogger(LIBRARY) as said:  # Llama has all that Qwen3 has: two warnings, of its bias and of the weights
        _, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {name.split(".")[-2] for name in report["unexpected_keys"]} == {"q_norm", "k_norm"}
    assert "`mlp_bias` is missing and takes its default" in said.out and "q_norm.weight" in said.out


# -- every field counts, or is refused ------------------------------------------------------------------------------

# A value of each field that is the default of no family.
VALUES = {
    "num_key_value_heads": 1,
    "head_dim": 10,
    "hidden_act": "relu",
    "use_parallel_residual": False,
    "attention_bias": None,  # by family
    "mlp_bias": True,
    "hidden_dropout": 0.5,
    "layer_norm_eps": 0.3,
    "rms_norm_eps": 0.3,
}


def value_of(field: str, family: str):
    return family != "gpt_neox" if field == "attention_bias" else VALUES[field]


def fields_of(family: str) -> set[str]:
    known = FAMILIES[family]
    return {*known.fields()} - {"norm"}  # every family has a norm


def test_every_field_of_a_family_has_a_value_here():
    assert VALUES.keys() == {*FAMILY_FIELDS} - {"norm"}
    assert all(
        value_of(field, family) != getattr(small_config(layer_family=family), field)
        for family in FAMILIES
        for field in VALUES
    )


HAS = [(family, field) for family in FAMILIES for field in sorted(fields_of(family))]
LACKS = [(family, field) for family in FAMILIES for field in VALUES if field not in fields_of(family)]


@pytest.mark.parametrize(("family", "field"), HAS)
def test_a_field_that_the_family_has_changes_the_function(family, field):
    """That it is the right function, the tests of reference and library say."""
    plain = small_model(layer_family=family)
    changed = small_model(layer_family=family, **{field: value_of(field, family)})
    shapes = {name: weight.shape for name, weight in plain.state_dict().items()}
    common = {
        name: weight
        for name, weight in plain.state_dict().items()
        if changed.state_dict().get(name, torch.empty(0)).shape == shapes[name]
    }
    changed.load_state_dict(common, strict=False)
    ids = random_ids(2, 19)
    if "dropout" in field:
        assert torch.equal(logits_of(changed, ids), logits_of(plain, ids))
        changed.train()
    assert (logits_of(changed, ids) - logits_of(plain, ids)).abs().max() > 1e-3
    same_shapes = len(common) == len(plain.state_dict()) == len(changed.state_dict())
    assert same_shapes == (field not in ("num_key_value_heads", "head_dim", "attention_bias", "mlp_bias"))


@families
def test_attention_dropout_is_of_training(family):
    plain, dropping = small_model(layer_family=family), small_model(layer_family=family, attention_dropout=0.5)
    ids = random_ids(2, 19)
    assert torch.equal(logits_of(dropping, ids), logits_of(plain, ids))
    assert (logits_of(dropping.train(), ids) - logits_of(plain.train(), ids)).abs().max() > 1e-3


@families
def test_either_norm_is_that_of_every_layer_and_of_the_head(family):
    for norm, eps in (("layer_norm", "layer_norm_eps"), ("rms_norm", "rms_norm_eps")):
        model = small_model(dtype=torch.float32, layer_family=family, norm=norm, **{eps: 0.3})
        norms = {name: module for name, module in model.named_modules() if "norm" in name.rpartition(".")[2]}
        of_heads = {name for name in norms if name.endswith(("q_norm", "k_norm"))}
        assert len(norms) - len(of_heads) == 4 * 2 + 1 and bool(of_heads) == (family == "qwen3")
        for name, module in norms.items():
            is_rms = norm == "rms_norm" or name in of_heads
            assert isinstance(module, torch.nn.LayerNorm) != is_rms
            of_norm = module.variance_epsilon if is_rms else module.eps
            assert of_norm == (0.3 if name not in of_heads or norm == "rms_norm" else 1e-6)


@pytest.mark.parametrize(("family", "field"), LACKS)
def test_a_field_that_the_family_lacks_is_refused(family, field, tmp_path):
    value = value_of(field, family)
    refused = pytest.raises(
        StrictDataclassError, match=f'`{field}` must be None with layer_family "{family}".* but got {value}'
    )
    config = small_config(layer_family=family)
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert field not in stored
    with refused:
        small_config(layer_family=family, **{field: value})
    with refused:
        SpiralFormerConfig.from_dict(stored | {field: value})
    setattr(config, field, value)
    for use in (SpiralFormerForCausalLM, lambda config: config.save_pretrained(tmp_path)):
        with refused:
            use(config)
    SpiralFormerForCausalLM(small_config(layer_family=family)).save_pretrained(tmp_path)
    with refused:
        AutoModelForCausalLM.from_pretrained(tmp_path, **{field: value})


@pytest.mark.parametrize(("family", "field"), HAS)
def test_a_field_that_the_family_has_is_filled_in_and_not_taken_away(family, field):
    config = small_config(layer_family=family, **{field: None})
    assert getattr(config, field) is not None
    setattr(config, field, None)
    with pytest.raises(
        StrictDataclassError, match=f'`{field}` must be set with layer_family "{family}".* but got None'
    ):
        SpiralFormerForCausalLM(config)


@families
@pytest.mark.parametrize(("field", "value"), [("sliding_window", 4), ("use_sliding_window", True)])
def test_a_window_is_refused_however_it_is_given(family, field, value, tmp_path):
    small_model(dtype=torch.float32, layer_family=family).save_pretrained(tmp_path)
    refused = pytest.raises(StrictDataclassError, match=f"`{field}` must be left out: .* but got {value}")
    with refused:
        small_config(layer_family=family, **{field: value})
    for auto_class in (AutoConfig, AutoModelForCausalLM):
        with refused:
            auto_class.from_pretrained(tmp_path, **{field: value})
    config = small_config(layer_family=family)
    setattr(config, field, value)
    for use in (SpiralFormerForCausalLM, lambda config: config.save_pretrained(tmp_path)):
        with refused:
            use(config)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | {field: value}))
    with refused:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    off = {"sliding_window": None, "use_sliding_window": False}  # as configurations of Qwen3 say
    small_config(layer_family=family, **off)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_key_value_heads": 3},
            r"`num_key_value_heads` must be a divisor of num_attention_heads \(4\), but got 3",
        ),
        (
            {"num_key_value_heads": 8},
            r"`num_key_value_heads` must be a divisor of num_attention_heads \(4\), but got 8",
        ),
        ({"hidden_size": 18, "head_dim": None}, r"`hidden_size` must be a multiple of num_attention_heads .* got 18"),
        ({"head_dim": 5}, "head_dim.*5|the 5 dimensions of a head"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "'partial_rotary_factor'.* must be 1 with layer_family"),
        ({"partial_rotary_factor": 0.25}, "'partial_rotary_factor'.* must be 1 with layer_family .* but got 0.25"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope_type.* but got 'longrope'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type.* but got 'dynamic'"),
    ],
)
def test_heads_and_angles_that_cannot_be_are_refused(family, options, message):
    with pytest.raises(StrictDataclassError, match=f"(?s){message}"):
        small_config(layer_family=family, **options)


# -- these tests can fail -------------------------------------------------------------------------------------------


def check_reference() -> None:
    """Models of each family in which every norm, epsilon and head counts, against the reference."""
    ids = random_ids(1, 19)
    for norm in ("layer_norm", "rms_norm"):
        for family in FAMILIES:
            eps = {name: 0.1 for name in FAMILIES[family].fields(norm) if name.endswith("norm_eps")}
            model = small_model(layer_family=family, norm=norm, num_core_layers=1, chunk_sizes=[3, 1], **eps)
            expected = reference_logits(model.config, model.state_dict(), ids[0])
            assert (logits_of(model, ids)[0] - expected).abs().max() < 1e-9


def with_attribute(made_by, change):
    """The constructor `made_by`, after which `change` is done to what it made."""

    def make(self, *args, **kwargs):
        made_by(self, *args, **kwargs)
        change(self)

    return make


def norms_of_heads_forget_their_eps(attention):
    attention.q_norm.variance_epsilon = attention.k_norm.variance_epsilon = 1e-6


def scores_of_the_width(attention):
    attention.scaling = (attention.q_proj.in_features / attention.config.num_attention_heads) ** -0.5


def no_norms(family: str) -> dict:
    return {family: dataclasses.replace(FAMILIES[family], norms=())}


DELIBERATE_BUGS = {
    "norms of queries and keys have another epsilon": (
        Qwen3Attention,
        {"__init__": with_attribute(Qwen3Attention.__init__, norms_of_heads_forget_their_eps)},
    ),
    "scores are scaled by the width, not by the head": (
        Qwen3Attention,
        {"__init__": with_attribute(Qwen3Attention.__init__, scores_of_the_width)},
    ),
    "the last norm is always a layer norm": (
        modeling_spiralformer,
        {"make_norm": lambda config: torch.nn.LayerNorm(config.hidden_size)},
    ),
    **{f"{family} keeps its own norm": (FAMILIES, no_norms(family)) for family in FAMILIES},
    "angles of the width, not of the head": (
        modeling_spiralformer,
        {"make_rotary_embedding": lambda config: Qwen3RotaryEmbedding(small_config(layer_family="llama"))},
    ),
}


@pytest.mark.host
@pytest.mark.parametrize(("place", "change"), DELIBERATE_BUGS.values(), ids=DELIBERATE_BUGS.keys())
def test_the_reference_catches(place, change, monkeypatch):
    check_reference()
    for name, value in change.items():
        (monkeypatch.setitem if place is FAMILIES else monkeypatch.setattr)(place, name, value)
    with pytest.raises((AssertionError, RuntimeError, KeyError, TypeError)):  # a norm may lack its bias or its epsilon
        check_reference()


@pytest.mark.parametrize("missing", ["llama", "qwen3"])
def test_a_family_whose_outputs_are_not_recorded_is_caught(missing, monkeypatch):
    test_hidden_states_and_attentions(missing)
    known = [family.attention for name, family in FAMILIES.items() if name != missing]
    recorded = SpiralFormerPreTrainedModel._can_record_outputs | {"attentions": known}
    monkeypatch.setattr(SpiralFormerPreTrainedModel, "_can_record_outputs", recorded)
    with pytest.raises((AssertionError, TypeError)):
        test_hidden_states_and_attentions(missing)


# -- parts of the model ---------------------------------------------------------------------------------------------


@families
def test_outputs_of_a_layer_start_smaller(family):
    torch.manual_seed(0)
    config = small_config(layer_family=family, hidden_size=64, intermediate_size=256, head_dim=None)
    model = SpiralFormerForCausalLM(config).model
    expected = {
        "gpt_neox": {"attention.dense", "mlp.dense_4h_to_h"},
        "llama": {"self_attn.o_proj", "mlp.down_proj"},
        "qwen3": {"self_attn.o_proj", "mlp.down_proj"},
    }[family]
    scaled = 0.02 / (2 * config.num_hidden_layers) ** 0.5
    for layer in (*model.prelude, *model.core, *model.coda):
        linear = {name: module.weight for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
        assert expected < linear.keys()
        for name, weight in linear.items():
            assert abs(weight.std() / (scaled if name in expected else 0.02) - 1) < 0.1, name


@families
def test_parameters_of_a_layer_have_the_names_of_the_library(family):
    model = small_model(layer_family=family)
    theirs = library_model(small_model(layer_family=family, **NO_LOOP))
    layers = theirs.gpt_neox.layers if family == "gpt_neox" else theirs.model.layers
    names = {name: weight.shape for name, weight in layers[0].state_dict().items()}
    for layer in (*model.model.prelude, *model.model.core, *model.model.coda):
        assert {name: weight.shape for name, weight in layer.state_dict().items()} == names
        assert type(layer) is type(layers[0])
    assert type(layers[0]).__name__ in model._no_split_modules
    assert len({name for name in model._no_split_modules if "Layer" in name}) == 1


@families
def test_hidden_states_and_attentions(family):
    """One for each entry of the cache, from layers that run in several iterations too."""
    model = small_model(implementation="eager", chunk_sizes=[4, 1], layer_family=family)
    heads = model.config.num_attention_heads
    with torch.no_grad():
        outputs = model.model(random_ids(2, 10), output_hidden_states=True, output_attentions=True, use_cache=False)
    lengths = [10, 10, 3, 3, 10, 10, 10]  # embeddings, prelude, core over 3 latents, core over tokens, coda
    assert [state.shape for state in outputs.hidden_states] == [(2, n, 16) for n in lengths]
    assert [attention.shape for attention in outputs.attentions] == [(2, heads, n, n) for n in lengths[1:]]
    for attention in outputs.attentions:
        torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]), atol=1e-6, rtol=0)
        assert attention.triu(1).eq(0).all() and len(attention.flatten(2).unique(dim=1)[0]) == heads
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)


@families
def test_the_plan_of_tensor_parallelism_is_added_to_and_never_saved(family, tmp_path):
    """transformers 5.17 adds tied embeddings."""
    config = small_config(layer_family=family, tie_word_embeddings=True)
    plan = config.base_model_tp_plan
    config.base_model_tp_plan = plan | {"embed_tokens": "embedding_rowwise"}
    assert config.base_model_tp_plan == plan | {"embed_tokens": "embedding_rowwise"} and "prelude" in str(plan)
    config.save_pretrained(tmp_path)
    assert "tp_plan" not in (tmp_path / "config.json").read_text()
    for other in (None, {}, {"embed_tokens": "embedding_rowwise"}):
        with pytest.raises(ValueError, match="`base_model_tp_plan` must be left alone or added to"):
            config.base_model_tp_plan = other


@families
def test_the_cache_holds_the_heads_of_keys(family):
    model = small_model(layer_family=family)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(random_ids(2, 9), past_key_values=cache)
    heads, size = {"gpt_neox": (2, 8), "llama": (2, 4), "qwen3": (2, 6)}[family]
    assert {layer.keys.shape[:2] + layer.keys.shape[3:] for layer in cache.layers} == {(2, heads, size)}
    assert HEADS[family].get("num_key_value_heads", 2) == heads
