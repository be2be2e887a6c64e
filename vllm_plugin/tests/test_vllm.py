"""What docs/vllm.md says: its commands are run, its servers asked by several clients at once, its table counted."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from documents import MAKEFILE, ROOT, blocks, commands
from engines import MODELS, Text, alone, engine, make_model, prompt, served
from transformers import AutoTokenizer

from modeling_spiralformer import TOKENIZER_FOLDER, SpiralFormerForCausalLM

COMMANDS = commands("docs/vllm.md")
SERVERS = [line for line in COMMANDS if "api_server" in line]
(REQUEST,) = (line for line in COMMANDS if line.startswith("curl"))
TEXTS = ["def read(path):", "x", "class Tree:\n    def __init__(self, left, right", "import os, sys\n" * 40, "é = 3"]
NEW = 20


def test_every_command_of_the_page_is_run():
    """The servers and the request here; the installation is what the Makefile does before these tests."""
    (recipe,) = re.findall(r"^\$\(VLLM_VENV\)/\.installed:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    done = recipe.replace("$(VLLM_RUN)", "$(VLLM_VENV)/bin/python").replace("$(VLLM_VENV)", ".venv-vllm")
    done = [line.strip().replace(" --quiet", "") for line in done.splitlines()]
    installation = COMMANDS[:4]
    assert done[:4] == [installation[0].replace("python3", "$(PYTHON)"), *installation[1:]]
    assert COMMANDS[4] == "make test-vllm"
    assert sorted([*COMMANDS[:5], *SERVERS, REQUEST]) == sorted(COMMANDS) and len(SERVERS) == 3


@pytest.mark.processes
def test_the_short_command_of_vllm_does_not_know_its_distribution():
    """Why the page starts servers by `python -m`: once this fails, it can say `vllm serve`."""
    command = [str(Path(sys.executable).with_name("vllm")), "serve", "my_model"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode and "No package metadata was found for vllm" in ended.stderr


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A folder with `my_model`: heads of keys that two processes repeat, text beyond one block."""
    folder = tmp_path_factory.mktemp("page")
    options = MODELS["llama-anchor"][1] | {"num_key_value_heads": 1, "chunk_sizes": [8, 4, 2, 1], "topology": "mesh"}
    options |= {"chunk_offsets": None, "causal_shifts": None, "vocab_size": 4096}
    make_model(**options).save_pretrained(folder / "my_model")
    AutoTokenizer.from_pretrained(TOKENIZER_FOLDER).save_pretrained(folder / "my_model")
    return folder


@pytest.fixture(scope="module")
def expected(checkpoint) -> dict[str, Text]:
    """What transformers gives for each text alone."""
    model = SpiralFormerForCausalLM.from_pretrained(checkpoint / "my_model", dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(checkpoint / "my_model")
    prompts = {text: tokenizer(text)["input_ids"] for text in TEXTS}
    assert max(map(len, prompts.values())) > 128
    return {text: alone(model, ids, NEW) for text, ids in prompts.items()}


@contextlib.contextmanager
def serving(line: str, folder: Path) -> Iterator[str]:
    """The address of a server that a command of the page starts in a folder, in float32 on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = shlex.split(line.replace("8000", str(port)))
    variables = dict(word.split("=") for word in words[: words.index("python")])
    command = [sys.executable, *words[words.index("python") + 1 :], "--dtype", "float32", "--host", "127.0.0.1"]
    log = folder / "log.txt"
    with log.open("w") as output:
        environment = os.environ | variables | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        options = {"cwd": folder, "env": environment, "stdout": output, "stderr": output, "start_new_session": True}
        server = subprocess.Popen(command, **options)
    try:
        wait_until_healthy(server, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):  # whoever is left of its session
                os.killpg(server.pid, signal.SIGKILL)


def wait_until_healthy(server: subprocess.Popen, address: str, log: Path) -> None:
    deadline = time.monotonic() + 300
    while True:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)


def ask(address: str, body: dict) -> dict:
    """The first choice of a completion."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)["choices"][0]


@pytest.mark.processes
@pytest.mark.parametrize("line", SERVERS, ids=["one", "tensor-parallel", "replicas"])
def test_clients_at_once_get_what_each_gets_alone(line, checkpoint, expected):
    answers = {}

    def client(text: str) -> None:
        body = {"prompt": text, "max_tokens": NEW, "temperature": 0, "ignore_eos": True, "logprobs": 0}
        answers[text] = ask(address, body | {"return_token_ids": True})

    with serving(line, checkpoint) as address:
        clients = [threading.Thread(target=client, args=(text,)) for text in TEXTS]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join(timeout=200)
        words = shlex.split(REQUEST)
        of_the_page = ask(address, json.loads(words[words.index("-d") + 1]))
    assert len(of_the_page["text"]) > 0
    assert len({token for text in expected.values() for token in text.tokens}) > 10
    for text, answer in answers.items():
        assert answer["token_ids"] == expected[text].tokens
        scores = torch.tensor(answer["logprobs"]["token_logprobs"])
        torch.testing.assert_close(scores, expected[text].scores, atol=1e-4, rtol=0)
    assert len(answers) == len(TEXTS)


@pytest.mark.processes
def test_the_program_of_the_page_runs(checkpoint, expected):
    ((text, _),) = blocks("docs/vllm.md", "py")
    program = f"if __name__ == '__main__':\n    {text.strip().replace(chr(10), chr(10) + '    ')}\n    print(texts)"
    (checkpoint / "program.py").write_text(program)
    command = [sys.executable, "program.py"]
    printed = subprocess.run(command, cwd=checkpoint, capture_output=True, text=True, timeout=300)
    assert printed.returncode == 0, printed.stderr[-3000:]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint / "my_model")
    (texts,) = (line for line in printed.stdout.splitlines() if line.startswith("["))
    found = tokenizer.decode(expected[TEXTS[0]].tokens, skip_special_tokens=True)
    assert repr(found) in texts


@pytest.mark.processes
def test_heads_are_split_over_two_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    model = make_model(**MODELS["neox-mesh"][1])
    model.save_pretrained(tmp_path)
    prompts = [prompt(length) for length in (5, 17, 1, 64, 2, 140)]
    with engine(tmp_path, tensor_parallel_size=2) as llm:
        found = served(llm, prompts)
    for ids, text in zip(prompts, found, strict=True):
        there = alone(model, ids)
        assert text.tokens == there.tokens
        torch.testing.assert_close(text.scores, there.scores, atol=1e-4, rtol=0)


def test_the_cache_holds_more_tokens_than_at_full_resolution(tmp_path):
    block, width, budget, sizes, ends, core = 128, 64, 2**26, [8, 4, 2, 1], 2, 2
    make_model(chunk_sizes=sizes, num_prelude_layers=ends, num_coda_layers=ends).save_pretrained(tmp_path)
    with engine(tmp_path, num_gpu_blocks_override=None, kv_cache_memory_bytes=budget) as llm:
        tokens = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks * block
    states = sum(g - 1 + (g - 1 + g - 1) // g for g in sizes) * width * 4  # open tokens and newest latents
    per_layer = 2 * width * 4 * block
    in_block = per_layer * (2 * ends + sum(core / g for g in sizes)) + states
    assert tokens == budget // in_block * block == 16_768
    full = budget // (per_layer * (2 * ends + core * len(sizes))) * block
    assert full == 10_880 and round(100 * states / in_block, 1) == 0.7
    page = (ROOT / "docs" / "vllm.md").read_text()
    assert f"| {tokens:,} |" in page and f"| {full:,} |" in page
