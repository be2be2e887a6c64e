"""Continuous batching: each request as it is alone, whatever runs beside it and wherever its blocks lie."""

import asyncio
import importlib.util
import inspect
import math
import re

import pytest
import torch
import transformers
from batched_requests import LENGTHS, NEW, alone, check, counting_tokens, decoding, make_model, prompts, settings
from documents import ROOT
from packaging import version
from support import random_ids
from transformers import AutoTokenizer, CompileConfig, ContinuousBatchingConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation import stopping_criteria
from transformers.generation import utils as generation_utils
from transformers.generation.continuous_batching import cache as library_cache
from transformers.generation.continuous_batching import continuous_api, initialization, requests, scheduler

from modeling_spiralformer import request_attention_spiralformer
from modeling_spiralformer.cache_name_spiralformer import EAGER_READS_PAGES
from modeling_spiralformer.chunking_spiralformer import ChunkGrid
from modeling_spiralformer.continuous_spiralformer import (
    ALLOCATORS,
    GROUPS,
    MEMORY,
    PRIVATE,
    TOKEN_LAYERS,
    SpiralFormerAllocator,
    these_blocks,
)
from modeling_spiralformer.paging_spiralformer import kept_counts

if version.parse(transformers.__version__) < version.parse("5.23"):
    pytest.skip("needs transformers 5.23 or later", allow_module_level=True)

MODELS = {
    "mesh": {"chunk_sizes": [8, 4, 2, 1]},
    "odd shifts": {"chunk_sizes": [4, 3, 1], "chunk_offsets": [3, 0, 0], "causal_shifts": [9, 2, 3]}
    | {"topology": "residual", "down_scaling": "mean", "up_scaling": "broadcast", "use_parallel_residual": False},
    "own cores, tied": {"share_core": False, "tie_word_embeddings": True, "topology": "anchor"},
    "llama": {"layer_family": "llama", "chunk_sizes": [6, 2]},
    "streams": {"topology": "hyper_connections", "chunk_sizes": [4, 1]},
    "qwen3": {"layer_family": "qwen3", "num_coda_layers": 0},
    "no token layers": {"chunk_sizes": [1, 1], "num_prelude_layers": 0, "num_coda_layers": 0},
    "no loop": {"chunk_sizes": [], "num_core_layers": 0},
}
models = pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())


@models
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_every_request_is_what_it_is_alone(options, implementation):
    model = make_model(implementation, **options)
    if implementation == "eager" and version.parse(transformers.__version__) < version.parse("5.24"):
        with pytest.raises(ValueError, match="`attn_implementation` must be sdpa .* but got 'eager'"):
            model.init_continuous_batching(decoding(), settings())
        return
    read = check(model, prompts(), settings())
    assert read == sum(LENGTHS) + len(LENGTHS) * (NEW - 1)  # each token once
    assert model.config._attn_implementation == implementation


def test_a_view_of_some_iterations():
    model = make_model(chunk_sizes=[8, 4, 2, 1])
    check(model.with_schedule([4, 1]), prompts(), settings())
    check(model, prompts(), settings())


@models
def test_a_shared_beginning_is_computed_once(options):
    """Seven prompts of ten whole pages and a little, all but the last tokens the same."""
    model, beginning = make_model(**options), random_ids(1, 240, seed=5)[0].tolist()
    texts = [beginning + random_ids(1, n, seed=n)[0].tolist() for n in (1, 5, 9, 23, 24, 25, 30)]
    once, again = (check(model, texts, settings(allow_block_sharing=sharing), new=4) for sharing in (True, False))
    assert again == sum(map(len, texts)) + 3 * len(texts)
    assert once <= again - 4 * 240  # the first ones run side by side, before there is anything to share


@models
def test_a_cache_that_is_too_small_computes_again(options):
    model, texts = make_model(**options), prompts((40, 41, 42, 43))
    sharing = {"allow_block_sharing": False, "max_batch_tokens": 96}
    # Two requests fit to their end, or a little more; the library drops one and begins it again.
    bytes_needed = 2 * -(-(43 + 40) // 24)
    read = check(model, texts, settings(num_blocks=bytes_needed, **sharing), new=40)
    whole = check(model, texts, settings(num_blocks=200, **sharing), new=40)
    assert whole == sum(map(len, texts)) + 4 * 39
    assert read > whole


@models
def test_several_texts_of_one_prompt_fork_its_blocks(options):
    model = make_model(**options)
    likeliest = decoding(do_sample=True, top_k=1, num_return_sequences=3)
    results = model.generate_batch(prompts((29, 50)), likeliest, settings())
    assert len(results) == 6
    expected = {tuple(prompt): alone(model, prompt)[0] for prompt in prompts((29, 50))}
    for result in results.values():
        assert result.generated_tokens == expected[tuple(result.prompt_ids)]


def test_requests_with_settings_of_their_own_come_and_go():
    """Streamed, cancelled, ended by a token of its own, and one that samples the likeliest of one."""
    model = make_model(chunk_sizes=[4, 2, 1])
    texts = prompts((20, 33, 11, 26))
    expected = [alone(model, prompt, 30)[0] for prompt in texts]
    manager = model.init_continuous_batching(
        decoding(do_sample=True, top_k=40, temperature=0.9), settings(per_request_processors=True)
    )
    manager.start()
    try:
        greedy = {"top_k": 1}
        end = expected[2][17]
        manager.add_request(texts[0], "streamed", max_new_tokens=30, streaming=True, **greedy)
        manager.add_request(texts[1], "cancelled", max_new_tokens=1_000, **greedy)
        manager.add_request(texts[2], "ended", max_new_tokens=30, eos_token_id=end, **greedy)
        manager.add_request(texts[3], "free", max_new_tokens=30, temperature=5.0)
        seen, last = [], {}
        for result in manager:
            if result.request_id == "streamed":
                seen.append(list(result.generated_tokens))
                if len(seen) == 3:
                    manager.cancel_request("cancelled")
            last[result.request_id] = result
            if {"streamed", "ended", "free"} <= {name for name, one in last.items() if one.is_finished()}:
                break
    finally:
        manager.stop(block=True)
    assert len(seen) > 10 and seen[-1] == expected[0]
    assert all(part == expected[0][: len(part)] for part in seen)
    assert last["ended"].generated_tokens == expected[2][: expected[2].index(end) + 1]
    assert len(last["free"].generated_tokens) == 30 and last["free"].generated_tokens != expected[3]
    assert "cancelled" not in last or not last["cancelled"].is_finished()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "tokenization")


def stopped_alone(model, tokenizer, prompt: list[int], stop: str | list[str], new: int) -> list[int]:
    """The greedy text of one prompt up to a stop string, by generate()."""
    how = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    out = model.generate(torch.tensor([prompt]), **how, stop_strings=stop, tokenizer=tokenizer)
    return out[0, len(prompt) :].tolist()


def stop_string(model, tokenizer, prompt: list[int], at: int) -> str:
    """What begins within a token of its greedy text, that at `at`, and ends within the next but one."""
    tokens = model.generate(torch.tensor([prompt]), max_new_tokens=at + 3, do_sample=False, pad_token_id=0)[0, -3:]
    first, second, third = (tokenizer.decode([token]) for token in tokens)
    return first[-1:] + second + third[:1]


def test_stop_strings_end_texts_where_generate_ends_them(tokenizer):
    """Strings that begin in one token and end in another, in some texts and not in others."""
    model = make_model(chunk_sizes=[4, 2, 1], vocab_size=4096, seed=5)
    texts = prompts((20, 33, 11, 26))
    stops = [stop_string(model, tokenizer, texts[0], 0), stop_string(model, tokenizer, texts[2], 4)]
    expected = [stopped_alone(model, tokenizer, prompt, stops, 30) for prompt in texts]
    assert len(expected[0]) == 3 and len(expected[2]) == 7 and 30 in map(len, expected)
    for per_text in (1, 2):
        likeliest = {} if per_text == 1 else {"do_sample": True, "top_k": 1}
        config = decoding(max_new_tokens=30, stop_strings=stops, num_return_sequences=per_text, **likeliest)
        results = model.generate_batch(texts, config, settings(), tokenizer=tokenizer)
        assert [one.generated_tokens for one in results.values()] == [
            text for text in expected for _ in range(per_text)
        ]


def test_requests_have_stop_strings_of_their_own(tokenizer):
    """Streamed or not, and one cancelled; the manager remembers none of them."""
    model = make_model(chunk_sizes=[4, 2, 1], vocab_size=4096, seed=5)
    texts, new = prompts((20, 33, 40, 26)), 25
    first, last = (stop_string(model, tokenizer, texts[number], at) for number, at in ((0, 0), (3, 7)))
    stops = [first, "no", ["neither", "nor"], [last]]
    expected = [stopped_alone(model, tokenizer, prompt, stop, new) for prompt, stop in zip(texts, stops, strict=True)]
    assert len(expected[0]) == 3 and len(expected[2]) == new and len(expected[3]) == 10
    manager = model.init_continuous_batching(decoding(max_new_tokens=new), settings(), tokenizer=tokenizer)
    manager.start()
    outputs: dict[str, list] = {name: [] for name in "0123"}
    try:
        for number, (prompt, stop) in enumerate(zip(texts, stops, strict=True)):
            manager.add_request(prompt, str(number), streaming=number == 0, stop_strings=stop)
        manager.cancel_request("1")
        for result in manager:
            outputs[result.request_id].append(result)
            if all(outputs[name] and outputs[name][-1].is_finished() for name in "023"):
                break
    finally:
        manager.stop(block=True)
    assert len(outputs["0"]) == len(expected[0]) and not outputs["1"]
    for name in "023":
        assert outputs[name][-1].error is None and outputs[name][-1].generated_tokens == expected[int(name)]
    assert len(outputs["2"]) == len(outputs["3"]) == 1
    assert not manager.output_router.watched
    with pytest.raises(ValueError, match="`tokenizer` must be given with `stop_strings`, but got None"):
        model.init_continuous_batching(decoding(), settings()).add_request([3, 4], stop_strings="x")


@pytest.mark.parametrize("stop", [None, "never"])
def test_nothing_of_a_cancelled_request_stays(tokenizer, stop):
    """Whether it runs or waits: the library would keep the handler of a client that has gone."""
    model, outputs = make_model(chunk_sizes=[4, 1], vocab_size=4096), []
    manager = model.init_continuous_batching(decoding(), settings(max_requests_per_batch=1), tokenizer=tokenizer)

    async def serve():
        for name, new in (("runs", 1000), ("waits", 5)):
            manager.register_result_handler(name, outputs.append)
            manager.add_request(prompts((9,))[0], name, max_new_tokens=new, streaming=True, stop_strings=stop)
        manager.start()
        while len(outputs) < 3:
            await asyncio.sleep(0.01)
        for name in ("runs", "waits"):
            manager.cancel_request(name)
        manager.register_result_handler("last", outputs.append)
        manager.add_request(prompts((7,))[0], "last", max_new_tokens=2)
        while outputs[-1].request_id != "last":
            await asyncio.sleep(0.01)

    try:
        asyncio.run(asyncio.wait_for(serve(), timeout=120))
    finally:
        manager.stop(block=True)
    assert outputs[-1].generated_tokens == alone(model, prompts((7,))[0], 2)[0]
    assert not manager.output_router.result_handlers and not manager.output_router.watched


def test_a_dropped_request_still_stops(tokenizer):
    """In a cache for two requests and a little more, of which all have a stop string that the third comes to late."""
    model = make_model(chunk_sizes=[4, 2, 1], vocab_size=4096, seed=5)
    texts, new = prompts((40, 41, 42, 43)), 40
    stops = [stop_string(model, tokenizer, texts[2], 35), "never"]
    expected = [stopped_alone(model, tokenizer, prompt, stops, new) for prompt in texts]
    assert list(map(len, expected)) == [40, 40, 38, 40]
    small = settings(num_blocks=2 * -(-(43 + 40) // 24), allow_block_sharing=False, max_batch_tokens=96)
    with counting_tokens(model) as read:
        results = model.generate_batch(
            texts, decoding(max_new_tokens=new, stop_strings=stops), small, tokenizer=tokenizer
        )
    assert [one.generated_tokens for one in results.values()] == expected
    assert read[0] > sum(map(len, texts)) + sum(map(len, expected)) - len(texts)


def test_requests_of_very_unequal_length():
    """One of one token beside one of 700, which comes in parts; and texts of one and of 120 new tokens."""
    model = make_model(chunk_sizes=[8, 4, 1])
    texts, new = prompts((1, 700, 2, 350)), (60, 1, 12, 2)
    batching = settings(num_blocks=128, max_batch_tokens=64, return_logprobs=True)
    manager = model.init_continuous_batching(decoding(), batching)
    manager.start()
    results = {}
    try:
        for number, (prompt, count) in enumerate(zip(texts, new, strict=True)):
            manager.add_request(prompt, str(number), max_new_tokens=count)
        while len(results) < len(texts) and manager.is_running():
            if result := manager.get_result(timeout=1):
                results[result.request_id] = result
    finally:
        manager.stop(block=True)
    for number, (prompt, count) in enumerate(zip(texts, new, strict=True)):
        tokens, logprobs = alone(model, prompt, count)
        assert results[str(number)].generated_tokens == tokens
        assert (torch.tensor(results[str(number)].logprobs) - logprobs).abs().max() < 1e-4


def test_blocks_hold_what_the_formula_says():
    """Keys and values of each layer at its resolution, and the state of each resolution once a block."""
    model = make_model(chunk_sizes=[8, 4, 2, 1], layer_family="llama")
    config, page = model.config, 48
    with these_blocks():
        allocator = library_cache.ATTN_TYPE_TO_ALLOCATOR[TOKEN_LAYERS](
            index=0,
            config=config,
            num_key_value_heads=config.num_key_value_heads,
            cache_dtype=torch.float32,
            page_size=page,
            layer_indices=library_cache.group_layers_by_attn_type(config)[TOKEN_LAYERS],
            allow_block_sharing=True,
        )
    assert type(allocator) is SpiralFormerAllocator
    entry = 2 * config.num_key_value_heads * config.resolved_head_dim * 4  # bytes of one token in one layer
    layers = config.num_prelude_layers + config.num_coda_layers
    layers += config.num_core_layers * sum(1 / size for size in config.chunk_sizes)
    states = sum(sum(kept_counts(grid)) for grid in ChunkGrid.of(config)) * config.hidden_size * 4
    needed = entry * page * layers + states
    assert needed <= allocator.bytes_per_block < needed + entry * page  # rounded up to a page


# -- the library's private names --------------------------------------------------------------------------------------


def test_the_names_that_say_how_blocks_are_built_are_there_and_are_put_back():
    modules = (library_cache, initialization)
    places = [(module, name) for module in modules for name in (ALLOCATORS, GROUPS)] + [(library_cache, MEMORY)]
    before = [getattr(*place) for place in places]
    assert before[0][TOKEN_LAYERS] is library_cache.FullAttentionCacheAllocator
    check(make_model(), prompts((5, 9)), settings(), new=2)
    assert all(now is then for now, then in zip([getattr(*place) for place in places], before, strict=True))


@pytest.mark.parametrize("owner", PRIVATE)
def test_the_names_that_no_page_documents_are_there(owner):
    places = (continuous_api, requests, scheduler, generation_utils, stopping_criteria)
    (found,) = {getattr(place, owner) for place in places if hasattr(place, owner)}
    set_by_itself = re.findall(r"self\.(\w+)", inspect.getsource(found))
    known = {*dir(found), *getattr(found, "__dataclass_fields__", ()), *set_by_itself}
    assert {*PRIVATE[owner]} <= known


def test_attention_is_put_back():
    """While there is a manager, and no longer, layers attend request by request; another call has its own mask."""
    model = make_model()
    manager = model.init_continuous_batching(decoding(), settings())
    assert model.config._attn_implementation.startswith("sdpa_by_request")
    ids = torch.tensor(prompts((9,)))
    meanwhile = model(ids).logits
    manager.start()
    manager.stop(block=True)
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(meanwhile, model(ids).logits)


def test_other_models_keep_their_blocks_meanwhile():
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    with these_blocks():
        other = LlamaForCausalLM(config).eval()
        other.generation_config.eos_token_id = None
        results = other.generate_batch(prompts((5, 30)), decoding(), settings())
    for prompt, result in zip(prompts((5, 30)), results.values(), strict=True):
        assert result.generated_tokens == alone(other, prompt)[0]


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batching", "generation", "names"),
    [
        ({"page_size": 26}, {}, "`page_size` must be a multiple of all chunk sizes .* of 4, but got 26"),
        ({"use_cuda_graph": True}, {}, "`use_cuda_graph` must be left out, but got True"),
        ({"use_cuda_graph": (False, True)}, {}, "`use_cuda_graph`"),
        ({"q_padding_interval_size": 64}, {}, "`q_padding_interval_size` must be left out, but got 64"),
        ({"kv_padding_interval_size": 64}, {}, "`kv_padding_interval_size`"),
        ({"default_compile_level": 1}, {}, "`default_compile_level`"),
        ({"varlen_compile_config": {"mode": "default"}}, {}, "`varlen_compile_config`"),
        ({}, {"num_beams": 3}, "decodes greedily or by sampling, but got beam_search"),
        ({}, {"stop_strings": ["x"]}, "`tokenizer` must be given with `stop_strings`, but got None"),
        ({}, {"repetition_penalty": 1.5}, "at scores alone, but got RepetitionPenaltyLogitsProcessor"),
        ({}, {"no_repeat_ngram_size": 2}, "at scores alone, but got NoRepeatNGramLogitsProcessor"),
        ({}, {"bad_words_ids": [[5, 6]]}, "at scores alone, but got NoBadWordsLogitsProcessor"),
        (
            {"drop_unsupported_processors": False},
            {"min_new_tokens": 3, "eos_token_id": 5},
            "at scores alone, but got Min",
        ),
        ({}, {"max_time": 1.0}, "`max_time` must be None in"),
        ({}, {"cache_implementation": "static"}, "`cache_implementation` must be None or 'paged' in"),
        ({}, {"output_scores": True}, "`output_scores` must be None or False in"),
        ({}, {"output_hidden_states": True}, "`output_hidden_states` must be None or False in"),
        ({}, {"token_healing": True}, "`token_healing` must be None or False in"),
        ({}, {"compile_config": CompileConfig()}, "`compile_config` must be None in"),
        (
            {},
            {"max_length": 9, "max_new_tokens": None},
            "`max_length` must be None in.*but got 9: give `max_new_tokens",
        ),
    ],
    ids=str,
)
def test_what_it_cannot_follow_is_refused(batching, generation, names):
    with pytest.raises(ValueError, match=names):
        make_model(chunk_sizes=[4, 1]).generate_batch([[3, 4, 5]], decoding(**generation), settings(**batching))


def test_a_length_is_refused_where_a_request_gives_no_count():
    model = make_model()
    manager = model.init_continuous_batching(decoding(max_length=9, max_new_tokens=None), settings())
    with pytest.raises(ValueError, match="`max_length` must be None in.*but got 9: give `max_new_tokens"):
        manager.add_request([3, 4, 5])
    manager.start()
    try:
        name = manager.add_request(prompts()[0], max_new_tokens=2)
        assert manager.get_result(name, timeout=60).generated_tokens == alone(model, prompts()[0], 2)[0]
    finally:
        manager.stop(block=True)


def test_generate_names_the_kind_of_cache_that_it_has_not():
    with pytest.raises(ValueError, match=r"`cache_implementation` must not be 'paged' in generate\(\)"):
        make_model().generate(torch.tensor([[3, 4, 5]]), cache_implementation="paged", max_new_tokens=2)


@pytest.mark.filterwarnings("ignore:Passing ContinuousBatchingConfig:FutureWarning")
def test_settings_may_lie_in_the_generation_configuration():
    """As they did in earlier releases of the library."""
    model, texts = make_model(chunk_sizes=[4, 1]), prompts()[:2]
    try:
        how = decoding(continuous_batching_config=settings(return_logprobs=True))
        for _ in range(2):
            found = model.generate_batch(texts, how, persistent_manager=True)
            assert all(len(result.logprobs) == NEW for result in found.values())
    finally:
        model.destroy_cached_continuous_batching_manager()
    with pytest.raises(ValueError, match="`page_size` must be a multiple of all chunk sizes"):
        model.generate_batch(texts, decoding(continuous_batching_config=settings(page_size=26)))


@pytest.mark.parametrize("stops", [None, ["never written"]])
@pytest.mark.parametrize("hard_stop", [False, True])
def test_an_id_is_of_one_request_at_a_time(hard_stop, stops, tokenizer):
    model = make_model(vocab_size=len(tokenizer))
    manager = model.init_continuous_batching(decoding(), settings(), tokenizer=tokenizer)
    manager.add_request(prompts()[0], "x", stop_strings=stops)
    manager.stop()  # which has not begun: the request waits
    with pytest.raises(ValueError, match="`request_id` must be one that no request has, but got 'x'"):
        manager.add_request(prompts()[1], "x", stop_strings=stops)
    with pytest.raises(TypeError):
        manager.add_request(prompts()[1], "y", 3, False, *range(9), stop_strings=stops)
    assert manager.output_router.taken == {"x"}  # one that was not added has no id
    manager.start()
    try:
        for _ in range(2):  # its id is free when it has ended
            assert manager.get_result("x", timeout=60).generated_tokens == alone(model, prompts()[0])[0]
            manager.add_request(prompts()[0], "x", stop_strings=stops)
    finally:
        manager.stop(block=True, hard_stop=hard_stop)
    assert not manager.output_router.taken  # whether the last one was answered, failed or lost


def test_copies_of_the_code_have_attention_of_their_own():
    """Each takes its own objects in place of a mask, so they must not share a name."""
    path = ROOT / "modeling_spiralformer" / "request_attention_spiralformer.py"
    spec = importlib.util.spec_from_file_location("a_copy_of_request_attention", path)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    names = [{name for name, _ in module.BY_REQUEST.values()} for module in (copy, request_attention_spiralformer)]
    assert len(names[0] | names[1]) == 4


def test_an_option_that_the_library_would_drop_is_refused():
    with pytest.raises(ValueError, match=r"all else of decoding in `generation_config`, but got \['temperature'\]"):
        make_model().generate_batch([[3, 4, 5]], decoding(), settings(), temperature=0.5)


def test_a_page_that_cuts_no_chunk_is_chosen_where_none_is_given():
    model = make_model(chunk_sizes=[5, 3])
    manager = model.init_continuous_batching(decoding())
    assert manager.continuous_batching_config.page_size == 270 and 270 % math.lcm(5, 3) == 0


def test_earlier_releases_are_refused_by_name(monkeypatch):
    monkeypatch.delattr(library_cache, ALLOCATORS)
    with pytest.raises(NotImplementedError, match="needs transformers 5.23 or later"):
        make_model().generate_batch([[3, 4, 5]], decoding())


def run(model, requests: list[tuple[list[int], int | None]], batching: ContinuousBatchingConfig) -> tuple:
    """The results of prompts with counts of new tokens, and the cache."""
    manager = model.init_continuous_batching(decoding(max_new_tokens=None), batching)
    manager.start()
    results: dict[str, object] = {}
    try:
        for number, (prompt, new) in enumerate(requests):
            manager.add_request(prompt, str(number), max_new_tokens=new)
        while len(results) < len(requests) and manager.is_running():
            if result := manager.get_result(timeout=1):
                results[result.request_id] = result
        assert manager.background_thread_status.fatal_error is None
        return [results[str(number)] for number in range(len(requests))], manager.batch_processor.cache
    finally:
        manager.stop(block=True)


@models
@pytest.mark.parametrize("page_size", [24, 240])
def test_a_cache_has_the_blocks_that_were_asked_for(options, page_size):
    """Where their states make them larger than a page for each cache entry, and where latents make them smaller."""
    model, batching = make_model(**options), settings(num_blocks=5, page_size=page_size)
    for _ in range(3):  # the library writes the count that it found into the settings
        _, cache = run(model, [([3, 4, 5], 1)], batching)
        (allocator,) = cache.cache_allocators.values()
        at_once = cache.bytes_per_sector // allocator.bytes_per_block  # a sector is a multiple of 128 bytes
        assert batching.num_blocks == cache.num_blocks == at_once * math.ceil(5 / at_once)
        assert cache.max_tokens_read == cache.num_blocks * page_size


def test_a_manager_that_is_kept_follows_its_settings_or_refuses_others():
    model, texts = make_model(), prompts()[:2]
    how, batching = decoding(), settings()
    expected = [alone(model, text)[0] for text in texts]
    try:
        for given in (batching, batching, settings()):  # in which the library has written, and has not
            found = model.generate_batch(texts, how, given, persistent_manager=True)
            assert [result.generated_tokens for result in found.values()] == expected
        fewer = model.generate_batch(texts, decoding(max_new_tokens=2), batching, persistent_manager=True)
        assert [result.generated_tokens for result in fewer.values()] == [tokens[:2] for tokens in expected]
        manager = model.init_continuous_batching(decoding(max_new_tokens=3), batching)  # the one that was kept
        manager.start()
        manager.add_request(texts[0], "says no count")
        assert manager.get_result("says no count", timeout=60).generated_tokens == expected[0][:3]
        manager.stop(block=True, keep_for_next_session=True)
        with pytest.raises(
            ValueError, match=r"`generation_config` must stay .* differs in \['eos_token_id'\]: call `destroy"
        ):
            model.generate_batch(texts, decoding(eos_token_id=expected[0][0]), batching, persistent_manager=True)
        with pytest.raises(
            ValueError, match=r"`continuous_batching_config` must stay .* differs in \['max_batch_tokens"
        ):
            model.generate_batch(texts, how, settings(max_batch_tokens=49), persistent_manager=True)
        assert model.config._attn_implementation == "sdpa"  # after a refusal too
    finally:
        model.destroy_cached_continuous_batching_manager()
    ended = model.generate_batch(texts[:1], decoding(eos_token_id=expected[0][0]), batching)
    assert [result.generated_tokens for result in ended.values()] == [expected[0][:1]]


def test_a_manager_that_was_kept_keeps_its_tokenizer(tokenizer):
    model = make_model(vocab_size=len(tokenizer))
    text, how = prompts()[0], decoding(stop_strings=["never written"])
    try:
        first = model.generate_batch([text], how, settings(), tokenizer=tokenizer, persistent_manager=True)
        again = model.generate_batch([text], how, settings(), persistent_manager=True)
    finally:
        model.destroy_cached_continuous_batching_manager()
    assert [r.generated_tokens for r in again.values()] == [r.generated_tokens for r in first.values()]


def test_a_manager_that_was_never_stopped_is_in_nobodys_way():
    model, text = make_model(), prompts()[0]
    model.init_continuous_batching(decoding(), settings())
    found = model.generate_batch([text], decoding(), settings())
    assert [result.generated_tokens for result in found.values()] == [alone(model, text)[0]]
    assert model.config._attn_implementation == "sdpa"


def test_one_manager_of_a_model_is_at_work_at_a_time():
    """The layers attend as the last one that was made or stopped has them."""
    model, text = make_model(chunk_sizes=[8, 4, 2, 1]), prompts()[0]
    first = model.init_continuous_batching(decoding(), settings())
    first.start()
    try:
        for other in (model, model.with_schedule([4, 1])):
            with pytest.raises(ValueError, match="one manager of continuous batching at work, but another runs"):
                other.init_continuous_batching(decoding(), settings())
        first.add_request(text, "text")
        assert first.get_result("text", timeout=60).generated_tokens == alone(model, text)[0]
    finally:
        first.stop(block=True)
    check(model, prompts()[:2], settings())


def test_a_view_leaves_the_attention_of_its_model_as_it_was():
    if EAGER_READS_PAGES:
        pytest.skip("eager attention is refused")
    model, text = make_model(chunk_sizes=[8, 4, 2, 1]), prompts()[0]
    view = model.with_schedule([4, 1])
    model.set_attn_implementation("eager")  # the view's own configuration says sdpa still
    found = view.generate_batch([text], decoding(), settings())
    assert [result.generated_tokens for result in found.values()] == [alone(view, text)[0]]
    assert model.config._attn_implementation == model.model.layer_config._attn_implementation == "eager"


def test_a_request_that_the_cache_cannot_hold_fails_alone():
    """By its prompt or by what it asks for; one that just fits, and one without a count, end where the cache ends."""
    model, small = make_model(chunk_sizes=[4, 2, 1]), {"num_blocks": 2, "allow_block_sharing": False}
    first, *others = prompts((10, 400, 30, 20, 15))
    (_,), cache = run(model, [(first, 1)], settings(**small))
    room = cache.max_tokens_read
    assert room == 48
    requests = [(first, 8), (others[0], 8), (others[1], room - 28), (others[2], room - 19), (others[3], None)]
    results, _ = run(model, requests, settings(**small))
    for number in (1, 2):
        assert not results[number].generated_tokens
        assert f"holds {room} tokens, and request {number} of" in results[number].error
    for number, new in ((0, 8), (3, room - 19), (4, room - 14)):
        assert results[number].error is None
        assert results[number].generated_tokens == alone(model, requests[number][0], new)[0]


@pytest.mark.parametrize(
    "wrong, message", [([], "at least one token"), ([1, 999], "must be in [0, 60], but"), ([-1], "but request")]
)
def test_what_is_no_prompt_fails_alone(wrong, message):
    """The library would answer an empty one with another request's token, and end all for an unknown id."""
    model, good = make_model(), prompts()[:2]
    results = [*model.generate_batch([good[0], wrong, good[1]], decoding(), settings()).values()]
    by_text = {tuple(result.prompt_ids): result for result in results}
    for prompt in good:
        assert by_text[tuple(prompt)].generated_tokens == alone(model, prompt, NEW)[0]
    failed = by_text[tuple(wrong)]
    assert message in failed.error and failed.generated_tokens == []


def test_adapters_that_are_chosen_by_row_are_refused():
    """As PEFT's `adapter_names` does it, by a hook on each layer: the rows of the flat batch are no requests."""
    pytest.importorskip("peft")

    def choose(module, args, kwargs):
        return None

    choose.__module__ = "peft.tuners.mixed"
    model = make_model()
    model.model.core[0].register_forward_pre_hook(choose, with_kwargs=True)
    (result,) = model.generate_batch([[3, 4, 5]], decoding(), settings()).values()
    assert "chosen by row in continuous batching" in result.error


def test_several_processes_are_refused():
    model = make_model()
    model.config.distributed_config = type("Distributed", (), {"tp_size": 2})()
    with pytest.raises(ValueError, match="`tp_size` must be 1 in continuous batching, but got 2"):
        model.init_continuous_batching(decoding())
