"""Flex attention is sdpa: at every level, in every kind of row, with a cache, and backward; and what it refuses.

On a CPU in float64, where torch does not compile it; on an accelerator the compiled kernel in float32.
"""

import threading

import accelerate
import pytest
import torch
from support import VOCAB, large_weights, make_exact, pad_rows, random_ids, small_config
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import BlockMask
from transformers import StaticCache

from modeling_spiralformer import SpiralFormerForCausalLM, SpiralFormerQuantizedCache, modeling_spiralformer
from modeling_spiralformer.flex_spiralformer import UNFUSED

# Heads of 16 and more, which the kernel asks for. Their number, or their size, is no power of 2; queries are grouped.
LAYERS = {
    "gpt_neox": {"layer_family": "gpt_neox", "hidden_size": 32, "num_attention_heads": 2},
    "llama": {"layer_family": "llama", "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1},
    "qwen3": {"layer_family": "qwen3", "hidden_size": 32, "num_attention_heads": 6, "head_dim": 24},
    "streams": {"layer_family": "llama", "hidden_size": 64, "num_key_value_heads": 4, "topology": "hyper_connections"},
    "anchor": {"layer_family": "gpt_neox", "hidden_size": 32, "topology": "anchor", "chunk_sizes": [5, 3, 1]},
}
# Which torch does itself; on an accelerator it finds no kernel.
GROUPED = {"layer_family": "llama", "hidden_size": 64}
families = pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
LENGTHS = (131, 94, 150)  # more than a block of the mask has, 128; odd pads, another in each row
TEXTS = ([5, 150, 9, 136], [201, 1, 98], [300])


@pytest.fixture(autouse=True)
def _compiles_anew():
    """Or all tests together would compile more often than torch allows."""
    yield
    torch._dynamo.reset()


def is_on_cpu() -> bool:
    return torch.get_default_device().type == "cpu"


def bound() -> float:
    return 1e-9 if is_on_cpu() else 3e-5


def make_models(**options):
    """A model under flex attention, and what it must equal: the same weights in float64 under sdpa."""
    models = []
    for implementation in ("flex_attention", "sdpa"):
        config = small_config(**options)
        config._attn_implementation = implementation
        models.append(large_weights(SpiralFormerForCausalLM(config)).eval())
    flex, exact = models
    return make_exact(flex) if is_on_cpu() else flex, make_exact(exact)


def difference(values: torch.Tensor, expected: torch.Tensor) -> float:
    return ((values.double() - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


def rows_of(kind: str) -> tuple[dict, torch.Tensor]:
    """The arguments of a call, and `(B, S)` True where its logits count."""
    if kind == "packed":
        ids = random_ids(3, 300)
        position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in TEXTS])
        return {"input_ids": ids, "position_ids": position_ids}, torch.ones_like(ids).bool()
    if kind == "unpadded":
        ids = random_ids(3, 150)
        return {"input_ids": ids}, torch.ones_like(ids).bool()
    ids, mask = pad_rows([random_ids(1, n, seed=n)[0] for n in LENGTHS], kind)
    return {"input_ids": ids, "attention_mask": mask}, mask.bool()


# -- the same function --------------------------------------------------------------------------------------------


@families
@torch.no_grad()
def test_every_kind_of_row_is_what_it_is_under_sdpa(layers):
    flex, exact = make_models(**layers)
    for kind in ("unpadded", "left", "right", "packed"):
        arguments, counted = rows_of(kind)
        logits, expected = (model(**arguments, use_cache=False).logits for model in (flex, exact))
        assert difference(logits[counted], expected[counted]) < bound(), kind


@torch.no_grad()
def test_grouped_queries():
    flex, exact = make_models(**GROUPED)
    if not is_on_cpu():
        refused("`num_key_value_heads` must be 4, .* with flex_attention on cuda: .* but got 2", flex)
        return
    arguments, counted = rows_of("left")
    logits, expected = (model(**arguments, use_cache=False).logits[counted] for model in (flex, exact))
    assert difference(logits, expected) < bound()


@families
@pytest.mark.parametrize("kind", ["unpadded", "left"])
@torch.no_grad()
def test_a_text_in_pieces_and_token_by_token_is_the_whole_text(layers, kind):
    flex, exact = make_models(**layers)
    arguments, counted = rows_of(kind)
    expected = exact(**arguments, use_cache=False).logits
    cache, steps, past = None, [], 0
    for part in arguments["input_ids"].split([7, 1, 122, 9, *[1] * 11], dim=1):
        past += part.shape[1]
        mask = arguments["attention_mask"][:, :past] if kind == "left" else None
        out = flex(part, attention_mask=mask, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    assert difference(torch.cat(steps, dim=1)[counted], expected[counted]) < bound()


@families
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_gradients_are_those_under_sdpa(layers, checkpointed, monkeypatch):
    """On a CPU torch refuses gradients, and so does the model; there the refusals are taken out."""
    if is_on_cpu() and checkpointed:
        pytest.skip("what is replayed in the backward pass would be compiled")
    if is_on_cpu():
        monkeypatch.setattr(torch_flex, "_validate_device", lambda *states: None)
        monkeypatch.setattr(modeling_spiralformer, "check_flex", lambda *call: None)
    flex, exact = make_models(**layers)
    flex.train(), exact.train()
    if checkpointed:
        flex.gradient_checkpointing_enable()
    for kind in ("left", "packed"):
        arguments, counted = rows_of(kind)
        labels = arguments["input_ids"].masked_fill(~counted, -100)
        for model in (flex, exact):
            model.zero_grad()
            model(**arguments, labels=labels, use_cache=False).loss.backward()
        largest = max(parameter.grad.abs().max() for parameter in exact.parameters())
        for (name, parameter), wanted in zip(flex.named_parameters(), exact.parameters(), strict=True):
            error = (parameter.grad.double() - wanted.grad).abs().max()
            assert error < bound() * largest, (kind, name)


@torch.no_grad()
def test_masks_are_block_masks_at_every_level_and_skip_other_texts():
    flex, _ = make_models(**LAYERS["gpt_neox"])
    masks = []
    for layer in (*flex.model.prelude, *flex.model.core, *flex.model.coda):
        layer.register_forward_pre_hook(
            lambda module, inputs, named: masks.append(named["attention_mask"]), with_kwargs=True
        )
    flex(random_ids(1, 2048), position_ids=torch.arange(512).repeat(4)[None], use_cache=False)
    assert len(masks) == flex.config.num_hidden_layers and all(isinstance(mask, BlockMask) for mask in masks)
    # Of each of four texts a triangle of blocks: of 4, 2 and 1 a side.
    blocks = {mask.shape[-1]: (mask.kv_num_blocks + mask.full_kv_num_blocks).sum().item() for mask in masks}
    assert blocks == {2048: 4 * 10, 1024: 4 * 3, 512: 4 * 1}


def test_generate_writes_what_it_writes_under_sdpa():
    flex, exact = make_models(**LAYERS["qwen3"])
    ids, mask = pad_rows([random_ids(1, n, seed=n)[0] for n in (11, 4, 9)], "left")
    for how in ({}, {"num_beams": 2}, {"prefill_chunk_size": 4}):
        options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **how}
        assert torch.equal(flex.generate(ids, **options), exact.generate(ids, **options)), how


@torch.no_grad()
def test_views_and_quantised_caches():
    flex, exact = make_models(**LAYERS["llama"])
    arguments, counted = rows_of("left")
    views = [model.with_schedule([4, 1])(**arguments, use_cache=False).logits[counted] for model in (flex, exact)]
    assert difference(*views) < bound()
    if is_on_cpu():  # in float32 a key may be rounded to the other side
        caches = [SpiralFormerQuantizedCache(flex.config, nbits=8) for _ in range(2)]
        logits = [
            model(**arguments, past_key_values=cache).logits[counted]
            for model, cache in zip((flex, exact), caches, strict=True)
        ]
        assert difference(*logits) < bound()


# -- what is refused ----------------------------------------------------------------------------------------------


def refused(match: str, model, **arguments):
    with pytest.raises(ValueError, match=match):
        model(random_ids(2, 9), **arguments)


@torch.no_grad()
def test_what_flex_attention_cannot_do_is_refused_by_name():
    flex, _ = make_models(**LAYERS["gpt_neox"], attention_dropout=0.1)
    assert flex(random_ids(2, 9)).logits.isfinite().all()
    refused("`attention_dropout` must be 0 in training with flex_attention, .* but got 0.1", flex.train())
    refused("`output_attentions` must be False with flex_attention", flex.eval(), output_attentions=True)
    static = StaticCache(config=flex.config, max_cache_len=16)
    refused("must be dynamic with flex_attention.* but got 'StaticCache'", flex, past_key_values=static)
    with pytest.raises(ValueError, match="must be dynamic with flex_attention"):
        flex.generate(random_ids(2, 9), max_new_tokens=2, cache_implementation="static", pad_token_id=0)
    with pytest.raises(ValueError, match="`attn_implementation` must be sdpa or eager in continuous batching"):
        flex.init_continuous_batching()
    with pytest.raises(Exception, match="`attn_implementation` must be sdpa or eager where the model is compiled"):
        torch.compile(flex.forward, backend="eager", fullgraph=True)(random_ids(2, 9))  # raised by torch


def test_what_a_device_cannot_do_is_refused_by_name():
    if is_on_cpu():
        flex, _ = make_models(**LAYERS["gpt_neox"])
        refused("`attn_implementation` must be sdpa or eager for gradients on a CPU", flex)
        embeddings = torch.randn(1, 5, 32, dtype=torch.float64, requires_grad=True)
        with pytest.raises(ValueError, match="for gradients on a CPU"):
            flex.requires_grad_(False)(inputs_embeds=embeddings)
        assert flex(random_ids(2, 9)).logits.shape == (2, 9, VOCAB)  # nothing is trained
        return
    flex, _ = make_models()
    refused("`head_dim` must be at least 16 with flex_attention on cuda, but got 8", flex)
    flex, _ = make_models(**LAYERS["gpt_neox"])
    refused("`dtype` must be one of .* with flex_attention, but got torch.float64", flex.double())


# -- compiling --------------------------------------------------------------------------------------------------------


def is_compiling() -> bool:
    seen = []
    torch.compile(lambda x: x + 1, backend=lambda graph, inputs: seen.append(graph) or graph.forward)(torch.ones(2))
    return bool(seen)


@torch.no_grad()
def test_offloaded_weights_leave_it_uncompiled(tmp_path):
    """The tokens are on the CPU where the weights are nowhere."""
    if not is_on_cpu():
        return
    flex, _ = make_models(**LAYERS["gpt_neox"])
    expected = flex(random_ids(1, 9)).logits
    accelerate.disk_offload(flex, tmp_path, execution_device=torch.device("cpu"))
    seen = []
    flex.model.norm.register_forward_hook(lambda *_: seen.append(is_compiling()))
    assert torch.equal(flex(random_ids(1, 9)).logits, expected) and seen == [False]


@torch.no_grad()
def test_what_else_is_compiled_stays_so():
    """Also after an error, and where several threads are in a forward at once."""
    flex, _ = make_models(**LAYERS["gpt_neox"])
    flex(random_ids(1, 9))
    assert is_compiling()
    refused("output_attentions", flex, output_attentions=True)
    assert is_compiling()
    if not is_on_cpu():
        return
    entered, left = threading.Event(), threading.Event()

    def stay():
        with UNFUSED:
            entered.set()
            left.wait()

    thread = threading.Thread(target=stay)
    with UNFUSED:
        thread.start()
        entered.wait()
        assert not is_compiling()
    assert not is_compiling()  # the thread is still in there
    left.set()
    thread.join()
    assert is_compiling()
