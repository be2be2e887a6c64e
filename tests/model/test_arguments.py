"""What a call is given either counts or is refused: no argument is dropped or read in two ways, in any mode."""

import pytest
import torch
from support import large_weights, new_cache, pad_rows, random_ids, small_config, small_model
from transformers import DynamicCache, StaticCache

from modeling_spiralformer import (
    SpiralFormerForCausalLM,
    SpiralFormerForQuestionAnswering,
    SpiralFormerForSequenceClassification,
    SpiralFormerForTokenClassification,
)
from modeling_spiralformer.cache_name_spiralformer import CHECKPOINTED_LAYERS_KEEP_CACHE
from modeling_spiralformer.layers_spiralformer import FAMILIES

LOOP, NO_LOOP = {"chunk_sizes": [5, 3, 1]}, {"chunk_sizes": [], "num_core_layers": 0}
schedule = pytest.mark.parametrize("options", [LOOP, NO_LOOP], ids=["loop", "no loop"])
# Where a call reaches the layers with a cache: each family gives it to them under its own name, of heads of its own.
CASES = {
    f"{name}, {family}": options | {"layer_family": family}
    for family in FAMILIES
    for name, options in (("loop", LOOP), ("no loop", NO_LOOP))
}
schedule_and_family = pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
SEARCH = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def filled(model, ids, mask=None) -> DynamicCache:
    """A cache that has seen `ids`."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    return cache


def check_whole(cache, columns: int) -> None:
    """What was refused has changed nothing: the cache goes on from where it was."""
    assert cache.get_seq_length() == columns
    levels = [layer.state for layer in cache.layers if getattr(layer, "owns_state", False)]
    assert all(level.seen == columns and not level.rows.unfinished for level in levels)


# -- positions ----------------------------------------------------------------------------------------------------


@pytest.mark.host
@schedule
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(
    "positions",
    [[0, 1, 2], [11, 12, 13], [10, 12, 13], [10, 11, 11], [12], [0], [9], [10, 9]],
    ids=lambda positions: " ".join(map(str, positions)),
)
def test_positions_that_do_not_go_on_from_the_cache_are_refused(options, static, positions):
    model, text = small_model(**options), random_ids(2, 13)
    cache = new_cache(model, static, 20)
    with torch.no_grad():
        model(text[:, :10], past_key_values=cache)
        with pytest.raises(ValueError, match="`position_ids`"):
            model(text[:, 10 : 10 + len(positions)], past_key_values=cache, position_ids=torch.tensor([positions]))
        after = model(text[:, 10:], past_key_values=cache, position_ids=torch.arange(10, 13)[None]).logits
        expected = model(text, use_cache=False).logits[:, 10:]
    assert (after - expected).abs().max() < 1e-9


@schedule
@pytest.mark.parametrize(
    "positions", [[0, 2, 4, 6, 8, 10], [3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 6], [1, 2, 3, 4, 5, 6]]
)
@pytest.mark.parametrize("use_cache", [False, True])
def test_positions_that_skip_tokens_are_refused_without_a_cache_too(options, positions, use_cache):
    """Chunks are cut by the count of tokens: positions 0, 2, 4 would say nothing about them."""
    with pytest.raises(ValueError, match="`position_ids` must count the tokens of each row"):
        small_model(**options)(random_ids(1, 6), position_ids=torch.tensor([positions]), use_cache=use_cache)


@schedule
@torch.no_grad()
def test_positions_are_integers_of_any_size(options):
    """uint8 would wrap around where a text of a packed row begins again."""
    model, ids, positions = small_model(**options), random_ids(1, 12), torch.tensor([[*range(7), *range(5)]])
    expected = model(ids, position_ids=positions, use_cache=False).logits
    for dtype in (torch.uint8, torch.int8, torch.int32):
        assert torch.equal(model(ids, position_ids=positions.to(dtype), use_cache=False).logits, expected)
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(ValueError, match=f"`position_ids` must be a tensor of integers, but got {dtype}"):
            model(ids, position_ids=positions.to(dtype))


@schedule
@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_of_padded_rows(options, side):
    """A row's first real token is 0; what padding is given does not matter; one row at fault is named."""
    ids, mask = pad_rows([random_ids(1, n, seed=n)[0] for n in (9, 4, 7)], side)
    model, positions = small_model(**options), (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        for padding in (0, 1, 77):
            given = positions.where(mask.bool(), padding)
            logits = model(ids, attention_mask=mask, position_ids=given, use_cache=False).logits
            assert torch.equal(logits[mask.bool()], expected[mask.bool()])
        positions[2, 8 if side == "left" else 6] += 1
        with pytest.raises(ValueError, match="in row 2"):
            model(ids, attention_mask=mask, position_ids=positions, use_cache=False)
        if side == "left":
            with pytest.raises(ValueError, match="in row 1"):  # columns are no positions
                model(ids, attention_mask=mask, position_ids=torch.arange(9)[None], use_cache=False)


@pytest.mark.host
@schedule_and_family
def test_positions_of_padded_rows_over_a_cache(options):
    ids, mask = pad_rows([random_ids(1, n, seed=n)[0] for n in (13, 4, 9)], "left")
    model, positions = small_model(**options), (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        cache = filled(model, ids[:, :10], mask[:, :10])
        for column in (10, 11, 12):
            step = {"attention_mask": mask[:, : column + 1], "past_key_values": cache}
            token, right = ids[:, column : column + 1], positions[:, column : column + 1]
            wrong = right + torch.tensor([[0], [0], [1]])
            with pytest.raises(ValueError, match="in row 2"):
                model(token, position_ids=wrong, **step)
            logits = model(token, position_ids=right, **step).logits
            assert (logits[:, 0] - expected[:, column]).abs().max() < 1e-9


@pytest.mark.host
def test_a_compiled_step_refuses_wrong_positions():
    """It does not wait for the device to say so: there the refusal is the device's own."""
    model, text = small_model(dtype=torch.float32), random_ids(1, 13)
    cache = StaticCache(config=model.config, max_cache_len=20)
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    with torch.no_grad():
        model(text[:, :10], past_key_values=cache)
        step = compiled(text[:, 10:11], position_ids=torch.tensor([[10]]), past_key_values=cache)
        assert (step.logits - model(text[:, :11], use_cache=False).logits[:, 10:]).abs().max() < 1e-4
        with pytest.raises(RuntimeError, match="`position_ids`"):
            compiled(text[:, 11:12], position_ids=torch.tensor([[12]]), past_key_values=cache)


@pytest.mark.parametrize(
    "told",
    [
        {"cu_seq_lens_q": torch.tensor([0, 2, 7])},
        {"cu_seq_lens_k": torch.tensor([0, 4, 7], dtype=torch.int32)},
        {"seq_idx": torch.tensor([[0, 0, 1, 1, 1, 1, 1]], dtype=torch.int32)},
    ],
    ids=["cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"],
)
@pytest.mark.parametrize("packed", [True, False])
def test_boundaries_that_contradict_positions_are_refused(told, packed):
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]]) if packed else torch.arange(7)[None]
    with pytest.raises(ValueError, match=f"`{next(iter(told))}`.*`position_ids`"):
        small_model()(random_ids(1, 7), position_ids=positions, **told)


# -- training mode with gradient checkpointing ---------------------------------------------------------------------


def checkpointed(**options):
    """A model in training mode whose layers are replayed in the backward pass."""
    model = small_model(**options)
    model.gradient_checkpointing_enable()
    return model.train()


@schedule_and_family
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("static", [False, True])
def test_generate_while_training_with_checkpointing(options, padded, static):
    """No gradients are recorded, nothing is replayed: where the layers keep their cache it works, else it says why."""
    model = checkpointed(**options)
    ids, mask = pad_rows([random_ids(1, n, seed=n)[0] for n in ((9, 4) if padded else (9, 9))], "left")
    kept = {"cache_implementation": "static", "disable_compile": True} if static else {}
    expected = model.generate(ids, attention_mask=mask, use_cache=False, **SEARCH)
    if CHECKPOINTED_LAYERS_KEEP_CACHE:
        assert torch.equal(model.generate(ids, attention_mask=mask, **kept, **SEARCH), expected)
    else:
        with pytest.raises(ValueError, match="training mode with gradient checkpointing"):
            model.generate(ids, attention_mask=mask, **kept, **SEARCH)


@schedule_and_family
def test_a_cache_given_while_training_with_checkpointing(options):
    model, text = checkpointed(**options), random_ids(1, 20)
    cache = filled(model.eval(), text[:, :12])
    expected = model(text, use_cache=False).logits[:, 12:]
    model.train()
    for given in (cache, DynamicCache(config=model.config)):
        with pytest.raises(ValueError, match="must be None in training mode with gradient checkpointing"):
            model(text[:, 12:], past_key_values=given)
    check_whole(cache, 12)
    with torch.no_grad():
        if CHECKPOINTED_LAYERS_KEEP_CACHE:
            assert (model(text[:, 12:], past_key_values=cache).logits - expected).abs().max() < 1e-9
        else:
            with pytest.raises(ValueError, match="must be None in training mode"):
                model(text[:, 12:], past_key_values=cache)


@schedule_and_family
def test_a_cache_given_while_training_without_checkpointing(options):
    """Nothing is replayed: the cache counts, gradients flow through what is new."""
    model, text = small_model(**options).train(), random_ids(1, 20)
    cache = filled(model, text[:, :12])
    logits = model(text[:, 12:], past_key_values=cache).logits
    assert (logits - model(text, use_cache=False).logits[:, 12:]).abs().max() < 1e-9
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.model.coda.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_refuse_a_cache_while_training_with_checkpointing(family):
    model = large_weights(SpiralFormerForSequenceClassification(small_config(layer_family=family))).double()
    cache = DynamicCache(config=model.config)
    model.model(random_ids(1, 5), past_key_values=cache)
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="must be None in training mode"):
        model.train()(random_ids(1, 5), past_key_values=cache)


# -- pad ids without a mask ----------------------------------------------------------------------------------------


@schedule
def test_pad_ids_inside_rows_need_a_mask(options):
    """generate() infers a mask from pad ids, and cannot know whether they are padding or text."""
    model, text = small_model(**options), random_ids(2, 12)
    text[1, 7] = 0
    with pytest.raises(ValueError, match=r"`attention_mask` must be given.*pad_token_id` 0.*row 1.*column 7"):
        model.generate(text, **SEARCH)
    ones = torch.ones_like(text)
    expected = model.generate(text, attention_mask=ones, use_cache=False, **SEARCH)
    assert torch.equal(model.generate(text, attention_mask=ones, **SEARCH), expected)


@schedule
@pytest.mark.parametrize("chunk", [None, 4])
def test_a_continued_batch_with_pad_ids_inside_its_rows(options, chunk):
    """One cached prefix with ends of unequal lengths, and a chat whose rows ended early."""
    model, prefix = small_model(**options), random_ids(1, 10, seed=5)
    whole = torch.cat([prefix.repeat(2, 1), random_ids(2, 6)], dim=1)
    whole[0, 10:13] = 0
    cache = filled(model, prefix)
    cache.batch_repeat_interleave(2)
    with pytest.raises(ValueError, match=r"`attention_mask` must be given.*row 0.*column 10"):
        model.generate(whole, past_key_values=cache, prefill_chunk_size=chunk, **SEARCH)
    check_whole(cache, 10)
    with pytest.raises(ValueError, match="`attention_mask`.*holes"):
        model.generate(whole, attention_mask=(whole != 0).long(), past_key_values=cache, **SEARCH)
    check_whole(cache, 10)


@schedule_and_family
@pytest.mark.parametrize("length", [14, 11])
def test_a_continued_batch_without_pad_ids_needs_no_mask(options, length):
    model, text = small_model(**options), random_ids(2, length)
    expected = model.generate(text, use_cache=False, **SEARCH)
    assert torch.equal(model.generate(text, past_key_values=filled(model, text[:, :10]), **SEARCH), expected)


@schedule
@pytest.mark.parametrize("places", [[10], [0], [0, 1, 10, 23]], ids=str)
def test_assisted_decoding_of_a_prompt_that_holds_the_pad_id(options, places):
    """Its mask is all ones: the pad ids are text, for the draft as for the model."""
    model, text = small_model(**options), random_ids(1, 24)
    text[0, places] = 0
    ones = torch.ones_like(text)
    expected = model.generate(text, attention_mask=ones, use_cache=False, **SEARCH)
    for draft in (small_model(**options), small_model(chunk_sizes=[4, 1], num_core_layers=1, seed=3)):
        tokens = model.generate(text, attention_mask=ones, assistant_model=draft, **SEARCH)
        assert torch.equal(tokens, expected)


@pytest.mark.parametrize("options", [LOOP, NO_LOOP, CASES["loop, llama"]], ids=["loop", "no loop", "loop, llama"])
def test_assisted_decoding_of_a_padded_prompt(options):
    model, (ids, mask) = small_model(**options), pad_rows([random_ids(1, 11)[0]], "left", total=16)
    expected = model.generate(ids, attention_mask=mask, use_cache=False, **SEARCH)
    draft = small_model(chunk_sizes=[4, 1], num_core_layers=1, seed=3)
    assert torch.equal(model.generate(ids, attention_mask=mask, assistant_model=draft, **SEARCH), expected)
    ids = ids.masked_fill(mask == 0, 0)  # and where the mask is inferred
    assert torch.equal(
        model.generate(ids, assistant_model=draft, **SEARCH), expected.masked_fill(expected < 0, 0)
    ) or (torch.equal(model.generate(ids, assistant_model=draft, **SEARCH)[:, 16:], expected[:, 16:]))


# -- first calls that generate() cannot make -------------------------------------------------------------------------


@schedule
@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("held, given", [(10, 3), (10, 10), (1, 1)])
def test_a_prompt_that_the_cache_has_no_room_for(options, chunk, held, given):
    model, text = small_model(**options), random_ids(1, 20)
    cache = filled(model, text[:, :held])
    message = rf"`input_ids` must hold the {held} tokens of `past_key_values`.*but got {given}.*`attention_mask`"
    for mask in (None, torch.ones(1, given, dtype=torch.long)):
        with pytest.raises(ValueError, match=message):
            model.generate(
                text[:, :given], attention_mask=mask, past_key_values=cache, prefill_chunk_size=chunk, **SEARCH
            )
    check_whole(cache, held)
    if chunk is None:
        embeddings = model.get_input_embeddings()(text[:, :given])
        with pytest.raises(ValueError, match=message.replace("input_ids", "inputs_embeds")):
            model.generate(inputs_embeds=embeddings, past_key_values=cache, **SEARCH)
        check_whole(cache, held)


@schedule_and_family
def test_new_tokens_alone_with_a_mask_of_all_columns(options):
    model, text = small_model(**options), random_ids(1, 13)
    expected = model.generate(text, use_cache=False, **SEARCH)[:, 13:]
    for held in (10, 3):
        cache = filled(model, text[:, :held])
        mask = torch.ones(1, 13, dtype=torch.long)
        mask_free = model.generate(text, past_key_values=filled(model, text[:, :held]), **SEARCH)
        assert torch.equal(mask_free[:, 13:], expected)
        # All ones, so the library drops it; what tells the two apart is its length.
        tokens = model.generate(text[:, held:], attention_mask=mask, past_key_values=cache, **SEARCH)
        assert torch.equal(tokens[:, 13 - held :], expected)


@schedule
@pytest.mark.parametrize("columns", [7, 12])
def test_a_mask_of_another_length_is_named(options, columns):
    model, text = small_model(**options), random_ids(1, 9)
    mask = torch.ones(1, columns, dtype=torch.long)
    mask[0, 0] = 0
    for given in (mask, torch.ones_like(mask)):  # of ones alone the library keeps the length
        with pytest.raises(ValueError, match=f"`attention_mask` must have 9 columns, .* but got {columns}"):
            model.generate(text, attention_mask=given, **SEARCH)
    cache = filled(model, text[:, :4])
    with pytest.raises(ValueError, match=f"`attention_mask` must have 13 columns, .* but got {columns}"):
        model.generate(text, attention_mask=mask, past_key_values=cache, **SEARCH)
    check_whole(cache, 4)


@schedule
def test_embeddings_are_not_read_in_chunks(options):
    model, (ids, mask) = small_model(**options), pad_rows([random_ids(1, 9)[0]], "left", total=12)
    embeddings = model.get_input_embeddings()(ids)
    for given in (mask, None):
        with pytest.raises(ValueError, match="`prefill_chunk_size` must be None with `inputs_embeds`.*but got 4"):
            model.generate(inputs_embeds=embeddings, attention_mask=given, prefill_chunk_size=4, **SEARCH)


@schedule
def test_assisted_decoding_over_a_filled_cache_is_refused(options):
    """The library reads the whole text once more there; its positions tell."""
    model, text = small_model(**options), random_ids(1, 13)
    for how in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": small_model(**options)}):
        cache = filled(model, text[:, :10])
        with pytest.raises(ValueError, match="assisted and prompt-lookup decoding over a filled cache"):
            model.generate(text, past_key_values=cache, **how, **SEARCH)


@schedule
def test_early_exit_is_refused_by_name(options):
    with pytest.raises(ValueError, match="`assistant_early_exit` must be None, but got 1"):
        small_model(**options).generate(random_ids(1, 9), assistant_early_exit=1, **SEARCH)


@schedule
@pytest.mark.parametrize("cache", [((torch.zeros(1, 2, 3, 8),) * 2,) * 2, [], "dynamic"], ids=["tuple", "list", "str"])
def test_what_is_no_cache_is_refused(options, cache):
    for model in (small_model(**options), SpiralFormerForSequenceClassification(small_config(**options))):
        with pytest.raises(ValueError, match=f"`past_key_values`.*must be a `Cache`, but got {type(cache).__name__}"):
            model(random_ids(1, 9), past_key_values=cache)


# -- logits that are asked for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
def test_logits_to_keep(cached):
    """Numbers, positions of all rows, positions of each row and a mask, as the library's own models take them."""
    model, text = small_model(), random_ids(2, 9)
    whole = model(text).logits
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 3:6] = mask[1, :2] = True
    positions = torch.tensor([[0, 4, 8, 4], [1, 2, 3, -1]])
    cases = [
        (0, whole),
        (1, whole[:, -1:]),
        (4, whole[:, -4:]),
        (torch.tensor([7, 2]), whole[:, [7, 2]]),
        (mask, torch.cat([whole[0, 3:6], whole[1, :2]])),
        (positions, torch.stack([whole[0, [0, 4, 8, 4]], whole[1, [1, 2, 3, -1]]])),
        (positions[:, :1], torch.stack([whole[0, :1], whole[1, 1:2]])),
        (torch.tensor([8, 7, 6, 5, 4, 3, 2, 1, 0], dtype=torch.uint8), whole.flip(1)),  # as long as a mask
        (torch.tensor([7, -2], dtype=torch.int16), whole[:, [7, -2]]),
        (positions.int(), torch.stack([whole[0, [0, 4, 8, 4]], whole[1, [1, 2, 3, -1]]])),
    ]
    for kept, expected in cases:
        cache = DynamicCache(config=model.config) if cached else None
        logits = model(text, logits_to_keep=kept, past_key_values=cache, use_cache=cached).logits
        assert logits.shape == expected.shape and (logits - expected).abs().max() < 1e-12, kept


@schedule
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"logits_to_keep": -3}, "`logits_to_keep` must be 0 or more.*but got -3"),
        ({"logits_to_keep": [1, 2]}, r"`logits_to_keep` must be an integer, or a tensor.*but got \[1, 2\]"),
        ({"logits_to_keep": torch.tensor([0.5])}, "`logits_to_keep` must be an integer.*but got torch.float"),
        ({"logits_to_keep": torch.tensor([1, 4])}, r"`logits_to_keep` must be in \[-4, 3\], but got 1 to 4"),
        ({"logits_to_keep": torch.tensor([[1], [-5]])}, r"`logits_to_keep` must be in \[-4, 3\], but got -5 to 1"),
        (
            {"logits_to_keep": torch.ones(3, 1, dtype=torch.long)},
            r"must have shape \(K,\) or \(2, K\), but got \(3, 1\)",
        ),
        ({"logits_to_keep": torch.ones(3, dtype=torch.bool)}, r"must have shape \(4,\) or \(2, 4\), but got \(3,\)"),
        ({"labels": [[1, 2, 3, 4]] * 2}, "`labels` must be a tensor of integers, but got list"),
        ({"labels": torch.ones(2, 4)}, "`labels` must be a tensor of integers, but got torch.float"),
        ({"labels": torch.ones(2, 4, dtype=torch.bool)}, "`labels` must be a tensor of integers, but got torch.bool"),
        ({"labels": torch.ones(4, 2, dtype=torch.long)}, r"`labels` must have shape \(2, 4\).*but got \(4, 2\)"),
        ({"labels": torch.full((2, 4), 61)}, r"`labels` must be in \[0, 60\], or -100, but got 61"),
        ({"labels": torch.full((2, 4), -1)}, r"`labels` must be in \[0, 60\], or -100, but got -1"),
        ({"labels": torch.ones(2, 4).long(), "logits_to_keep": 3}, r"`labels` must have shape \(2, 3\)"),
        ({"labels": torch.ones(2, 4).long(), "logits_to_keep": torch.tensor([1])}, "`labels` must be None where"),
        (
            {"labels": torch.ones(2, 4).long(), "shift_labels": torch.ones(2, 3).long()},
            "`shift_labels` must have shape",
        ),
        ({"input_ids": torch.ones(2, 4)}, "`input_ids` must be a tensor of integers, but got torch.float"),
        ({"input_ids": torch.ones(2, 4, dtype=torch.bool)}, "`input_ids` must be a tensor of integers, but got"),
        (
            {"input_ids": torch.ones(2, 4).short()},
            "`input_ids` must be a tensor of int64 or int32, but got torch.int16",
        ),
        ({"input_ids": [[1, 2, 3, 4]] * 2}, "`input_ids` must be a tensor of integers, but got list"),
        ({"input_ids": None, "inputs_embeds": torch.ones(2, 4, 15)}, "`inputs_embeds` must be 16 wide, but got shape"),
        (
            {"input_ids": None, "inputs_embeds": torch.ones(2, 4, 16).long()},
            "`inputs_embeds` must be a tensor of float",
        ),
        ({"is_causal": False}, "`is_causal` must be True, but got False"),
    ],
    ids=str,
)
def test_what_cannot_be_answered_is_refused_before_the_cache_is_written_to(options, bad, message):
    model, text = small_model(**options), random_ids(2, 9)
    cache = filled(model, text[:, :5])
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        model(**{"input_ids": text[:, 5:], "past_key_values": cache, **bad})
    check_whole(cache, 5)
    with torch.no_grad():
        logits = model(text[:, 5:], past_key_values=cache).logits
        assert (logits - model(text, use_cache=False).logits[:, 5:]).abs().max() < 1e-9


def test_labels_go_with_the_logits_that_are_kept():
    """As the library's models have it; another label without a loss, and labels that are shifted already."""
    model, text = small_model(), random_ids(2, 9)
    logits = model(text).logits
    loss = torch.nn.functional.cross_entropy(logits[:, 5:-1].flatten(0, 1), text[:, 6:].flatten())
    assert (model(text, labels=text[:, 5:], logits_to_keep=4).loss - loss).abs() < 1e-6
    ignored = text.index_fill(1, torch.arange(6), -7)
    assert (model(text, labels=ignored, ignore_index=-7).loss - loss).abs() < 1e-6
    shifted = torch.cat([torch.full((2, 5), -100), text[:, 6:], torch.full((2, 1), -100)], dim=1)
    assert (model(text, labels=text, shift_labels=shifted).loss - loss).abs() < 1e-6
    # Integers of any dtype, among them one that cannot hold -100.
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        assert torch.equal(model(text, labels=text.to(dtype)).loss, model(text, labels=text).loss)
        if dtype.is_signed:
            assert (model(text, labels=text, shift_labels=shifted.to(dtype)).loss - loss).abs() < 1e-6


HEADS = [
    SpiralFormerForCausalLM,
    SpiralFormerForSequenceClassification,
    SpiralFormerForTokenClassification,
    SpiralFormerForQuestionAnswering,
]


@pytest.mark.parametrize("model_class", HEADS)
def test_a_configuration_that_asks_for_tuples_gets_them(model_class):
    model, text = large_weights(model_class(small_config(pad_token_id=0))).eval(), random_ids(2, 9)
    expected = model(text)[0]
    model.config.return_dict = False
    found = model(text)
    assert isinstance(found, tuple) and torch.equal(found[0], expected)
    assert torch.equal(model(text, return_dict=True)[0], expected)


def test_a_full_static_cache_is_refused_by_name():
    for options in CASES.values():
        model, text = small_model(**options), random_ids(2, 9)
        cache = StaticCache(config=model.config, max_cache_len=8)
        with torch.no_grad():
            model(text[:, :6], past_key_values=cache)
            with pytest.raises(ValueError, match="static cache of max_cache_len 8, but got token 9"):
                model(text[:, 6:], past_key_values=cache)
            after = model(text[:, 6:8], past_key_values=cache).logits
            assert (after - model(text, use_cache=False).logits[:, 6:8]).abs().max() < 1e-9


def test_a_stack_without_a_loop_refuses_a_cache_of_latents():
    """With as many entries as its own."""
    looped = small_model(chunk_sizes=[4, 1], num_core_layers=1)
    plain = small_model(**NO_LOOP, num_prelude_layers=2, num_coda_layers=2)
    assert looped.config.num_hidden_layers == plain.config.num_hidden_layers
    cache = filled(looped, random_ids(1, 6))
    with torch.no_grad(), pytest.raises(ValueError, match="must be built for this model"):
        plain(random_ids(1, 3), past_key_values=cache)
    check_whole(cache, 6)


def test_a_model_that_was_told_not_to_be_causal_refuses():
    with pytest.raises(ValueError, match="`is_causal` must be True, but got False"):
        small_model(is_causal=False)(random_ids(1, 9))
    model = small_model()
    model.set_attn_implementation("paged|eager")
    with pytest.raises(
        ValueError, match="`attn_implementation` must be sdpa, eager or flex_attention, but got 'paged"
    ):
        model(random_ids(1, 9))


@pytest.mark.parametrize(
    "changed", [{"chunk_sizes": [8, 3, 1]}, {"chunk_offsets": [0, 0, 0]}, {"causal_shifts": [9, 9, 9]}], ids=str
)
def test_a_schedule_that_was_changed_under_its_model_is_refused(changed, tmp_path):
    """It would have no effect, and the model would be another one once it is saved and loaded."""
    ((name, value),) = changed.items()
    for model in (small_model(**LOOP), SpiralFormerForSequenceClassification(small_config(**LOOP))):
        before = getattr(model.config, name)
        setattr(model.config, name, value)
        with pytest.raises(ValueError, match="`chunk_sizes`, `chunk_offsets` and `causal_shifts` must stay"):
            model(random_ids(1, 9))
        with pytest.raises(ValueError, match="`chunk_sizes`, `chunk_offsets` and `causal_shifts` must stay"):
            model.save_pretrained(tmp_path)
        setattr(model.config, name, before)
        model(random_ids(1, 9))
    model = small_model(**LOOP)
    model.config.chunk_sizes[0] = 4  # in place
    with pytest.raises(ValueError, match="`chunk_sizes`"):
        model(random_ids(1, 9))


# -- recording ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [-1, 2, [0, 3]], ids=str)
def test_numbers_of_states_are_refused_where_a_call_may_not_run_them(chosen):
    """Idle iterations have no state: the number would name another one in each step."""
    model, text = small_model(**LOOP), random_ids(1, 9)
    cache = filled(model, text[:, :6])
    with pytest.raises(ValueError, match="`output_hidden_states` must be True or False with a cache, but got"):
        model(text[:, 6:7], past_key_values=cache, output_hidden_states=chosen)
    check_whole(cache, 6)
    if CHECKPOINTED_LAYERS_KEEP_CACHE:  # a release that knows numbers
        every = model(text, use_cache=False, output_hidden_states=True).hidden_states
        some = model(text, use_cache=False, output_hidden_states=chosen).hidden_states
        for index in [chosen] if isinstance(chosen, int) else chosen:
            assert torch.equal(some[index], every[index])
        with pytest.raises(ValueError, match="must be True or False for a text without a chunk of size 5"):
            model(text[:, :2], use_cache=False, output_hidden_states=chosen)  # w = 2: the first chunk fills with 3
        packed = torch.tensor([[0, 1, 2, 0, 1, 2]])
        with pytest.raises(ValueError, match="must be True or False for a text without a chunk of size 5"):
            model(text[:, :6], position_ids=packed, use_cache=False, output_hidden_states=chosen)
        model.config.output_hidden_states = chosen
        with pytest.raises(ValueError, match="must be True or False for a text without a chunk of size 5"):
            model(text[:, :1], use_cache=False)
        model(text, use_cache=False)  # long enough
        model.train()(text[:, :1], use_cache=False)  # there the core runs all the same


@pytest.mark.parametrize(
    ("padded", "family"), [(False, "gpt_neox"), (True, "gpt_neox"), (True, "llama"), (True, "qwen3")]
)
def test_recording_that_the_library_switches_off_stops(padded, family):
    """The library sets the flag of the layers itself where it hands a cache back: no states pile up after that."""
    model = small_model(chunk_sizes=[5, 3, 1], layer_family=family)
    ids, mask = pad_rows([random_ids(1, n, seed=n)[0] for n in ((12, 5) if padded else (12, 12))], "left")
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    levels = lambda: [layer.state for layer in cache.layers if getattr(layer, "owns_state", False)]  # noqa: E731
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        assert all(level.tokens.shape[1] == 12 for level in levels())  # it did record
        for layer in cache.layers:
            if hasattr(layer, "record_past"):
                layer.record_past = False
        for step in range(40):
            ids = torch.cat([ids, random_ids(2, 1, seed=step)], dim=1)
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
            logits = model(ids[:, -1:], attention_mask=mask, past_key_values=cache).logits
        assert not any(getattr(layer, "record_past", False) for layer in cache.layers)
        assert all(level.tokens.shape[1] <= level.grid.size for level in levels())
        assert all(level.latents.shape[1] <= 3 for level in levels())
        expected = model(ids, attention_mask=mask, use_cache=False).logits[:, -1:]
        assert (logits - expected).abs().max() < 1e-9
        with pytest.raises(ValueError, match="activate_past_recording"):
            cache.crop(-20)
