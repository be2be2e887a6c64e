"""Runs of `scripts/train.py` that are killed, at random moments and while they save, and go on to their end.

A run that was killed must end with the losses and the weights of one that was not, bit for bit. Processes are forked
from this one, which has imported the libraries and computed nothing.
"""

import json
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from modeling_spiralformer.files_spiralformer import digest
from workshop.damage.loads import make_text, words_of_run
from workshop.files import ROOT
from workshop.resuming import last_whole_checkpoint

STEPS, SAVED = 24, 4
# In the order in which they are written.
OF_CHECKPOINT = ("config.json", "model.safetensors", "tokenizer.json", "training_args.bin", "optimizer.pt")
OF_CHECKPOINT += ("scheduler.pt", "rng_state.pth", TRAINER_STATE_NAME, "SHA256SUMS")
OF_RUN = ("config.json", "model.safetensors", "tokenizer.json", "train_results.json", TRAINER_STATE_NAME, "SHA256SUMS")
POLL = 0.0005  # seconds


@dataclass(frozen=True)
class Kill:
    """One run: where it was killed, from which step it went on, and what differs in the end; "" where nothing does."""

    number: int
    moment: str
    resumed_from: str
    differs: str


def train(words: list[str], log: Path) -> None:
    """`python scripts/train.py words`, in this process."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output, stream.fileno())
    torch.set_num_threads(1)
    script = ROOT / "scripts" / "train.py"
    sys.argv[:] = [str(script), *words]
    runpy.run_path(str(script), run_name="__main__")


def words_of(home: Path, output: Path) -> list[str]:
    """The command line, which goes on from what is there, as the user of a machine that went down would have it."""
    changes = {"max_steps": str(STEPS), "save_steps": str(SAVED), "do_eval": "True", "max_eval_samples": "4"}
    changes |= {"validation_file": str(home / "text.txt")}
    if last_whole_checkpoint(output) is not None:
        changes["resume_from_checkpoint"] = "true"
    return words_of_run(home, output, **changes)


def start(home: Path, output: Path) -> multiprocessing.Process:
    log = output.with_name(f"{output.name}.log")
    process = multiprocessing.get_context("fork").Process(target=train, args=(words_of(home, output), log))
    process.start()
    return process


def train_to_end(home: Path, output: Path) -> float:
    """Seconds that it took. Raises RuntimeError, with the end of what it said, where the run fails."""
    started = time.monotonic()
    process = start(home, output)
    process.join()
    if process.exitcode != 0:
        said = output.with_name(f"{output.name}.log").read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"The run in {output} ended with {process.exitcode}: {said[-2000:]}")
    return time.monotonic() - started


def figures(output: Path) -> dict:
    """What a finished run left: its log of training losses, its loss in evaluation, its weights."""
    log = json.loads((output / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["log_history"]
    evaluated = json.loads((output / "eval_results.json").read_text(encoding="utf-8"))
    return {
        "losses": [entry for entry in log if "loss" in entry],
        "evaluation": evaluated["eval_loss"],
        "weights": digest(output / "model.safetensors"),
    }


def choose_moment(output: Path, number: int, seconds: float, random: Random) -> tuple[str, Callable[[], bool]]:
    """
    When a run is killed, in words, and whether it is time: every second run after a part of the `seconds` that a
    whole one takes, the others when a file of a checkpoint or of the finished run appears.
    """
    if number % 2 == 0:
        share, started = random.uniform(0.05, 0.95), time.monotonic()
        return f"after {share:.0%} of the time", lambda: time.monotonic() - started > share * seconds
    steps = random.randrange(SAVED, STEPS + 2 * SAVED, SAVED)
    folder = output / f"{PREFIX_CHECKPOINT_DIR}-{steps}" if steps <= STEPS else output
    path = folder / random.choice(OF_CHECKPOINT if steps <= STEPS else OF_RUN)
    return f"while it writes {path.relative_to(output)}", path.exists


def kill_once(home: Path, output: Path, number: int, seconds: float, random: Random) -> str:
    """Starts a run anew until a kill hits it, and says when that was."""
    while True:
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        moment, is_time = choose_moment(output, number, seconds, random)
        process = start(home, output)
        while process.is_alive() and not is_time():
            time.sleep(POLL)
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            return moment


def run_kills(folder: Path, seed: int, count: int) -> Iterator[Kill]:
    """What became of `count` runs; each is killed once. `folder` is empty, and holds the runs afterwards."""
    home = folder / "home"
    make_text(home)
    train_to_end(home, folder / "first")  # makes the caches of the data, so that the next one shows the time
    seconds = train_to_end(home, folder / "whole")
    expected = figures(folder / "whole")
    for number in range(count):
        output = folder / f"run-{number}"
        moment = kill_once(home, output, number, seconds, Random(f"{seed}/{number}"))
        checkpoint = last_whole_checkpoint(output)
        train_to_end(home, output)
        found = figures(output)
        differs = ", ".join(name for name in expected if found[name] != expected[name])
        yield Kill(number, moment, Path(checkpoint).name if checkpoint else "the start", differs)
