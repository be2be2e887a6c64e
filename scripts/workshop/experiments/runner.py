"""The runner of experiments: it hands their runs to workers, and writes one JSON line for every finished run.

It can be killed at any moment and started again: finished runs are skipped, others go on from their last checkpoint.
"""

import multiprocessing
import multiprocessing.connection
import os
import threading
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from modeling_spiralformer.files_spiralformer import digest
from workshop.data import load_file
from workshop.experiments.plan import Experiment, Run
from workshop.experiments.results import check_line
from workshop.experiments.run import train_run
from workshop.experiments.store import append_line, losses, read_lines, text_folder
from workshop.experiments.tasks import describe_rows
from workshop.molecules.judging import check_rdkit
from workshop.molecules.rows import read_molecules
from workshop.provenance import machine
from workshop.tokenizers import (
    SPECIAL_TOKENS,
    make_word_tokenizer,
    save_tokenizer,
    split_smiles,
    train_smiles_tokenizer,
    train_tokenizer,
)

TERA = 1e12
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.2f} of {total:.2f} TFLOP, {elapsed} gone, {remaining} left"


# -- in a worker's process ------------------------------------------------------------------------------------------

flops_done = None  # shared with the runner, which shows it


def exit_with_runner() -> None:
    """Ends this process with its runner, however that ended: the next runner will train in the same folders."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def start_worker(shared, threads: int) -> None:
    """Called once in each new process."""
    global flops_done
    threading.Thread(target=exit_with_runner, daemon=True).start()
    flops_done = shared
    torch.set_num_threads(threads)


def report_flops(flops: float) -> None:
    with flops_done.get_lock():
        flops_done.value += flops


def work(run: Run, data_dir: Path, runs_folder: Path, tokenizer: Path) -> dict:
    """What a worker does for one run."""
    return train_run(run, data_dir, runs_folder, tokenizer, report_flops)


# -- in the runner's process ----------------------------------------------------------------------------------------


@contextmanager
def held(name: str, path: Path):
    """Holds a path for one runner: two would train the same runs. The lock ends with the process, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{path}.lock", timeout=0):  # a file beside it: what is locked is not written on Windows
            yield
    except Timeout as error:
        raise ValueError(f"`{name}` must not be in use, but another runner works with {path}.") from error


def describe_text(experiment: Experiment, data_dir: Path) -> dict[str, dict[str, str]]:
    """
    File name and SHA-256 of each text of an experiment, or of the rows of its task. Raises an error that names a text
    which cannot be read.
    """
    if experiment.drawn is not None:
        return describe_rows(experiment.drawn, experiment.evaluation_blocks)
    described = {}
    for name, file in experiment.text.items():
        if not (data_dir / file).is_file():
            raise FileNotFoundError(f"`data_dir` must hold {file}, the {name} text of {experiment.name}: {data_dir}.")
        load_file(name, str(data_dir / file))
        described[name] = {"file": file, "sha256": digest(data_dir / file)}
    return described


def read_the_same(settings: dict, experiment: Experiment) -> bool:
    """Whether a finished run read the texts that an experiment names, or so many rows of its task."""
    if experiment.task is None:
        return settings["text"] == experiment.text
    now = (experiment.task, experiment.evaluation_blocks)
    return (settings.get("task"), settings.get("evaluation_blocks")) == now


def check_same_text(text: dict, lines: list[dict], experiment: Experiment) -> None:
    """Refuses to mix runs on texts that share only their names."""
    for line in lines:
        if read_the_same(line["settings"], experiment) and line["text"] != text:
            raise ValueError(
                f"`data_dir` must hold the text that the finished runs were trained on, but run {line['key']} of "
                f"{line['experiment']} has other digests: {line['text']}, here {text}."
            )


def check_molecules(experiment: Experiment, data_dir: Path) -> None:
    """Refuses molecules that differ in number of tokens, or in mean length, from what costs and budget count on."""
    path = data_dir / experiment.text["train"]
    lengths, tokens = [], set()
    for smiles in read_molecules("train", path):
        found = split_smiles(smiles)
        lengths.append(len(found) + 2)  # bos and eos
        tokens.update(found)
    found = {"vocab_size": len(tokens) + len(SPECIAL_TOKENS), "mean_length": round(sum(lengths) / len(lengths))}
    planned = {"vocab_size": experiment.vocab_size, "mean_length": experiment.smiles["mean_length"]}
    for name, value in planned.items():
        if value != found[name]:
            raise ValueError(f"`{name}` of {experiment.name} must be {found[name]}, as in {path}, but got {value}.")


def make_tokenizer(experiment: Experiment, data_dir: Path, folder: Path) -> Path:
    """
    Of `vocab_size` ids, from the training text: that of SMILES, or a byte-level BPE, of which 259 ids are the bytes.
    That of a task has its words.
    """
    tokenizer = folder / f"tokenizer-{experiment.vocab_size}"
    if not tokenizer.exists():
        if experiment.drawn is not None:
            trained = make_word_tokenizer(experiment.drawn.words, experiment.drawn.template)
        elif experiment.smiles is not None:
            trained = train_smiles_tokenizer(read_molecules("train", data_dir / experiment.text["train"]))
        else:
            documents = load_file("train", str(data_dir / experiment.text["train"]))
            trained = train_tokenizer(list(documents["text"]), experiment.vocab_size)
        unfinished = tokenizer.with_name(f"{tokenizer.name}.unfinished")
        save_tokenizer(trained, unfinished, model_max_length=experiment.block_size)
        unfinished.rename(tokenizer)
    return tokenizer


class Runner:
    """Starts the runs of several experiments as their sweeps allow, and writes a line for each that has ended."""

    def __init__(
        self,
        experiments: list[Experiment],
        data_dir: str | Path,
        lines: str | Path,
        runs_dir: str | Path,
        workers: int,
        threads: int | None = None,
    ):
        self.experiments = {item.name: item for item in experiments}
        self.data_dir, self.runs_dir = Path(data_dir), Path(runs_dir)
        self.path, self.workers = Path(lines), workers
        self.threads = threads or max(1, (os.cpu_count() or 1) // workers)
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        self.origin = machine(device) | {"workers": self.workers, "threads": self.threads}
        self.lines = read_lines(self.path)
        for line in self.lines:
            check_line(line)
        self.text = {item.name: describe_text(item, self.data_dir) for item in experiments}
        molecular = [item for item in experiments if item.smiles is not None]
        if molecular:
            check_rdkit()
        for item in molecular:
            check_molecules(item, self.data_dir)
        for item in experiments:
            check_same_text(self.text[item.name], self.lines, item)

    def folder(self, experiment: str) -> Path:
        """Where its runs are kept."""
        return text_folder(self.runs_dir, self.text[experiment])

    def pending(self) -> tuple[dict[str, Run], dict[str, Run]]:
        """Runs that can start, and those that wait for a sweep, by key, in order and each once."""
        ready, waiting = {}, {}
        for experiment in self.experiments.values():
            starting, later = experiment.pending(self.lines)
            ready |= {run.key: run for run in starting if run.key not in ready}
            waiting |= {run.key: run for run in later}
        return ready, {key: run for key, run in waiting.items() if key not in ready}

    def start(self, pool: ProcessPoolExecutor, run: Run) -> Future:
        """Hands a run to a worker."""
        folder = self.folder(run.experiment)
        tokenizer = make_tokenizer(self.experiments[run.experiment], self.data_dir, folder)
        return pool.submit(work, run, self.data_dir, folder, tokenizer)

    def finish(self, run: Run, results: dict) -> None:
        """Writes the line of a run."""
        origin = dict(self.origin)
        line = {
            "key": run.key,
            "experiment": run.experiment,
            "model": run.model,
            "seed": run.settings["seed"],
            "learning_rate": run.settings["learning_rate"],
            "settings": run.settings,
            "text": self.text[run.experiment],
            **self.experiments[run.experiment].costs(run.model),
            **results,
            "commit": origin.pop("commit"),
            "date": origin.pop("date"),
            "machine": origin,
        }
        append_line(self.path, line)
        self.lines.append(line)

    def run(self) -> None:
        """
        Until nothing is left. After the first run that fails no other starts, and those beside it end first. A worker
        that is killed takes those beside it along. Raises RuntimeError that names every run that failed.
        """
        context = multiprocessing.get_context("spawn")
        shared = context.Value("d", 0.0)
        with (
            tqdm(total=0, bar_format=BAR) as progress,
            ProcessPoolExecutor(self.workers, context, start_worker, (shared, self.threads)) as pool,
        ):
            active: dict[Future, Run] = {}
            finished, failures = 0, []
            while True:
                ready, waiting = self.pending()
                progress.total = (finished + sum(run.flops for run in (ready | waiting).values())) / TERA
                progress.set_description_str(f"{len(ready) + len(waiting)} runs left")
                running = {run.key for run in active.values()}
                free = 0 if failures else self.workers - len(active)
                for run in [run for key, run in ready.items() if key not in running][:free]:
                    active[self.start(pool, run)] = run
                if not active:
                    break
                ended = set()
                while not ended:
                    ended, _ = wait(active, timeout=1, return_when=FIRST_COMPLETED)
                    progress.update(shared.value / TERA - progress.n)
                for future in ended:
                    run = active.pop(future)
                    if future.exception() is not None:
                        failures.append((run, future.exception()))
                        continue
                    self.finish(run, future.result())
                    finished += run.flops
                    tqdm.write(describe(self.lines[-1]))
        if failures:
            named = "; ".join(
                f"{run.experiment}: {run.model}, seed {run.settings['seed']}, rate {run.settings['learning_rate']:g}"
                for run, _ in failures
            )
            raise RuntimeError(
                f"{named} failed; started again, the runner goes on from the last checkpoint of each"
            ) from failures[0][1]


def describe(line: dict) -> str:
    """A finished run in one line of text."""
    found = ", ".join(
        f"{name} {'diverged' if value is None else f'{value:.4f}'}" for name, value in losses(line).items()
    )
    unit = "nats per token" if "nats_per_token" in line else "bits per byte"
    if line.get("samples", {}).get("count"):  # a diverged model has none
        unit += f", {line['samples']['valid'] / line['samples']['count']:.1%} valid"
    settings = f"seed {line['seed']}, rate {line['learning_rate']:g}"
    return f"{line['experiment']}: {line['model']}, {settings}: {found} {unit}, {line['wall_seconds']:.0f} s"
