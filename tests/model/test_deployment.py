"""Dtypes, int8 weights, device maps and exported programs: the library's own ways to run a model elsewhere."""

import copy
import math
import runpy
import shlex
import sys

import accelerate
import pytest
import torch
from documents import ROOT, commands
from support import large_weights, pad_rows, random_ids, small_model
from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig, IntxUnpackedToInt8Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, StaticCache, TorchAoConfig

from modeling_spiralformer import SpiralFormerConfig, SpiralFormerForCausalLM
from modeling_spiralformer.layers_spiralformer import FAMILIES
from modeling_spiralformer.topology_spiralformer import TOPOLOGIES

WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def saved_by_family(tmp_path_factory):
    """Of each family a float32 model with large random weights, and the folder that holds it."""
    found = {}
    for family in FAMILIES:
        model = small_model(dtype=torch.float32, layer_family=family, **WIDE)
        found[family] = model, tmp_path_factory.mktemp(family)
        model.save_pretrained(found[family][1])
    return found


@pytest.fixture
def saved(saved_by_family):
    return saved_by_family["gpt_neox"]


def padded_batch() -> dict[str, torch.Tensor]:
    ids, mask = pad_rows([random_ids(1, length, seed=length)[0] for length in (21, 16, 19)], "left")
    return {"input_ids": ids, "attention_mask": mask}


def relative_error(got: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor) -> float:
    """The largest error at a real token, in units of the logits' standard deviation there."""
    got, expected = got[mask.bool()].float(), expected[mask.bool()].float()
    return ((got - expected).abs().max() / expected.std()).item()


# -- dtype --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 0.1), ("float16", 0.01), ("float32", 1e-5)])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_dtype_runs_and_stays_near_float32(saved_by_family, family, dtype, tolerance):
    reference, folder = saved_by_family[family]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    expected_dtype = getattr(torch, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected_dtype}
    batch = padded_batch()
    outputs, expected = model(**batch, use_cache=False), reference(**batch, use_cache=False)
    assert outputs.logits.dtype == expected_dtype
    error = relative_error(outputs.logits, expected.logits, batch["attention_mask"])
    assert error < tolerance
    generated = model.generate(
        **batch, max_new_tokens=9, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    text = generated.sequences[:, :-1]
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 8, dtype=torch.long)], dim=1)
    uncached = model(text, attention_mask=mask, use_cache=False).logits[:, -9:]
    decoded = torch.stack(generated.logits, dim=1)
    assert decoded.shape == uncached.shape
    assert relative_error(decoded, uncached, torch.ones(3, 9)) < tolerance


# -- int8 weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt_neox", "qwen3"])
@torch.no_grad()
def test_int8_weights_generate_and_survive_saving(saved_by_family, family, tmp_path):
    reference, folder = saved_by_family[family]
    config = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    linear = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    quantised = {name for name in linear if isinstance(model.get_submodule(name).weight, Int8Tensor)}
    in_a_layer, output = (4, "dense_4h_to_h") if family == "gpt_neox" else (7, "down_proj")
    assert linear - quantised == {"lm_head"} and len(quantised) == 4 * in_a_layer + 2 * 2 + 4 * 2
    batch = padded_batch()
    logits, expected = model(**batch, use_cache=False).logits, reference(**batch, use_cache=False).logits
    assert 0 < relative_error(logits, expected, batch["attention_mask"]) < 0.1
    tokens = model.generate(**batch, max_new_tokens=9, do_sample=False)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 9, dtype=torch.long)], dim=1)
    again = model(tokens, attention_mask=mask, use_cache=False).logits[:, -10:-1]
    chosen = again.gather(-1, tokens[:, -9:, None]).squeeze(-1)
    assert (again.max(-1).values - chosen).max() < 1e-4  # the cached steps chose what the uncached forward prefers
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    weights = [module.model.core[0].mlp.get_submodule(output).weight for module in (model, loaded)]
    assert isinstance(weights[1], Int8Tensor) and torch.equal(*(weight.dequantize() for weight in weights))
    # Weights read from a file need not be aligned as those made here, and sums then round otherwise.
    torch.testing.assert_close(loaded(**batch, use_cache=False).logits, logits, atol=1e-5, rtol=1e-5)
    size = {path: (path / "model.safetensors").stat().st_size for path in (folder, tmp_path)}
    assert size[tmp_path] < 0.5 * size[folder]


# -- device maps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "device_map, share, family",
    [
        *(("auto", None, "gpt_neox"), ("cpu", None, "gpt_neox"), ({"": "cpu"}, None, "gpt_neox")),
        *(("auto", share, "gpt_neox") for share in (10.0, 0.7, 0.5, 0.1)),
        *(("auto", 0.5, "llama"), ("auto", 0.5, "qwen3")),
    ],
)
@torch.no_grad()
def test_a_device_map_sends_to_disk_what_does_not_fit(saved_by_family, device_map, share, family):
    """`share` of the model's size is what the CPU may hold; a map by hand is taken as it is."""
    reference, folder = saved_by_family[family]
    size = sum(parameter.numel() * 4 for parameter in reference.parameters())
    memory = {} if share is None else {"max_memory": {"cpu": int(size * share)}}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, **memory)
    to_disk = share is not None and share < 1
    assert any(parameter.is_meta for parameter in model.parameters()) == to_disk
    if to_disk:
        assert "disk" in model.hf_device_map.values()
        blocks = [n for n, module in model.named_modules() if type(module).__name__ in model._no_split_modules]
        assert not any(name.startswith(f"{block}.") for name in model.hf_device_map for block in blocks)
    batch = padded_batch()
    logits, expected = model(**batch, use_cache=False).logits, reference(**batch, use_cache=False).logits
    assert relative_error(logits, expected, batch["attention_mask"]) < 1e-5
    options = {"max_new_tokens": 9, "do_sample": False}
    assert torch.equal(model.generate(**batch, **options), reference.generate(**batch, **options))


@pytest.mark.parametrize("topology", TOPOLOGIES)
@torch.no_grad()
def test_every_weight_may_lie_on_disk_until_its_module_is_called(topology, tmp_path):
    reference = small_model(dtype=torch.float32, topology=topology)
    model = accelerate.disk_offload(copy.deepcopy(reference), tmp_path, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    batch, options = padded_batch(), {"max_new_tokens": 9, "do_sample": False}
    assert torch.equal(model(**batch, use_cache=False).logits, reference(**batch, use_cache=False).logits)
    assert torch.equal(model.generate(**batch, **options), reference.generate(**batch, **options))


@torch.no_grad()
def test_a_map_by_hand_may_send_parts_to_disk(saved, tmp_path):
    reference, folder = saved
    parts = [name for name, _ in reference.model.named_children()]
    device_map = {f"model.{name}": "disk" if name in ("core", "topology") else "cpu" for name in parts}
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map={**device_map, "lm_head": "cpu"}, offload_folder=tmp_path
    )
    assert model.model.core[0].mlp.dense_h_to_4h.weight.is_meta and not model.model.embed_tokens.weight.is_meta
    batch = padded_batch()
    options = {"max_new_tokens": 9, "do_sample": False}
    assert torch.equal(model.generate(**batch, **options), reference.generate(**batch, **options))


# -- export -------------------------------------------------------------------------------------------------------

CONFIGURATIONS = {
    "mesh": {"chunk_sizes": [4, 1], "num_core_layers": 1, "num_coda_layers": 0},
    "plain": {"chunk_sizes": [], "num_core_layers": 0},
    "streams": {"chunk_sizes": [3, 1], "num_core_layers": 1, "topology": "hyper_connections"},
    "anchor, coarse last, far shifts": {
        **{"chunk_sizes": [2, 3], "chunk_offsets": [0, 2], "causal_shifts": [3, 2], "num_core_layers": 1},
        **{"num_coda_layers": 0, "topology": "anchor", "down_scaling": "mean", "up_scaling": "broadcast"},
    },
    "qwen3": {"chunk_sizes": [2], "num_core_layers": 1, "num_coda_layers": 0, "layer_family": "qwen3"},
}


def export(model: SpiralFormerForCausalLM, masked: bool) -> tuple[torch.nn.Module, int]:
    """The program of a dynamic batch and of lengths that are multiples of all chunk sizes; and their period."""
    period = math.lcm(*model.config.chunk_sizes)
    shape = {0: torch.export.Dim("batch", max=64), 1: period * torch.export.Dim("periods", min=2, max=64)}
    inputs = {"input_ids": random_ids(2, 3 * period)}
    if masked:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    shapes = {**dict.fromkeys(inputs, shape), "use_cache": None}
    program = torch.export.export(model, (), {**inputs, "use_cache": False}, dynamic_shapes=shapes, strict=False)
    return program, period


@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
@torch.no_grad()
def test_an_exported_program_takes_any_batch_of_padded_texts(options, tmp_path):
    model = small_model(**options)
    program, period = export(model, masked=True)
    torch.export.save(program, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for rows, length in ((1, 12), (3, 24), (2, 36)):
        assert length % period == 0
        texts = [random_ids(1, length - 5 * row, seed=row)[0] for row in range(rows)]
        ids, mask = pad_rows(texts, "left", total=length)
        got = program(input_ids=ids, attention_mask=mask, use_cache=False).logits
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        assert (got - expected)[mask.bool()].abs().max() < 1e-9
        for row, text in enumerate(texts):
            alone = model(text[None], use_cache=False).logits[0]
            assert (got[row, length - len(text) :] - alone).abs().max() < 1e-9


@torch.no_grad()
def test_any_length_fits_an_exported_program_by_padding_on_the_right():
    model = small_model(chunk_sizes=[4, 2], num_core_layers=1, num_coda_layers=0)
    program, period = export(model, masked=False)
    program = program.module()
    for length in range(period + 1, 4 * period):
        text = random_ids(2, length, seed=length)
        padded = torch.nn.functional.pad(text, (0, -length % period), value=7)
        got = program(input_ids=padded, use_cache=False).logits[:, :length]
        assert (got - model(text, use_cache=False).logits).abs().max() < 1e-9
    with pytest.raises(AssertionError, match="Guard failed.*size"):
        program(input_ids=random_ids(2, 3 * period + 1), use_cache=False)


@torch.no_grad()
def test_a_fixed_length_exports_whatever_its_remainder():
    model = small_model(chunk_sizes=[4, 1], num_core_layers=1)
    for length in (1, 22):
        text = random_ids(2, length)
        program = torch.export.export(model, (), {"input_ids": text, "use_cache": False}, strict=False).module()
        other = random_ids(2, length, seed=1)
        got, expected = program(input_ids=other, use_cache=False).logits, model(other, use_cache=False).logits
        assert (got - expected).abs().max() < 1e-9


def test_a_cache_is_no_part_of_an_exported_program():
    model = small_model(chunk_sizes=[4, 1], num_core_layers=1)
    with pytest.raises(ValueError, match="`use_cache` must be False.*`past_key_values`"):
        torch.export.export(model, (), {"input_ids": random_ids(1, 8)}, strict=False)
    cache = StaticCache(config=model.config, max_cache_len=16)
    with pytest.raises(ValueError, match="Unsupported input type.*StaticCache"):
        torch.export.export(model, (), {"input_ids": random_ids(1, 8), "past_key_values": cache}, strict=False)


# -- the commands of the page -------------------------------------------------------------------------------------


def test_the_commands_of_the_page_run(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    command, _ = commands("docs/deployment.md")  # the other one: test_trained_models.py
    python, script, *words = shlex.split(command)
    assert (python, script) == ("python", "examples/quantise.py")
    config = SpiralFormerConfig.from_pretrained(ROOT / "configuration" / "tiny")
    large_weights(SpiralFormerForCausalLM(config)).save_pretrained(words[0])
    AutoTokenizer.from_pretrained(ROOT / "tokenization").save_pretrained(words[0])
    words += ["--block_size", "32", "--max_blocks", "8"]
    kept = {}
    some = ["lm_head", "model.topology", "model.resolutions"]
    for keep, bits in ((["lm_head"], "8"), (some, "8"), (["lm_head"], "4")):
        how = ["--keep", *keep, "--bits", bits, "--dtype", "bfloat16", "--prompt", "def"]
        monkeypatch.setattr(sys, "argv", [script, *words, *how])
        runpy.run_path(script, run_name="__main__")
        printed = capsys.readouterr().out
        assert "perplexity: " in printed and "MiB in runs/quantised" in printed and "def" in printed
        model = AutoModelForCausalLM.from_pretrained("runs/quantised")
        assert model.dtype == torch.bfloat16
        weight = model.model.topology.read[0].weight
        kept[len(keep), bits] = type(weight), weight.dequantize().unique().numel() if bits == "4" else None
    assert kept[1, "8"][0] is Int8Tensor and kept[3, "8"][0] is torch.nn.Parameter
    assert kept[1, "4"][0] is IntxUnpackedToInt8Tensor and kept[1, "4"][1] <= 16 * len(weight)  # values of a row
