"""A random sample of small faults of the package, each put in by Cosmic Ray and held to the tests: `make mutants`.

    python tests/helpers/mutants.py --count 300 --workers 2
    python tests/helpers/mutants.py --count 300 --workers 2 --slow

A fault is a number that is one off, a condition or comparison turned around, another operator, a loop that never runs,
a decorator that is gone. Tests of the module that has the fault come first, and the first that fails ends it. A line
of `--record` says what was changed, and which test told it; faults that are there are not tried again. No fault at all
is the first of them: no test may tell it.

`--slow` holds those that the quick tests did not tell to the others, which take half an hour each. It leaves out what
`--read` says of: faults that were read and change nothing, with the reason.
"""

import argparse
import difflib
import importlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest
from cosmic_ray.commands import init
from cosmic_ray.mutating import use_mutation
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import WorkDB
from cosmic_ray.work_item import MutationSpec
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "docs" / "results" / "mutants.jsonl"
READ = ROOT / "docs" / "results" / "mutants_read.json"
PACKAGE = Path("modeling_spiralformer")
LONGEST = {"quick": 1800.0, "slow": 5400.0}  # seconds of such tests on one fault, which may end in a loop
NONE = "no fault"
# What each run of tests would import for seconds. The package is not among it, nor PEFT, which it looks for.
LIBRARIES = ("torch._inductor.compile_fx", "transformers.trainer", "transformers.pipelines", "hypothesis")
LIBRARIES += tuple(f"transformers.models.{name}.modeling_{name}" for name in ("gpt_neox", "llama", "qwen3"))
# Of the operators of Cosmic Ray, those that change a value a little: what is left out mostly raises at once.
SWAPS = {("Add", "Sub"), ("Sub", "Add"), ("Mul", "Add"), ("Div", "Mul"), ("FloorDiv", "Sub"), ("Mod", "FloorDiv")}
SWAPS |= {("BitAnd", "BitOr"), ("BitOr", "BitAnd"), ("Lt", "LtE"), ("LtE", "Lt"), ("Gt", "GtE"), ("GtE", "Gt")}
SWAPS |= {("Eq", "NotEq"), ("NotEq", "Eq"), ("Is", "IsNot"), ("IsNot", "Is")}
SWAPS |= {("Delete", "Not"), ("Delete", "USub"), ("Delete", "Invert")}
# Tests in the order in which they are run: what is quick, what takes minutes.
QUICK = ["cache/test_chunking", "cache/test_level", "model/test_configuration", "model/test_reference"]
QUICK += ["cache/test_precision", "cache/test_paging", "model/test_hyper_connections", "model/test_routers"]
QUICK += ["model/test_cache_name", "model/test_another_family", "model/test_checkpoint_files", "model/test_families"]
QUICK += ["model/test_arguments", "cache/test_cache", "model/test_modeling", "model/test_heads", "model/test_packing"]
QUICK += ["model/test_configuration_damage", "model/test_devices", "model/test_elastic_generation"]
QUICK += ["model/test_flex_attention", "model/test_tracing"]
SLOW = ["model/test_continuous_batching", "cache/test_static_cache", "model/test_generation", "model/test_elastic"]
SLOW += ["model/test_compiled_packing", "model/test_deployment", "model/test_adapters", "model/test_threads"]
SLOW += ["pages/test_hub", "pages/test_security", "tools/test_conversion", "tools/test_upstream"]
# Tests that come before the others where a module has the fault.
FIRST = {
    "adapters": ["model/test_adapters"],
    "compiled": ["cache/test_static_cache", "model/test_tracing"],
    "continuous": ["model/test_continuous_batching"],
    "elastic": ["model/test_elastic"],
    "files": ["model/test_checkpoint_files", "pages/test_hub"],
    "flex": ["model/test_flex_attention"],
    "request_attention": ["model/test_continuous_batching"],
    "static_cache": ["cache/test_cache", "cache/test_static_cache"],
    "stopping": ["model/test_continuous_batching"],
    "storage": ["cache/test_cache"],
    "topology": ["model/test_reference", "model/test_hyper_connections"],
}


def output_of(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.strip("\n")


def is_small(operator: str) -> bool:
    """Whether faults of an operator are tried."""
    kind, *swap = operator.removeprefix("core/").split("_")
    return not swap or tuple(swap) in SWAPS


def named(fault: MutationSpec | None) -> str:
    """What tells a fault from any other of the same commit."""
    return NONE if fault is None else f"{fault.module_path.name} {fault.operator_name} {fault.occurrence}"


def sample(count: int, seed: int) -> list[MutationSpec]:
    """So many faults, each of all there are as likely as any other; a larger sample begins with the smaller one."""
    with tempfile.TemporaryDirectory() as folder:
        all_faults = WorkDB(f"{folder}/faults.sqlite", WorkDB.Mode.create)
        init(sorted(PACKAGE.glob("*.py")), all_faults, {})
        faults = [fault for item in all_faults.work_items for fault in item.mutations if is_small(fault.operator_name)]
    faults.sort(key=lambda fault: (fault.module_path.name, fault.operator_name, fault.occurrence))
    random.Random(seed).shuffle(faults)
    return faults[:count]


def start_worker(folder: Path) -> None:
    """A process with a copy of the checkout, which is where its faults are, and with the libraries of the tests."""
    own = folder / str(os.getpid())
    own.mkdir(parents=True)
    for name in output_of("git", "ls-files", "-z").split("\0")[:-1]:
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, own / name, follow_symlinks=False)
    os.chdir(own)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HOME": str(own / "home")}
    sys.dont_write_bytecode = True  # a fault may be of the same size and second as the one before
    foreign = (ROOT, ROOT / "tests" / "helpers")
    sys.path[:] = [str(own), *(path for path in sys.path if path and Path(path) not in foreign)]
    for library in LIBRARIES:
        importlib.import_module(library)
    if str(PACKAGE) in sys.modules:
        raise RuntimeError(f"{PACKAGE} must be imported by the tests alone: it would be the one without faults")


def told(tests: list[str], seconds: float) -> str | None:
    """The first test that fails, or how the run ended where it names none; None where all pass. In a process of its
    own, forked from this one, which has so many seconds."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        child = os.fork()
        if child == 0:
            _run_tests(tests, output.fileno())
        ends = time.monotonic() + seconds
        while (state := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > ends:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return f"it took more than {seconds:.0f} s"
            time.sleep(0.1)
        if state[1] == 0:
            return None
        output.seek(0)
        text = output.read().strip()
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", text, flags=re.MULTILINE)
        return failed.group(1) if failed else text[-300:]


def _run_tests(tests: list[str], output: int) -> NoReturn:
    """Ends this process with the status of the tests: it must not go on as the worker that it was forked from."""
    status = 1
    try:
        os.setsid()
        os.dup2(output, 1)
        os.dup2(output, 2)
        options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=mutants"]
        status = int(pytest.main([*options, *(f"tests/{name}.py" for name in tests)]))
        sys.stdout.flush()
    finally:
        os._exit(status)


def tests_of(module: str, kind: str) -> list[str]:
    """Quick tests, those of the module first, or the slow ones that are not among them."""
    first = FIRST.get(module.removesuffix("_spiralformer.py"), [])
    if kind == "quick":
        return [*first, *(name for name in QUICK if name not in first)]
    return [name for name in SLOW if name not in first]


def try_fault(fault: MutationSpec | None, kind: str) -> dict:
    """One fault, and the line that records it: `told` names the test that failed, None where none did."""
    started, found = time.time(), {}
    if fault is None:
        by = told(tests_of("", kind), LONGEST[kind])
    else:
        operator = get_operator(fault.operator_name)(**fault.operator_args)
        with use_mutation(fault.module_path, operator, fault.occurrence) as (before, after):
            by = told(tests_of(fault.module_path.name, kind), LONGEST[kind])
            diff = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
            change = "\n".join(text for text in diff if re.match(r"[+-](?![+-])", text))
        found = {"line": fault.start_pos[0], "change": change}
    return {"fault": named(fault), "tests": kind, **found, "told": by, "seconds": round(time.time() - started, 1)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="How many there shall be in the record.")
    parser.add_argument("--seed", type=int, default=0, help="Of the sample.")
    parser.add_argument("--workers", type=int, default=2, help="Processes, each with a copy of the checkout.")
    parser.add_argument("--slow", action="store_true", help="The slow tests, on what the quick ones did not tell.")
    parser.add_argument("--record", type=Path, default=RECORD, help="Where the tried faults are.")
    parser.add_argument("--read", type=Path, default=READ, help="Faults that were read and change nothing: why not.")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "mutants", help="Where the copies are made.")
    arguments = parser.parse_args(argv)
    os.chdir(ROOT)
    sys.path.append(str(ROOT / "scripts"))
    store = importlib.import_module("workshop.experiments.store")  # brings the package, which no worker may have
    if output_of("git", "status", "--porcelain", str(PACKAGE), "tests"):
        raise SystemExit("package and tests must be as they were committed: what is recorded names them")
    package = output_of("git", "rev-parse", "--short", f"HEAD:{PACKAGE}")  # faults of other code are others
    origin = {"package": package, "commit": output_of("git", "rev-parse", "--short", "HEAD")}
    lines = {line["fault"]: line for line in store.read_lines(arguments.record) if line["package"] == package}
    read = json.loads(arguments.read.read_text()) if arguments.read.exists() else {}
    faults: list[MutationSpec | None] = [None, *sample(arguments.count, arguments.seed)]
    kind = "slow" if arguments.slow else "quick"
    if kind == "slow":
        faults = [fault for fault in faults if named(fault) in lines]
        left = [fault for fault in faults if lines[named(fault)]["told"] is None and named(fault) not in read]
        left = [fault for fault in left if lines[named(fault)]["tests"] == "quick"]
    else:
        left = [fault for fault in faults if named(fault) not in lines]
    shutil.rmtree(arguments.folder, ignore_errors=True)
    with multiprocessing.get_context("spawn").Pool(arguments.workers, start_worker, [arguments.folder]) as pool:
        for line in tqdm(pool.imap_unordered(partial(try_fault, kind=kind), left), "tried", len(left)):
            if line["fault"] == NONE and line["told"]:
                raise SystemExit(f"tests must pass where there is no fault, but got {line['told']}")
            store.append_line(arguments.record, line | origin)
            lines[line["fault"]] = line
    of_sample = [lines[named(fault)] for fault in faults if fault is not None]
    missed = [line for line in of_sample if line["told"] is None and line["fault"] not in read]
    harmless = sum(line["fault"] in read for line in of_sample)
    print(f"{len(of_sample)} faults: {len(of_sample) - len(missed) - harmless} told, {len(missed)} not told;")
    print(f"the other {harmless} change nothing ({arguments.read.name})")
    for line in missed:
        print(f"\n{line['fault']}, line {line['line']}, {line['tests']} tests:\n{line['change']}")


if __name__ == "__main__":
    main()
