"""Conversion of GPT-NeoX checkpoints: exact where no loop is added, near the source where one is, and back again."""

import json
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from documents import ROOT, commands
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from support import VOCAB, large_weights, pad_rows, random_ids, small_config
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForTokenClassification,
    GPTNeoXModel,
    MistralConfig,
    MistralForCausalLM,
)

from convert import ConversionArguments, convert
from convert import main as convert_main
from modeling_spiralformer import SpiralFormerForCausalLM
from workshop.conversion import (
    CLOSED_GATE,
    default_core_layers,
    parse_core_layers,
    plain_config,
    spiral_config,
    to_plain,
    to_spiralformer,
)

LAYERS = 5
# No field of the source at its default, so that none can be lost unseen.
UNUSUAL = {
    "hidden_act": "relu",
    "attention_dropout": 0.1,
    "hidden_dropout": 0.2,
    "classifier_dropout": 0.3,
    "max_position_embeddings": 77,
    "initializer_range": 0.05,
    "layer_norm_eps": 1e-3,
    "use_cache": False,
    "bos_token_id": 3,
    "eos_token_id": [4, 5],
    "pad_token_id": 6,
    "tie_word_embeddings": True,
    "use_parallel_residual": False,
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
    "attention_bias": False,
    "is_decoder": True,
    "id2label": {0: "no", 1: "yes", 2: "maybe"},
    "label2id": {"no": 0, "yes": 1, "maybe": 2},
    "a_note_of_its_own": "kept",
}


def neox_config(**options) -> GPTNeoXConfig:
    defaults = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    return GPTNeoXConfig(**{**defaults, "num_hidden_layers": LAYERS, **options})


def neox_model(dtype=torch.float64, **options) -> GPTNeoXForCausalLM:
    """A GPT-NeoX model with large random weights, float64 unless asked otherwise."""
    model = large_weights(GPTNeoXForCausalLM(neox_config(**options))).to(dtype).eval()
    model.config.dtype = dtype  # as in a checkpoint
    return model


def comparable(config) -> dict:
    """A configuration as it is saved, without where it was loaded from."""
    return {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}


def same_state(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# -- no loop: the same function, and back -----------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_coda_layers": 2}, {"num_prelude_layers": 0, "num_coda_layers": LAYERS}])
@pytest.mark.parametrize("source_options", [{}, UNUSUAL], ids=["default", "unusual"])
@torch.no_grad()
def test_an_empty_schedule_has_the_logits_of_the_source_and_goes_back(options, source_options):
    check_plain_stack(neox_model(**source_options), options)


@torch.no_grad()
def check_plain_stack(source, options: dict):
    """A source without a loop has its logits as a SpiralFormer, padded or not, and goes back; the converted model."""
    converted = to_spiralformer(source, chunk_sizes=[], **options)
    ids, mask = pad_rows([random_ids(1, n, seed=n)[0] for n in (23, 17, 20)], "left")
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    for inputs in ({"input_ids": ids[:1]}, {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids}):
        expected, got = source(**inputs, use_cache=False).logits, converted(**inputs, use_cache=False).logits
        assert torch.equal(got[mask[: len(got)].bool()], expected[mask[: len(got)].bool()])
    back = to_plain(converted)
    assert type(back) is type(source) and same_state(back, source)
    assert not back.training and to_plain(to_spiralformer(source.train(), chunk_sizes=[], **options)).training
    assert comparable(back.config) == comparable(source.config)
    return converted


def test_every_field_of_the_source_is_carried():
    source, plain = neox_config(**UNUSUAL), neox_config()
    converted = spiral_config(source, chunk_sizes=[4, 1], num_prelude_layers=1, num_coda_layers=1, num_core_layers=2)
    assert converted.scale_embeddings is False
    for name in UNUSUAL:
        assert getattr(source, name) != getattr(plain, name, None), f"{name} is at its default: the test is blind"
        assert getattr(converted, name) == getattr(source, name), name
    declared = set(comparable(plain)) - set(UNUSUAL) - {"num_hidden_layers", "model_type", "architectures"}
    assert all(getattr(converted, name) == getattr(source, name) for name in declared)


# -- a loop: which layer goes where -----------------------------------------------------------------------------


def test_prelude_and_coda_are_copied_and_the_core_selected_or_averaged():
    source = neox_model()
    layers = source.gpt_neox.layers
    split = {"num_prelude_layers": 1, "num_core_layers": 2, "num_coda_layers": 1, "chunk_sizes": [4, 2, 1]}
    converted = to_spiralformer(source, core_layers=[[3], [1, 2, 4]], **split)
    model = converted.model
    for copied, original in ((model.prelude[0], layers[0]), (model.core[0], layers[3]), (model.coda[0], layers[4])):
        assert same_state(copied, original)
    for name, value in model.core[1].state_dict().items():
        mean = sum(layers[index].state_dict()[name] for index in (1, 2, 4)) / 3
        assert torch.allclose(value, mean, atol=1e-15, rtol=0), name
    assert torch.equal(model.embed_tokens.weight, source.gpt_neox.embed_in.weight)
    assert same_state(model.norm, source.gpt_neox.final_layer_norm) and same_state(converted.lm_head, source.lm_head)
    assert converted.generation_config == source.generation_config is not converted.generation_config


@torch.no_grad()
def test_an_unlooped_core_of_all_layers_is_the_source():
    source = neox_model()
    split = {"num_prelude_layers": 1, "num_core_layers": 1, "num_coda_layers": 1, "chunk_sizes": [1, 1, 1]}
    converted = to_spiralformer(source, topology="base", share_core=False, **split).eval()
    ids = random_ids(2, 19)
    assert torch.equal(converted(ids, use_cache=False).logits, source(ids, use_cache=False).logits)


@pytest.mark.parametrize("count, expected", [(1, [1]), (2, [1, 3]), (3, [1, 2, 4]), (5, [1, 2, 3, 4, 5])])
def test_the_default_core_is_spread_over_the_layers_between(count, expected):
    config = small_config(num_prelude_layers=1, num_core_layers=count, num_coda_layers=2)
    assert default_core_layers(config, 8) == [[index] for index in expected]


@pytest.mark.parametrize("slots, tolerance", [(None, 1e-4), (12, 1e-4), (5, 1e-4)])
@torch.no_grad()
def test_routers_start_as_the_plain_stack(slots, tolerance):
    """With a firm bias the loop is the source itself: coarse updates have no share, each g = 1 update replaces h."""
    source = neox_model()
    split = {"num_prelude_layers": 1, "num_core_layers": 3, "num_coda_layers": 1, "chunk_sizes": [4, 2, 1]}
    ids, expected = random_ids(2, 19), None
    expected = source(ids, use_cache=False).logits
    converted = to_spiralformer(source, router_bias=20.0, num_memory_slots=slots, **split).eval()
    error = (converted(ids, use_cache=False).logits - expected).abs().max()
    assert error < tolerance
    default = to_spiralformer(source, num_memory_slots=slots, **split).eval()
    undecided = to_spiralformer(source, router_bias=0.0, num_memory_slots=slots, **split).eval()
    near, far = ((model(ids, use_cache=False).logits - expected).abs().mean() for model in (default, undecided))
    assert error < near < far / 2


@pytest.mark.parametrize("streams", [2, 4, 8])
@torch.no_grad()
def test_gates_start_as_the_plain_stack(streams):
    """h_0 is v, a coarse update joins with a small share, and one of g = 1 replaces the state."""
    source = neox_model()
    split = {"num_prelude_layers": 1, "num_core_layers": 3, "num_coda_layers": 1, "chunk_sizes": [4, 2, 1]}
    ids = random_ids(2, 19)
    expected = source(ids, use_cache=False).logits
    converted = to_spiralformer(source, topology="hyper_connections", num_streams=streams, **split).eval()
    states = []
    converted.model.topology.register_forward_hook(lambda module, inputs, outputs: states.append((inputs, outputs[0])))
    near = (converted(ids, use_cache=False).logits - expected).abs().mean()
    (((prelude, _), first), ((coarse, _, _), second), _, ((fine, _, _), last)) = states
    assert (first - prelude).abs().max() < 1e-7  # biases are drawn in float32
    assert (second - first - CLOSED_GATE * (coarse - first)).abs().max() < 1e-4 * coarse.abs().max()
    assert (last - fine).abs().max() < 0.01 * fine.abs().max()
    anchored = to_spiralformer(source, topology="anchor", **split).eval()
    assert near < (anchored(ids, use_cache=False).logits - expected).abs().mean() / 20
    routed = to_spiralformer(source, topology="mesh", **split).eval()
    assert near < (routed(ids, use_cache=False).logits - expected).abs().mean()


def test_no_two_gates_of_streams_start_equal():
    split = {"num_prelude_layers": 1, "num_core_layers": 2, "num_coda_layers": 1, "chunk_sizes": [4, 2, 1]}
    topology = to_spiralformer(neox_model(), topology="hyper_connections", **split).model.topology
    for connection in topology.connections:
        for gate in (connection.keep, connection.write):
            assert len(gate.projection.weight.unique(dim=0)) == 4 and gate.scale.item() == pytest.approx(0.01)


def test_routers_ignore_the_size_of_the_states_and_no_two_slots_start_equal():
    split = {"num_prelude_layers": 1, "num_core_layers": 2, "num_coda_layers": 1, "chunk_sizes": [4, 2, 1]}
    topology = to_spiralformer(neox_model(), num_memory_slots=9, **split).model.topology
    for router in (*topology.write, *topology.read):
        assert router.weight.abs().max() == 0 and len(router.bias.unique()) == 9


def test_fewer_slots_than_cycles_share_the_last_one():
    split = {"num_prelude_layers": 1, "num_core_layers": 1, "num_coda_layers": 1, "chunk_sizes": [2, 1, 1]}
    topology = to_spiralformer(neox_model(), num_memory_slots=3, **split).model.topology
    assert [router.bias.argmax().item() for router in topology.write] == [1, 2, 2, 2]
    assert [router.bias.argmax().item() for router in topology.read] == [1, 1, 2, 2]
    topology = to_spiralformer(neox_model(), num_memory_slots=1, **split).model.topology
    assert all(router.bias.shape == (1,) for router in topology.write)


# -- what is refused --------------------------------------------------------------------------------------------

LOOP = {"num_prelude_layers": 1, "num_core_layers": 2, "num_coda_layers": 1, "chunk_sizes": [4, 1]}


@pytest.mark.parametrize(
    "core_layers, options, message",
    [
        (
            None,
            {**LOOP, "num_prelude_layers": 5},
            r"num_prelude_layers, num_coda_layers.*at most the source's 5 .*5, 1",
        ),
        (None, {**LOOP, "num_core_layers": 4}, "num_core_layers.*at most the 3 layers between.*4"),
        (None, {**LOOP, "share_core": False}, "num_core_layers.*at most the 3 layers between.*name 4.*2"),
        (None, {"chunk_sizes": [], "num_prelude_layers": 3}, r"num_prelude_layers, num_coda_layers.*5 together.*3, 0"),
        (None, {"chunk_sizes": [], "num_core_layers": 2}, "num_core_layers.*0 where chunk_sizes is empty.*2"),
        ([[1]], LOOP, r"core_layers.*2 entries.*\[\[1\]\]"),
        ([[1], [5]], LOOP, r"core_layers.*\[0, 4\].*\[5\]"),
        ([[-1], [1]], LOOP, r"core_layers.*\[0, 4\].*\[-1\]"),
        ([[], [1]], LOOP, r"core_layers.*\[0, 4\].*\[\]"),
        ([[1]], {"chunk_sizes": []}, r"core_layers.*0 entries.*\[\[1\]\]"),
        (None, {**LOOP, "vocab_size": 9}, "vocab_size.*left to the source.*9"),
        (None, {**LOOP, "scale_embeddings": True}, "scale_embeddings.*left to the source.*True"),
        (None, {**LOOP, "topology": "ring"}, "topology.*one of.*ring"),
        (None, {**LOOP, "router_start": "half_anchor"}, "router_start.*left out: the routers.*half_anchor"),
        (None, {**LOOP, "topology": "hyper_connections", "gate_start": "replace"}, "gate_start.*left out.*replace"),
    ],
)
def test_what_does_not_fit_is_refused(core_layers, options, message):
    with pytest.raises((ValueError, StrictDataclassError), match=f"(?s){message}"):
        to_spiralformer(neox_model(), core_layers, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, r"rope_parameters\['rope_type'\].*dynamic"),
        ({"topology": "ring"}, "topology.*absent from a configuration.*gpt_neox.*ring"),
        ({"quantization_config": {"quant_method": "torchao"}}, "quantization_config.*absent.*torchao"),
    ],
)
def test_a_source_that_cannot_be_carried_is_refused(options, message):
    with pytest.raises((ValueError, StrictDataclassError), match=f"(?s){message}"):
        spiral_config(neox_config(**options), **LOOP)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, r"chunk_sizes.*\[\].*\[4, 2, 1\]"),
        ({"chunk_sizes": [], "num_core_layers": 0}, "scale_embeddings.*False.*True"),
    ],
)
def test_a_model_that_is_not_a_plain_stack_does_not_go_back(options, message):
    with pytest.raises(ValueError, match=message):
        plain_config(small_config(**options))


@pytest.mark.parametrize("text", ["a", "", "1+", "-1", "1.5", "2-3"])
def test_core_layers_are_numbers_joined_by_plus(text):
    assert parse_core_layers(["4", "5+6+0"]) == [[4], [5, 6, 0]]
    with pytest.raises(ValueError, match="core_layers"):
        parse_core_layers([text])


# -- checkpoints ------------------------------------------------------------------------------------------------

SPLIT = "num_prelude_layers=1,num_core_layers=2,num_coda_layers=1,chunk_sizes=[4,1]"


def files(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def checkpoint(tmp_path):
    """A bfloat16 GPT-NeoX checkpoint in several files, with the project's tokenizer as a GPT-NeoX one."""
    folder = tmp_path / "source"
    model = neox_model(torch.bfloat16, **{**UNUSUAL, "vocab_size": 4096, "tie_word_embeddings": False})
    model.generation_config.max_new_tokens = 13
    model.save_pretrained(folder, max_shard_size="60KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (ROOT / "tokenization" / name).read_text()
        (folder / name).write_text(text.replace("PreTrainedTokenizerFast", "GPTNeoXTokenizer"))
    assert "model.safetensors.index.json" in files(folder)
    return folder


@pytest.mark.parametrize("shard", ["60KB", "5GB"])
def test_a_checkpoint_goes_there_and_back(checkpoint, tmp_path, shard):
    source, there, back = str(checkpoint), str(tmp_path / "there"), str(tmp_path / "back")
    convert_main(ConversionArguments(source, there, config_overrides="chunk_sizes=[]", max_shard_size=shard))
    for size in ({"60KB", "5GB"} - {shard}).pop(), shard:  # the second over the first
        convert_main(ConversionArguments(there, back, to="gpt_neox", max_shard_size=size))
    for folder in (there, back):
        weights = {"model.safetensors", "model.safetensors.index.json"} & files(Path(folder))
        assert weights == {"model.safetensors" if shard == "5GB" else "model.safetensors.index.json"}
    expected, returned = (AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in (source, back))
    assert type(returned) is GPTNeoXForCausalLM and returned.dtype == torch.bfloat16
    assert same_state(returned, expected)
    for name in ("config.json", "generation_config.json"):
        saved = [json.loads((folder / name).read_text()) for folder in (checkpoint, tmp_path / "back")]
        assert saved[0] == saved[1], name
    stored = [value for path in Path(back).glob("*.safetensors") for value in load_file(path).values()]
    assert {value.dtype for value in stored} == {torch.bfloat16}


def test_a_looped_checkpoint_keeps_dtype_tokenizer_and_generation_settings(checkpoint, tmp_path):
    there = tmp_path / "there"
    convert_main(ConversionArguments(str(checkpoint), str(there), config_overrides=SPLIT, core_layers=["1", "2+3"]))
    model = AutoModelForCausalLM.from_pretrained(there)
    assert type(model) is SpiralFormerForCausalLM and model.dtype == torch.bfloat16
    assert model.config.chunk_sizes == [4, 1] and model.generation_config.max_new_tokens == 13
    original = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert same_state(model.model.core[0], original.gpt_neox.layers[1])
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (checkpoint, there)]
    text = "def read(path):\n    return 1"
    assert tokenizers[0](text).input_ids == tokenizers[1](text).input_ids
    assert type(tokenizers[0]) is type(tokenizers[1]) and tokenizers[1].decode(tokenizers[1](text).input_ids) == text


@torch.no_grad()
def test_weights_of_two_dtypes_are_kept_in_the_one_that_takes_both():
    source = neox_model(torch.bfloat16)
    source.get_output_embeddings().double()
    source.get_output_embeddings().weight += 2.0**-20  # no number of bfloat16, nor a small one of float32
    converted = to_spiralformer(source, chunk_sizes=[])
    for model in (converted, to_plain(converted)):
        assert model.dtype == torch.float64
        assert torch.equal(model.get_output_embeddings().weight, source.get_output_embeddings().weight)


def test_an_older_tokenizer_of_the_folder_is_gone(checkpoint, tmp_path):
    """What it alone had, and what is no tokenizer's stays; a source without a tokenizer does not get that one."""
    there, template = tmp_path / "there", "{{ messages }}"
    (there / "additional_chat_templates").mkdir(parents=True)
    for name in ("chat_template.jinja", "additional_chat_templates/tool.jinja", "merges.txt", "notes.txt"):
        (there / name).write_text(template)
    convert_main(ConversionArguments(str(checkpoint), str(there), config_overrides=SPLIT))
    assert AutoTokenizer.from_pretrained(there).chat_template is None
    assert "notes.txt" in files(there) and not {"chat_template.jinja", "merges.txt"} & files(there)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).unlink()
    before = {name: (there / name).read_bytes() for name in files(there) if (there / name).is_file()}
    with pytest.raises(ValueError, match="`output_dir` must be a folder without a tokenizer"):
        convert_main(ConversionArguments(str(checkpoint), str(there), config_overrides=SPLIT))
    assert all((there / name).read_bytes() == content for name, content in before.items())


def test_the_router_bias_and_the_seed_have_an_effect(checkpoint, tmp_path):
    def routers(name: str, **options) -> torch.Tensor:
        arguments = ConversionArguments(str(checkpoint), str(tmp_path / name), config_overrides=SPLIT, **options)
        return convert(arguments).model.topology.read[1].bias.float()

    first = routers("a", seed=1)
    assert torch.equal(first, routers("b", seed=1)) and not torch.equal(first, routers("c", seed=2))
    assert (routers("d", seed=1, router_bias=3.0) - first).abs().max() > 1


def test_a_source_without_tokenizer_says_so(tmp_path, capsys):
    neox_model().save_pretrained(tmp_path / "source")
    convert_main(ConversionArguments(str(tmp_path / "source"), str(tmp_path / "there"), config_overrides=SPLIT))
    assert "has no tokenizer" in capsys.readouterr().out
    assert not any("tokenizer" in name for name in files(tmp_path / "there"))


def test_older_checkpoints_hold_buffers_that_are_no_weights(tmp_path):
    """Pythia's files hold causal masks and rotary frequencies of every layer, and the older names of rotary fields."""
    source = neox_model()
    state = source.state_dict()
    for index in range(LAYERS):
        prefix = f"gpt_neox.layers.{index}.attention"
        state[f"{prefix}.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
        state[f"{prefix}.masked_bias"] = torch.tensor(-1e9)
        state[f"{prefix}.rotary_emb.inv_freq"] = torch.ones(1)
    source.save_pretrained(tmp_path / "source", state_dict=state)
    path = tmp_path / "source" / "config.json"
    settings = json.loads(path.read_text())
    settings |= {"rotary_pct": 0.5, "rotary_emb_base": 500}
    del settings["rope_parameters"]
    path.write_text(json.dumps(settings))
    assert any("masked_bias" in name for name in load_file(tmp_path / "source" / "model.safetensors"))
    converted = convert(ConversionArguments(str(path.parent), str(tmp_path / "there"), config_overrides=SPLIT))
    rotary = converted.config.rope_parameters
    assert (rotary["partial_rotary_factor"], rotary["rope_theta"]) == (0.5, 500)
    assert same_state(converted.model.prelude[0], source.gpt_neox.layers[0])


def test_checkpoints_that_are_no_gpt_neox_language_model_are_refused(tmp_path):
    mistral = MistralConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8
    )
    models = {
        "mistral": MistralForCausalLM(mistral),
        "base": GPTNeoXModel(neox_config()),
        "labels": GPTNeoXForTokenClassification(neox_config(tie_word_embeddings=True)),
        "spiral": SpiralFormerForCausalLM(small_config()),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    output = str(tmp_path / "there")
    for name, message in (
        ("mistral", 'model_name_or_path.*gpt_neox.*, not "mistral".*mistral'),
        ("base", "lacks 1 weights.*lm_head"),
        ("labels", "holds 2 weights.*classifier"),
        ("spiral", 'model_name_or_path.*gpt_neox.*, not "spiralformer"'),
    ):
        with pytest.raises(ValueError, match=message):
            convert(ConversionArguments(str(tmp_path / name), output, config_overrides=SPLIT))
    with pytest.raises(ValueError, match='spiralformer.*, not "gpt_neox"'):
        convert(ConversionArguments(str(tmp_path / "base"), output, to="gpt_neox"))
    for options in ({"config_overrides": SPLIT}, {"core_layers": ["1"]}, {"router_bias": 1.0}):
        with pytest.raises(ValueError, match=f'{[*options][0]}.*left out with to="gpt_neox"'):
            ConversionArguments(str(tmp_path / "spiral"), output, to="gpt_neox", **options)


# -- the commands of the page -----------------------------------------------------------------------------------------


@pytest.fixture
def tiny_pythia(workplace):
    """A checkpoint with twelve layers in place of the one that the commands download."""
    folder = workplace / "pythia"
    neox_model(torch.float32, num_hidden_layers=12, vocab_size=4096).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "tokenization").save_pretrained(folder)
    return folder


def test_the_commands_of_the_page_run(workplace, tiny_pythia, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    lines = commands("docs/conversion.md")
    assert len(lines) >= 5
    short = {
        "examples/uptrain.py": ["--adapter_steps", "1", "--max_steps", "2", "--block_size", "32"],
        "scripts/train.py": ["--max_steps", "2", "--train_file", "text.txt", "--report_to", "none"],
        "scripts/compare_starts.py": [
            *(
                "--hidden_size",
                "32",
                "--starts",
                "converted",
                "--source_steps",
                "2",
                "--max_steps",
                "1",
                "--max_eval_samples",
                "2",
            ),
            *("--train_file", "text.txt", "--validation_file", "text.txt", "--seeds", "0"),
        ],
    }
    for line in lines:
        words = shlex.split(line.replace("EleutherAI/pythia-160m", "pythia"))
        assert words[0] == "python", line
        monkeypatch.setattr(sys, "argv", [*words[1:], *short.get(words[1], [])])
        runpy.run_path(words[1], run_name="__main__")
    printed = capsys.readouterr().out
    assert "held-out loss: source" in printed and "| converted |" in printed
    assert {"converted", "plain", "back", "uptrained", "trained"} <= files(workplace / "runs")
    assert same_state(*(AutoModelForCausalLM.from_pretrained(folder) for folder in ("pythia", "runs/back")))
