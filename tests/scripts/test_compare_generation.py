"""What generation costs: bytes as the cache holds them, drafts as they are accepted, equal tokens compiled or not."""

import json
import sys

import pytest
import torch
from documents import ROOT, run
from support import large_weights, random_ids, small_config, small_model
from transformers import AutoTokenizer

import compare_generation
from modeling_spiralformer import SpiralFormerForCausalLM
from workshop import generation

SIZES = {"vocab_size": 4096, "hidden_size": 32, "num_core_layers": 1, "max_position_embeddings": 512}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


@pytest.fixture
def checkpoints(tmp_path) -> list[str]:
    """A plain stack and a loop with one tokenizer, which has a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tokenization")
    tokenizer.chat_template = TEMPLATE
    loops = {"plain": {"chunk_sizes": [], "num_core_layers": 0}, "loop": {"chunk_sizes": [4, 1]}}
    for name, options in loops.items():
        config = small_config(**{**SIZES, **options, "dtype": "float32"})
        large_weights(SpiralFormerForCausalLM(config)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return [str(tmp_path / name) for name in loops]


def test_the_command_counts_the_cache_and_times_every_model(checkpoints, workplace, capsys):
    arguments = compare_generation.GenerationArguments(
        checkpoints,
        str(workplace / "text.txt"),
        context_lengths=[16, 64],
        new_tokens=4,
        prompts=2,
        prompt_length=8,
        rounds=1,
        output_file=str(workplace / "figures.json"),
    )
    figures = compare_generation.main(arguments)
    assert figures == json.loads((workplace / "figures.json").read_text())
    plain, loop = checkpoints
    kept = 2 * 32 * 4  # keys and values of a token, or a latent, in one layer
    for length in (16, 64):
        held = figures["contexts"][str(length)]
        assert held[plain]["bytes"] == 2 * kept * length
        # 1 prelude, 1 coda, 1 core at 1/4 and at 1: and the states of the open chunk and the latents still read.
        between = held[loop]["bytes"] - (2 + 1.25) * kept * length
        assert 0 < between <= 8 * 32 * 4
    printed = capsys.readouterr().out
    assert printed.count(f"| {loop} | 16 |") == printed.count(f"| {plain} | {loop} |") == 1
    assert set(figures["assisted"]) == {f"{plain} < {loop}", f"{loop} < {plain}"} and figures["compiled"] == {}


@pytest.mark.parametrize("same", [True, False])
def test_drafts_of_an_equal_model_are_all_accepted(same):
    """And hardly any of another one's; the tokens are those of the target alone."""
    target = small_model(chunk_sizes=[4, 1])
    assistant = small_model(seed=0 if same else 1, chunk_sizes=[4, 1])
    assistant.generation_config.assistant_confidence_threshold = 0.0  # random weights are sure of nothing
    ids = random_ids(1, 11)
    (figures, _) = generation.compare_assisted({"t": target, "a": assistant}, [ids], 20, rounds=1).values()
    if same:
        assert figures["accepted"] == 1 and figures["tokens_per_call"] > 3
    else:
        assert figures["accepted"] < 0.5 and 1 <= figures["tokens_per_call"] < 3
    assert not target._forward_hooks and not assistant._forward_hooks


def test_medians_leave_the_first_round_out(monkeypatch):
    runs = iter([100.0, 1.0, 2.0, 5.0])
    monkeypatch.setattr(generation, "time_context", lambda *_: {"bytes": 8, "prefill": next(runs), "step": 1.0})
    found = generation.compare_contexts({"a": None}, torch.zeros(1, 9), [9], 4, rounds=3)
    assert found == {9: {"a": {"bytes": 8, "prefill": 2.0, "step": 1.0}}}


def test_compiled_steps_that_say_something_else_are_refused(monkeypatch):
    def time_generate(model, ids, new_tokens, **how):
        return 1.0, torch.zeros(1, 2) if "compile_config" in how else torch.ones(1, 2)

    monkeypatch.setattr(generation, "time_generate", time_generate)
    with pytest.raises(RuntimeError, match="same tokens"):
        generation.time_compiled(None, random_ids(1, 3), 2, rounds=1)


@pytest.mark.parametrize("name, value", [("context_lengths", [8, 0]), ("context_lengths", []), ("prompts", -1)])
def test_lengths_that_are_none_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .*integers? >= "):
        compare_generation.GenerationArguments(["a"], "text.txt", **{name: value})


def test_a_short_text_is_refused(checkpoints, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    arguments = compare_generation.GenerationArguments(checkpoints, str(tmp_path / "short.txt"))
    with pytest.raises(ValueError, match="text_file.*4096 tokens.*short.txt"):
        compare_generation.main(arguments)


def test_the_chat_example_answers_every_message(checkpoints, tmp_path):
    words = [str(ROOT / "examples" / "chat.py"), checkpoints[1], "def", "import os", "--max_new_tokens", "5"]
    printed = run([sys.executable, *words], tmp_path)
    assert [line for line in printed.splitlines() if line.startswith("> ")] == ["> def", "> import os"]
