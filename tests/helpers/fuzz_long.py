"""A hundred thousand random histories of the caches, batch by batch: `make fuzz-long`.

    python tests/helpers/fuzz_long.py --histories 100000 --workers 2

Hypothesis draws a batch from its number, the seed: models of all families, topologies and schedules, views of them,
and what happens to their caches. A line of `--record` says that a batch went right, with its seed and commit; batches
that are there are not run again. A batch that goes wrong ends the command with the shortest history that shows the
fault.
"""

import argparse
import itertools
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test
from tqdm import tqdm
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from batched_requests import check_requests  # noqa: E402  this checkout's package
from cache_machine import CacheMachine  # noqa: E402
from support import model_options  # noqa: E402

from workshop.experiments.store import append_line, read_lines  # noqa: E402
from workshop.provenance import machine  # noqa: E402

RECORD = ROOT / "docs" / "results" / "fuzz.jsonl"
HISTORIES = {"cache": 200, "requests": 20}  # of a batch
PHASES = (Phase.generate, Phase.shrink)
# One batch in so many is of requests: it takes about as long as one of caches.
EVERY = 10


def quiet(count: int) -> settings:
    """Hypothesis without its data base, which would play old faults first, and without its clock."""
    return settings(
        max_examples=count,
        stateful_step_count=14,
        deadline=None,
        database=None,
        phases=PHASES,
        report_multiple_bugs=False,
        suppress_health_check=[*HealthCheck],
    )


def play_cache(number: int, count: int) -> Counter:
    """Plays one batch of histories of dynamic, quantised or static caches; returns how many of each there were."""
    played: Counter = Counter()

    class Counted(CacheMachine):
        def teardown(self):
            if hasattr(self, "history"):
                kind = "dynamic" if self.history.bits is None else "quantised"
                played["static" if self.history.static else kind] += 1

    run_state_machine_as_test(seed(number)(Counted), settings=quiet(count), _min_steps=1)
    return played


def play_requests(number: int, count: int) -> Counter:
    """Plays one batch of calls of `generate_batch`, each with its own model, requests and room for them."""
    played: Counter = Counter()

    @seed(number)
    @quiet(count)
    @given(
        options=model_options(max_size=6),
        lengths=st.lists(st.integers(1, 70), min_size=1, max_size=6),
        room=st.integers(0, 3),
        tokens=st.integers(20, 90),
        sharing=st.booleans(),
    )
    def play(options, lengths, room, tokens, sharing):
        check_requests(options, lengths, room, tokens, sharing)
        played["continuous"] += 1

    play()
    return played


PLAYS = {"cache": play_cache, "requests": play_requests}


def start_worker() -> None:
    """Called once in each new process: one thread, and no warnings between the lines of progress."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()


def play_batch(batch: tuple[str, int, int]) -> dict:
    """One batch, and the line that records it."""
    kind, number, count = batch
    started = time.time()
    played = PLAYS[kind](number, count)
    return {"kind": kind, "seed": number, "histories": dict(played), "seconds": round(time.time() - started, 1)}


def batches() -> Iterator[tuple[str, int, int]]:
    """All batches there are, in order: kind, seed, histories."""
    for number in itertools.count():
        kind = "requests" if number % EVERY == EVERY - 1 else "cache"
        yield kind, number, HISTORIES[kind]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--histories", type=int, default=100_000, help="How many there shall be in the record.")
    parser.add_argument("--workers", type=int, default=2, help="Processes.")
    parser.add_argument("--record", type=Path, default=RECORD, help="Where the finished batches are.")
    arguments = parser.parse_args(argv)
    lines = read_lines(arguments.record)
    finished = {line["seed"] for line in lines}
    total = sum(sum(line["histories"].values()) for line in lines)
    origin = machine(torch.device("cpu"))
    left = (batch for batch in batches() if batch[1] not in finished)
    with (
        tqdm(total=arguments.histories, initial=total, unit=" histories") as progress,
        ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn"), start_worker) as pool,
    ):
        pending: set[Future] = set()
        while pending or total < arguments.histories:
            while total < arguments.histories and len(pending) < arguments.workers:
                pending.add(pool.submit(play_batch, next(left)))
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for line in (batch.result() for batch in done):
                append_line(arguments.record, line | {"commit": origin["commit"], "date": origin["date"]})
                count = sum(line["histories"].values())
                total += count
                progress.update(count)


if __name__ == "__main__":
    main()
