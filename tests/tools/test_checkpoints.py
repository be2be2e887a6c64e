"""Checkpoints that commands load: whole and as their configuration says, or refused with the name of every tensor."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from documents import ROOT
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support import small_config, small_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig

import convert
import evaluate_model
import probe
import quickstart
import serve
import train
from modeling_spiralformer import SpiralFormerForTokenClassification, SpiralFormerModel
from workshop.checkpoints import load_config, load_model, load_tokenizer, parse_overrides
from workshop.hub import load_checkpoint

CODA = "model.coda.0.mlp.dense_h_to_4h.weight"


def save(folder: Path, dtype=torch.float32, **options) -> Path:
    """A small model with the project's tokenizer."""
    small_model(dtype=dtype, vocab_size=4096, **options).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "tokenization").save_pretrained(folder)
    return folder


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), encoding="utf-8")


def neox_source(folder: Path) -> None:
    """A GPT-NeoX of four layers."""
    sizes = {"vocab_size": 4096, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, num_hidden_layers=4)).save_pretrained(folder)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return save(tmp_path / "checkpoint")


@pytest.fixture
def text(tmp_path) -> str:
    (tmp_path / "text.txt").write_text("def add(a, b):\n    return a + b\n" * 100, encoding="utf-8")
    return str(tmp_path / "text.txt")


# -- weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, names",
    [
        ({"num_coda_layers": 0}, ["holds 12 weights", CODA]),
        ({"num_prelude_layers": 2}, ["lacks 12 weights", "model.prelude.1.mlp.dense_h_to_4h.weight"]),
        ({"num_core_layers": 1}, ["holds 12 weights", "model.core.1.mlp.dense_h_to_4h.weight"]),
        ({"topology": "anchor"}, ["holds 16 weights", "model.topology.read.0.weight", "model.topology.write.3.bias"]),
        ({"down_scaling": "mean"}, ["holds 4 weights", "model.resolutions.0.scorer.weight"]),
        ({"chunk_sizes": [4, 1], "num_memory_slots": 6}, ["holds 8 weights", "model.resolutions.1.scorer.weight"]),
        ({"chunk_sizes": [8, 2, 1]}, [r"model.resolutions.0.allocator.weight \(\[4, 16\] in place of \[8, 16\]\)"]),
        ({"vocab_size": 4097}, [r"model.embed_tokens.weight \(\[4096, 16\] in place of \[4097, 16\]\)", "lm_head"]),
        ({"attention_bias": False}, ["model.coda.0.attention.dense.bias"]),
        ({"tie_word_embeddings": True}, ["holds a head of its own, but `tie_word_embeddings` is True"]),
    ],
)
def test_weights_and_configuration_that_do_not_fit_are_refused_by_name(checkpoint, changes, names):
    edit_config(checkpoint, **changes)
    for name in names:
        with pytest.raises(ValueError, match=name):
            load_model(str(checkpoint), load_config(str(checkpoint)))


def test_every_tensor_is_named(checkpoint):
    edit_config(checkpoint, num_coda_layers=0)
    lost = [name for name in load_file(checkpoint / "model.safetensors") if name.startswith("model.coda")]
    with pytest.raises(ValueError) as raised:
        load_model(str(checkpoint), load_config(str(checkpoint)))
    assert len(lost) == 12 and all(name in str(raised.value) for name in lost)


def test_whole_checkpoints_load(tmp_path):
    """In one file and in several, with a tied head, and as other classes; a base model where its head is tied."""
    for name, shard, options in (
        ("one", "5GB", {}),
        ("many", "20KB", {}),
        ("tied", "5GB", {"tie_word_embeddings": True}),
    ):
        model = small_model(dtype=torch.float32, **options)
        model.save_pretrained(tmp_path / name, max_shard_size=shard)
        loaded = load_model(str(tmp_path / name), load_config(str(tmp_path / name)))
        for key, value in model.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[key]), (name, key)
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    edit_config(tmp_path / "tied", tie_word_embeddings=False)
    with pytest.raises(ValueError, match="lacks 1 weights.*lm_head.weight"):
        load_model(str(tmp_path / "tied"), load_config(str(tmp_path / "tied")))
    body = SpiralFormerModel(small_config(tie_word_embeddings=True))
    body.save_pretrained(tmp_path / "body")
    loaded = load_model(str(tmp_path / "body"), load_config(str(tmp_path / "body")))
    assert torch.equal(loaded.lm_head.weight, body.embed_tokens.weight)


def test_a_head_of_another_class_is_refused_by_name(tmp_path):
    for tied in (False, True):
        folder = str(tmp_path / str(tied))
        SpiralFormerForTokenClassification(small_config(tie_word_embeddings=tied)).save_pretrained(folder)
        with pytest.raises(ValueError, match="holds 2 weights.* has no place for .*: [a-z]+.bias, [a-z]+.weight"):
            load_model(folder, load_config(folder))


def test_shards_that_are_not_all_read_are_refused(tmp_path):
    folder = tmp_path / "shards"
    small_model(dtype=torch.float32).save_pretrained(folder, max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text("utf-8"))
    dropped = sorted(set(whole["weight_map"].values()))[-1]
    kept = {name: file for name, file in whole["weight_map"].items() if file != dropped}
    index.write_text(json.dumps(whole | {"weight_map": kept}), encoding="utf-8")
    with pytest.raises(ValueError, match=f"it holds .*{dropped}.*which nothing would load"):
        load_model(str(folder), load_config(str(folder)))
    for damaged in ({"files": kept}, {"weight_map": kept | {"lm_head.weight": 3}}, [kept]):
        index.write_text(json.dumps(damaged), encoding="utf-8")
        with pytest.raises(ValueError, match="damaged model.safetensors.index.json"):
            load_model(str(folder), load_config(str(folder)))
    index.write_text(json.dumps(whole), encoding="utf-8")
    assert load_model(str(folder), load_config(str(folder))) is not None
    save_file({"lm_head.weight": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="beside model.safetensors it holds .*model-00001-of"):
        load_model(str(folder), load_config(str(folder)))


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_another_thing_in_the_place_of_weights_is_named(name, tmp_path):
    small_model(dtype=torch.float32).save_pretrained(
        tmp_path, max_shard_size="20KB" if name.endswith(".json") else "5GB"
    )
    (tmp_path / name).unlink()
    if name.endswith(".json"):
        with pytest.raises(ValueError, match="must hold model.safetensors or model.safetensors.index.json, but holds"):
            load_model(str(tmp_path), load_config(str(tmp_path)))
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"must hold files, but {name} is a folder or a link to nothing"):
        load_model(str(tmp_path), load_config(str(tmp_path)))
    (tmp_path / name).rmdir()
    (tmp_path / name).symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"must hold files, but {name} is a folder or a link to nothing"):
        load_model(str(tmp_path), load_config(str(tmp_path)))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_named_by_its_file(name, checkpoint):
    whole = (checkpoint / name).read_text("utf-8")
    for content in ("", whole[:-9], "[]", '{"a": 1, "a": 1}', "{}" if name == "tokenizer.json" else "null"):
        (checkpoint / name).write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=f"{name}"):
            load_tokenizer(str(checkpoint), None)


def test_an_adapter_is_no_checkpoint(checkpoint, tmp_path):
    """The library loads the base model that an adapter names, wherever it is, and no weight that lies beside it."""
    base = AutoModelForCausalLM.from_pretrained(save(tmp_path / "base", seed=1))
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")).save_pretrained(
        checkpoint
    )
    assert (checkpoint / "model.safetensors").is_file() and (checkpoint / "config.json").is_file()
    with pytest.raises(ValueError, match="`model_name_or_path` must be a whole model, but .* holds an adapter"):
        load_config(str(checkpoint))
    (checkpoint / "config.json").unlink()
    with pytest.raises(ValueError, match="holds an adapter"):
        load_config(str(checkpoint))


@pytest.mark.parametrize("claimed", ["float16", "bfloat16", None])
def test_weights_are_pushed_and_converted_as_wide_as_they_were_saved(tmp_path, claimed):
    """What config.json says of the dtype may be narrower than the weights: rounding them would lose digits."""
    folder = save(tmp_path / "checkpoint")
    edit_config(folder, dtype=claimed)
    saved = load_file(folder / "model.safetensors")
    state = load_checkpoint(str(folder)).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in saved.items())


# -- every command ----------------------------------------------------------------------------------------------


def trained(checkpoint: str, text: str, output: str) -> None:
    words = ["--model_name_or_path", checkpoint, "--train_file", text, "--output_dir", output, "--max_steps", "1"]
    train.main([*words, "--block_size", "32", "--report_to", "none", "--do_eval", "False", "--save_strategy", "no"])


def probed(checkpoint: str, text: str, output: str) -> None:
    probe.main(["--model", checkpoint, "--text", text, "--output_dir", output, "--sequences", "1", "--length", "32"])


def evaluated(checkpoint: str, text: str, output: str) -> None:
    evaluate_model.main(["--model_name_or_path", checkpoint, "--text_files", text, "--window", "32"])


def converted(checkpoint: str, text: str, output: str) -> None:
    convert.main(convert.ConversionArguments(checkpoint, output, to="gpt_neox"))


COMMANDS = {
    "train": trained,
    "probe": probed,
    "evaluate": evaluated,
    "convert": converted,
    "push": lambda checkpoint, text, output: load_checkpoint(checkpoint),
    "quickstart": lambda checkpoint, text, output: quickstart.generate_code(checkpoint, "def"),
    "serve": lambda checkpoint, text, output: serve.ServedModel.from_pretrained(checkpoint),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_drops_a_layer(name, checkpoint, text, tmp_path):
    edit_config(checkpoint, num_coda_layers=0)
    with pytest.raises(ValueError, match=f"holds 12 weights .*{CODA}"):
        COMMANDS[name](str(checkpoint), text, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").glob("*.safetensors"))


def test_a_gpt_neox_source_keeps_all_of_its_layers(tmp_path):
    neox_source(tmp_path / "source")
    edit_config(tmp_path / "source", num_hidden_layers=3)
    arguments = convert.ConversionArguments(
        str(tmp_path / "source"), str(tmp_path / "out"), config_overrides="chunk_sizes=[]"
    )
    with pytest.raises(ValueError, match="gpt_neox.layers.3.attention.dense.bias"):
        convert.main(arguments)


@pytest.mark.parametrize("example", ["finetune", "lora", "quantise", "uptrain"])
@pytest.mark.processes
def test_no_example_drops_a_layer(example, checkpoint, text, tmp_path):
    output, lost = str(tmp_path / "out"), "model.coda.0.attention.dense.bias"
    edit_config(checkpoint, num_coda_layers=0)
    words = [str(checkpoint), output]
    if example in ("finetune", "lora"):
        words = ["--model", str(checkpoint), "--output_dir", output]
    said = "must hold the weights of its configuration"
    command = [sys.executable, f"examples/{example}.py", *words, "--text", text]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert result.returncode != 0 and lost in result.stderr and said in result.stderr, result.stderr[-500:]


# -- what is not there ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, field",
    [("train", "model_name_or_path"), ("probe", "model"), ("evaluate", "model_name_or_path"), ("push", "checkpoint")],
)
def test_a_folder_that_is_not_there_is_named(name, field, text, tmp_path):
    for missing in (tmp_path / "no" / "such", Path("./no/such/folder")):
        with pytest.raises(FileNotFoundError, match=f"`{field}` must be an existing folder or .*no/such"):
            COMMANDS[name](str(missing), text, str(tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=f"`{field}` must be a folder with config.json, but .*empty"):
        COMMANDS[name](str(tmp_path / "empty"), text, str(tmp_path / "out"))
    with pytest.raises(ValueError, match=f"`{field}` must be a folder or .*text.txt' is a file"):
        COMMANDS[name](text, text, str(tmp_path / "out"))


def test_a_checkpoint_without_a_tokenizer_is_named(checkpoint, text, tmp_path, monkeypatch):
    for path in checkpoint.glob("tokenizer*"):
        path.unlink()
    for name, field in (("train", "tokenizer_name"), ("evaluate", "tokenizer_name"), ("probe", "model")):
        with pytest.raises(
            FileNotFoundError, match=f"`{field}` must name .* with a tokenizer, but .*checkpoint' holds"
        ):
            COMMANDS[name](str(checkpoint), text, str(tmp_path / "out"))
    (checkpoint / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="`tokenizer_name` must name .*checkpoint' cannot be read"):
        evaluated(str(checkpoint), text, "")


@pytest.mark.parametrize(
    "overrides", ["layer_norm_eps=NaN", "initializer_range=1e999", "rope_parameters={'rope_theta':1e999}"]
)
def test_overrides_hold_finite_numbers(overrides):
    with pytest.raises(ValueError, match="`config_overrides` must hold finite numbers"):
        parse_overrides(overrides)


@pytest.mark.parametrize("folder", ["tiny", "llama"])
def test_overrides_leave_the_dtype_of_weights_to_its_option(folder, tmp_path):
    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    path = ROOT / "configuration/tiny" if folder == "tiny" else tmp_path
    with pytest.raises(ValueError, match="`config_overrides` must leave `dtype` to `--dtype`, but got 'bfloat16'"):
        load_config(str(path), parse_overrides("dtype=bfloat16"))


def test_overrides_set_a_field_once():
    with pytest.raises(ValueError, match="`config_overrides` must set a field once, but got 'topology' again"):
        parse_overrides("topology=anchor,chunk_sizes=[2,1],topology=base")
