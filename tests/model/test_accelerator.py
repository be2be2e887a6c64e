"""What only an accelerator shows: `generate()` that compiles by itself, low precision, sharding. `make test-cuda`."""

import pytest
import torch
import torch.distributed as dist
from support import HEADS, large_weights, make_exact, random_ids, small_config, small_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from modeling_spiralformer import SpiralFormerForCausalLM


@pytest.fixture(autouse=True)
def _on_an_accelerator(request):
    if request.config.getoption("--device") == "cpu":
        pytest.skip("needs an accelerator: `make test-cuda`")


# Wide enough for kernels of low precision.
WIDE = {"hidden_size": 64, "intermediate_size": 96, "chunk_sizes": [5, 3, 1]}
HOW = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
HOW |= {"return_dict_in_generate": True, "output_logits": True}
LAYERS = {family: {"layer_family": family} for family in HEADS}
LAYERS["streams"] = {"layer_family": "llama", "topology": "hyper_connections"}
families = pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)


@families
def test_generate_compiles_by_itself_with_a_static_cache(layers):
    model = small_model(dtype=torch.float32, **layers, **WIDE)
    ids, mask = random_ids(3, 11), torch.ones(3, 11, dtype=torch.long)
    ids[1, :4] = mask[1, :4] = 0
    plain = model.generate(ids, attention_mask=mask, **HOW)
    assert not hasattr(model, "_compiled_call")
    compiled = model.generate(ids, attention_mask=mask, cache_implementation="static", **HOW)
    assert hasattr(model, "_compiled_call")  # the library's sign that it decoded by a compiled forward
    assert torch.equal(plain.sequences, compiled.sequences)
    assert (torch.stack(plain.logits) - torch.stack(compiled.logits)).abs().max() < 1e-4


def relative_error(values: torch.Tensor, expected: torch.Tensor) -> float:
    return ((values.double() - expected).norm() / expected.norm()).item()


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_low_precision_errs_as_little_cached_as_uncached(layers, dtype):
    model = large_weights(SpiralFormerForCausalLM(small_config(**layers, **WIDE))).to(dtype).eval()
    exact = large_weights(SpiralFormerForCausalLM(small_config(**layers, **WIDE))).to(dtype).eval()
    exact, ids = make_exact(exact), random_ids(2, 31)
    expected = exact(ids, use_cache=False).logits
    full = model(ids, use_cache=False).logits
    cache, steps = None, []
    for part in ids.split([7, *[1] * 24], dim=1):
        out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    bound = 30 * torch.finfo(dtype).eps
    assert relative_error(full, expected) < bound and relative_error(torch.cat(steps, dim=1), expected) < bound


@families
def test_sharded_parameters_train_like_whole_ones(layers, tmp_path):
    model = small_model(dtype=torch.float32, **layers, **WIDE)
    sharded = small_model(dtype=torch.float32, **layers, **WIDE)
    ids = random_ids(2, 31)
    device = ids.device.type
    dist.init_process_group(
        dist.get_default_backend_for_device(device), init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh(device, (1,))
        for block in (sharded.model.prelude, sharded.model.core, sharded.model.coda):
            for layer in block:
                fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        losses = [one(ids, labels=ids).loss for one in (model, sharded)]
        for loss in losses:
            loss.backward()
        assert (losses[0] - losses[1]).abs() < 1e-5
        for (name, whole), shard in zip(model.named_parameters(), sharded.parameters(), strict=True):
            assert (whole.grad - shard.grad.full_tensor()).abs().max() < 1e-4 * (1 + whole.grad.abs().max()), name
    finally:
        dist.destroy_process_group()
