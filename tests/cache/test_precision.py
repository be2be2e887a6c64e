"""Keys and values as integers: what a record holds, what the cache must equal, how users reach it, what is refused."""

import copy
import json

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from rounded_keys import rounded, rounded_keys
from support import pad_rows, random_ids, seeded, small_config, small_model
from transformers import DynamicCache, GenerationConfig

from modeling_spiralformer import SpiralFormerQuantizedCache
from modeling_spiralformer.precision_spiralformer import PARAMETER_BYTES, Precision, entry_sizes

NO_HOLES = {"attention_mask": torch.ones(2, 9, dtype=torch.long), "do_sample": False, "max_new_tokens": 12}
NO_HOLES |= {"eos_token_id": None, "pad_token_id": 0}


# -- records ------------------------------------------------------------------------------------------------------


@given(
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([2, 6, 16]),
    groups=st.integers(1, 3),
    shape=st.lists(st.integers(0, 3), max_size=3),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([0, 1e-3, 1, 300]),
    offset=st.sampled_from([0, -1, 50]),
)
@example(bits=8, group_size=2, groups=3, shape=[3], dtype=torch.float16, scale=1e-3, offset=0)  # a step below 6e-5
def test_a_record_holds_each_value_within_half_a_step(bits, group_size, groups, shape, dtype, scale, offset):
    """Packed and read back; `shape` before the channels, columns of none among them."""
    states = torch.randn(*shape, groups * group_size, generator=seeded(0)) * scale + offset
    states = states.to(dtype)
    precision = Precision(bits, group_size)
    records = precision.pack(states)
    assert records.dtype == torch.uint8
    assert records.shape == (*shape, groups * (PARAMETER_BYTES + group_size * bits // 8))
    read = precision.unpack(records, dtype)
    assert read.dtype == dtype and read.shape == states.shape
    by_group = states.double().unflatten(-1, (-1, group_size))
    span = by_group.amax(-1, keepdim=True) - by_group.amin(-1, keepdim=True)
    largest = by_group.abs().amax(-1, keepdim=True)
    bound = span / (2**bits - 1) / 2 + (span + largest) * 2**-8 + 4 * torch.finfo(dtype).eps * (span + largest)
    assert ((read.double().unflatten(-1, (-1, group_size)) - by_group).abs() <= bound).all()
    if dtype == torch.float64:
        assert torch.allclose(read, rounded(states, bits, group_size), atol=1e-12, rtol=1e-12)


def test_records_are_read_wherever_they_lie():
    """As slices of a longer store, at odd addresses too."""
    precision = Precision(4, 6)  # 7 bytes
    states = torch.randn(2, 3, 6, generator=seeded(0))
    records = precision.pack(states)
    store = torch.zeros(2, 5, 7, dtype=torch.uint8)
    store[:, 1:4] = records
    for rows in (slice(0, 1), slice(1, 2), slice(None)):
        for columns in (slice(1, 2), slice(2, 3), slice(1, 4)):
            found = precision.unpack(store[rows, columns], torch.float32)
            moved = slice(columns.start - 1, columns.stop - 1)
            assert torch.equal(found, precision.unpack(records, torch.float32)[rows, moved])


# -- what the cache must equal ------------------------------------------------------------------------------------


CASES = [
    ({"chunk_sizes": [8, 4, 2, 1]}, {8: 8, 4: 8, 2: 8, 1: 8}, None),
    ({"chunk_sizes": [4, 1]}, {4: 4, 1: 8}, 4),
    ({"chunk_sizes": [5, 3], "topology": "anchor", "causal_shifts": [11, 4]}, {5: 16, 3: 4, 1: 8}, 2),
    ({"chunk_sizes": [6, 1], "layer_family": "llama"}, {6: 4, 1: 16}, None),
    ({"chunk_sizes": [4, 2], "layer_family": "qwen3"}, {4: 8, 2: 4, 1: 4}, 2),
    ({"chunk_sizes": [], "num_core_layers": 0}, {1: 4}, None),
]


@pytest.mark.parametrize(("options", "bits", "group_size"), CASES)
@pytest.mark.parametrize("cut", [[23], [1] * 23, [10, 1, 1, 7, 1, 3]], ids=["whole", "by token", "mixed"])
@torch.no_grad()
def test_logits_are_those_of_rounded_keys_however_a_text_is_cut(options, bits, group_size, cut):
    model = small_model(**options)
    ids, mask = pad_rows([random_ids(1, length, seed=length)[0] for length in (23, 20, 12)], "left")
    with rounded_keys(model, bits, group_size):
        expected = model(ids, attention_mask=mask, use_cache=False).logits
    cache, steps, column = SpiralFormerQuantizedCache(model.config, bits, group_size), [], 0
    for count in cut:
        part = slice(column, column + count)
        column += count
        steps.append(model(ids[:, part], attention_mask=mask[:, :column], past_key_values=cache).logits)
    difference = (torch.cat(steps, dim=1) - expected)[mask.bool()].abs().max()
    assert difference < 1e-9
    exact = model(ids, attention_mask=mask, use_cache=False).logits
    assert (exact - expected)[mask.bool()].abs().max() > 1e-4  # rounding is seen at all


@torch.no_grad()
def test_sixteen_bits_keep_what_the_model_computes():
    model, ids = small_model(dtype=torch.float32), random_ids(2, 21)
    found = {}
    for name, cache in {
        "plain": DynamicCache(config=model.config),
        "16": SpiralFormerQuantizedCache(model.config, 16),
        "none named": SpiralFormerQuantizedCache(model.config, {}),
    }.items():
        found[name] = torch.cat(
            [model(part, past_key_values=cache).logits for part in ids.split([9, *[1] * 12], 1)], 1
        )
        assert all(layer.keys.dtype == torch.float32 for layer in cache.layers)
    assert torch.equal(found["16"], found["plain"]) and torch.equal(found["none named"], found["plain"])


@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_bytes_are_those_of_the_records(bits):
    config = small_config(chunk_sizes=[8, 2], hidden_size=64, num_attention_heads=2)
    model = small_model(chunk_sizes=[8, 2], hidden_size=64, num_attention_heads=2, dtype=torch.float32)
    cache = SpiralFormerQuantizedCache(config, {8: bits, 1: 4}, 16)
    model(random_ids(1, 320), past_key_values=cache)
    assert entry_sizes(config) == [1, 8, 8, 2, 2, 1]
    for layer, size in zip(cache.layers, entry_sizes(config), strict=True):
        head = {8: 2 * (4 + 16 * bits // 8), 2: 32 * 4, 1: 2 * (4 + 8)}[size]
        assert layer.keys.nbytes == layer.values.nbytes == 320 // size * 2 * head


# -- how users reach it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_generate_builds_it_and_writes_what_rounded_keys_write(how):
    model, ids = small_model(chunk_sizes=[4, 2, 1]), random_ids(2, 9)
    bits = {4: 8, 2: 8, 1: 4}
    scores = {"output_scores": True, "return_dict_in_generate": True}
    quantised = {"cache_implementation": "quantized", "cache_config": {"nbits": bits, "q_group_size": 4}}
    found = model.generate(ids, **NO_HOLES, **how, **scores, **quantised)
    assert isinstance(found.past_key_values, SpiralFormerQuantizedCache)
    with rounded_keys(model, bits, 4):
        expected = model.generate(ids, **NO_HOLES, **how, **scores, use_cache=False)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.allclose(torch.stack(found.scores), torch.stack(expected.scores), atol=1e-9, rtol=0)


def test_assisted_decoding_takes_back_what_it_refuses():
    """The draft proposes badly: tokens of most steps are cropped away."""
    model, draft, ids = small_model(), small_model(seed=1, chunk_sizes=[2]), random_ids(1, 9)
    how = NO_HOLES | {"attention_mask": torch.ones(1, 9, dtype=torch.long)}
    quantised = {"cache_implementation": "quantized", "cache_config": {"nbits": 4}}
    found = model.generate(ids, **how, **quantised, assistant_model=draft)
    with rounded_keys(model, {4: 4, 2: 4, 1: 4}):
        expected = model.generate(ids, **how, use_cache=False)
    assert torch.equal(found, expected)


def test_the_choice_survives_a_saved_generation_config(tmp_path):
    """JSON makes strings of the chunk sizes."""
    saved = GenerationConfig(cache_implementation="quantized", cache_config={"nbits": {1: 4, 4: 8}})
    saved.save_pretrained(tmp_path)
    assert "4" in json.loads((tmp_path / "generation_config.json").read_text())["cache_config"]["nbits"]
    model, loaded = small_model(), GenerationConfig.from_pretrained(tmp_path)
    outputs = model.generate(
        random_ids(1, 5), generation_config=loaded, max_new_tokens=2, return_dict_in_generate=True, pad_token_id=0
    )
    kept = [None if layer.precision is None else layer.precision.bits for layer in outputs.past_key_values.layers]
    assert kept == [4, 8, 8, None, None, 4, 4, 4]


def test_a_view_has_its_own():
    view = small_model(chunk_sizes=[4, 2, 1]).with_schedule([4])
    with pytest.raises(ValueError, match=r"`nbits` must be for some of the chunk sizes \[1, 4\]"):
        SpiralFormerQuantizedCache(view.config, {2: 8})
    with torch.no_grad():
        ids, cache = random_ids(1, 11), SpiralFormerQuantizedCache(view.config, {4: 4})
        steps = [view(part, past_key_values=cache).logits for part in ids.split(1, dim=1)]
        with rounded_keys(view, {4: 4}):
            expected = view(ids, use_cache=False).logits
    assert (torch.cat(steps, dim=1) - expected).abs().max() < 1e-9


# -- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nbits": 2}, r"`nbits` must be one of \[4, 8, 16\]"),
        ({"nbits": 8.0}, r"`nbits` must be one of \[4, 8, 16\]"),
        ({"nbits": {4: 8.0}}, r"`nbits` must be one of \[4, 8, 16\]"),
        ({"nbits": True}, "`nbits`"),
        ({"nbits": None}, "`nbits`"),
        ({"nbits": {4: 8.5}}, "`nbits`"),
        ({"nbits": {3: 8}}, r"`nbits` must be for some of the chunk sizes \[1, 2, 4\]"),
        ({"nbits": {"1.0": 8}}, "chunk sizes"),
        ({"nbits": {1: 4, "1": 8}}, "`nbits` must be each chunk size once, be it a number or a word, but got"),
        ({"q_group_size": 3}, "`q_group_size` must be None or a divisor of 8"),
        ({"q_group_size": 0}, "`q_group_size`"),
        ({"q_group_size": -4}, "`q_group_size`"),
        ({"q_group_size": True}, "`q_group_size`"),
        ({"q_group_size": 4.0}, "`q_group_size`"),
        ({"q_group_size": 1, "nbits": {1: 4}}, "`q_group_size` must be even with 4 bits"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SpiralFormerQuantizedCache(small_config(), **options)
    with pytest.raises(ValueError, match=message):
        small_model().generate(
            random_ids(1, 3), max_new_tokens=1, cache_implementation="quantized", cache_config=options
        )


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"past_key_values": "one of its own"},
    ],
)
def test_options_of_a_cache_that_is_not_quantised_are_refused(how):
    model = small_model()
    if "past_key_values" in how:
        how = {"past_key_values": DynamicCache(config=model.config)}
    with pytest.raises(
        ValueError, match="`cache_config` must be None where `cache_implementation` is not 'quantized'"
    ):
        model.generate(random_ids(1, 9), cache_config={"nbits": 4}, max_new_tokens=2, **how)


@pytest.mark.parametrize("options", [{"backend": "quanto"}, {"residual_length": 64}, {"nbits": 4, "axis_key": 0}])
def test_options_of_the_librarys_layers_are_refused(options):
    with pytest.raises(ValueError, match=r"`cache_config` must hold `nbits` and `q_group_size` alone, but got \['"):
        small_model().generate(
            random_ids(1, 3), max_new_tokens=1, cache_implementation="quantized", cache_config=options
        )


def test_a_call_that_records_gradients_is_refused_and_leaves_the_cache():
    model, ids = small_model(), random_ids(1, 9)
    cache = SpiralFormerQuantizedCache(model.config)
    with pytest.raises(ValueError, match="gradients"):
        model(ids, past_key_values=cache)
    with torch.no_grad():
        first = model(ids, past_key_values=cache).logits
        kept = copy.deepcopy(cache)
    with pytest.raises(ValueError, match="gradients"):
        model(ids[:, :1], past_key_values=cache)
    with torch.inference_mode():
        assert torch.equal(
            model(ids[:, :1], past_key_values=cache).logits, model(ids[:, :1], past_key_values=kept).logits
        )
    assert first.isfinite().all()


def test_a_cache_and_the_name_of_one_are_not_taken_together():
    model = small_model()
    cache = SpiralFormerQuantizedCache(model.config)
    with pytest.raises(ValueError, match="Passing both"):
        model.generate(random_ids(1, 3), max_new_tokens=1, past_key_values=cache, cache_implementation="quantized")


@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_offloaded_caches_are_refused_with_what_to_take_instead(kind):
    with pytest.raises(ValueError, match=r'`cache_implementation` must not be .* quantise .*"quantized"'):
        small_model().generate(random_ids(1, 3), max_new_tokens=1, cache_implementation=kind)
