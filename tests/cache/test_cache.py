"""The multi-resolution cache: random histories, padding, work done, bytes held, what it refuses."""

import copy

import numpy as np
import pytest
import torch
from cache_machine import CacheMachine
from histories import History
from support import new_cache, pad_rows, random_ids, small_config, small_model
from transformers import Cache, DynamicCache, MistralConfig, cache_utils

from modeling_spiralformer import SpiralFormerConfig, SpiralFormerForCausalLM, batch_spiralformer
from modeling_spiralformer.layers_spiralformer import FAMILIES

# A layer that needs no further package; transformers 5.17 does not have it, and every other one needs one.
FP8_LAYER = getattr(cache_utils, "Fp8QuantizedLayer", cache_utils.DynamicLayer)

TestCache = CacheMachine.TestCase


@pytest.mark.parametrize(
    "options",
    [
        {"chunk_sizes": [8, 4, 2, 1]},
        {"chunk_sizes": [5, 3], "chunk_offsets": [0, 2], "causal_shifts": [11, 4], "topology": "anchor"},
        {"chunk_sizes": [6, 1], "layer_family": "llama"},
        {"chunk_sizes": [7, 2], "layer_family": "qwen3", "norm": "layer_norm"},
    ],
)
def test_token_by_token_decoding_of_padded_rows(options):
    """Every padding from 0 to 2 max(g), all in one batch, one token at a time from the very first column."""
    model, size = small_model(**options), max(options["chunk_sizes"])
    row = random_ids(1, 3 * size + 2 * size)[0]
    with torch.no_grad():
        alone = model(row[None], use_cache=False).logits[0]
        ids, mask = pad_rows([row[: len(row) - pads] for pads in range(2 * size + 1)], "left")
        cache = DynamicCache(config=model.config)
        steps = []
        for column in range(len(row)):
            step = model(ids[:, column : column + 1], attention_mask=mask[:, : column + 1], past_key_values=cache)
            steps.append(step.logits[:, 0])
    for pads in range(2 * size + 1):
        decoded = torch.stack([steps[column][pads] for column in range(pads, len(row))])
        assert (decoded - alone[: len(row) - pads]).abs().max() < 1e-9, pads


# -- what a decode step costs -------------------------------------------------------------------------------------


NEOX = [(pads, w, "gpt_neox") for pads in ([0], [0, 0, 0], [0, 3, 7, 8, 14]) for w in (None, [0, 0, 0, 0])]


@pytest.mark.parametrize(("pads", "offsets", "family"), [*NEOX, ([0, 5], None, "llama"), ([0, 5], None, "qwen3")])
def test_the_core_runs_where_a_chunk_fills_and_nowhere_else(pads, offsets, family):
    model = small_model(chunk_sizes=[8, 4, 2, 1], chunk_offsets=offsets, num_core_layers=1, layer_family=family)
    passes = []  # (iteration, rows) of every pass of the core

    def count(module, args, kwargs):
        view = kwargs[model.model.cache_argument]
        passes.append((view.entry_offset, args[0].shape[0], args[0].shape[1]))

    prompt = max(pads) + 5
    ids = random_ids(len(pads), prompt + 256)
    mask = (torch.arange(prompt + 256) >= torch.tensor(pads)[:, None]).long()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :prompt], attention_mask=mask[:, :prompt], past_key_values=cache)
        model.model.core[0].register_forward_pre_hook(count, with_kwargs=True)
        for column in range(prompt, prompt + 256):
            passes.clear()
            model(ids[:, [column]], attention_mask=mask[:, : column + 1], past_key_values=cache)
            expected = []
            for iteration, (size, offset) in enumerate(
                zip([8, 4, 2, 1], model.config.resolved_chunk_offsets, strict=True)
            ):
                rows = sum((column - p + 1 + offset) % size == 0 for p in pads)
                if rows:
                    expected.append((iteration, rows, 1))
            assert passes == expected, column


@pytest.mark.parametrize(
    ("static", "family"), [(False, "gpt_neox"), (True, "gpt_neox"), (False, "llama"), (True, "qwen3")]
)
def test_a_decode_step_never_waits_for_the_device(static, family):
    """On the meta device any read of a value raises: .item(), .tolist(), `if tensor`, nonzero, boolean indexing."""
    with torch.device("meta"):
        model = SpiralFormerForCausalLM(small_config(chunk_sizes=[8, 4, 2, 1], layer_family=family)).eval()
    cache = new_cache(model, static, 72)
    ids = torch.zeros(2, 40, dtype=torch.long, device="meta")
    with torch.no_grad():
        model(ids, past_key_values=cache)
        for step in range(32):  # with and without a mask: a step does not look at it
            mask = torch.ones(2, 41 + step, dtype=torch.long, device="meta") if step % 2 else None
            logits = model(ids[:, :1], attention_mask=mask, past_key_values=cache).logits
        assert logits.shape == (2, 1, 61) and cache.layers[1].state.seen == 72
        with pytest.raises((RuntimeError, NotImplementedError)):  # the check can fail: meta tensors do refuse
            cache.layers[1].keys.sum().item()


def states_of(cache) -> list[torch.Tensor]:
    """Every state tensor that a cache holds, once."""
    layers = cache.layers
    states = [state for layer in layers for state in (layer.keys, layer.values)]
    for layer in layers:
        if getattr(layer, "owns_state", False):
            states += [state for state in (layer.state.tokens, layer.state.latents) if state is not None]
    return states


@pytest.mark.parametrize("name", ["spiralformer-b-mesh-160m", "spiralformer-l-mesh-160m"])
def test_bytes_held_follow_the_formula(name):
    config = SpiralFormerConfig.from_pretrained(f"configuration/{name}")
    with torch.device("meta"):
        model = SpiralFormerForCausalLM(config).eval()
        cache = DynamicCache(config=config)
        with torch.no_grad():
            model(torch.zeros(1, 2048, dtype=torch.long), past_key_values=cache)
    held = sum(state.numel() * state.element_size() for state in states_of(cache))
    layers = config.num_prelude_layers + config.num_coda_layers
    layers += config.num_core_layers * sum(1 / g for g in config.chunk_sizes)
    formula = 2048 * 2 * config.hidden_size * 4 * layers
    assert abs(held / formula - 1) < 0.02
    extra = sum(
        state.shape[1]
        for layer in cache.layers
        if getattr(layer, "owns_state", False)
        for state in (layer.state.tokens, layer.state.latents)
    )
    shifts = config.resolved_causal_shifts
    assert extra <= sum(g + 1 - (-(s - g + 1) // g) for g, s in zip(config.chunk_sizes, shifts, strict=True))


def test_spare_room_of_a_growing_cache_is_held_to_the_formula_too():
    """Keys grow in place, with room for a few more columns; counted by the memory behind them."""
    model = small_model(chunk_sizes=[8, 2], num_core_layers=1, dtype=torch.float32)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(random_ids(1, 2048), past_key_values=cache)
        places = set()
        for _ in range(70):
            model(random_ids(1, 1), past_key_values=cache)
            places.add(cache.layers[0].keys.data_ptr())
            formula = cache.get_seq_length() * 2 * 16 * 4 * (2 + 1 / 8 + 1 / 2)
            held = sum(state.untyped_storage().nbytes() for state in states_of(cache))
            assert held / formula < 1.02
    assert len(places) <= 4  # moved only when the room was full


@pytest.mark.parametrize("family", FAMILIES)
def test_a_growing_cache_survives_gradients_and_inference_mode(family):
    """What records gradients, or was made where nothing may be written, is copied and not written into."""
    model, ids = (
        small_model(chunk_sizes=[4, 1], layer_family=family),
        random_ids(2, 140),
    )  # long enough for room between two steps
    expected = model(ids, use_cache=False).logits
    for first, then in ((torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)):
        cache = DynamicCache(config=model.config)
        with first():
            model(ids[:, :127], past_key_values=cache)
            model(ids[:, 127:128], past_key_values=cache)
        with then():
            logits = [model(ids[:, [column]], past_key_values=cache).logits for column in range(128, 140)]
        assert torch.allclose(torch.cat(logits, dim=1), expected[:, 128:], atol=1e-9, rtol=0)

    cache = DynamicCache(config=model.config)
    steps = [model(part, past_key_values=cache).logits for part in ids.split([127, *[1] * 13], dim=1)]
    torch.cat(steps, dim=1).square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(ids, use_cache=False).logits.square().sum().backward()
    for found, parameter in zip(gradients, model.parameters(), strict=True):
        assert torch.allclose(found, parameter.grad, atol=1e-7, rtol=1e-7)


def test_a_copy_of_a_growing_cache_goes_its_own_way():
    """Both go on in turn, in the room that there was when the copy was made."""
    model, ids = small_model(chunk_sizes=[4, 1]), random_ids(1, 326)
    texts = [ids, torch.cat([ids[:, :321], random_ids(1, 5, seed=7)], dim=1)]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :320], past_key_values=cache)
        model(ids[:, 320:321], past_key_values=cache)
        caches = [cache, copy.deepcopy(cache)]
        for column in range(321, 326):
            for text, own in zip(texts, caches, strict=True):
                logits = model(text[:, [column]], past_key_values=own).logits[:, 0]
                expected = model(text[:, : column + 1], use_cache=False).logits[:, -1]
                assert torch.allclose(logits, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("pads", [[0, 0], [3, 10]])
def test_state_between_calls_stays_small(pads):
    """At most g + 1 + ceil((s - g + 1) / g) states a level and row; and no state keeps a longer tensor alive."""
    options = {"chunk_sizes": [8, 5, 1], "causal_shifts": [7, 11, 3]}
    history = History(options, pads)
    for count in (40, 1, 1, 1, 1, 9, 1, 1, 1, 1, 1, 1):
        history.feed(count)
        for layer in history.cache.layers:
            if getattr(layer, "owns_state", False):
                grid, level = layer.state.grid, layer.state
                kept = [state for state in (level.tokens, level.latents) if state is not None]
                assert sum(state.shape[1] for state in kept) <= grid.size + 1 - (
                    -(grid.shift - grid.size + 1) // grid.size
                )
                for state in kept:
                    assert state.untyped_storage().nbytes() <= state.numel() * state.element_size()


# -- rollback -----------------------------------------------------------------------------------------------------


def test_crop_goes_back_over_everything_recorded():
    for count in range(1, 26):
        history = History({"chunk_sizes": [8, 3, 1]}, [0, 5])
        history.feed(20)
        history.record()
        history.feed(25)
        history.crop(count)
        assert history.columns == 45 - count, "refused a recorded point"
        history.feed(9)


def test_crop_deeper_than_the_cache_covers_is_refused():
    model = small_model(chunk_sizes=[8, 1])
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(random_ids(1, 30), past_key_values=cache)
    with pytest.raises(ValueError, match="activate_past_recording"):
        copy.deepcopy(cache).crop(-12)
    with pytest.raises(ValueError, match="positive|negative"):
        cache.crop(5)
    half_cropped = copy.deepcopy(cache)
    with pytest.raises(ValueError):
        half_cropped.crop(-12)
    with pytest.raises(ValueError, match="whole"):
        model(random_ids(1, 1), past_key_values=half_cropped)


def test_crop_of_nothing_drops_what_was_recorded():
    history = History({"chunk_sizes": [8, 1]}, [0])
    history.record()
    history.feed(50)
    level = history.cache.layers[1].state
    assert level.tokens.shape[1] == 50
    history.crop(0)
    assert history.cache.layers[1].state.tokens.shape[1] < 8
    history.feed(4)


# -- refusals -----------------------------------------------------------------------------------------------------


def test_caches_of_another_kind_are_refused():
    model, ids = small_model(dtype=torch.float32), random_ids(2, 9)
    with pytest.raises(ValueError, match=r"DynamicCache\(config=model.config\)"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match=r"DynamicCache\(config=model.config\)"):
        model(ids, past_key_values=DynamicCache(config=small_config(chunk_sizes=[4, 1])))
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    other = small_model(dtype=torch.float32, chunk_sizes=[8, 2, 1])
    with pytest.raises(ValueError, match="other chunk sizes"):
        other(ids[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="2 rows"):
        model(ids[:1, :1], past_key_values=cache)


def test_a_prefix_without_latents_is_refused():
    """What prefix tuning hands over: keys and values that no token made."""
    model = small_model(dtype=torch.float32)
    prefix = DynamicCache([(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8))] * model.config.num_hidden_layers)
    with pytest.raises(ValueError, match=r"DynamicCache\(config=model.config\)"):
        model(random_ids(1, 3), past_key_values=prefix, attention_mask=torch.ones(1, 7))


def test_quantised_caches_of_the_library_and_offloaded_ones_are_refused():
    model = small_model(dtype=torch.float32)
    cache = DynamicCache(config=model.config)
    cache.offloading = True  # building one needs a GPU
    with pytest.raises(ValueError, match='offloaded.* quantise .*"quantized"'):
        model(random_ids(1, 3), past_key_values=cache)
    layers = [FP8_LAYER() for _ in range(model.config.num_hidden_layers)]
    with pytest.raises(ValueError, match="quantized"):
        model(random_ids(1, 3), past_key_values=Cache(layers=layers))


def test_appending_to_right_padded_rows_is_refused():
    model = small_model(dtype=torch.float32)
    ids, mask = pad_rows([random_ids(1, 9)[0], random_ids(1, 6)[0]], "right")
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="right-padded"):
        model(ids[:, :1], past_key_values=cache)


@torch.no_grad()
def test_a_row_of_padding_alone_has_not_ended():
    """Beside one that has: left by itself it begins."""
    model, ids = small_model(chunk_sizes=[5, 3, 1], dtype=torch.float64), random_ids(2, 9)
    mask = torch.tensor([[0] * 6, [1] * 4 + [0] * 2])
    cache = DynamicCache(config=model.config)
    model(ids[:, :6], attention_mask=mask, past_key_values=cache)
    cache.batch_select_indices([0])
    found = model(ids[:1, 6:], attention_mask=torch.tensor([[0] * 6 + [1] * 3]), past_key_values=cache).logits
    assert (found - model(ids[:1, 6:], use_cache=False).logits).abs().max() < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("change", ["crop", "select", "reorder", "repeat"])
def test_rows_that_no_longer_end_in_padding_go_on(change):
    """Cut back to where every row has tokens, or without the rows that ended."""
    model = small_model(chunk_sizes=[5, 3, 1], dtype=torch.float64)
    rows = [random_ids(1, length, seed=length)[0] for length in (11, 7, 11)]
    ids, mask = pad_rows(rows, "right")
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(ids, attention_mask=mask, past_key_values=cache)
    if change == "crop":
        longer = copy.deepcopy(cache)
        longer.crop(-3)  # the second row has ended still
        with pytest.raises(ValueError, match="right-padded"):
            model(random_ids(3, 1), past_key_values=longer)
        cache.crop(-4)
        kept = ids[:, :7]
    elif change == "repeat":
        cache.batch_repeat_interleave(2)
        with pytest.raises(ValueError, match="right-padded"):
            model(random_ids(6, 1), past_key_values=cache)
        cache.batch_select_indices([0, 1, 4])
        kept = ids[[0, 0, 2]]
    else:
        keep = torch.tensor([2, 0] if change == "select" else [2, 0, 0])
        cache.batch_select_indices(keep) if change == "select" else cache.reorder_cache(keep)
        kept = ids[keep]
    more = random_ids(len(kept), 6, seed=5)
    found = model(more, past_key_values=cache).logits
    expected = model(torch.cat([kept, more], dim=1), use_cache=False).logits[:, -6:]
    assert (found - expected).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], "columns of padding"),  # a pad turned into a token
        ([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]], "columns of padding"),  # a token turned into a pad
        ([[1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1]], "holes"),
        ([[1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0]], "newest token"),
        ([[1, 1], [1, 1]], "shape"),
    ],
)
def test_masks_that_contradict_the_cache_are_refused(mask, message):
    model = small_model(dtype=torch.float32)
    cache = DynamicCache(config=model.config)
    model(random_ids(2, 4), attention_mask=torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]), past_key_values=cache)
    with pytest.raises(ValueError, match=message):
        model(random_ids(2, 2), attention_mask=torch.tensor(mask), past_key_values=cache)


@pytest.mark.parametrize("static", [False, True])
def test_a_token_that_came_alone_is_not_turned_into_padding(static):
    model, ids = small_model(dtype=torch.float32), random_ids(2, 3)
    cache = new_cache(model, static, 4)
    with torch.no_grad():
        model(ids[:, :1], past_key_values=cache)
        with pytest.raises(ValueError, match="columns of padding"):
            model(ids[:, 1:], attention_mask=torch.tensor([[1, 1, 1], [0, 1, 1]]), past_key_values=cache)


@pytest.mark.parametrize("first", [1, 5])
def test_a_step_reads_no_mask_from_the_device_once_padding_is_final(first, monkeypatch):
    model, ids, looked = small_model(dtype=torch.float32), random_ids(2, first + 2), []
    look = batch_spiralformer._look_at_mask
    monkeypatch.setattr(batch_spiralformer, "_look_at_mask", lambda *mask: looked.append(mask) or look(*mask))
    cache = DynamicCache(config=model.config)
    for end, part in zip((first, first + 1, first + 2), ids.split([first, 1, 1], dim=1), strict=True):
        model(part, attention_mask=torch.ones(2, end, dtype=torch.long), past_key_values=cache)
    assert len(looked) == 1


# -- errors in the middle of a call -------------------------------------------------------------------------------


class Interrupted(Exception):
    """Stands for anything that can end a forward: out of memory, Ctrl-C."""


NO_LOOP = {"chunk_sizes": [], "num_core_layers": 0}
schedules = pytest.mark.parametrize("options", [{}, NO_LOOP], ids=["loop", "no loop"])


FOUR_LAYERS = NO_LOOP | {"num_prelude_layers": 2, "num_coda_layers": 2}


@pytest.mark.parametrize(
    ("place", "options"),
    [
        *((place, {}) for place in ("prelude.0", "core.1", "topology.write.3", "coda.0")),
        ("core.0.self_attn.k_proj", {"layer_family": "llama"}),
        ("core.1.self_attn.k_norm", {"layer_family": "qwen3"}),
        *((place, FOUR_LAYERS) for place in ("prelude.0", "prelude.1", "coda.0", "coda.1")),
    ],
)
@pytest.mark.parametrize("static", [False, True])
def test_a_cache_that_an_error_left_half_written_is_refused(place, options, static):
    model, ids = small_model(**options), random_ids(1, 15)
    cache = new_cache(model, static, 20)

    def interrupt(*args):
        raise Interrupted

    with torch.no_grad():
        model(ids[:, :13], past_key_values=cache)
        handle = model.model.get_submodule(place).register_forward_hook(interrupt)
        with pytest.raises(Interrupted):
            model(ids[:, 13:14], past_key_values=cache)
        handle.remove()
        for kept in (cache, copy.deepcopy(cache)):
            with pytest.raises(ValueError, match="call reset"):
                model(ids[:, 13:14], past_key_values=kept)
        cache.reset()
        restarted = model(ids, past_key_values=cache).logits
        assert (restarted - model(ids, use_cache=False).logits).abs().max() < 1e-9


def test_a_cache_of_another_kind_is_refused_without_a_loop():
    model, ids = small_model(**NO_LOOP), random_ids(2, 9)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :6], past_key_values=cache)
        with pytest.raises(ValueError, match="holds 2 rows, but the input has 1"):
            model(ids[:1, 6:], past_key_values=cache)
        logits = model(ids[:, 6:], past_key_values=cache).logits
        assert (logits - model(ids, use_cache=False).logits[:, 6:]).abs().max() < 1e-9
        built_for_none = DynamicCache()
        logits = torch.cat([model(part, past_key_values=built_for_none).logits for part in ids.split(5, dim=1)], dim=1)
        assert (logits - model(ids, use_cache=False).logits).abs().max() < 1e-9
        for count, window in ((2, 4), (3, None)):
            other = MistralConfig(num_hidden_layers=count, sliding_window=window)
            with pytest.raises(
                ValueError, match=r"must be built for this model by DynamicCache\(config=model.config\)"
            ):
                model(ids, past_key_values=DynamicCache(config=other))


LOOP_OR_NOT = pytest.mark.parametrize(
    "options", [{}, {"chunk_sizes": [], "num_core_layers": 0}], ids=["loop", "no loop"]
)


@LOOP_OR_NOT
@pytest.mark.parametrize("other", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("static", [False, True])
def test_states_of_another_dtype_are_refused(static, other, options):
    model, ids = small_model(dtype=torch.float32, **options), random_ids(2, 15)
    cache = new_cache(model, static, 20)
    with torch.no_grad():
        model(ids[:, :9], past_key_values=cache)
        model.to(other)
        with pytest.raises(ValueError, match=f"holds states in torch.float32, but got an input in {other}"):
            model(ids[:, 9:], past_key_values=cache)
        cache.reset()
        logits = [model(part, past_key_values=cache).logits for part in ids.split([9, 1, 5], dim=1)]
        assert cache.layers[0].keys.dtype == cache.layers[-1].keys.dtype == other
        assert (torch.cat(logits, dim=1) - model(ids, use_cache=False).logits).abs().max() < 0.03


UNDER = {"whole": [True] * 4, "later": [False, True, True, True], "first": [True, False, True, False]}


@LOOP_OR_NOT
@pytest.mark.parametrize("under", UNDER.values(), ids=UNDER.keys())
@pytest.mark.parametrize("static", [False, True])
def test_a_cache_under_autocast(static, under, options):
    model, ids = small_model(dtype=torch.float32, **options), random_ids(2, 15)
    cache = new_cache(model, static, 20)
    with torch.no_grad():
        logits = []
        for part, enabled in zip(ids.split([6, 3, 1, 5], dim=1), under, strict=True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                logits.append(model(part, past_key_values=cache).logits)
        assert (torch.cat(logits, dim=1) - model(ids, use_cache=False).logits).abs().max() < 0.03


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])  # GPT-NeoX makes queries and keys by one product
def test_gradients_through_a_cache_of_frozen_keys(attention, family):
    """Queries alone learn, as with adapters of theirs: what is kept for their gradients must not be written to."""
    options = {"layer_family": family, "num_core_layers": 1, "num_key_value_heads": 4}
    model = small_model(**options, attn_implementation=attention)
    model.requires_grad_(False)
    layers = (model.model.prelude[0], model.model.core[0])
    learnt = [layer.self_attn.q_proj.weight.requires_grad_() for layer in layers]
    ids, gradients = random_ids(1, 80), []
    for cached in (False, True):
        if cached:
            cache = DynamicCache(config=model.config)
            parts = [model(part, past_key_values=cache).logits for part in ids[:, :70].split([66, 1, 1, 2], dim=1)]
            logits = torch.cat(parts, dim=1)
        else:
            logits = model(ids[:, :70], use_cache=False).logits
        gradients.append(torch.autograd.grad(logits.square().sum(), learnt))
    for expected, found in zip(*gradients, strict=True):
        assert (expected - found).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize("static", [False, True])
def test_a_refused_input_leaves_the_cache_as_it_was(static):
    model, ids = small_model(), random_ids(1, 15)
    cache = new_cache(model, static, 20)
    bad_calls = (
        {"attention_mask": torch.ones(1, 3)},
        {"attention_mask": {"full_attention": None}},
        {"attention_mask": torch.tensor([[1] * 8 + [0]]), "position_ids": torch.zeros(1, 9, dtype=torch.long)},
        {"position_ids": torch.arange(9)},
        {"position_ids": torch.zeros(1, 9, dtype=torch.long)},
    )
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        for bad in bad_calls:
            with pytest.raises(ValueError):
                model(ids[:, :9], past_key_values=cache, **bad)
        first = model(ids[:, :9], past_key_values=cache).logits
        for bad in bad_calls:
            with pytest.raises(ValueError):
                model(ids[:, 9:], past_key_values=cache, **{**bad, "attention_mask": torch.ones(1, 7)})
        second = model(ids[:, 9:], past_key_values=cache).logits
    assert (torch.cat([first, second], dim=1) - expected).abs().max() < 1e-9


# -- rows that are kept -------------------------------------------------------------------------------------------


@schedules
@pytest.mark.parametrize(
    "kind", [torch.tensor, list, np.array, lambda rows: torch.tensor([row in rows for row in range(3)])]
)
def test_rows_are_kept_whatever_names_them(options, kind):
    model, ids = small_model(**options), random_ids(3, 15)
    rows, cache = [0, 2], DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :9], past_key_values=cache)
        cache.batch_select_indices(kind(rows))
        logits = model(ids[rows, 9:], past_key_values=cache).logits
        assert (logits - model(ids[rows], use_cache=False).logits[:, 9:]).abs().max() < 1e-9


@schedules
@pytest.mark.parametrize(
    "indices", [1, slice(0, 1), torch.tensor(1), torch.tensor([[1]]), torch.tensor([0.5])], ids=str
)
def test_what_names_no_rows_is_refused(options, indices):
    model, ids = small_model(**options), random_ids(3, 15)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :9], past_key_values=cache)
        with pytest.raises(ValueError, match="`indices` must be one dimension of integers or booleans, but got"):
            cache.batch_select_indices(indices)
        logits = model(ids[:, 9:], past_key_values=cache).logits
        assert (logits - model(ids, use_cache=False).logits[:, 9:]).abs().max() < 1e-9
