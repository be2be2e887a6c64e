"""A server of `scripts/serve.py` in a process of its own, and requests to it."""

import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import torch
from documents import ROOT
from support import small_model
from transformers import AutoTokenizer


def save_served(folder: Path, template: str) -> None:
    """The checkpoint `my_model` in a folder from which the pages' commands run: weights of std 0.15, greedy texts of
    several different tokens."""
    (folder / "scripts").symlink_to(ROOT / "scripts")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tokenization")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder / "my_model")
    small_model(5, vocab_size=4096, hidden_size=32, dtype=torch.float32).save_pretrained(folder / "my_model")


@contextlib.contextmanager
def serving(folder: Path, start: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """The address and process of the server that a page's command starts in a folder, at a port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = shlex.split(start)
    assert words[:2] == ["python", "scripts/serve.py"] and words[-2] == "--port"
    (folder / "cache").mkdir()
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "cache")}
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, *words[1:-1], str(port)],
            cwd=folder,
            env={**os.environ, **environment},
            stdout=log,
            stderr=log,
        )
    address = f"http://localhost:{port}"
    try:
        wait_for(address + "/health", server, folder / "log")
        yield address, server
    finally:
        server.terminate()
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            server.kill()
            raise


def wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    """Returns once the address answers; fails with the server's log where it ends before, or after three minutes."""
    deadline = time.monotonic() + 180
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, TimeoutError):
            ended = server.poll() is not None
            assert not ended and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.3)


def ask(address: str, path: str, body: dict | None = None) -> str:
    """The text of the answer to a GET, or to a POST where there is a body."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return response.read().decode()
