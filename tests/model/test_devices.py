"""A model on several devices: emulated ones, since accelerate's hooks are the same and the numbers can be compared."""

import accelerate
import pytest
import torch
from accelerate.utils.dataclasses import get_module_class_from_name
from emulated_devices import EmulatedDevices, spread
from support import pad_rows, random_ids, small_model
from transformers import DynamicCache

MODELS = {
    "mesh": {},
    "streams": {"topology": "hyper_connections"},
    "anchor, own cores": {"share_core": False, "topology": "anchor"},
    "neither scaling learned": {"chunk_sizes": [5, 3], "down_scaling": "mean", "up_scaling": "broadcast"},
    "no token layers": {"chunk_sizes": [1, 1], "num_prelude_layers": 0, "num_coda_layers": 0},
    "no loop": {"chunk_sizes": [], "num_core_layers": 0},
    "llama": {"chunk_sizes": [5, 3], "layer_family": "llama"},
    "qwen3": {"chunk_sizes": [4, 1], "layer_family": "qwen3", "norm": "layer_norm"},
}
models = pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())


def one_device_each(model) -> dict[str, torch.device]:
    """A device of its own for every block that may not be split, and for every leaf outside of them."""
    blocks = [name for name, module in model.named_modules() if type(module).__name__ in model._no_split_modules]
    inside = tuple(f"{block}." for block in blocks)
    leaves = [name for name, module in model.named_modules() if not list(module.children())]
    blocks += [name for name in leaves if name not in blocks and not name.startswith(inside)]
    return {name: torch.device("cuda", index) for index, name in enumerate(blocks)}


@models
@pytest.mark.parametrize("lengths", [(13, 13), (13, 6, 9)], ids=str)
@torch.no_grad()
def test_every_block_on_a_device_of_its_own(options, lengths, monkeypatch):
    model, alone = small_model(**options), small_model(**options)
    ids, mask = pad_rows([random_ids(1, n, seed=n)[0] for n in lengths], "left")
    real = mask.bool()
    expected = alone(ids, attention_mask=mask, use_cache=False).logits
    spread(model, one_device_each(model), monkeypatch)
    with EmulatedDevices():
        full = model(ids, attention_mask=mask, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        cuts = [0, 5, 6, 7, 11, 12, 13]
        steps = [
            model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits
            for start, end in zip(cuts, cuts[1:], strict=False)
        ]
        places = [layer.keys.device for layer in cache.layers]
    assert (full - expected)[real].abs().max() < 1e-9
    assert (torch.cat(steps, dim=1) - expected)[real].abs().max() < 1e-9
    layers = len(model.model.prelude) + len(model.model.core) + len(model.model.coda)
    assert len(set(places)) == layers  # keys lie where their layer does


@torch.no_grad()
def test_packed_rows_on_several_devices(monkeypatch):
    model, alone = small_model(), small_model()
    ids, positions = random_ids(1, 17), torch.tensor([[*range(9), *range(8)]])
    spread(model, one_device_each(model), monkeypatch)
    with EmulatedDevices():
        logits = model(ids, position_ids=positions).logits
    assert (logits - alone(ids, position_ids=positions).logits).abs().max() < 1e-9


def test_beams_on_several_devices(monkeypatch):
    model, alone = small_model(), small_model()
    ids, mask = pad_rows([random_ids(1, 7)[0], random_ids(1, 12)[0]], "left")
    how = {"attention_mask": mask, "num_beams": 3, "max_new_tokens": 9, "do_sample": False}
    expected = alone.generate(ids, **how)
    spread(model, one_device_each(model), monkeypatch)
    with EmulatedDevices():
        assert torch.equal(model.generate(ids, **how), expected)


@torch.no_grad()
def test_mixed_devices_are_seen(monkeypatch):
    """The emulation can fail: without the hook of one block its input stays where it was."""
    model = small_model()
    spread(model, one_device_each(model), monkeypatch)
    accelerate.hooks.remove_hook_from_submodules(model.model.topology)
    with EmulatedDevices(), pytest.raises(RuntimeError, match="got tensors on"):
        model(random_ids(1, 9))


@models
def test_a_device_map_splits_between_blocks_and_never_inside(options):
    model = small_model(dtype=torch.float32, **options)
    third = model.get_memory_footprint() // 3
    device_map = accelerate.infer_auto_device_map(
        model, {0: third, 1: third, "cpu": 2**30}, no_split_module_classes=model._no_split_modules
    )
    assert len(set(device_map.values())) > 1
    blocks = [n for n, module in model.named_modules() if type(module).__name__ in model._no_split_modules]
    assert blocks and not any(name.startswith(f"{block}.") for name in device_map for block in blocks)
    # FSDP looks each name up, and refuses one that the model does not hold.
    assert all(get_module_class_from_name(model, name) for name in model._no_split_modules)
