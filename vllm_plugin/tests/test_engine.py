"""What an engine gives for many requests at once is what transformers gives for each alone, in float32."""

import pytest
import torch
from engines import BLOCKS, MODELS, NEW, SEATS, STEP, alone, engine, make_model, metric, prompt, served

TOLERANCE = 1e-4  # of a log-probability


@pytest.fixture(scope="module", params=MODELS)
def running(request, tmp_path_factory):
    """A model, the size of a block, and an engine that serves it."""
    block_size, options = MODELS[request.param]
    folder, model = tmp_path_factory.mktemp(request.param), make_model(**options)
    model.save_pretrained(folder)
    with engine(folder, block_size=block_size) as llm:
        yield model, block_size, llm


def check(model, llm, prompts: list[list[int]], count: int = NEW) -> None:
    """Tokens are the same, and log-probabilities but for rounding."""
    expected = [alone(model, ids, count) for ids in prompts]
    assert len({token for text in expected for token in text.tokens}) > 5
    worst = 0.0
    for found, text in zip(served(llm, prompts, count), expected, strict=True):
        assert found.tokens == text.tokens
        worst = max(worst, float((found.scores - text.scores).abs().max()))
    assert worst < TOLERANCE


def test_ragged_requests(running):
    """More than there are seats, over the ends of blocks, their prompts in parts."""
    model, block_size, llm = running
    lengths = [5, 17, 1, block_size + 2, 3, 64, block_size - 3, 2]
    assert len(lengths) > SEATS and block_size + 2 > STEP
    check(model, llm, [prompt(length) for length in lengths])


def test_a_beginning_that_requests_share_is_computed_once(running):
    model, block_size, llm = running
    shared = prompt(block_size + 7, seed=100)
    served(llm, [shared], count=1)
    before = metric(llm, "prefix_cache_hits")
    check(model, llm, [shared[: block_size + 1 + n] + prompt(n, seed=n) for n in range(6)])
    assert metric(llm, "prefix_cache_hits") - before == 6 * block_size


def test_requests_are_dropped_and_begin_again(running):
    """They start with a block each, and the second of all together does not fit."""
    model, block_size, llm = running
    prompts = [prompt(block_size - 9 + n, seed=200 + n) for n in range(SEATS)]
    assert all(len(ids) < block_size for ids in prompts) and 2 * SEATS > BLOCKS - 1
    before = metric(llm, "num_preemptions")
    check(model, llm, prompts, count=2 * NEW)
    assert metric(llm, "num_preemptions") > before


@pytest.mark.parametrize("name", ["neox-mesh", "llama-anchor"])
def test_bfloat16_is_as_close_to_float32_as_that_of_transformers(name, tmp_path):
    block_size, options = MODELS[name]
    model = make_model(**options)
    model.save_pretrained(tmp_path)
    prompts = [prompt(length) for length in (5, 17, 40, 64, block_size + 2, 2)]
    with engine(tmp_path, block_size=block_size, dtype="bfloat16") as llm:
        texts = served(llm, prompts)
    short = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    errors = {"vllm": [], "transformers": []}
    for ids, text in zip(prompts, texts, strict=True):
        row, tokens = torch.tensor([ids + text.tokens]), torch.tensor(text.tokens)
        exact, rounded = (
            m(row).logits[0, len(ids) - 1 : -1].float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
            for m in (model, short)
        )
        errors["vllm"].append(text.scores - exact)
        errors["transformers"].append(rounded - exact)
    found, allowed = (float(torch.cat(errors[side]).abs().mean()) for side in ("vllm", "transformers"))
    assert 0 < found < 1.25 * allowed
