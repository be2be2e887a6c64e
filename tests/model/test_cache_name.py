"""The cache under its two names: either goes in, the release's own name comes out."""

import pytest
import torch
from support import large_weights, random_ids, small_config, small_model
from transformers import DynamicCache

from modeling_spiralformer import (
    SpiralFormerForQuestionAnswering,
    SpiralFormerForSequenceClassification,
    SpiralFormerForTokenClassification,
)
from modeling_spiralformer.cache_name_spiralformer import CACHE_NAME

NAMES = ("past_key_values", "cache")
HEADS = (
    SpiralFormerForQuestionAnswering,
    SpiralFormerForSequenceClassification,
    SpiralFormerForTokenClassification,
)


def filled(model, ids) -> DynamicCache:
    """A cache that has seen `ids`."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        getattr(model, model.base_model_prefix)(ids, cache=cache)
    return cache


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [{}, {"chunk_sizes": [], "num_core_layers": 0}, {"layer_family": "llama"}, {"layer_family": "qwen3"}],
    ids=["loop", "no loop", "llama", "qwen3"],
)
def test_forward(name, options):
    model, ids = small_model(**options), random_ids(2, 19)
    expected = model(ids, use_cache=False).logits[:, 11:]
    for part in (model, model.model):
        outputs = part(ids[:, 11:], **{name: filled(model, ids[:, :11])})
        assert dict(outputs)[CACHE_NAME].get_seq_length() == 19
        logits = model.lm_head(outputs.last_hidden_state) if part is model.model else outputs.logits
        assert (logits - expected).abs().max() < 1e-9


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head", HEADS)
def test_heads(name, head):
    """The library's own heads: their forward says the release's name, and hands the other one on."""
    model = large_weights(head(small_config())).double().eval()
    ids = random_ids(2, 19)
    whole = model(ids, use_cache=False)
    outputs = model(ids[:, 11:], **{name: filled(model, ids[:, :11])})
    if head is SpiralFormerForQuestionAnswering:
        assert (outputs.start_logits - whole.start_logits[:, 11:]).abs().max() < 1e-9
        return
    is_one_label = head is SpiralFormerForSequenceClassification
    assert (outputs.logits - (whole.logits if is_one_label else whole.logits[:, 11:])).abs().max() < 1e-9
    assert not is_one_label or outputs[CACHE_NAME].get_seq_length() == 19  # the only head whose output has a cache


@pytest.mark.parametrize("name", NAMES)
def test_generate_goes_on_from_the_cache_given(name):
    model, ids = small_model(), random_ids(1, 19)
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    expected = model.generate(ids, use_cache=False, **options).sequences
    cache = filled(model, ids[:, :11])
    fed = []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: fed.append(args[0].shape[1]))
    outputs = model.generate(ids, **options, **{name: cache})
    assert fed == [8] + [1] * 8  # the cached tokens are not read again
    assert outputs[CACHE_NAME] is cache
    assert torch.equal(outputs.sequences, expected)


def test_by_position():
    """The fifth argument, as in the library's GPT-NeoX of either release."""
    model, ids = small_model(), random_ids(2, 19)
    expected = model(ids, use_cache=False).logits[:, 11:]
    outputs = model(ids[:, 11:], None, None, None, filled(model, ids[:, :11]))
    assert (outputs.logits - expected).abs().max() < 1e-9


def test_both_names():
    """None under one name is no cache; one cache under both is one cache; two are refused."""
    model, ids = small_model(), random_ids(2, 19)
    expected = model(ids, use_cache=False).logits[:, 11:]
    for other in NAMES:
        cache = filled(model, ids[:, :11])
        outputs = model(ids[:, 11:], **({"past_key_values": cache, "cache": cache} | {other: None}))
        assert (outputs.logits - expected).abs().max() < 1e-9
    cache = filled(model, ids[:, :11])
    outputs = model(ids[:, 11:], past_key_values=cache, cache=cache)
    assert (outputs.logits - expected).abs().max() < 1e-9
    with pytest.raises(ValueError, match="`past_key_values`.*`cache`.*given once"):
        model(ids[:, 11:], past_key_values=filled(model, ids[:, :11]), cache=filled(model, ids[:, :11]))


def test_flags_have_the_releases_name():
    """Trainer drops the cache from predictions, and device maps leave it where it is, by name."""
    model = small_model()
    assert model.config.keys_to_ignore_at_inference == [CACHE_NAME]
    assert CACHE_NAME in model._skip_keys_device_placement
