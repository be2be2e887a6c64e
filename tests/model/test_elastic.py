"""Views of some iterations of a schedule: the function of a model built for them, on the parameters of their model."""

import copy
import json
import pickle
import shlex
import shutil
import sys
from pathlib import Path

import accelerate
import peft
import pytest
import torch
from documents import ROOT, commands, run
from emulated_devices import EmulatedDevices, spread
from huggingface_hub.errors import StrictDataclassError
from reference import reference_logits
from support import large_weights, make_exact, pad_rows, random_ids, small_config, small_model
from test_devices import one_device_each
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache
from views import renamed

from modeling_spiralformer import (
    SpiralFormerForCausalLM,
    SpiralFormerForQuestionAnswering,
    SpiralFormerForSequenceClassification,
    SpiralFormerForTokenClassification,
    SpiralFormerModel,
)

TOLERANCE = 1e-9
ODD = {"chunk_offsets": [6, 0, 1, 2, 0], "causal_shifts": [9, 5, 4, 3, 2]}


def parent(**options) -> SpiralFormerForCausalLM:
    """A model of five iterations, two of them alike, with offsets and shifts of its own."""
    return small_model(
        **{"chunk_sizes": [7, 4, 2, 4, 1], "num_core_layers": 2, "num_coda_layers": 2, **ODD, **options}
    )


def numbers(view) -> list[int]:
    """The iterations of `parent` that a view runs."""
    return {
        (7, 2): [0, 2],
        (4, 4, 1): [1, 3, 4],
        (1,): [4],
        (2, 4): [2, 3],
        (4, 1): [1, 4],
        (7, 4, 2, 4, 1): [0, 1, 2, 3, 4],
    }[tuple(view.config.chunk_sizes)]


def standalone(model, view) -> SpiralFormerForCausalLM:
    """A model with the configuration of the view, and the parameters of `model` copied in by name."""
    fresh = make_exact(SpiralFormerForCausalLM(copy.deepcopy(view.config))).eval()
    fresh.load_state_dict(renamed(model, numbers(view)))
    return fresh


VARIANTS = {
    "mesh": {},
    "mesh, few slots": {"num_memory_slots": 2},
    "own cores": {"share_core": False},
    "streams": {"topology": "hyper_connections", "num_streams": 3},
    "anchor": {"topology": "anchor", "down_scaling": "mean"},
    "residual, own cores": {"topology": "residual", "share_core": False, "up_scaling": "broadcast"},
    "base": {"topology": "base", "num_coda_layers": 0},
    "tied": {"tie_word_embeddings": True},
    "llama": {"layer_family": "llama", "num_key_value_heads": 1},
    "qwen3, own cores": {"layer_family": "qwen3", "share_core": False},
}
variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
schedule = pytest.mark.parametrize("chunk_sizes", [[7, 2], [4, 4, 1], [1], [2, 4], [7, 4, 2, 4, 1]], ids=str)


@torch.no_grad()
def logits(model, ids, **options) -> torch.Tensor:
    return model(ids, use_cache=False, **options).logits


@variant
@schedule
@torch.no_grad()
def test_a_view_is_the_model_of_its_schedule(options, chunk_sizes):
    model = parent(**options)
    view, ids = model.with_schedule(chunk_sizes), random_ids(2, 33)
    expected = logits(standalone(model, view), ids)
    assert (logits(view, ids) - expected).abs().max() < TOLERANCE
    rows = [reference_logits(view.config, renamed(model, numbers(view)), row) for row in ids]
    assert (torch.stack(rows) - expected).abs().max() < TOLERANCE
    difference = (logits(model, ids) - expected).abs().max()
    assert difference < TOLERANCE if chunk_sizes == model.config.chunk_sizes else difference > 1e-3


@variant
@schedule
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@torch.no_grad()
def test_cached_views(options, chunk_sizes, static):
    """Left-padded rows, in steps, beside the model's own cache."""
    model = parent(**options)
    view = model.with_schedule(chunk_sizes)
    ids, mask = pad_rows([random_ids(1, n, seed=n)[0] for n in (29, 22, 9)], "left")
    caches = []
    for one in (view, model):
        expected = logits(one, ids, attention_mask=mask)
        kind = {"max_cache_len": 31} if static else {}
        cache = (StaticCache if static else DynamicCache)(config=one.config, **kind)
        assert len(cache.layers) == one.config.num_hidden_layers
        for start, end in [(0, 11), (11, 12), (12, 13), (13, 20), *((n, n + 1) for n in range(20, 29))]:
            cached = one(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True).logits
            difference = (cached - expected[:, start:end])[mask[:, start:end].bool()]
            assert difference.abs().max() < TOLERANCE
        caches.append(cache)
    assert all(layer.keys.shape[-2] > 0 for cache in caches for layer in cache.layers)


# -- which iterations -----------------------------------------------------------------


def test_the_earliest_iterations_that_fit():
    model = parent()
    config = model.with_schedule((4, 1)).config
    assert config.chunk_sizes == [4, 1]
    assert config.chunk_offsets == [0, 0] and config.causal_shifts == [5, 2]  # of iterations 1 and 4
    assert config.num_memory_slots == model.config.resolved_num_memory_slots == 8
    config = parent(topology="anchor", chunk_offsets=None, causal_shifts=None).with_schedule([4, 4]).config
    assert config.chunk_offsets == [2, 2] and config.causal_shifts == [3, 3] and config.num_memory_slots is None


@pytest.mark.parametrize(
    "chunk_sizes", [[], [3], [1, 7], [4, 4, 4], [7, 4, 2, 4, 1, 1], None, 4, "74", [4.0], [True], ["4"]], ids=str
)
def test_what_is_no_part_of_the_schedule_is_refused(chunk_sizes):
    with pytest.raises(
        ValueError, match="`chunk_sizes` must be .*the model's .7, 4, 2, 4, 1., in that order"
    ) as error:
        parent().with_schedule(chunk_sizes)
    assert str(error.value).endswith(f"got {chunk_sizes!r}.")


def test_a_stack_without_a_loop_has_no_views():
    model = small_model(chunk_sizes=[], num_core_layers=0)
    with pytest.raises(ValueError, match=r"`chunk_sizes` must be .*the model's \[\]"):
        model.with_schedule([])


def test_a_coarse_start_needs_a_prelude():
    model = small_model(chunk_sizes=[1, 4, 1], num_prelude_layers=0)
    ids = random_ids(1, 9)
    assert logits(model.with_schedule([1, 1]), ids).shape == (1, 9, model.config.vocab_size)
    with pytest.raises(StrictDataclassError, match="num_prelude_layers"):
        model.with_schedule([4])


# -- one set of parameters -----------------------------------------------------------------


@variant
def test_a_view_holds_the_parameters_that_it_uses(options):
    model = parent(**options)
    view = model.with_schedule([4, 1])
    fresh = SpiralFormerForCausalLM(copy.deepcopy(view.config))
    assert {id(p) for p in view.parameters()} < {id(p) for p in model.parameters()}
    assert view.num_parameters() == fresh.num_parameters() < model.num_parameters()
    assert view.state_dict().keys() == fresh.state_dict().keys()
    assert view.dtype == model.dtype and view.device == model.device
    assert view._no_split_modules == fresh._no_split_modules
    assert view.all_tied_weights_keys == fresh.all_tied_weights_keys


def test_making_a_view_draws_no_random_numbers():
    model = parent()
    torch.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)
    model.with_schedule([4, 1])
    assert torch.equal(torch.rand(5), expected)


@pytest.mark.parametrize("share_core", [True, False])
def test_gradients_reach_the_model(share_core):
    model, ids = parent(share_core=share_core).train(), random_ids(2, 23)
    view = model.with_schedule([4, 1])
    fresh = standalone(model, view).train()
    for one in (view, fresh):
        one(ids, labels=ids).loss.backward()
    expected = renamed(model, [1, 4])
    own = {id(weight): name for name, weight in view.named_parameters()}
    compared = 0
    for weight in model.parameters():
        if id(weight) not in own:
            assert weight.grad is None
            continue
        assert (weight.grad - fresh.get_parameter(own[id(weight)]).grad).abs().max() < TOLERANCE
        compared += 1
    assert compared == len(set(expected))


@torch.no_grad()
def test_what_changes_the_model_changes_the_view():
    model, ids = parent(), random_ids(1, 19)
    view = model.with_schedule([7, 2])
    large_weights(model, seed=5)
    assert (logits(view, ids) - logits(standalone(model, view), ids)).abs().max() < TOLERANCE
    model.load_state_dict(parent(seed=7).state_dict())
    assert (logits(view, ids) - logits(standalone(model, view), ids)).abs().max() < TOLERANCE
    model.to(torch.float32)
    assert view.dtype == logits(view, ids).dtype == torch.float32


@torch.no_grad()
def test_adapters_in_layers_act_in_the_view():
    model, ids = parent(dtype=torch.float32), random_ids(1, 19)
    view = model.with_schedule([7, 2])
    before, plain = logits(view, ids), logits(model, ids)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query_key_value"], init_lora_weights=False))
    adapted.eval()
    assert (logits(view, ids) - before).abs().max() > 1e-3
    assert torch.equal(logits(view, ids), logits(adapted.with_schedule([7, 2]), ids))
    with adapted.disable_adapter():
        assert torch.equal(logits(view, ids), before) and torch.equal(logits(model, ids), plain)


@pytest.mark.parametrize("change", ["routers", "head", "view"])
@pytest.mark.parametrize("depth", [1, 2])
@torch.no_grad()
def test_replaced_modules_are_refused(change, depth, tmp_path):
    model, ids = parent(dtype=torch.float32), random_ids(1, 9)
    view = model.with_schedule([7, 2])
    if depth == 2:
        view = model.with_schedule([7, 4, 2]).with_schedule([7, 2])
    logits(view, ids)
    if change == "routers":
        config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
        model = peft.get_peft_model(model, config).eval()
    elif change == "head":
        model.set_output_embeddings(torch.nn.Linear(16, 61, bias=False))
    else:
        view.set_output_embeddings(torch.nn.Linear(16, 61, bias=False))
    with pytest.raises(ValueError, match="call `with_schedule` again"):
        logits(view, ids)
    with pytest.raises(ValueError, match="call `with_schedule` again"):
        view.save_pretrained(tmp_path)
    again = model.with_schedule([7, 2])
    assert logits(again, ids).shape[1] == 9


@pytest.mark.parametrize("size", [70, 50])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "kind",
    [SpiralFormerForCausalLM, SpiralFormerForSequenceClassification, SpiralFormerForTokenClassification]
    + [SpiralFormerForQuestionAnswering, SpiralFormerModel],
)
@torch.no_grad()
def test_resized_embeddings_are_refused_until_the_view_is_made_again(kind, tied, size, tmp_path):
    """The library resizes them in place: the module is the same, and the configuration of the view is not told."""
    model, ids = kind(small_config(tie_word_embeddings=tied, num_labels=2)).eval(), random_ids(1, 9).clamp(max=49)
    view = model.with_schedule(model.config.chunk_sizes[1:])
    with pytest.raises(ValueError, match="`resize_token_embeddings` must be called on the model"):
        view.resize_token_embeddings(size)
    model(ids), view(ids)
    model.resize_token_embeddings(size)
    for attempt in (lambda: view(ids), lambda: view.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="embed_tokens|lm_head"):
            attempt()
    again = model.with_schedule(view.config.chunk_sizes)
    again.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path).eval()
    assert loaded.config.vocab_size == loaded.get_input_embeddings().weight.shape[0] == size
    assert torch.equal(loaded(ids)[0], again(ids)[0])


@pytest.mark.parametrize("topology", ["mesh", "hyper_connections", "anchor"])
@torch.no_grad()
def test_a_wrapped_topology_is_refused_until_it_is_merged(topology):
    """A view holds some of its routers or gates, and no wrapper of them all."""
    model, ids = parent(dtype=torch.float32, topology=topology), random_ids(1, 9)
    expected = logits(model.with_schedule([7, 2]), ids)
    options = {"target_modules": ["query_key_value"], "modules_to_save": ["topology"]}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options)).eval()
    with pytest.raises(ValueError, match="`with_schedule` .* `modules_to_save`"):
        adapted.with_schedule([7, 2])
    assert (logits(adapted.merge_and_unload().with_schedule([7, 2]), ids) - expected).abs().max() < 1e-6


@torch.no_grad()
def test_a_view_has_the_adapters_of_the_embeddings():
    model, ids = parent(dtype=torch.float32), random_ids(1, 9)
    before = logits(model.with_schedule([7, 2]), ids)
    for options in ({"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}):
        options = {"target_modules": ["query_key_value"], **options}
        adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**options, init_lora_weights=False)).eval()
        assert not torch.equal(logits(adapted.with_schedule([7, 2]), ids), before)


@pytest.mark.parametrize("who", ["model", "view"])
@torch.no_grad()
def test_the_attention_of_both_is_one(who):
    """A mask made for another implementation than that of the layers would be wrong where rows are padded."""
    model = parent(dtype=torch.float32)  # eager attention has NaN where float64 is padded, as in the library
    view = model.with_schedule([4, 1])
    ids, mask = pad_rows([random_ids(1, n, seed=n)[0] for n in (19, 8)], "left")
    expected = [logits(one, ids, attention_mask=mask) for one in (model, view)]
    for implementation in ("eager", "sdpa", "eager"):
        {"model": model, "view": view}[who].set_attn_implementation(implementation)
        for one, logits_before in zip((model, view), expected, strict=True):
            difference = logits(one, ids, attention_mask=mask) - logits_before
            assert difference[mask.bool()].abs().max() < 1e-5
            outputs = one(ids, attention_mask=mask, output_attentions=True)
            assert len(outputs.attentions) == (one.config.num_hidden_layers if implementation == "eager" else 0)


@torch.no_grad()
def test_the_configuration_of_a_view_does_not_hear_of_the_models_attention():
    """A model does not know its views: their field is what was last set there. Their attention is the model's."""
    model, ids = parent(dtype=torch.float32), random_ids(1, 9)
    view, other = model.with_schedule([4, 1]), model.with_schedule([1])

    def computed_by(one) -> str:
        return "eager" if one(ids, output_attentions=True).attentions else "sdpa"

    model.set_attn_implementation("eager")
    assert [computed_by(one) for one in (model, view, other)] == ["eager"] * 3
    assert view.config._attn_implementation == other.config._attn_implementation == "sdpa"
    view.set_attn_implementation("sdpa")  # what its own field says already
    assert [computed_by(one) for one in (model, view, other)] == ["sdpa"] * 3
    view.set_attn_implementation("eager")
    assert [computed_by(one) for one in (model, view, other)] == ["eager"] * 3
    assert model.config._attn_implementation == "eager"
    assert computed_by(model.with_schedule([4, 1])) == "eager"


@pytest.mark.parametrize("first", ["model", "view"])
@torch.no_grad()
def test_states_are_recorded_once(first):
    model, ids = parent(share_core=False, implementation="eager"), random_ids(1, 9)
    if first == "model":
        model(ids, output_hidden_states=True, output_attentions=True)
    view = model.with_schedule([4, 1])
    for one in (view, model, view.with_schedule([1]), standalone(model, model.with_schedule([7, 2])), view):
        outputs = one(ids, output_hidden_states=True, output_attentions=True)
        assert len(outputs.attentions) == one.config.num_hidden_layers
        assert len(outputs.hidden_states) == one.config.num_hidden_layers + 1


@torch.no_grad()
def test_the_mode_is_that_of_the_layers():
    model, ids = parent(hidden_dropout=0.5), random_ids(1, 9)
    view = model.with_schedule([4, 1])
    expected = logits(view, ids)
    model.train()
    assert not torch.equal(logits(view, ids), logits(view, ids))
    view.eval()
    assert torch.equal(logits(view, ids), expected) and torch.equal(logits(model, ids), logits(model, ids))


def test_gradient_checkpointing_of_the_model_is_that_of_the_view():
    model, ids = parent(), random_ids(2, 23)
    view = model.with_schedule([4, 1])
    view(ids, labels=ids).loss.backward()
    expected = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="in training mode with gradient checkpointing"):
        view(ids, past_key_values=DynamicCache(config=view.config))
    view(ids, labels=ids).loss.backward()
    for weight, before in zip(model.parameters(), expected, strict=True):
        assert (weight.grad is None) == (before is None)
        assert before is None or (weight.grad - before).abs().max() < TOLERANCE
    model.gradient_checkpointing_disable()
    assert view(ids, past_key_values=DynamicCache(config=view.config)).logits.shape[:2] == (2, 23)


# -- a model like any other -----------------------------------------------------------------


@torch.no_grad()
def test_a_view_of_a_view():
    model, ids = parent(share_core=False), random_ids(1, 21)
    view = model.with_schedule([7, 4, 1]).with_schedule([4, 1])
    direct = model.with_schedule([4, 1])
    assert view.config.to_dict() == direct.config.to_dict()
    assert torch.equal(logits(view, ids), logits(direct, ids))
    cache = DynamicCache(config=view.config)
    steps = [view(part, past_key_values=cache).logits for part in ids.split([9, 1, 1, 10], dim=1)]
    assert (torch.cat(steps, dim=1) - logits(direct, ids)).abs().max() < TOLERANCE
    large_weights(model, seed=5)
    assert torch.equal(logits(view, ids), logits(direct, ids))


@pytest.mark.parametrize("options", [{}, {"share_core": False, "tie_word_embeddings": True}], ids=str)
@torch.no_grad()
def test_a_saved_view_is_a_checkpoint_of_its_own(options, tmp_path):
    model, ids = parent(**options), random_ids(1, 19)
    view = model.with_schedule([4, 1])
    view.generation_config.max_new_tokens = 7
    view.save_pretrained(tmp_path)
    loaded, report = SpiralFormerForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert not any(report.values())
    assert loaded.config.chunk_sizes == [4, 1] and loaded.generation_config.max_new_tokens == 7
    assert loaded.num_parameters() == view.num_parameters()
    assert (logits(loaded.eval(), ids) - logits(view, ids)).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda view: pickle.loads(pickle.dumps(view))], ids=["copy", "pickle"]
)
@torch.no_grad()
def test_copies_of_a_view_stand_alone(twin, tmp_path):
    model, ids = parent(), random_ids(1, 19)
    view = model.with_schedule([4, 1])
    expected = logits(view, ids)
    copied = twin(view)
    large_weights(model, seed=5)
    assert not torch.equal(logits(view, ids), expected)
    assert torch.equal(logits(copied, ids), expected)
    copied.set_attn_implementation("eager")
    assert model.config._attn_implementation == "sdpa"
    outputs = copied(ids, output_attentions=True)
    assert len(outputs.attentions) == copied.config.num_hidden_layers
    assert (outputs.logits - expected).abs().max() < 1e-6  # eager attention has its softmax in float32


@pytest.mark.parametrize(
    "kind",
    [
        SpiralFormerModel,
        SpiralFormerForSequenceClassification,
        SpiralFormerForTokenClassification,
        SpiralFormerForQuestionAnswering,
    ],
)
@torch.no_grad()
def test_bodies_and_other_heads(kind):
    config = small_config(chunk_sizes=[4, 2, 1], num_labels=3 if kind is not SpiralFormerForQuestionAnswering else 2)
    model, ids = large_weights(kind(config)).to(torch.float64).eval(), random_ids(2, 13)
    view = model.with_schedule([4, 1])
    fresh = kind(copy.deepcopy(view.config)).to(torch.float64).eval()
    fresh.load_state_dict(view.state_dict())
    assert torch.equal(view(ids)[0], fresh(ids)[0])
    assert not torch.equal(view(ids)[0], model(ids)[0])
    assert isinstance(view, kind) and view.config.num_labels == config.num_labels


@torch.no_grad()
def test_packed_rows():
    view = parent(share_core=False).with_schedule([7, 2])
    first, second = random_ids(1, 9, seed=1), random_ids(1, 14, seed=2)
    positions = torch.tensor([[*range(9), *range(14)]])
    packed = logits(view, torch.cat([first, second], dim=1), position_ids=positions)
    alone = torch.cat([logits(view, first), logits(view, second)], dim=1)
    assert (packed - alone).abs().max() < TOLERANCE


@torch.no_grad()
def test_a_cache_of_the_model_is_refused():
    model = parent(share_core=False)
    view = model.with_schedule([7, 4, 2, 4])
    with pytest.raises(ValueError, match="must be built for this model"):
        view(random_ids(1, 9), past_key_values=DynamicCache(config=model.config))


@torch.no_grad()
def test_a_view_on_several_devices(monkeypatch):
    model, alone = parent(share_core=False), parent(share_core=False)
    ids, mask = pad_rows([random_ids(1, n, seed=n)[0] for n in (13, 6)], "left")
    expected = logits(alone.with_schedule([4, 1]), ids, attention_mask=mask)
    spread(model, one_device_each(model), monkeypatch)
    with EmulatedDevices():
        got = logits(model.with_schedule([4, 1]), ids, attention_mask=mask)
    assert (got - expected)[mask.bool()].abs().max() < TOLERANCE


def test_sharded_and_offloaded_models_are_refused():
    model = parent()
    model.model.core[0].unshard = None  # as FSDP gives a layer a method of that name
    with pytest.raises(ValueError, match="`with_schedule` .* not sharded by FSDP"):
        model.with_schedule([4, 1])
    model = parent(dtype=torch.float32)
    accelerate.cpu_offload(model, "cpu")
    with pytest.raises(ValueError, match="`with_schedule` .* none of whose modules are offloaded"):
        model.with_schedule([4, 1])


# -- the page --------------------------------------------------------------------------------------------------------


@pytest.mark.processes
def test_the_commands_of_the_page_run(workplace):
    """With another text, and two steps in place of nine hundred."""
    (workplace / "boolq_wiki").mkdir()
    for name in ("train", "valid"):
        shutil.copy(ROOT / "docs" / "limits.md", workplace / "boolq_wiki" / f"{name}.txt")
    few = {"train.py": "--max_steps 2 --block_size 32 --report_to none --use_cpu --max_eval_samples 4"}
    few["compare_schedules.py"] = "--length 16 --sequences 4 --prompts 2 --new_tokens 9"
    printed = {}
    for command in commands("docs/elastic.md"):
        script = command.split()[1].removeprefix("scripts/")
        printed[script] = run([sys.executable, *shlex.split(f"{command} {few.get(script, '')}")[1:]], workplace)
    metrics = json.loads((workplace / "runs/elastic/eval_results.json").read_text())
    assert {"eval_loss", "eval_8-4-2_loss", "eval_8-4_loss", "eval_1_loss"} <= metrics.keys()
    written = json.loads((workplace / "runs/elastic.json").read_text())["rows"]
    assert [row["layer_equivalents"] for row in written] == [5.75, 3.75, 2.75, 2.25, 4.25, 4.0]
    assert all(0 <= row["accepted"] <= 1 <= row["tokens_per_call"] for row in written[1:])
    check_example(printed["examples/elastic.py"], workplace / "runs/elastic")


def check_example(printed: str, checkpoint: Path) -> None:
    """What the example prints of the model and three views: cost, loss and text; then the text that each drafts."""
    model, tokenizer = (kind.from_pretrained(checkpoint) for kind in (AutoModelForCausalLM, AutoTokenizer))
    prompt = tokenizer("def add(a, b):\n    return", return_tensors="pt")
    layers = {(8, 4, 2, 1): 5.75, (8, 4, 2): 3.75, (8, 4): 2.75, (1,): 4.0}
    expected = []
    for sizes, count in layers.items():
        view = model.with_schedule(sizes)
        with torch.no_grad():
            loss = view(**prompt, labels=prompt["input_ids"]).loss
        tokens = view.generate(**prompt, max_new_tokens=20, do_sample=False, use_cache=False)
        text = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        expected.append(f"{list(sizes)}: {count:.2f} layers for a token, loss {loss:.3f}, {text!r}")
    drafted = [f"drafted by {list(sizes)}: the model's text" for sizes in list(layers)[1:]]
    assert printed.splitlines()[-7:] == expected + drafted
    assert len(set(expected)) == 4
