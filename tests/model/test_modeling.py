"""The model without a cache: against the reference, causality, padding, topologies, heads, compilation."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import reference_logits
from support import large_weights, model_options, pad_rows, random_ids, seeded, small_config, small_model
from transformers import DynamicCache

from modeling_spiralformer import (
    SpiralFormerForCausalLM,
    SpiralFormerForQuestionAnswering,
    SpiralFormerForSequenceClassification,
    SpiralFormerForTokenClassification,
    SpiralFormerModel,
)
from modeling_spiralformer.topology_spiralformer import TOPOLOGIES

# One of every option, for the tests that are too dear for a drawn grid.
VARIETY = {
    "defaults": {},
    "anchor": {"topology": "anchor"},
    "residual": {"topology": "residual", "chunk_sizes": [5, 3], "chunk_offsets": [0, 2]},
    "base": {"topology": "base", "chunk_sizes": [3], "causal_shifts": [7]},
    "streams": {"topology": "hyper_connections", "chunk_sizes": [5, 3, 1], "num_streams": 3},
    "mean": {"down_scaling": "mean", "chunk_sizes": [16, 3, 1]},
    "broadcast": {"up_scaling": "broadcast", "chunk_offsets": [3, 1, 0]},
    "unshared": {"share_core": False, "chunk_sizes": [1, 1], "num_prelude_layers": 0},
    "parallel shift": {"causal_shifts": [4, 2, 1]},
    "sequential": {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True},
    "no loop": {"chunk_sizes": [], "num_core_layers": 0},
    "llama": {"layer_family": "llama", "attention_bias": True, "mlp_bias": True},
    "qwen3": {"layer_family": "qwen3", "chunk_sizes": [5, 1], "share_core": False, "norm": "layer_norm"},
}
variety = pytest.mark.parametrize("options", VARIETY.values(), ids=VARIETY.keys())


@torch.no_grad()
def logits_of(model, ids, mask=None):
    return model(ids, attention_mask=mask, use_cache=False).logits


# -- the reference ------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(options=model_options(), length=st.integers(1, 40), seed=st.integers(0, 1000))
def test_agrees_with_the_reference(options, length, seed):
    ids = random_ids(1, length, seed)
    model = small_model(seed, **options)
    expected = reference_logits(model.config, model.state_dict(), ids[0])
    assert (logits_of(model, ids)[0] - expected).abs().max() < 1e-9
    model.set_attn_implementation("eager")
    assert (logits_of(model, ids)[0] - expected).abs().max() < 1e-6


@variety
def test_eager_and_sdpa_agree(options):
    model = small_model(dtype=torch.float32, **options)
    ids, mask = pad_rows([random_ids(1, n)[0] for n in (21, 13, 18)], "left")
    sdpa = logits_of(model, ids, mask)
    model.set_attn_implementation("eager")
    assert (sdpa - logits_of(model, ids, mask))[mask.bool()].abs().max() < 1e-4


# -- causality ----------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(options=model_options(), length=st.integers(2, 24), data=st.data())
def test_a_token_changes_no_logit_before_it(options, length, data):
    model = small_model(**options)
    position = data.draw(st.integers(0, length - 1))
    embeddings = torch.randn(1, length, 16, dtype=torch.float64, generator=seeded(0))
    changed = embeddings.clone()
    changed[0, position] += torch.randn(16, dtype=torch.float64, generator=seeded(1))
    with torch.no_grad():
        before = model(inputs_embeds=embeddings, use_cache=False).logits
        after = model(inputs_embeds=changed, use_cache=False).logits
    difference = (before - after).abs().amax(dim=-1)[0]
    assert difference[:position].eq(0).all()
    direct_path = options["topology"] != "base" or not options["chunk_sizes"]
    if direct_path:
        assert difference[position] > 1e-6


@variety
def test_no_gradient_flows_to_later_tokens(options):
    model = small_model(**options)
    embeddings = torch.randn(1, 20, 16, dtype=torch.float64, requires_grad=True)
    for position in (0, 6, 13):
        logits = model(inputs_embeds=embeddings, use_cache=False).logits
        (gradient,) = torch.autograd.grad(logits[0, position].sum(), embeddings)
        assert gradient[0, position + 1 :].eq(0).all()
        if options.get("topology") != "base":
            assert gradient[0, position].abs().max() > 0


# -- prefixes and padding -----------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(options=model_options(), length=st.integers(1, 30), data=st.data())
def test_logits_of_a_prefix_are_the_prefix_of_the_logits(options, length, data):
    model, ids = small_model(**options), random_ids(2, length)
    prefix = data.draw(st.integers(1, length))
    assert (logits_of(model, ids)[:, :prefix] - logits_of(model, ids[:, :prefix])).abs().max() < 1e-9


@variety
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_rows_alone(options, side):
    model = small_model(**options)
    row = random_ids(1, 40)[0]
    alone = logits_of(model, row[None])[0]
    ids, mask = pad_rows([row[: 40 - pads] for pads in range(18)], side)
    embeddings = model.get_input_embeddings()(ids).detach()
    embeddings[mask == 0] = 1e4  # rubbish where nothing may look
    with torch.no_grad():
        padded = model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits
    for pads in range(18):
        assert (padded[pads][mask[pads].bool()] - alone[: 40 - pads]).abs().max() < 1e-9, pads


@pytest.mark.parametrize("side", ["left", "right"])
def test_position_ids_that_count_real_tokens_change_nothing(side):
    """What callers compute from the mask, with 1 in the padding, as generate() and others do."""
    model = small_model()
    ids, mask = pad_rows([random_ids(1, n)[0] for n in (21, 13, 18)], side)
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    with torch.no_grad():
        given = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert (given - logits_of(model, ids, mask))[mask.bool()].abs().max() < 1e-9


def test_loss_of_a_padded_batch_is_the_loss_of_its_rows():
    model = small_model()
    rows = [random_ids(1, n, seed=n)[0] for n in (23, 9, 16)]
    ids, mask = pad_rows(rows, "left")
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        losses = [model(row[None], labels=row[None]).loss * (len(row) - 1) for row in rows]
        expected = sum(losses) / sum(len(row) - 1 for row in rows)
        labels[mask.cumsum(-1) == 1] = -100  # a row's first token has no token before it to be predicted from
        mean = model(ids, attention_mask=mask, labels=labels).loss
        # num_items_in_batch is how Trainer averages over accumulated batches
        summed = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=10).loss
    assert abs(mean - expected) < 1e-9
    assert abs(summed * 10 - sum(losses)) < 1e-9


# -- hooks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", ["anchor", "residual", "base", "mesh", "hyper_connections"])
@torch.no_grad()
def test_forward_hooks_see_every_step_of_the_loop(topology):
    """z, u, the shifted update and the state of each iteration, as the equations join them."""
    model = small_model(topology=topology, chunk_sizes=[5, 3], causal_shifts=[6, 2], chunk_offsets=[2, 0]).model
    seen, length = {}, 17

    def keep(name):
        return lambda module, inputs, outputs: seen.setdefault(name, []).append((inputs, outputs))

    for name, module in model.named_modules():
        module.register_forward_hook(keep(name))
    model(random_ids(2, length), use_cache=False)
    states = [outputs[0] for _, outputs in seen["topology"]]
    assert len(states) == model.config.num_iterations + 1
    prelude = seen["prelude.0"][0][1]
    for iteration, grid in enumerate(model.grids):
        block = f"resolutions.{iteration}"
        (((hidden, *_), update),), (((members, *_), latents),) = seen[block], seen[f"{block}.down"]
        (((outputs, _), updates),) = seen[f"{block}.up"]
        assert torch.equal(hidden, states[iteration])
        assert members.shape[1:3] == (grid.num_filled(length), grid.size) == (latents.shape[1], grid.size)
        first = seen["core.0"][iteration][0][0]
        assert torch.equal(first, latents) and torch.equal(outputs, seen["core.1"][iteration][1])
        for token in range(length):
            read = token - grid.shift
            place = grid.pi(read) * grid.size + grid.rho(read)
            expected = torch.zeros_like(update[:, 0]) if read < 0 else updates[:, place]
            assert torch.equal(update[:, token], expected), token
        joined = {"anchor": update + prelude, "residual": update + states[iteration], "base": update}
        assert topology not in joined or torch.equal(states[iteration + 1], joined[topology])


# -- equal functions ----------------------------------------------------------------------------------------------


def test_mesh_without_slots_is_mesh_with_slots():
    model = small_model(num_memory_slots=4).model
    mesh, generator = model.topology, seeded(1)
    x, *news = torch.randn(5, 2, 7, 16, generator=generator, dtype=torch.float64)
    slots = [x] + [torch.zeros_like(x) for _ in range(3)]
    state, expected = x, []
    for write, read, new in zip(mesh.write, mesh.read, news, strict=True):
        weights, reads = write(state).softmax(-1), read(state).softmax(-1)
        slots = [slot + weights[..., b : b + 1] * new for b, slot in enumerate(slots)]
        state = sum(reads[..., b : b + 1] * slot for b, slot in enumerate(slots))
        expected.append(state)
    hidden, carrier = mesh(news[0], x)
    assert (hidden - expected[0]).abs().max() < 1e-12
    for iteration, new in enumerate(news[1:]):
        hidden, carrier = mesh(new, hidden, carrier)
        assert (hidden - expected[iteration + 1]).abs().max() < 1e-12


def test_unshared_core_with_equal_weights_is_the_shared_core():
    shared, unshared = small_model(), small_model(seed=1, share_core=False)
    state = dict(shared.state_dict())
    for name in [name for name in state if name.startswith("model.core.")]:
        layer = int(name.split(".")[2])
        for iteration in range(1, 3):
            state[name.replace(f"core.{layer}.", f"core.{layer + 2 * iteration}.")] = state[name]
    unshared.load_state_dict(state)
    ids = random_ids(2, 17)
    assert torch.equal(logits_of(shared, ids), logits_of(unshared, ids))


# -- initialisation -----------------------------------------------------------------------------------------------


def test_initial_weights():
    torch.manual_seed(0)
    config = small_config(hidden_size=64, intermediate_size=256, chunk_sizes=[8, 4, 2, 1])
    model = SpiralFormerForCausalLM(config).model
    for resolution in model.resolutions[:3]:
        for linear in (resolution.scorer, resolution.allocator):
            assert linear.weight.eq(0).all() and linear.bias.eq(0).all()
    assert model.resolutions[3].scorer is None and model.resolutions[3].allocator is None
    routers = torch.cat([linear.weight.flatten() for linear in (*model.topology.write, *model.topology.read)])
    assert abs(routers.std() / 0.02 - 1) < 0.1
    scaled = 0.02 / (2 * config.num_hidden_layers) ** 0.5
    for layer in (*model.prelude, *model.core, *model.coda):
        assert abs(layer.attention.dense.weight.std() / scaled - 1) < 0.1
        assert abs(layer.mlp.dense_4h_to_h.weight.std() / scaled - 1) < 0.1
        assert abs(layer.attention.query_key_value.weight.std() / 0.02 - 1) < 0.1


def test_parameter_names():
    names = set(small_model(chunk_sizes=[2, 1], num_core_layers=1).state_dict())
    loop = {f"model.resolutions.0.{part}.{kind}" for part in ("scorer", "allocator") for kind in ("weight", "bias")}
    loop |= {
        f"model.topology.{part}.{k}.{kind}"
        for part in ("write", "read")
        for k in range(3)
        for kind in ("weight", "bias")
    }
    layer = [name.removeprefix("model.core.0.") for name in names if name.startswith("model.core.0.")]
    layers = {f"model.{block}.0.{part}" for block in ("prelude", "core", "coda") for part in layer}
    outside = {"model.embed_tokens.weight", "model.norm.weight", "model.norm.bias", "lm_head.weight"}
    assert names == loop | layers | outside and len(layer) == 12


# -- training -----------------------------------------------------------------------------------------------------


@variety
@pytest.mark.parametrize("length", [1, 19])
def test_every_parameter_gets_a_gradient(options, length):
    """Also for a text too short to fill a chunk: data-parallel training waits for all of them."""
    model = small_model(**options).train()
    ids = random_ids(2, length)
    model(ids).logits.square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@variety
def test_gradient_checkpointing_changes_no_gradient(options):
    plain = small_model(**options).train()
    replayed = copy.deepcopy(plain)
    replayed.gradient_checkpointing_enable()
    ids, mask = pad_rows([random_ids(1, n)[0] for n in (21, 13)], "left")
    for model in (plain, replayed):
        model(ids, attention_mask=mask, labels=ids).loss.backward()
    for (name, expected), parameter in zip(plain.named_parameters(), replayed.parameters(), strict=True):
        assert torch.allclose(expected.grad, parameter.grad, atol=1e-12), name


def test_no_cache_is_built_under_gradient_checkpointing():
    model = small_model().train()
    model.gradient_checkpointing_enable()
    assert model(random_ids(1, 9), use_cache=True).past_key_values is None
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(random_ids(1, 9), past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 0 and all(layer.keys is None for layer in cache.layers)


@variety
def test_bfloat16_is_finite_and_close(options):
    model = small_model(dtype=torch.float32, **options).train()
    torch.nn.init.normal_(model.lm_head.weight, std=0.02)
    half = copy.deepcopy(model).bfloat16()
    ids = random_ids(4, 33)
    loss, half_loss = model(ids, labels=ids).loss, half(ids, labels=ids).loss
    half_loss.backward()
    assert abs(half_loss / loss - 1) < 0.02
    assert all(parameter.grad.isfinite().all() for parameter in half.parameters())


@pytest.mark.parametrize(("padded", "family"), [(False, "gpt_neox"), (True, "gpt_neox"), (True, "qwen3")])
def test_compiles_whole_forward_and_backward(padded, family):
    torch._dynamo.reset()
    options = {"num_core_layers": 1, "chunk_sizes": [4, 1], "layer_family": family}
    model = small_model(dtype=torch.float32, **options).train()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    ids, mask = pad_rows([random_ids(1, n)[0] for n in (21, 13)], "left") if padded else (random_ids(2, 21), None)
    losses = []
    for module in (model, compiled):
        loss = module(ids, attention_mask=mask, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
    assert abs(losses[0] - losses[1]) < 1e-5
    for (name, expected), parameter in zip(model.named_parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(expected.grad, parameter.grad, atol=1e-4, rtol=1e-3), name


# -- outputs ------------------------------------------------------------------------------------------------------


def test_logits_to_keep():
    model, ids = small_model(), random_ids(2, 11)
    full = logits_of(model, ids)
    with torch.no_grad():
        assert torch.allclose(model(ids, logits_to_keep=3).logits, full[:, -3:], atol=1e-12)
        assert torch.allclose(model(ids, logits_to_keep=torch.tensor([1, 5])).logits, full[:, [1, 5]], atol=1e-12)


def test_inputs_embeds_are_scaled_like_ids():
    model, ids = small_model(), random_ids(2, 11)
    with torch.no_grad():
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids), use_cache=False).logits
    assert torch.equal(embedded, logits_of(model, ids))


def test_hidden_states_and_attentions():
    model = small_model(implementation="eager", chunk_sizes=[4, 1])
    with torch.no_grad():
        outputs = model.model(random_ids(2, 10), output_hidden_states=True, output_attentions=True, use_cache=False)
    lengths = [10, 10, 3, 3, 10, 10, 10]  # embeddings, prelude, core over 3 latents, core over tokens, coda
    assert [state.shape[1] for state in outputs.hidden_states] == lengths
    assert [attention.shape[-2:] for attention in outputs.attentions] == [(n, n) for n in lengths[1:]]
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    scaled = model.get_input_embeddings()(random_ids(2, 10)) * 4  # sqrt(16)
    assert torch.equal(outputs.hidden_states[0], scaled)


@pytest.mark.parametrize("coda", [0, 1])
def test_the_last_hidden_state_is_the_normed_one(coda):
    """In place of the last layer call's own: without a coda one of the core, or, where that rests, of the prelude."""
    model = small_model(chunk_sizes=[4], num_core_layers=1, num_prelude_layers=1, num_coda_layers=coda)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for length, ran in ((10, 2 + coda), (1, 1 + coda)):
            outputs = model.model(
                random_ids(1, length), past_key_values=cache, output_hidden_states=True, use_cache=True
            )
            assert len(outputs.hidden_states) == 1 + ran
            assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)


def test_hidden_states_start_with_the_embeddings_without_a_prelude():
    model = small_model(chunk_sizes=[1, 1], num_prelude_layers=0)
    ids = random_ids(1, 6)
    states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    assert len(states) == model.config.num_hidden_layers + 1
    assert torch.equal(states[0], model.get_input_embeddings()(ids) * 4)


@pytest.mark.parametrize(
    ("head", "family"),
    [
        (SpiralFormerForSequenceClassification, "gpt_neox"),
        (SpiralFormerForTokenClassification, "gpt_neox"),
        (SpiralFormerForQuestionAnswering, "gpt_neox"),
        (SpiralFormerForSequenceClassification, "llama"),
        (SpiralFormerForTokenClassification, "qwen3"),
    ],
)
def test_task_heads(head, family, tmp_path):
    model = large_weights(head(small_config(num_labels=3, layer_family=family))).eval()
    ids, mask = pad_rows([random_ids(1, 9)[0], random_ids(1, 5, seed=1)[0]], "left")
    ids[mask == 0] = 0
    one = {
        SpiralFormerForSequenceClassification: {"labels": torch.tensor([0, 2])},
        SpiralFormerForTokenClassification: {"labels": (ids % 3).masked_fill(mask == 0, -100)},
        SpiralFormerForQuestionAnswering: {
            "start_positions": torch.tensor([4, 5]),
            "end_positions": torch.tensor([6, 8]),
        },
    }[head]
    outputs = model(ids, attention_mask=mask, **one)
    outputs.loss.backward()
    assert all(weight.grad.abs().max() > 0 for weight in model.model.core[0].parameters())
    model.save_pretrained(tmp_path)
    again = head.from_pretrained(tmp_path).eval()(ids, attention_mask=mask, **one)
    assert torch.allclose(outputs.loss, again.loss, atol=1e-6)
    if head is SpiralFormerForSequenceClassification:
        alone = model(ids[1:, 4:]).logits
        assert torch.allclose(outputs.logits[1:], alone, atol=1e-5)


def test_resized_and_tied_embeddings(tmp_path):
    model = small_model(tie_word_embeddings=True, dtype=torch.float32)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    before = logits_of(model, random_ids(1, 9))
    model.resize_token_embeddings(80)
    assert model.config.vocab_size == 80 and model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.allclose(logits_of(model, random_ids(1, 9))[..., :61], before, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = SpiralFormerForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(again, random_ids(1, 9)), logits_of(model, random_ids(1, 9)))


def test_capability_flags_promise_only_what_was_run():
    assert SpiralFormerModel._supports_sdpa and SpiralFormerModel._can_compile_fullgraph
    assert SpiralFormerModel._supports_flex_attn and not SpiralFormerModel._supports_flash_attn
    assert not SpiralFormerModel._supports_attention_backend
    with pytest.raises((ValueError, ImportError)):
        SpiralFormerModel._from_config(small_config(), attn_implementation="flash_attention_2")


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_gradients_of_each_row_by_functional_calls(topology):
    """`torch.func` puts other tensors in the place of parameters, and `vmap` runs all rows as one."""
    model, ids = small_model(topology=topology), random_ids(3, 14)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: dict, row: torch.Tensor) -> torch.Tensor:
        options = {"labels": row[None], "use_cache": False}
        return torch.func.functional_call(model, parameters, (row[None],), options).loss

    of_rows = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, ids)
    for row in range(3):
        model.zero_grad()
        model(ids[row, None], labels=ids[row, None], use_cache=False).loss.backward()
        for name, parameter in model.named_parameters():
            assert (of_rows[name][row] - parameter.grad).abs().max() < 1e-9, name


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "Exactly one"),
        ({"input_ids": random_ids(1, 3), "inputs_embeds": torch.zeros(1, 3, 16)}, "Exactly one"),
        ({"input_ids": random_ids(0, 3)}, "one row"),
        ({"input_ids": random_ids(2, 0)}, "one token"),
        ({"input_ids": random_ids(1, 4), "attention_mask": torch.tensor([[1, 0, 1, 1]])}, "holes"),
        ({"input_ids": random_ids(1, 4), "attention_mask": torch.tensor([[0, 1, 0, 1]])}, "holes"),
        ({"input_ids": random_ids(1, 4), "attention_mask": torch.ones(1, 1, 4, 4)}, "4 dimensions"),
        ({"input_ids": random_ids(1, 4), "attention_mask": torch.ones(1, 5)}, r"\(1, 4\)"),
        ({"input_ids": random_ids(2, 4), "attention_mask": torch.ones(1, 4)}, r"\(2, 4\)"),
        ({"input_ids": random_ids(1, 4), "position_ids": torch.tensor([[0, 1, 1, 2]])}, "packed"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        small_model(dtype=torch.float32)(**call)


def test_ids_out_of_range_are_refused():
    with pytest.raises(IndexError):
        small_model()(torch.tensor([[1, 61]]))
