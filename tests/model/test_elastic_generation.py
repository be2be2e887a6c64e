"""`generate()` of views: padded prompts, compiled steps, and drafts for their model."""

import pytest
import torch
from support import pad_rows, random_ids, small_model
from test_elastic import parent
from transformers import CompileConfig

GREEDY = {"max_new_tokens": 21, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("share_core", [True, False])
def test_generation_from_padded_prompts(how, share_core):
    model = parent(share_core=share_core)
    view = model.with_schedule([7, 4, 1])
    ids, mask = pad_rows([random_ids(1, n, seed=n)[0] for n in (19, 14, 6)], "left")
    given = {"attention_mask": mask, "repetition_penalty": 2.0, **GREEDY}
    beams = {"num_beams": how.get("num_beams", 1)}
    expected = [m.generate(ids, use_cache=False, **beams, **given) for m in (view, model)]
    got = [m.generate(ids, **how, **given) for m in (view, model)]
    assert all(torch.equal(one, other) for one, other in zip(expected, got, strict=True))
    assert not torch.equal(got[0], got[1])


def test_a_compiled_model_and_its_compiled_view():
    """Each compiles a graph of its own: the view must not run the graph of its model."""
    torch._dynamo.reset()
    model = small_model(chunk_sizes=[3, 1], num_core_layers=1)
    view = model.with_schedule([1])
    compiling = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compiling._compile_all_devices = True
    ids = random_ids(2, 9)
    for one in (model, view):
        expected = one.generate(ids, use_cache=False, **GREEDY)
        got = one.generate(ids, cache_implementation="static", compile_config=compiling, **GREEDY)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("draft", ["view", "model"])
@pytest.mark.parametrize(
    "options", [{}, {"share_core": False, "topology": "anchor", "layer_family": "llama"}], ids=str
)
def test_self_speculation_gives_the_greedy_tokens(draft, options):
    model, ids = parent(**options), random_ids(1, 13)
    view = model.with_schedule([7, 4, 1])
    target, assistant = (model, view) if draft == "view" else (view, model)
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.assistant_confidence_threshold = 0.0
    expected = target.generate(ids, **GREEDY)
    assert torch.equal(target.generate(ids, assistant_model=assistant, **GREEDY), expected)
    assert torch.equal(target.generate(ids, assistant_model=assistant, **GREEDY), expected)  # nothing was left behind
    assert torch.equal(target.generate(ids, use_cache=False, **GREEDY), expected)
    assert len(expected.unique()) > 5


def test_generation_settings_are_a_views_own():
    model = parent()
    model.generation_config.temperature = 0.5
    view = model.with_schedule([4, 1])
    assert view.generation_config.temperature == 0.5
    view.generation_config.temperature = 0.7
    assert model.generation_config.temperature == 0.5
