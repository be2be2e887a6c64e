"""Conversion of Llama and Qwen3: the function, the configuration and the way back, and what is refused."""

import json

import pytest
import torch
from documents import ROOT
from huggingface_hub.errors import StrictDataclassError
from qwen2 import QWEN2
from support import VOCAB, large_weights, random_ids, small_config
from test_conversion import LAYERS, LOOP, check_plain_stack, same_state
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from convert import ConversionArguments
from convert import main as convert_main
from modeling_spiralformer import SpiralFormerForCausalLM
from modeling_spiralformer.layers_spiralformer import FAMILIES
from workshop.conversion import FAMILY_OF, plain_config, spiral_config, to_plain, to_spiralformer

# No field at its default, so that none can be lost unseen.
COMMON = {
    "hidden_act": "relu",
    "attention_bias": True,
    "attention_dropout": 0.1,
    "max_position_embeddings": 77,
    "initializer_range": 0.05,
    "rms_norm_eps": 1e-3,
    "use_cache": False,
    "bos_token_id": 3,
    "eos_token_id": [4, 5],
    "pad_token_id": 6,
    "tie_word_embeddings": True,
    "num_key_value_heads": 2,
    "id2label": {0: "no", 1: "yes", 2: "maybe"},
    "label2id": {"no": 0, "yes": 1, "maybe": 2},
    "a_note_of_its_own": "kept",
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
UNUSUAL = {
    "llama": {
        **COMMON,
        "mlp_bias": True,
        "head_dim": 6,
        "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16, "rope_theta": 5000.0},
    },
    "qwen3": {
        **COMMON,
        "head_dim": 10,
        "max_window_layers": 3,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "rope_theta": 5000.0,
        },
    },
}
CLASSES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


def source_config(family: str, **options):
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
    sizes["num_key_value_heads"] = 4  # Qwen3's own default is no divisor
    return CLASSES[family][0](**{**sizes, "num_hidden_layers": LAYERS, **options})


def source_model(family: str, dtype=torch.float64, **options):
    model = large_weights(CLASSES[family][1](source_config(family, **options))).to(dtype).eval()
    model.config.dtype = dtype  # as in a checkpoint
    return model


families = pytest.mark.parametrize("family", [*CLASSES])


@pytest.mark.parametrize("options", [{}, {"num_coda_layers": 2}])
@pytest.mark.parametrize("unusual", [False, True], ids=["default", "unusual"])
@families
@torch.no_grad()
def test_an_empty_schedule_has_the_logits_of_the_source_and_goes_back(family, unusual, options):
    source = source_model(family, **(UNUSUAL[family] if unusual else {}))
    converted = check_plain_stack(source, options)
    assert (converted.lm_head.weight is converted.model.embed_tokens.weight) == unusual  # tied as the source is


@families
def test_every_field_of_the_source_is_carried(family):
    source, plain = source_config(family, **UNUSUAL[family]), source_config(family)
    # A default that changes nothing is not worth a line.
    assert (
        not {"max_window_layers", "pretraining_tp", "sliding_window"} & spiral_config(plain, **LOOP).to_dict().keys()
    )
    converted = spiral_config(source, **LOOP)
    assert converted.layer_family == family and converted.scale_embeddings is False
    for name in UNUSUAL[family]:
        assert getattr(source, name) != getattr(plain, name, None), f"{name} is at its default: the test is blind"
        if name == "rope_parameters":  # with the share of a head that rotates: all of it
            assert converted.rope_parameters == {**source.rope_parameters, "partial_rotary_factor": 1.0}
        else:
            assert getattr(converted, name) == getattr(source, name), name


@families
@torch.no_grad()
def test_layers_go_where_the_split_says(family):
    source = source_model(family)
    layers = source.model.layers
    converted = to_spiralformer(source, core_layers=[[3], [1, 2]], **LOOP).model
    for copied, original in ((converted.prelude[0], layers[0]), (converted.core[0], layers[3])):
        assert same_state(copied, original)
    assert same_state(converted.coda[0], layers[-1]) and same_state(converted.norm, source.model.norm)
    for name, value in converted.core[1].state_dict().items():
        assert torch.allclose(value, (layers[1].state_dict()[name] + layers[2].state_dict()[name]) / 2, atol=1e-15)
    split = {"num_prelude_layers": 1, "num_core_layers": 1, "num_coda_layers": 1, "chunk_sizes": [1, 1, 1]}
    unlooped = to_spiralformer(source, topology="base", share_core=False, **split).eval()
    ids = random_ids(2, 19)
    assert torch.equal(unlooped(ids, use_cache=False).logits, source(ids, use_cache=False).logits)


def test_every_family_can_be_a_source():
    assert [*FAMILY_OF] == [family.config_class.model_type for family in FAMILIES.values()]
    assert {"gpt_neox", *CLASSES} == set(FAMILIES), "a new family needs its row in CLASSES and UNUSUAL"


@torch.no_grad()
def test_another_family_needs_its_entry_alone(monkeypatch):
    """Qwen2's, as CONTRIBUTING.md says: there, and back."""
    monkeypatch.setitem(FAMILIES, "qwen2", QWEN2)
    monkeypatch.setitem(FAMILY_OF, "qwen2", "qwen2")
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
    config = Qwen2Config(**sizes, num_key_value_heads=2, num_hidden_layers=LAYERS, rms_norm_eps=1e-3)
    source = large_weights(Qwen2ForCausalLM(config)).double().eval()
    converted = to_spiralformer(source, chunk_sizes=[]).eval()
    ids = random_ids(2, 19)
    assert torch.equal(converted(ids).logits, source(ids).logits)
    assert same_state(to_plain(converted), source)
    with pytest.raises(ValueError, match="use_sliding_window.*False.*True"):
        spiral_config(Qwen2Config(**sizes, num_hidden_layers=LAYERS, **SLIDING), **LOOP)


# -- what is refused --------------------------------------------------------------------------------------------

SLIDING = {"use_sliding_window": True, "sliding_window": 4}


@pytest.mark.parametrize(
    "family, options, message",
    [
        ("qwen3", {**SLIDING, "max_window_layers": 1}, "use_sliding_window.*False.*True"),
        ("qwen3", {**SLIDING, "max_window_layers": 99}, "use_sliding_window.*False.*True"),
        ("qwen3", {"layer_types": ["sliding_attention"] * LAYERS}, "layer_types.*full_attention.*sliding_attention"),
        ("qwen3", {"mlp_bias": True}, "mlp_bias.*None with layer_family.*qwen3.*True"),
        ("llama", {"pretraining_tp": 2}, "pretraining_tp.*1.*2"),
        ("llama", {"sliding_window": 8}, "sliding_window.*left out.*8"),
        ("llama", {"use_parallel_residual": True}, "use_parallel_residual.*None with layer_family.*llama.*True"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type.*one of.*dynamic"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "longrope", "factor": 2.0, "short_factor": [1], "long_factor": [1]}},
            "rope_type.*one of.*longrope",
        ),
        ("llama", {"quantization_config": {"quant_method": "awq"}}, "quantization_config.*absent.*awq"),
        ("llama", {"layer_family": "qwen3"}, "layer_family.*absent from a configuration.*llama.*qwen3"),
    ],
)
def test_what_cannot_be_represented_is_refused(family, options, message):
    with pytest.raises((ValueError, StrictDataclassError), match=f"(?s){message}"):
        spiral_config(source_config(family, **options), **LOOP)


@pytest.mark.parametrize("options, message", [({"layer_family": "qwen3"}, "left to the source.*qwen3"), ({}, None)])
def test_the_family_is_that_of_the_source(options, message):
    if message is None:
        assert spiral_config(source_config("llama"), **LOOP).layer_family == "llama"
    else:
        with pytest.raises(ValueError, match=message):
            spiral_config(source_config("llama"), **LOOP, **options)


def test_a_model_type_without_a_family_is_refused():
    with pytest.raises(ValueError, match="model_type.*gpt_neox.*llama.*qwen3.*mistral"):
        spiral_config(MistralConfig(num_hidden_layers=LAYERS), **LOOP)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scale_embeddings": True}, "scale_embeddings.*False.*True"),
        ({"norm": "layer_norm"}, 'norm.*"rms_norm" with layer_family "llama".*layer_norm'),
    ],
)
def test_a_plain_stack_that_no_other_class_has_does_not_go_back(options, message):
    plain = {"layer_family": "llama", "chunk_sizes": [], "num_core_layers": 0, "scale_embeddings": False}
    with pytest.raises(ValueError, match=message):
        plain_config(small_config(**{**plain, **options}))


# -- checkpoints ------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    """A bfloat16 checkpoint with a tokenizer, its chat template and generation settings; the family is a parameter."""

    def save(family: str, name: str = "source", **options) -> str:
        model = source_model(family, torch.bfloat16, **{**UNUSUAL[family], "vocab_size": 4096, **options})
        model.generation_config.max_new_tokens = 13
        model.save_pretrained(tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "tokenization")
        tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}!{% endfor %}"
        tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@families
def test_a_checkpoint_goes_there_and_back(checkpoint, tmp_path, family, tied):
    source, there, back = checkpoint(family, tie_word_embeddings=tied), str(tmp_path / "there"), str(tmp_path / "back")
    convert_main(ConversionArguments(source, there, config_overrides="chunk_sizes=[]"))
    convert_main(ConversionArguments(there, back, to=family))
    expected, returned = (AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in (source, back))
    assert type(returned) is type(expected) and returned.dtype == torch.bfloat16
    assert same_state(returned, expected)
    assert (returned.lm_head.weight is returned.model.embed_tokens.weight) == tied
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "back" / name).read_text()) == json.loads(
            (tmp_path / "source" / name).read_text()
        )
    chat = [{"role": "user", "content": "def"}]
    for folder in (there, back):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.apply_chat_template(chat, tokenize=False) == "def!"
    other = {"llama": "qwen3", "qwen3": "llama"}[family]
    with pytest.raises(ValueError, match=f'`to`.*layer_family "{family}".*{other}'):
        convert_main(ConversionArguments(there, str(tmp_path / "other"), to=other))


@families
def test_a_looped_checkpoint_loads_and_generates(checkpoint, tmp_path, family):
    split = "num_prelude_layers=1,num_core_layers=2,num_coda_layers=1,chunk_sizes=[4,1]"
    convert_main(ConversionArguments(checkpoint(family), str(tmp_path / "there"), config_overrides=split))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "there")
    assert type(model) is SpiralFormerForCausalLM and model.config.layer_family == family
    ids = random_ids(1, 9)
    generated = model.generate(ids, do_sample=False, max_new_tokens=7, eos_token_id=None)
    expected = ids
    for _ in range(7):
        expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert generated.tolist() == expected.tolist()


def test_files_and_architectures_that_cannot_be_read_are_refused(checkpoint, tmp_path):
    source, output = checkpoint("llama"), str(tmp_path / "there")
    with pytest.raises(ValueError, match="gguf_file.*a file of .*source.*none.gguf"):
        convert_main(ConversionArguments(source, output, gguf_file="none.gguf"))
    with pytest.raises(ValueError, match='gguf_file.*left out with to="llama"'):
        ConversionArguments(source, output, gguf_file="some.gguf", to="llama")
    settings = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps({**settings, "model_type": "mistral"}))
    with pytest.raises(ValueError, match=r"model_name_or_path.*\['gpt_neox', 'llama', 'qwen3'\], not \"mistral\""):
        convert_main(ConversionArguments(source, output))
