"""What the model cannot follow, or nobody has run, is refused by name before a weight is loaded."""

from shutil import copyfile

import pytest
import torch
from engines import MODELS, engine, make_model
from safetensors.torch import load_file, save_file
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

import spiralformer_vllm
from spiralformer_vllm.refusals import ALLOWED


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model(**MODELS["neox-mesh"][1]).save_pretrained(folder)
    return folder


def settings(folder, **options):
    """Those of an engine, as vLLM checks them before it starts one."""
    return EngineArgs(str(folder), skip_tokenizer_init=True, **options).create_engine_config()


DRAFTS = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
OFFLOADING = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
REFUSED = {
    "parallel_config.pipeline_parallel_size": ({"pipeline_parallel_size": 2}, "1", "2"),
    "parallel_config.decode_context_parallel_size": (
        {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
        "1",
        "2",
    ),
    "parallel_config.prefill_context_parallel_size": ({"prefill_context_parallel_size": 2}, "1", "2"),
    "parallel_config.enable_dbo": ({"enable_dbo": True}, "False", "True"),
    "parallel_config.ubatch_size": ({"ubatch_size": 2}, "0", "2"),
    "speculative_config": ({"speculative_config": DRAFTS}, "None", "'ngram'"),
    "lora_config": ({"enable_lora": True}, "None", "LoRAConfig"),
    "kv_transfer_config": ({"kv_transfer_config": OFFLOADING}, "None", "KVTransferConfig"),
    "model_config.quantization": ({"quantization": "fp8"}, "None", "'fp8'"),
    "model_config.runner_type": ({"runner": "pooling"}, "'generate'", "'pooling'"),
    "cache_config.cache_dtype": ({"kv_cache_dtype": "fp8"}, "'auto'", "'fp8"),
    "offload_config.uva.cpu_offload_gb": ({"cpu_offload_gb": 1}, "0", "1"),
    "offload_config.prefetch.offload_group_size": ({"offload_group_size": 2}, "0", "2"),
}


def test_the_settings_as_they_are_pass(checkpoint):
    assert settings(checkpoint).model_config.architecture == spiralformer_vllm.ARCHITECTURE
    assert {*REFUSED} == {*ALLOWED}


@pytest.mark.parametrize("path", REFUSED)
def test_a_setting_is_refused_by_name(checkpoint, path):
    options, allowed, given = REFUSED[path]
    with pytest.raises(ValueError, match=rf"`{path}` must be {allowed} for SpiralFormer, but got {given}"):
        settings(checkpoint, **options)


def test_graphs_are_refused_where_there_are_any(checkpoint, monkeypatch):
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    with pytest.raises(ValueError, match="`model_config.enforce_eager` must be True for SpiralFormer: .* got False"):
        settings(checkpoint)


@pytest.mark.parametrize("trusted", [False, True])
def test_the_transformers_back_end_of_vllm_is_refused(checkpoint, trusted):
    """vLLM does not know the class; that of the checkpoint's own code refuses the attention of engines."""
    message = "must not be that of a serving engine, but got 'vllm'" if trusted else "Cannot find model module"
    options = {"model_impl": "transformers", "trust_remote_code": trusted}
    with pytest.raises(ValueError, match=message), engine(checkpoint, **options):
        pass


@pytest.mark.parametrize("block_size", [32, 64, 192])
def test_blocks_that_do_not_fit_are_refused_with_the_smallest_that_do(checkpoint, block_size):
    with (
        pytest.raises(ValueError, match=f"`block_size` must be a multiple of 128 for .* but got {block_size}"),
        engine(checkpoint, block_size=block_size, max_model_len=64),
    ):
        pass


def test_heads_without_a_kernel_are_refused(tmp_path):
    make_model(num_attention_heads=4).save_pretrained(tmp_path)
    with (
        pytest.raises(ValueError, match=r"`head_dim` must be one of \[32, .*\] for CPU_ATTN, but got 16"),
        engine(tmp_path),
    ):
        pass


def change(checkpoint, folder, name: str, tensor: torch.Tensor | None) -> None:
    """A copy of a checkpoint without a tensor of that name, or with that one."""
    weights = load_file(checkpoint / "model.safetensors") | {name: tensor}
    copyfile(checkpoint / "config.json", folder / "config.json")
    save_file({key: value for key, value in weights.items() if value is not None}, folder / "model.safetensors")


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("model.core.0.attention.dense.bias", None, r"of torch.Size\(\[64\]\), but got None"),
        ("model.topology.read.1.weight", None, r"of torch.Size\(\[7, 64\]\), but got None"),
        ("model.norm.weight", (32,), r"of torch.Size\(\[64\]\), but got torch.Size\(\[32\]\)"),
        ("model.core.2.input_layernorm.weight", (64,), r"left out, but got torch.Size\(\[64\]\)"),
        ("model.core.0.attention.more.weight", (64,), r"left out, but got torch.Size\(\[64\]\)"),
    ],
)
def test_a_checkpoint_of_other_weights_is_refused(checkpoint, tmp_path, name, shape, message):
    """vLLM would start without a bias, and take an initial value for it."""
    change(checkpoint, tmp_path, name, None if shape is None else torch.zeros(shape))
    with pytest.raises(ValueError, match=rf"`checkpoint\['{name}'\]` must be {message}"), engine(tmp_path):
        pass
