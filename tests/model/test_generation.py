"""generate() with the cache against generate() without: equal tokens, and equal logits to 1e-9, in every mode."""

import pytest
import torch
from support import pad_rows, random_ids, small_model
from transformers import DynamicCache, set_seed

SCHEDULES = {
    "powers of two": {"chunk_sizes": [8, 4, 2, 1]},
    "streams": {"chunk_sizes": [3, 1], "topology": "hyper_connections"},
    "coprime": {"chunk_sizes": [5, 3], "chunk_offsets": [0, 2], "causal_shifts": [6, 9], "topology": "anchor"},
    "small cache": {"chunk_sizes": [8, 4, 2], "down_scaling": "mean", "share_core": False},
    "no loop": {"chunk_sizes": [], "num_core_layers": 0},
    "llama": {"layer_family": "llama", "chunk_sizes": [6, 1], "num_core_layers": 1},
    "qwen3": {"layer_family": "qwen3", "chunk_sizes": [4, 3], "num_core_layers": 1, "topology": "residual"},
}
schedule = pytest.mark.parametrize("options", SCHEDULES.values(), ids=SCHEDULES.keys())


LENGTHS = {"none": (19, 19, 19, 19), "some": (19, 14, 6, 18), "all": (16, 14, 6, 18)}  # of prompts in 19 columns


def prompts(padded: str = "some") -> dict:
    """Four prompts, none, some (by odd numbers) or all of them padded, as generate() takes them."""
    ids, mask = pad_rows([random_ids(1, n, seed=n)[0] for n in LENGTHS[padded]], "left", total=19)
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, inputs: dict, **options):
    """Runs generate(), greedy and 24 tokens long unless asked otherwise; returns tokens and per-step logits."""
    defaults = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    outputs = model.generate(**inputs, **{**defaults, **options}, return_dict_in_generate=True, output_logits=True)
    return outputs.sequences, torch.stack(outputs.logits)


def check_equal(model, inputs: dict, cached: dict | None = None, **options):
    """Compares a cached run (with the extra options `cached`) with an uncached one."""
    set_seed(0)
    expected, expected_logits = generate(model, inputs, use_cache=False, **options)
    set_seed(0)
    tokens, logits = generate(model, inputs, **options, **(cached or {}))
    assert torch.equal(tokens, expected)
    assert (logits - expected_logits).abs().max() < 1e-9
    assert len(expected.unique()) > 5  # a model that says one word would agree with anything


padding = pytest.mark.parametrize("padded", ["some", "all"])


@schedule
@pytest.mark.parametrize("padded", LENGTHS)
def test_greedy(options, padded):
    check_equal(small_model(**options), prompts(padded))


@schedule
@padding
def test_sampling(options, padded):
    check_equal(small_model(**options), prompts(padded), do_sample=True, top_k=20, temperature=1.5)


@schedule
@padding
@pytest.mark.parametrize("beams", [4, 8])
def test_beams(options, beams, padded):
    check_equal(small_model(**options), prompts(padded), num_beams=beams, num_return_sequences=3)


@schedule
def test_several_return_sequences(options):
    check_equal(small_model(**options), prompts(), do_sample=True, num_return_sequences=3)


@schedule
@padding
@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_chunked_prefill(options, chunk, padded):
    """The chunk of 1 feeds columns that are padding in some rows, in all but one, or in all, one at a time."""
    check_equal(small_model(**options), prompts(padded), cached={"prefill_chunk_size": chunk})


@schedule
@pytest.mark.parametrize("draft", ["same", "smaller"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_assisted(options, draft, do_sample):
    model = small_model(**options)
    assistant = (
        small_model(chunk_sizes=[4, 1], num_core_layers=1, seed=3) if draft == "smaller" else small_model(**options)
    )
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.assistant_confidence_threshold = 0.0
    inputs = {"input_ids": random_ids(1, 13)}
    expected, expected_logits = generate(model, inputs, use_cache=False)
    tokens, logits = generate(model, inputs, assistant_model=assistant)
    assert torch.equal(tokens, expected) and (logits - expected_logits).abs().max() < 1e-5  # float32 inside generate
    if do_sample:  # nothing to compare a speculative sample with, but its logits are those of its text
        set_seed(0)
        tokens, logits = generate(model, inputs, assistant_model=assistant, do_sample=True, top_k=0)
        with torch.no_grad():
            replayed = model(tokens, use_cache=False).logits[0, 12:-1]
        assert (logits[:, 0] - replayed).abs().max() < 1e-5


@schedule
def test_prompt_lookup(options):
    model = small_model(**options)
    inputs = {"input_ids": random_ids(1, 7).repeat(1, 4)}
    expected, expected_logits = generate(model, inputs, use_cache=False)
    tokens, logits = generate(model, inputs, prompt_lookup_num_tokens=6)
    assert torch.equal(tokens, expected) and (logits - expected_logits).abs().max() < 1e-5


@schedule
def test_assisted_decoding_that_generates_the_pad_token(options):
    """The mask that generate() infers from pad ids while it continues counts leading pads only."""
    model = small_model(**options)
    inputs = {"input_ids": random_ids(1, 13)}
    word = generate(model, inputs, use_cache=False)[0][0, 16]
    with torch.no_grad():  # the pad token now beats that word
        model.lm_head.weight[0] = 1.5 * model.lm_head.weight[word]
    assistant = small_model(chunk_sizes=[4, 1], num_core_layers=1, seed=3)
    expected, _ = generate(model, inputs, use_cache=False, pad_token_id=0, eos_token_id=2)
    tokens, _ = generate(model, inputs, assistant_model=assistant, pad_token_id=0, eos_token_id=2)
    assert torch.equal(tokens, expected)
    assert (expected[:, 13:] == 0).any(), "no pad token was generated: the test shows nothing"


@schedule
@padding
def test_continuing_from_a_users_cache(options, padded):
    """Three turns of a chat: text, answer, more text, on one cache."""
    model, inputs = small_model(**options), prompts(padded)
    cache = DynamicCache(config=model.config)
    for turn in range(3):
        expected, _ = generate(model, inputs, use_cache=False, max_new_tokens=9)
        tokens, _ = generate(model, inputs, past_key_values=cache, max_new_tokens=9)
        assert torch.equal(tokens, expected)
        more = random_ids(4, 5 + turn, seed=turn)
        ones = torch.ones(4, tokens.shape[1] + more.shape[1] - inputs["attention_mask"].shape[1], dtype=torch.long)
        inputs = {
            "input_ids": torch.cat([tokens, more], dim=1),
            "attention_mask": torch.cat([inputs["attention_mask"], ones], dim=1),
        }


@schedule
@padding
def test_embedded_prompts(options, padded):
    model, inputs = small_model(**options), prompts(padded)
    embedded = {
        "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach(),
        "attention_mask": inputs["attention_mask"],
    }
    expected, expected_logits = generate(model, inputs, use_cache=False)
    tokens, logits = generate(model, embedded)
    assert torch.equal(tokens, expected[:, 19:]) and (logits - expected_logits).abs().max() < 1e-9


@schedule
@padding
def test_prompts_that_end_in_finished_rows(options, padded):
    """Rows that meet eos early are padded on; the others must not notice."""
    model, inputs = small_model(**options), prompts(padded)
    expected, _ = generate(model, inputs, use_cache=False, max_new_tokens=40)
    stop = int(expected[0, 24])
    one, _ = generate(model, inputs, use_cache=False, max_new_tokens=40, eos_token_id=stop)
    two, _ = generate(model, inputs, max_new_tokens=40, eos_token_id=stop)
    assert torch.equal(one, two) and (one == stop).any()


@schedule
def test_generate_builds_the_cache_itself(options):
    model = small_model(**options)
    outputs = model.generate(random_ids(1, 9), max_new_tokens=4, return_dict_in_generate=True, eos_token_id=None)
    cache = outputs.past_key_values
    assert type(cache) is DynamicCache and len(cache.layers) == model.config.num_hidden_layers
    assert cache.get_seq_length() == 12


@pytest.mark.parametrize("size", [0, -3])
def test_a_prefill_in_chunks_of_nothing_is_refused(size):
    for how in ({}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(ValueError, match=f"`prefill_chunk_size` must be >= 1, but got {size}"):
            small_model().generate(random_ids(1, 9), prefill_chunk_size=size, max_new_tokens=2, **how)


@pytest.mark.parametrize("how", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": small_model()}])
def test_a_prefill_in_chunks_is_refused_where_none_is_made(how):
    with pytest.raises(ValueError, match="`prefill_chunk_size` must be None in assisted and prompt-lookup decoding"):
        small_model().generate(random_ids(1, 9), prefill_chunk_size=4, max_new_tokens=2, **how)
