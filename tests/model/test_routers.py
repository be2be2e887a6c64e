"""The routers of MeSH: how they start, and what those of the first cycle look at."""

import json
import logging

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from reference import reference_logits
from support import random_ids, seeded, small_config, small_model

from modeling_spiralformer import SpiralFormerConfig, SpiralFormerForCausalLM

SIZES = [3, 1, 1]


@torch.no_grad()
def logits(model, ids) -> torch.Tensor:
    return model(ids, use_cache=False).logits


def read_slots(mesh, first, x, news) -> list[torch.Tensor]:
    """What every cycle reads of slots that are built one by one; cycle 0's routers look at `first`."""
    slots = [x] + [torch.zeros_like(x) for _ in range(mesh.write[0].out_features - 1)]
    state, reads = first, []
    for write, read, new in zip(mesh.write, mesh.read, news, strict=True):
        w, r = write(state).softmax(-1), read(state).softmax(-1)
        slots = [slot + w[..., [n]] * new for n, slot in enumerate(slots)]
        state = sum(r[..., [n]] * slot for n, slot in enumerate(slots))
        reads.append(state)
    return reads


# -- the function -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["uniform", "pass_through", "half_anchor"])
@pytest.mark.parametrize("first", ["embeddings", "prelude"])
def test_any_start_and_either_first_state_is_the_reference(first, start):
    """With the weights of a new model, whose biases differ by the start alone."""
    options = {"chunk_sizes": SIZES, "first_routers": first, "router_start": start, "initializer_range": 0.15}
    torch.manual_seed(0)
    model = SpiralFormerForCausalLM(small_config(**options)).double().eval()
    ids = random_ids(1, 17)
    expected = reference_logits(model.config, model.state_dict(), ids[0])
    assert (logits(model, ids)[0] - expected).abs().max() < 1e-9


@torch.no_grad()
def test_the_first_routers_look_at_what_the_configuration_says():
    for first in ("embeddings", "prelude"):
        mesh = small_model(chunk_sizes=SIZES, first_routers=first).model.topology
        x, *news = torch.randn(5, 2, 7, 16, generator=seeded(1), dtype=torch.float64)
        expected = read_slots(mesh, x if first == "embeddings" else news[0], x, news)
        hidden, carrier = mesh(news[0], x)
        assert (hidden - expected[0]).abs().max() < 1e-12
        for new, read in zip(news[1:], expected[1:], strict=True):
            hidden, carrier = mesh(new, hidden, carrier)
            assert (hidden - read).abs().max() < 1e-12


@torch.no_grad()
def test_the_first_routers_change_the_logits():
    """Or the comparison with the reference would say nothing of them."""
    ids, model = random_ids(1, 17), small_model(chunk_sizes=SIZES)
    other = small_model(chunk_sizes=SIZES, first_routers="prelude")
    other.load_state_dict(model.state_dict())
    assert (logits(model, ids) - logits(other, ids)).abs().max() > 1e-6


# -- how they start -----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("slots", [None, 5, 9])
def test_a_new_model_reads_what_its_start_says(slots):
    """0.9 of a write goes to the cycle's own slot, and 0.9 of a read comes from there, or half of it from v's."""
    x, *news = torch.randn(5, 1, 4, 16, generator=seeded(0))
    for start in ("pass_through", "half_anchor", "uniform"):
        config = small_config(chunk_sizes=SIZES, num_memory_slots=slots, router_start=start)
        mesh = SpiralFormerForCausalLM(config).model.topology
        count = config.resolved_num_memory_slots
        for router in (*mesh.write, *mesh.read):  # exactly, without what the states add
            router.weight.zero_()
        for cycle, (write, read) in enumerate(zip(mesh.write, mesh.read, strict=True)):
            w, r = write.bias.softmax(-1), read.bias.softmax(-1)
            if start == "uniform":
                assert torch.allclose(w, torch.full((count,), 1 / count)) and torch.equal(w, r)
                continue
            own = torch.full((count,), 0.1 / (count - 1))
            own[cycle + 1] = 0.9
            assert torch.allclose(w, own)
            if start == "pass_through" or cycle == 0:
                assert torch.allclose(r, own)
            else:
                half = torch.full((count,), 0.1 / (count - 2))
                half[[1, cycle + 1]] = 0.45
                assert torch.allclose(r, half)
        hidden, carrier = mesh(news[0], x)
        for new in news[1:]:
            hidden, carrier = mesh(new, hidden, carrier)
            likeness = torch.nn.functional.cosine_similarity(hidden, new, dim=-1).mean()
            both = torch.nn.functional.cosine_similarity(hidden, new + news[0], dim=-1).mean()
            if start == "pass_through":
                assert likeness > 0.95, (start, likeness)
            elif start == "half_anchor":
                assert both > 0.9 > likeness, (start, both, likeness)


def test_the_default_start_is_that_of_models_before():
    torch.manual_seed(0)
    model = SpiralFormerForCausalLM(small_config(chunk_sizes=SIZES))
    torch.manual_seed(0)
    named = SpiralFormerForCausalLM(
        small_config(chunk_sizes=SIZES, router_start="uniform", first_routers="embeddings")
    )
    for (name, one), two in zip(model.state_dict().items(), named.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    assert not any(router.bias.any() for router in (*model.model.topology.write, *model.model.topology.read))


@pytest.mark.parametrize("start", ["pass_through", "half_anchor"])
def test_a_start_needs_a_slot_for_each_cycle(start):
    small_config(chunk_sizes=SIZES, num_memory_slots=5, router_start=start)
    with pytest.raises(StrictDataclassError, match=r"num_memory_slots.*>= T \+ 2 = 5 with router_start.*4"):
        small_config(chunk_sizes=SIZES, num_memory_slots=4, router_start=start)


def test_a_view_has_the_first_routers_of_its_model():
    model = small_model(chunk_sizes=SIZES, first_routers="prelude", router_start="pass_through")
    view = model.with_schedule([3, 1])
    ids = random_ids(1, 17)
    expected = reference_logits(view.config, view.state_dict(), ids[0])
    assert (logits(view, ids)[0] - expected).abs().max() < 1e-9


# -- the configuration --------------------------------------------------------------------------------------------


def test_both_fields_are_saved_where_they_are_set_alone(tmp_path, caplog):
    small_config(router_start="half_anchor", first_routers="prelude").save_pretrained(tmp_path / "set")
    loaded = SpiralFormerConfig.from_pretrained(tmp_path / "set")
    assert (loaded.router_start, loaded.first_routers) == ("half_anchor", "prelude")
    small_config().save_pretrained(tmp_path / "unset")
    saved = json.loads((tmp_path / "unset" / "config.json").read_text())
    assert "router_start" not in saved and "first_routers" not in saved
    with caplog.at_level(logging.WARNING, "transformers"):
        default = SpiralFormerConfig.from_pretrained(tmp_path / "unset")
    assert caplog.messages == []
    assert (default.resolved_router_start, default.resolved_first_routers) == ("uniform", "embeddings")
