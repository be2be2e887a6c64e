"""A random sample of small faults of the package, each put in by Cosmic Ray and held to the tests: `make mutants`.

    python tests/helpers/mutants.py --count 300 --workers 2

A fault is a number that is one off, a condition or comparison turned around, another operator, a loop that never runs,
a decorator that is gone. Tests of the module that has the fault come first, and the first that fails ends it. A line
of `--record` says what was changed, and which test told it; faults that are there are not tried again.
"""

import argparse
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.work_db import WorkDB
from cosmic_ray.work_item import MutationSpec, TestOutcome
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts")]

from workshop.experiments.store import append_line, read_lines  # noqa: E402

RECORD = ROOT / "docs" / "results" / "mutants.jsonl"
PACKAGE = Path("modeling_spiralformer")
LONGEST = 3600.0  # seconds of all tests on one fault; a fault may also end in a loop
# Of the operators of Cosmic Ray, those that change a value a little: what is left out mostly raises at once.
SWAPS = {("Add", "Sub"), ("Sub", "Add"), ("Mul", "Add"), ("Div", "Mul"), ("FloorDiv", "Sub"), ("Mod", "FloorDiv")}
SWAPS |= {("BitAnd", "BitOr"), ("BitOr", "BitAnd"), ("Lt", "LtE"), ("LtE", "Lt"), ("Gt", "GtE"), ("GtE", "Gt")}
SWAPS |= {("Eq", "NotEq"), ("NotEq", "Eq"), ("Is", "IsNot"), ("IsNot", "Is")}
SWAPS |= {("Delete", "Not"), ("Delete", "USub"), ("Delete", "Invert")}
# Tests in the order in which they are run: what is quick, what takes minutes.
QUICK = ["cache/test_chunking", "cache/test_level", "model/test_configuration", "model/test_reference"]
QUICK += ["cache/test_precision", "cache/test_paging", "model/test_hyper_connections", "model/test_routers"]
QUICK += ["model/test_cache_name", "model/test_another_family", "model/test_checkpoint_files", "model/test_arguments"]
QUICK += ["model/test_families", "cache/test_cache"]
SLOW = ["model/test_modeling", "model/test_heads", "model/test_packing", "model/test_configuration_damage"]
SLOW += ["model/test_elastic_generation", "model/test_devices", "model/test_flex_attention", "model/test_tracing"]
SLOW += ["model/test_compiled_packing", "model/test_generation", "model/test_elastic", "model/test_deployment"]
SLOW += ["model/test_continuous_batching", "model/test_adapters", "cache/test_static_cache", "pages/test_hub"]
SLOW += ["pages/test_security", "tools/test_conversion", "tools/test_upstream"]
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


def named(fault: MutationSpec) -> list:
    """What tells a fault from any other of the same commit."""
    return [fault.module_path.name, fault.operator_name, fault.occurrence]


def sample(count: int, seed: int) -> list[MutationSpec]:
    """So many faults, each of all there are as likely as any other; a larger sample begins with the smaller one."""
    with tempfile.TemporaryDirectory() as folder:
        all_faults = WorkDB(f"{folder}/faults.sqlite", WorkDB.Mode.create)
        init(sorted(PACKAGE.glob("*.py")), all_faults, {})
        faults = [fault for item in all_faults.work_items for fault in item.mutations if is_small(fault.operator_name)]
    faults.sort(key=named)
    random.Random(seed).shuffle(faults)
    return faults[:count]


def start_worker(folder: Path) -> None:
    """A copy of the checkout for each process, which is where its faults are."""
    own = folder / str(os.getpid())
    own.mkdir(parents=True)
    for name in output_of("git", "ls-files", "-z").split("\0")[:-1]:
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, own / name, follow_symlinks=False)
    os.chdir(own)
    os.environ["OMP_NUM_THREADS"] = "1"


def test_command(module: str) -> str:
    """Tests of the module first, then the quick ones, then the slow ones; the first that fails ends it."""
    parts = [FIRST.get(module.removesuffix("_spiralformer.py"), []), QUICK, SLOW]
    run = f"{sys.executable} -m pytest -x -q -p no:cacheprovider --hypothesis-profile=mutants"
    lines = [f"{run} {' '.join(f'tests/{name}.py' for name in part)}" for part in parts if part]
    return f"sh -c '{' && '.join(lines)}'"


def try_fault(fault: MutationSpec) -> dict:
    """One fault, and the line that records it: `told` names the test that failed, None where none did."""
    started = time.time()
    result = mutate_and_test([fault], test_command(fault.module_path.name), LONGEST)
    output = result.output or ""
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", output, flags=re.MULTILINE)
    told = found.group(1) if found else output.strip()[-300:]
    return {
        "fault": named(fault),
        "line": fault.start_pos[0],
        "change": "\n".join(line for line in (result.diff or "").splitlines() if re.match(r"[+-](?![+-])", line)),
        "told": None if result.test_outcome == TestOutcome.SURVIVED else told,
        "seconds": round(time.time() - started, 1),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="How many there shall be in the record.")
    parser.add_argument("--seed", type=int, default=0, help="Of the sample.")
    parser.add_argument("--workers", type=int, default=2, help="Processes, each with a copy of the checkout.")
    parser.add_argument("--record", type=Path, default=RECORD, help="Where the tried faults are.")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "mutants", help="Where the copies are made.")
    arguments = parser.parse_args(argv)
    os.chdir(ROOT)
    package = output_of("git", "rev-parse", "--short", f"HEAD:{PACKAGE}")  # faults of other code are others
    if output_of("git", "status", "--porcelain", str(PACKAGE), "tests"):
        raise SystemExit("package and tests must be as they were committed: what is recorded names them")
    tried = {tuple(line["fault"]) for line in read_lines(arguments.record) if line["package"] == package}
    left = [fault for fault in sample(arguments.count, arguments.seed) if tuple(named(fault)) not in tried]
    origin = {"package": package, "commit": output_of("git", "rev-parse", "--short", "HEAD")}
    with multiprocessing.get_context("spawn").Pool(arguments.workers, start_worker, [arguments.folder]) as pool:
        for line in tqdm(pool.imap_unordered(try_fault, left), total=len(left), unit=" faults"):
            append_line(arguments.record, line | origin)


if __name__ == "__main__":
    main()
