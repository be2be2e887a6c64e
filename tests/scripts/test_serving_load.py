"""A minute of 32 clients at once: each gets what it gets alone, and the server neither grows nor dies."""

import http.client
import json
import random
import threading
import time
import urllib.error
from importlib.util import find_spec
from urllib.parse import urlsplit

import psutil
import pytest
import torch
from documents import commands
from http_server import ask, save_served, serving
from transformers import AutoModelForCausalLM, AutoTokenizer

SECONDS, CLIENTS = 60, 32
GROWTH = 32 * 2**20  # bytes that the server may gain between a third of the time and its end
WORDS = ["def read(path):", "import os", "class Tree:", "return left + right", "x = 3", "for line in file:", "é"]
TOO_LONG = "the cache of the server holds no such text " * 2000


def make_requests(folder, count: int) -> list[tuple[dict, str]]:
    """Greedy requests of very unequal length, and what each gets alone."""
    model = AutoModelForCausalLM.from_pretrained(folder / "my_model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "my_model")
    chosen, requests = random.Random(0), []
    for _ in range(count):
        prompt = " ".join(chosen.choices(WORDS, k=chosen.choice([1, 2, 5, 20, 60])))
        body = {"prompt": prompt, "max_tokens": chosen.choice([1, 3, 8, 20, 40]), "temperature": 0}
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            text = model.generate(ids, max_new_tokens=body["max_tokens"], do_sample=False, pad_token_id=0)
        requests.append((body, tokenizer.decode(text[0, ids.shape[1] :], skip_special_tokens=True)))
    return requests


class Load:
    """Clients that send until the time is over; what went wrong is in `wrong`."""

    def __init__(self, address: str, requests: list[tuple[dict, str]], seconds: float):
        self.address, self.requests = address, requests
        self.end = time.monotonic() + seconds
        self.counts, self.wrong, self.lock = {"answered": 0, "killed": 0, "refused": 0}, [], threading.Lock()

    def client(self, number: int) -> None:
        """Most wait for their answer; some leave a stream in its midst, some send too long a prompt."""
        chosen = random.Random(number)
        while time.monotonic() < self.end:
            kind = chosen.choices(["answered", "killed", "refused"], [20, 3, 1])[0]
            body, expected = chosen.choice(self.requests)
            try:
                right = getattr(self, kind)(body, expected)
            except Exception as error:  # of a thread: the test reports it
                right = False
                expected = repr(error)
            with self.lock:
                self.counts[kind] += 1
                if not right:
                    self.wrong.append((kind, body["max_tokens"], expected))

    def answered(self, body: dict, expected: str) -> bool:
        return json.loads(ask(self.address, "/v1/completions", body))["choices"][0]["text"] == expected

    def killed(self, body: dict, expected: str) -> bool:
        """Closes the connection after the first piece of a long stream."""
        connection = http.client.HTTPConnection(urlsplit(self.address).netloc, timeout=120)
        long = json.dumps({**body, "max_tokens": 300, "stream": True})
        connection.request("POST", "/v1/completions", long, {"Content-Type": "application/json"})
        started = bool(connection.getresponse().read(10))
        connection.close()
        return started

    def refused(self, body: dict, expected: str) -> bool:
        """A prompt that the cache does not hold is an error of its own request."""
        try:
            ask(self.address, "/v1/completions", {**body, "prompt": TOO_LONG})
        except urllib.error.HTTPError as error:
            return error.code >= 400
        return False


@pytest.mark.processes
def test_a_minute_of_clients(tmp_path):
    if not find_spec("transformers.generation.continuous_batching.cache_allocators"):
        pytest.skip("needs transformers 5.23 or later")
    save_served(tmp_path, "")
    (start,) = (line for line in commands("docs/serving.md") if "--continuous-batching" in line)
    start = start.replace("--cb-num-blocks 256", "--cb-num-blocks 24")  # soon all in use: growth is a leak
    assert "--cb-num-blocks 24 " in start
    requests = make_requests(tmp_path, 40)
    with serving(tmp_path, start) as (address, server):
        load = Load(address, requests, SECONDS)
        clients = [threading.Thread(target=load.client, args=(number,)) for number in range(CLIENTS)]
        for thread in clients:
            thread.start()
        time.sleep(SECONDS / 3)
        memory = psutil.Process(server.pid).memory_info().rss
        for thread in clients:
            thread.join(timeout=300)
        assert not any(thread.is_alive() for thread in clients)
        grown = psutil.Process(server.pid).memory_info().rss - memory
        assert json.loads(ask(address, "/health")) == {"status": "ok"}
    print(load.counts, f"grown by {grown / 2**20:.1f} MiB of {memory / 2**20:.0f}")
    assert not load.wrong, load.wrong[:5]
    assert min(load.counts.values()) > 0 and load.counts["answered"] > CLIENTS
    assert grown < GROWTH
    assert server.returncode in (0, -15)  # it ended at the first signal
    assert "Traceback" not in (tmp_path / "log").read_text().rpartition("Shutting down")[2]
