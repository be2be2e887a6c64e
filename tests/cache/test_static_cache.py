"""The static cache: the same logits in tensors of fixed size, and how often its calls compile."""

import copy
import pickle

import pytest
import torch
from support import pad_rows, random_ids, small_model
from transformers import CompileConfig, StaticCache

from modeling_spiralformer.batch_spiralformer import Rows
from modeling_spiralformer.compiled_spiralformer import CompiledStep
from modeling_spiralformer.static_cache_spiralformer import StaticState

STATIC = {
    "powers of two": {"chunk_sizes": [8, 4, 2, 1]},
    "streams": {"chunk_sizes": [3, 1], "topology": "hyper_connections"},
    "coprime": {"chunk_sizes": [5, 3], "chunk_offsets": [0, 2], "causal_shifts": [6, 9], "topology": "anchor"},
    "no prelude": {"chunk_sizes": [1, 1], "num_prelude_layers": 0, "num_coda_layers": 0, "share_core": False},
    "no loop": {"chunk_sizes": [], "num_core_layers": 0},
    "llama": {"chunk_sizes": [4, 1], "layer_family": "llama", "num_core_layers": 1},
    "qwen3": {"chunk_sizes": [6], "layer_family": "qwen3", "num_core_layers": 1, "num_coda_layers": 0},
}
static = pytest.mark.parametrize("options", STATIC.values(), ids=STATIC.keys())


@static
@pytest.mark.parametrize("lengths", [(40, 40, 40), (40, 31, 22, 37), (33, 31, 15), (39,), (18, 7)], ids=str)
@pytest.mark.parametrize("calls", [[1] * 40, [19] + [1] * 21, [3, 1, 1, 9, 1, 1, 1, 19, 1, 1, 1, 1]], ids=str)
def test_static_cache_gives_the_same_logits(options, lengths, calls):
    """Rows without padding, some padded, all of them: there whole calls hold nothing but padding."""
    model = small_model(**options)
    ids, mask = pad_rows([random_ids(1, n, seed=n)[0] for n in lengths], "left", total=40)
    cache, start = StaticCache(config=model.config, max_cache_len=43), 0
    with torch.no_grad():
        for repetition in range(2):
            full = model(ids, attention_mask=mask, use_cache=False).logits
            for count in calls:
                end = start + count
                step = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits
                difference = (step - full[:, start:end])[mask[:, start:end].bool()].abs()
                assert not len(difference) or difference.max() < 1e-9, (start, repetition)
                start = end
            cache.reset()
            start = 0


@static
@pytest.mark.parametrize("lengths", [(19, 19), (19, 14), (18, 14), (5,)], ids=str)
@pytest.mark.parametrize("how", [{}, {"num_beams": 4}, {"prefill_chunk_size": 3}], ids=str)
def test_generate_with_a_static_cache(options, lengths, how):
    model = small_model(**options)
    ids, mask = pad_rows([random_ids(1, n, seed=n)[0] for n in lengths], "left", total=19)
    inputs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 14, "eos_token_id": None}
    inputs |= {"do_sample": False, "pad_token_id": 0}
    expected = model.generate(**inputs, **({} if "prefill_chunk_size" in how else how), use_cache=False)
    assert torch.equal(model.generate(**inputs, **how, cache_implementation="static"), expected)


@static
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_reset_static_cache_takes_another_number_of_rows(options, rows):
    """It allocates anew; one that holds tokens says how many rows it has."""
    model = small_model(**options)
    cache = StaticCache(config=model.config, max_cache_len=20)
    with torch.no_grad():
        model(random_ids(3, 9), past_key_values=cache)
        for new in (random_ids(rows, 1), random_ids(rows, 4)):
            with pytest.raises(ValueError, match=rf"`past_key_values`.*holds 3 rows, but the input has {rows}"):
                model(new, past_key_values=cache)
        cache.reset()
        ids = random_ids(rows, 13, seed=1)
        cache.reorder_cache(torch.tensor([2, 4, 0]))  # there is nothing to reorder, and no number of rows
        steps = [model(part, past_key_values=cache).logits for part in ids.split([8, 1, 1, 1, 2], dim=1)]
        assert (torch.cat(steps, dim=1) - model(ids, use_cache=False).logits).abs().max() < 1e-9


def test_a_full_static_cache_says_so():
    model = small_model(dtype=torch.float32)
    cache = StaticCache(config=model.config, max_cache_len=6)
    with pytest.raises(ValueError, match="max_cache_len 6"):
        model(random_ids(1, 7), past_key_values=cache)


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 1), torch.tensor([[1.0] * 9, [0, 1, 0] + [1] * 6]), torch.ones(1, 1, 1, 9)]
)
def test_masks_of_an_empty_schedule_are_checked_with_a_static_cache_too(mask):
    model = small_model(dtype=torch.float32, chunk_sizes=[], num_core_layers=0)
    cache = StaticCache(config=model.config, max_cache_len=20)
    with torch.no_grad():
        model(random_ids(2, 8), past_key_values=cache)
        with pytest.raises(ValueError, match="attention_mask"):
            model(random_ids(2, 1), attention_mask=mask, past_key_values=cache)


def test_what_a_hook_keeps_of_a_step_stays_what_it_was():
    """The update of a token is no view of the ring that later steps write to."""
    model, ids, kept = small_model(chunk_sizes=[1, 1]), random_ids(1, 12), []
    cache = StaticCache(config=model.config, max_cache_len=20)
    model.model.resolutions[0].register_forward_hook(lambda *call: kept.append((call[-1], call[-1].clone())))
    with torch.no_grad():
        for part in ids.split([6, 1, 1, 1, 1, 1, 1], dim=1):
            model(part, past_key_values=cache)
    assert len(kept) == 7 and all(torch.equal(update, then) for update, then in kept)


# -- compiled calls ---------------------------------------------------------------------------------------------------


def counting(graphs: list):
    """A backend that runs what it is given as it stands, and lists it in `graphs`."""

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return backend


def compiled_generate(
    model, ids, mask, fullgraph=True, dynamic=None, times=1, compiling=None, **how
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """generate() as on an accelerator, where it compiles by itself: tokens, logits and the number of graphs."""
    torch._dynamo.reset()
    graphs = []
    if compiling is None:
        compiling = CompileConfig(fullgraph=fullgraph, dynamic=dynamic, backend=counting(graphs), mode=None)
    compiling._compile_all_devices = True
    options = {**SEARCH, **how, "cache_implementation": "static", "compile_config": compiling}
    for _ in range(times):
        out = model.generate(ids, attention_mask=mask, **options)
    return out.sequences, torch.stack(out.logits), len(graphs)


FEW_LAYERS = {"num_core_layers": 1, "num_coda_layers": 0}  # tracing takes its time
SEARCH = {"max_new_tokens": 13, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "output_logits": True}
SEARCH |= {"return_dict_in_generate": True}


def fill_patterns(model, pads: list[int], columns: range) -> int:
    """How many different sets of levels fill together, at one of these columns of rows with that padding."""
    sizes, offsets = model.config.chunk_sizes, model.config.resolved_chunk_offsets
    filled = lambda column, g, w: any((column - p + 1 + w) % g == 0 for p in pads)  # noqa: E731
    return len({tuple(filled(column, g, w) for g, w in zip(sizes, offsets, strict=True)) for column in columns})


PARTS = 3  # of a decode step: its beginning, the core of all levels, and its end


@pytest.fixture
def compiled_links(monkeypatch):
    """As where kernels are launched: between two iterations, too, a step is compiled."""
    monkeypatch.setattr(CompiledStep, "_compiles_links", True)


EVERY_WAY = [(n, dynamic, "gpt_neox") for n in ((11, 11), (11, 6), (10, 6)) for dynamic in (None, False)]


@pytest.mark.parametrize(("lengths", "dynamic", "family"), [*EVERY_WAY, ((10, 6), None, "llama")], ids=str)
def test_compiled_steps_need_one_graph_for_every_part(lengths, dynamic, family):
    """Whatever fills together: one for the layers of the core at all levels, and none for a second prompt."""
    check_graphs_of_steps(lengths, dynamic, family, 0)


@pytest.mark.parametrize(("lengths", "dynamic"), [((11, 11), None), ((11, 6), False)], ids=str)
def test_compiled_links_need_one_graph_each(lengths, dynamic, compiled_links):
    check_graphs_of_steps(lengths, dynamic, "gpt_neox", 1)


def check_graphs_of_steps(lengths: tuple[int, int], dynamic: bool | None, family: str, links: int):
    """Holds compiled steps to the uncached forward, and to a graph for every part and for so many links."""
    model = small_model(chunk_sizes=[4, 2], layer_family=family, **FEW_LAYERS)
    ids, mask = pad_rows([random_ids(1, n, seed=n)[0] for n in lengths], "left", total=11)
    expected = model.generate(ids, attention_mask=mask, use_cache=False, **SEARCH)
    tokens, logits, graphs = compiled_generate(model, ids, mask, dynamic=dynamic, times=2)
    assert torch.equal(tokens, expected.sequences)
    assert (logits - torch.stack(expected.logits)).abs().max() < 1e-6  # float32 inside generate
    assert graphs == PARTS + links


@pytest.mark.parametrize("options", [STATIC["coprime"], STATIC["llama"]], ids=["coprime", "llama"])
def test_every_flag_of_compilation_gives_the_same_logits(options, compiled_links):
    """`dynamic=True` makes sizes symbols that are not: it may cost a graph or two, and none for a token."""
    model = small_model(**options)
    ids, mask = pad_rows([random_ids(1, n, seed=n)[0] for n in (11, 6)], "left", total=11)
    expected = model.generate(ids, attention_mask=mask, use_cache=False, **SEARCH)
    tokens, logits, graphs = compiled_generate(model, ids, mask, dynamic=True)
    assert torch.equal(tokens, expected.sequences)
    assert (logits - torch.stack(expected.logits)).abs().max() < 1e-6
    assert graphs <= 2 * (PARTS + model.config.num_iterations - 1)


def test_a_step_with_recorded_states_is_compiled_whole():
    """What the parts know nothing of is in the whole forward, which is compiled as well."""
    model = small_model(chunk_sizes=[2], **FEW_LAYERS)
    ids, mask = random_ids(2, 11), torch.ones(2, 11, dtype=torch.long)
    expected = model.generate(ids, attention_mask=mask, **SEARCH, output_hidden_states=True)
    tokens, logits, graphs = compiled_generate(model, ids, mask, output_hidden_states=True)
    assert torch.equal(tokens, expected.sequences) and graphs == fill_patterns(model, [0], range(11, 23))
    assert (logits - torch.stack(expected.logits)).abs().max() < 1e-6


@pytest.mark.parametrize("options", [{"output_hidden_states": True}, {"output_attentions": True}], ids=str)
def test_steps_after_recorded_states_are_compiled_whole(options):
    """The library leaves hooks on every layer, which a part cannot be compiled with."""
    model = small_model(chunk_sizes=[2], attn_implementation="eager", **FEW_LAYERS)
    ids, mask = random_ids(2, 11), torch.ones(2, 11, dtype=torch.long)
    model(ids, **options)
    expected = model.generate(ids, attention_mask=mask, use_cache=False, **SEARCH)
    tokens, logits, graphs = compiled_generate(model, ids, mask)
    assert torch.equal(tokens, expected.sequences) and graphs == fill_patterns(model, [0], range(11, 23))
    assert (logits - torch.stack(expected.logits)).abs().max() < 1e-6


@pytest.mark.parametrize("field", ["hidden_states", "attentions"])
def test_a_compiled_step_has_the_states_that_the_configuration_asks_for(field):
    model, ids = small_model(chunk_sizes=[2], **FEW_LAYERS), random_ids(2, 12)
    model.set_attn_implementation("eager")
    cache = StaticCache(config=model.config, max_cache_len=12)
    step = model.get_compiled_call(CompileConfig(backend="eager", mode=None))
    with torch.no_grad():
        model(ids[:, :11], past_key_values=cache)
        setattr(model.config, f"output_{field}", True)
        found = step(input_ids=ids[:, 11:], past_key_values=cache, use_cache=True)[field]
    assert found[-1].shape[0] == 2 and len(found) >= model.config.num_prelude_layers


@pytest.mark.parametrize("place", ["lm_head", "model.core.0", "model.coda.0.mlp"])
def test_a_hook_that_comes_after_compiled_steps_counts(place):
    model = small_model(chunk_sizes=[2], num_core_layers=1)
    ids, mask = random_ids(2, 11), torch.ones(2, 11, dtype=torch.long)
    compiled_generate(model, ids, mask)
    model.get_submodule(place).register_forward_hook(lambda module, inputs, output: output * 1.5)
    expected = model.generate(ids, attention_mask=mask, use_cache=False, **SEARCH)
    tokens, logits, _ = compiled_generate(model, ids, mask)
    assert torch.equal(tokens, expected.sequences)
    assert (logits - torch.stack(expected.logits)).abs().max() < 1e-6


@pytest.mark.parametrize("how", [{}, {"prefill_chunk_size": 6}], ids=str)
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_of_a_model_that_was_compiled_runs_on_its_own_weights(how, duplicate):
    model = small_model(chunk_sizes=[2], **FEW_LAYERS)
    ids, mask = random_ids(2, 11), torch.ones(2, 11, dtype=torch.long)
    how = how | {"compiling": CompileConfig(fullgraph=True, backend="eager", mode=None)}  # equal ones compile once
    compiled_generate(model, ids, mask, **how)
    other = duplicate(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-1.7)
    expected = other.generate(ids, attention_mask=mask, use_cache=False, **SEARCH)
    tokens, logits, _ = compiled_generate(other, ids, mask, **how)
    assert torch.equal(tokens, expected.sequences)
    assert (logits - torch.stack(expected.logits)).abs().max() < 1e-6


@pytest.mark.parametrize("refused", ["full", "mask", "rows"])
def test_a_compiled_step_refuses_what_the_model_refuses(refused):
    model = small_model(dtype=torch.float32, chunk_sizes=[2], **FEW_LAYERS)
    step = model.get_compiled_call(CompileConfig(backend="eager", mode=None))
    cache = StaticCache(config=model.config, max_cache_len=9 if refused == "full" else 20)
    with torch.no_grad():
        model(random_ids(2, 8), past_key_values=cache)
        step(input_ids=random_ids(2, 1), past_key_values=cache)
        ids, mask = random_ids(3 if refused == "rows" else 2, 1), torch.ones(2, 4 if refused == "mask" else 10)
        words = {"full": "max_cache_len 9, but got token 10", "mask": "`attention_mask`", "rows": "holds 2 rows"}
        with pytest.raises(ValueError, match=words[refused]):
            step(input_ids=ids, attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize(
    ("sizes", "patterns", "family"),
    [
        *(([4, 2, 1], 3, "gpt_neox"), ([8, 4, 2, 1], 4, "gpt_neox"), ([16, 8, 4, 2], 5, "gpt_neox")),
        ([6, 2], 3, "qwen3"),
    ],
)
def test_a_decode_step_compiles_once_for_every_fill_pattern(sizes, patterns, family):
    """fullgraph, with a mask that grows: its first length has a graph of its own, never met again."""
    torch._dynamo.reset()
    model = small_model(dtype=torch.float32, chunk_sizes=sizes, num_core_layers=1, layer_family=family)
    graphs = []
    compiled = torch.compile(model.forward, fullgraph=True, backend=counting(graphs))
    period, ids = max(sizes), random_ids(1, 64)
    cache = StaticCache(config=model.config, max_cache_len=64)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        model(ids[:, :11], past_key_values=cache)
        for column in range(11, 64):
            positions = torch.tensor([[column]])
            mask = torch.ones(1, column + 1, dtype=torch.long)
            step = compiled(
                ids[:, column : column + 1].clone(), attention_mask=mask, position_ids=positions, past_key_values=cache
            )
            assert (step.logits[:, 0] - expected[:, column]).abs().max() < 1e-4, column
            if column == 11 + period:
                after_one_period = len(graphs)
    assert len(graphs) == after_one_period <= patterns + 1


IN_CHUNKS = [([3], True, lengths) for lengths in ((23, 23), (23, 6), (20, 2))]
IN_CHUNKS += [([3], False, (20, 2)), ([4, 2, 1], True, (23, 6)), ([], True, (20, 2))]


@pytest.mark.parametrize(("sizes", "fullgraph", "lengths"), IN_CHUNKS, ids=str)
def test_a_compiled_prefill_in_chunks(sizes, fullgraph, lengths):
    """Chunks of 7 end at other places of the chunks of each level every time, and the last one is shorter."""
    model = small_model(chunk_sizes=sizes, **{**FEW_LAYERS, "num_core_layers": int(bool(sizes))})
    ids, mask = pad_rows([random_ids(1, n, seed=n)[0] for n in lengths], "left", total=23)
    expected = model.generate(ids, attention_mask=mask, use_cache=False, **SEARCH)
    tokens, logits, graphs = compiled_generate(model, ids, mask, fullgraph, prefill_chunk_size=7)
    assert torch.equal(tokens, expected.sequences)
    assert (logits - torch.stack(expected.logits)).abs().max() < 1e-6
    *_, of_prefill = compiled_generate(model, ids, mask, fullgraph, prefill_chunk_size=7, max_new_tokens=1)
    assert of_prefill <= 3 and graphs - of_prefill == (PARTS if sizes else 1)


def test_a_compiled_prefill_keeps_its_padding_where_no_graph_writes(monkeypatch):
    """CUDA graphs reuse the memory of what a graph returns: the next one would change such a padding."""
    kept, make_room = [], Rows.make_room

    def remember(rows, *where):
        make_room(rows, *where)
        kept.append((rows, rows.padding.columns))

    monkeypatch.setattr(Rows, "make_room", remember)
    model = small_model(chunk_sizes=[4], **FEW_LAYERS)
    ids, mask = pad_rows([random_ids(1, n, seed=n)[0] for n in (23, 6)], "left", total=23)
    compiled_generate(model, ids, mask, prefill_chunk_size=7)
    ((rows, columns),) = kept
    assert rows.padding.columns is columns and columns.tolist() == [0, 17]


def test_a_call_that_is_compiled_in_parts(monkeypatch):
    """Where torch cannot compile a part, or has too many graphs of it, that part runs as it stands."""
    monkeypatch.setattr(StaticState, "feed", torch._dynamo.disable(StaticState.feed))
    model = small_model(chunk_sizes=[4, 2], **FEW_LAYERS)
    ids, mask = pad_rows([random_ids(1, n, seed=n)[0] for n in (11, 6)], "left", total=11)
    expected = model.generate(ids, attention_mask=mask, use_cache=False, **SEARCH)
    for how in ({}, {"prefill_chunk_size": 4}):
        tokens, logits, graphs = compiled_generate(model, ids, mask, fullgraph=False, **how)
        assert torch.equal(tokens, expected.sequences) and graphs > 2
        assert (logits - torch.stack(expected.logits)).abs().max() < 1e-6


@pytest.mark.host
@pytest.mark.parametrize("lengths", [(30, 30), (30, 19, 7)], ids=str)
def test_compiled_and_eager_calls_take_turns(lengths):
    """A compiled call leaves the padding, and how far it came, on the device; an eager one looks there."""
    torch._dynamo.reset()
    model, total = small_model(chunk_sizes=[4], **FEW_LAYERS), 30
    ids, mask = pad_rows([random_ids(1, n, seed=n)[0] for n in lengths], "left", total=total)
    compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
    cache, start = StaticCache(config=model.config, max_cache_len=total), 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        for count, forward in [(5, compiled), (1, compiled), (1, model), (9, compiled), (6, model), (1, model)] + [
            (1, compiled)
        ] * 7:
            end = start + count
            logits = forward(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits
            assert (logits - expected[:, start:end])[mask[:, start:end].bool()].abs().sum() < 1e-9, start
            start = end
        with pytest.raises(RuntimeError, match="`past_key_values`.*is full"):
            compiled(ids[:, :1], past_key_values=cache)
        with pytest.raises(ValueError, match="max_cache_len 30, but got token 31"):
            model(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("first", [0, 4])
def test_right_padding_that_a_compiled_prefill_could_not_see_is_refused_later(first):
    """Also where the padding was final before: an eager call has read the `first` columns."""
    torch._dynamo.reset()
    model = small_model(dtype=torch.float32, num_core_layers=1, chunk_sizes=[2])
    ids, mask = pad_rows([random_ids(1, 9)[0], random_ids(1, 6)[0]], "right")
    cache = StaticCache(config=model.config, max_cache_len=20)
    with torch.no_grad():
        if first:
            model(ids[:, :first], attention_mask=mask[:, :first], past_key_values=cache)
        torch.compile(model.forward, backend="eager")(ids[:, first:], attention_mask=mask, past_key_values=cache)
        for _ in range(2):  # a refusal does not count as a look
            with pytest.raises(ValueError, match="holes"):
                model(ids[:, :1], attention_mask=torch.cat([mask, mask[:, :1]], dim=1), past_key_values=cache)
