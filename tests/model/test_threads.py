"""One model in sixteen threads: every call gives the numbers that it gives alone, bit for bit, or is refused."""

import random
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from support import pad_rows, random_ids, small_model
from transformers import DynamicCache

THREADS, CALLS = 16, 6
MODELS = {
    "mesh": {"chunk_sizes": [4, 2, 1]},
    "anchor": {"topology": "anchor", "layer_family": "llama", "chunk_sizes": [5, 3, 1], "num_core_layers": 1},
    "streams": {"topology": "hyper_connections", "layer_family": "qwen3", "chunk_sizes": [3, 1], "share_core": False},
}
GREEDY = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
GREEDY |= {"return_dict_in_generate": True, "output_logits": True}
Results = tuple[torch.Tensor, ...]


def ragged(seed: int) -> dict:
    """Three rows, two of them padded on the left by an odd number of columns."""
    ids, mask = pad_rows([random_ids(1, n, seed=seed + n)[0] for n in (21, 14, 8)], "left")
    return {"input_ids": ids, "attention_mask": mask}


def plain_forward(model, seed: int) -> Results:
    outputs = model(random_ids(2, 23, seed), use_cache=False, output_hidden_states=True, output_attentions=False)
    return (outputs.logits, *outputs.hidden_states)


def padded_forward(model, seed: int) -> Results:
    return (model(**ragged(seed), use_cache=False).logits,)


def packed_forward(model, seed: int) -> Results:
    positions = torch.cat([torch.arange(9), torch.arange(14)])[None]
    return (model(random_ids(1, 23, seed), position_ids=positions, use_cache=False).logits,)


def gradients(model, seed: int) -> Results:
    """Of every weight. Asked for by name: `.grad` of a shared model belongs to all of its threads."""
    ids = random_ids(2, 17, seed)
    with torch.enable_grad():
        loss = model(ids, labels=ids, use_cache=False).loss
        return (loss.detach(), *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))


def stepwise(model, seed: int) -> Results:
    inputs, cache = ragged(seed), DynamicCache(config=model.config)
    found = []
    for stop in range(16, 22):
        columns = slice(0 if stop == 16 else stop - 1, stop)
        mask = inputs["attention_mask"][:, :stop]
        found.append(model(inputs["input_ids"][:, columns], mask, past_key_values=cache).logits)
    return tuple(found)


def greedy(model, seed: int) -> Results:
    outputs = model.generate(**ragged(seed), **GREEDY)
    return (outputs.sequences, *outputs.logits)


def static(model, seed: int) -> Results:
    outputs = model.generate(**ragged(seed), **GREEDY, cache_implementation="static")
    return (outputs.sequences, *outputs.logits)


def beams(model, seed: int) -> Results:
    outputs = model.generate(**ragged(seed), **GREEDY, num_beams=3)
    return (outputs.sequences, *outputs.logits)


def view(model, seed: int) -> Results:
    """A view of the last iteration alone, made in this thread."""
    with torch.no_grad():
        return (model.with_schedule(model.config.chunk_sizes[-1:])(random_ids(2, 18, seed)).logits,)


KINDS = (plain_forward, padded_forward, packed_forward, gradients, stepwise, greedy, static, beams, view)
Call = tuple[Callable[..., Results], int]


def same(found: Results, expected: Results) -> bool:
    """Bit for bit; a weight that is not used has no gradient."""
    pairs = list(zip(found, expected, strict=True))
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


def start(work: Callable[[int], None]) -> None:
    """Runs `work(n)` in every thread, which change places as often as the interpreter lets them."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=300)
    finally:
        sys.setswitchinterval(interval)
    assert not any(thread.is_alive() for thread in threads)


def drawn_calls() -> list[list[Call]]:
    """Of each thread; every kind is called by several threads."""
    choose = random.Random(0)
    kinds = [*KINDS] * (THREADS * CALLS // len(KINDS) + 1)
    choose.shuffle(kinds)
    return [[(kinds.pop(), choose.randrange(4)) for _ in range(CALLS)] for _ in range(THREADS)]


def check(model, calls: list[list[Call]], refused: str | None = None) -> int:
    """Compares calls in threads with the same ones alone; returns how many were refused, with the message given."""
    with torch.no_grad():
        expected = {(kind, seed): kind(model, seed) for kind, seed in {call for own in calls for call in own}}
    wrong, refusals = [], []
    barrier = threading.Barrier(THREADS)

    def work(number: int) -> None:
        barrier.wait(timeout=60)
        for kind, seed in calls[number]:
            model.train(mode=number % 2 == 0)
            try:
                with torch.no_grad():
                    found = kind(model, seed)
            except ValueError as error:
                (refusals if refused and refused in str(error) else wrong).append(f"{kind.__name__}: {error}")
                continue
            except Exception as error:  # of a thread: the test reports it
                wrong.append(f"{kind.__name__}: {error!r}")
                continue
            if not same(found, expected[kind, seed]):
                wrong.append(f"{kind.__name__} {seed}")

    start(work)
    assert not wrong, wrong
    return len(refusals)


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_mixed_calls_and_modes(options):
    assert check(small_model(**options), drawn_calls()) == 0


def test_a_mode_that_another_thread_switched_is_met_or_refused():
    """A cache in training mode cannot go with gradient checkpointing: `generate()` then says so, and nothing else."""
    model = small_model(chunk_sizes=[4, 2, 1])
    model.gradient_checkpointing_enable()
    kinds = (greedy, gradients, plain_forward)
    calls = [[(kinds[(number + turn) % 3], turn % 4) for turn in range(CALLS)] for number in range(THREADS)]
    check(model, calls, refused="gradient checkpointing")


def test_the_comparison_sees_a_state_that_threads_share(monkeypatch):
    """What these tests are for: a forward that leaves something on its model."""
    model = small_model(chunk_sizes=[4, 2, 1])
    forward = model.model.forward

    def forward_by_the_model(input_ids=None, **kwargs):
        model.left = input_ids
        outputs = forward(input_ids=input_ids, **kwargs)
        return outputs if model.left is input_ids else forward(model.left, **kwargs)

    monkeypatch.setattr(model.model, "forward", forward_by_the_model)
    calls = [[(padded_forward, number % 4)] * CALLS for number in range(THREADS)]
    with pytest.raises(AssertionError, match="padded_forward"):
        check(model, calls)
