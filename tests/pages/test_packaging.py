"""What pip makes of this: bounds that were run, a wheel that is whole by itself, extras that start the commands."""

import importlib.metadata
import json
import os
import re
import runpy
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from importlib.util import find_spec
from pathlib import Path
from shutil import copyfile
from unittest.mock import patch

import pytest
from documents import MAKEFILE, OLDEST, PAGES, ROOT, blocks, offline
from imports import imports_of
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CONFIGURATIONS = sorted(path.name for path in (ROOT / "configuration").iterdir())
PINS = (line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
PINS = {canonicalize_name(name): version for name, version in PINS}
COMMANDS = sorted(path.name for path in (ROOT / "scripts").glob("*.py") if "\nif __name__ ==" in path.read_text())


def requirements(*extras: str) -> list[Requirement]:
    """What setup.py asks for, with those extras."""
    with patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    asked = setup.call_args.kwargs
    return [
        Requirement(line)
        for part in [asked["install_requires"], *map(asked["extras_require"].get, extras)]
        for line in part
    ]


def test_bounds_are_the_versions_that_the_tests_run_on():
    bounded = set()
    for requirement in requirements("train", "eval", "dev"):
        name = canonicalize_name(requirement.name)
        newest = PINS[name]
        for bound in requirement.specifier:
            bounded.add((name, bound.operator))
            if bound.operator == "<":
                major, minor = map(int, newest.split(".")[:2])
                assert bound.version == f"{major}.{minor + 1}", name
            else:
                lowest = OLDEST if name == "transformers" else newest
                assert bound.operator == ">=" and f"{lowest}.".startswith(f"{bound.version}."), name
    assert {("transformers", "<"), ("transformers", ">="), ("torch", ">=")} <= bounded
    assert {"make test", "make test-min"} <= set((ROOT / ".ci" / "run").read_text().splitlines())


def make(folder: Path, *words: str) -> subprocess.CompletedProcess:
    """Runs make with this Makefile, in a folder that holds nothing else of the project."""
    command = ["make", "-f", str(ROOT / "Makefile"), *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_help_names_every_target(tmp_path):
    (listed,) = re.findall(r"^\.PHONY:(.*)", MAKEFILE.replace("\\\n", " "), re.MULTILINE)
    targets = set(listed.split()) - {"help"}
    assert "test-latest" in targets
    assert targets == set(re.findall(r"^make ([\w-]+) ", make(tmp_path, "help").stdout, re.MULTILINE))


@pytest.mark.parametrize(("target", "name"), [("test-version", "TRANSFORMERS"), ("test-torch", "TORCH")])
def test_the_tests_on_another_version_ask_which(target, name, tmp_path):
    refused = make(tmp_path, target)
    assert refused.returncode and f"{name} must name a version" in refused.stdout
    assert not list(tmp_path.iterdir())


def test_clean_removes_every_environment_and_nothing_else(tmp_path):
    environments = ".venv", ".venv-5.23.0", ".venv-torch-2.14.1", ".venv-latest"
    for name in (*environments, "runs", "build", "spiralformer.egg-info", "docs"):
        (tmp_path / name).mkdir()
    assert make(tmp_path, "clean").returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["docs"]


# -- the commands, on what an extra brings ------------------------------------------------------------------------


def closure(asked: list[Requirement]) -> set[str]:
    """Distributions that pip installs for these requirements, from the metadata of those that are installed here."""
    seen, todo = set(), [(requirement, {""}) for requirement in asked]
    while todo:
        requirement, extras = todo.pop()
        name = canonicalize_name(requirement.name)
        wanted = any(requirement.marker is None or requirement.marker.evaluate({"extra": extra}) for extra in extras)
        if not wanted or (name, *sorted(requirement.extras)) in seen:
            continue
        seen.add((name, *sorted(requirement.extras)))
        try:
            needs = distribution(name).requires or []
        except PackageNotFoundError:
            continue  # for another platform or Python, or blocked below by not being here
        todo += [(Requirement(line), {"", *requirement.extras}) for line in needs]
    return {name for name, *_ in seen}


START = """
import contextlib, io, json, runpy, sys

scripts, blocked, names = json.loads(sys.argv[1])
sys.path[:0] = scripts
sys.modules |= dict.fromkeys(blocked)
failed = {}
for name in names:
    sys.argv = [name, "--help"]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(f"{scripts[0]}/{name}", run_name="__main__")
    except ImportError as error:
        failed[name] = str(error)
    except SystemExit as end:
        assert not end.code, (name, end.code)
print(json.dumps(failed))
"""


def commands_that_do_not_start(asked: list[Requirement]) -> dict[str, str]:
    """Names and errors of the commands whose imports need more than these requirements."""
    installed = closure(asked)
    blocked = [
        module
        for module, names in packages_distributions().items()
        if module != "modeling_spiralformer" and not installed & set(map(canonicalize_name, names))
    ]
    assert {"hypothesis", "pytest"} <= set(blocked)
    arguments = json.dumps([[str(ROOT / "scripts"), str(ROOT)], blocked, COMMANDS])
    printed = subprocess.run(
        [sys.executable, "-c", START, arguments], capture_output=True, text=True, check=True
    ).stdout
    return json.loads(printed.splitlines()[-1])


def test_every_command_starts_with_the_extra_for_training():
    assert {"experiment.py", "probe.py", "quickstart.py", "report.py", "train.py"} < set(COMMANDS)
    assert commands_that_do_not_start(requirements("train")) == {}


def test_no_command_has_the_name_of_a_library():
    """`scripts/` comes first on the path of a command: what is there hides whatever else has its name."""
    names = {path.stem for path in (ROOT / "scripts").iterdir()}
    assert {"evaluate_model", "workshop"} <= names
    assert not names & (set(packages_distributions()) | sys.stdlib_module_names)


# Packages that a command imports only where its work needs them, and the extra that README names for them.
SERVER = "fastapi"  # of `transformers[serving]`, which the README asks for
ON_DEMAND = {"fcd": "molecules", "lm_eval": "eval", "rdkit": "molecules", "torchao": "molecules"}


def third_party(command: Path) -> dict[str, bool]:
    """Package -> whether it is imported in functions alone, of a command and what it imports of this project."""
    roots = {"workshop": ROOT / "scripts", "modeling_spiralformer": ROOT}
    found, seen, todo = {}, set(), [(command, command.parent)]
    while todo:
        path, root = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        for item in imports_of(path, root):
            if item.package in roots:
                root_of_item = roots[item.package]
                module = root_of_item / item.module.replace(".", "/")
                files = (module.with_suffix(".py"), module / "__init__.py")
                todo += [(file, root_of_item) for file in files if file.is_file()]
            elif item.package not in sys.stdlib_module_names:
                found[item.package] = found.get(item.package, True) and item.lazy
    return found


def shown_in_readme() -> set[str]:
    """The commands that README and its table name, those of their make targets among them."""
    readme = "".join((ROOT / page).read_text() for page in ("README.md", "docs/published.md"))
    recipes = dict(re.findall(r"^([\w-]+):.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE))
    named = [recipes.get(target, "") for target in re.findall(r"\bmake ([\w-]+)", readme)]
    return set(re.findall(r"scripts/(\w+\.py)", "\n".join([readme, *named])))


@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_command_imports_is_asked_for_by_name(name):
    """Not by way of another package, which may drop it: in install_requires or in the extra for training."""
    asked = {canonicalize_name(requirement.name) for requirement in requirements("train")}
    homes = packages_distributions()
    for package, on_demand in third_party(ROOT / "scripts" / name).items():
        wanted = asked
        if on_demand and package in ON_DEMAND:
            wanted = {canonicalize_name(requirement.name) for requirement in requirements(ON_DEMAND[package])}
        if on_demand and package == SERVER:
            assert any(re.match(f"{SERVER}.*serving", asks) for asks in importlib.metadata.requires("transformers"))
            continue
        assert wanted & set(map(canonicalize_name, homes.get(package, [package]))), (name, package)


def test_the_commands_of_the_readme_are_among_them():
    shown = shown_in_readme()
    assert {"train.py", "quickstart.py", "model_table.py", "benchmark.py", "report.py"} <= shown <= set(COMMANDS)
    found = third_party(ROOT / "scripts" / "experiment.py")
    assert {"torch", "datasets", "filelock", "pandas", "pyarrow"} <= set(found)
    assert found["rdkit"] and not found["pandas"]


# -- the wheel ----------------------------------------------------------------------------------------------------


def build(code: str, folder: Path) -> None:
    """Calls the hooks of setuptools in a folder, as pip does; they print a lot."""
    command = [sys.executable, "-c", f"from setuptools import build_meta\n{code}"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with a wheel and a source distribution of this checkout, and the list of the files in it."""
    folder = tmp_path_factory.mktemp("built")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        copyfile(ROOT / name, folder / "source" / name)
    (folder / "files.txt").write_text(listed)
    build("build_meta.build_sdist('..'), build_meta.build_wheel('..')", folder / "source")
    return folder


def wheel_files(folder: Path) -> dict[str, bytes]:
    """Names and contents of the one wheel in a folder."""
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        return {name: wheel.read(name) for name in wheel.namelist()}


needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git tells the files of the source from others")


@needs_git
@pytest.mark.processes
def test_a_source_distribution_is_the_source_and_builds_the_same_wheel(built, tmp_path):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert set((built / "files.txt").read_text().splitlines()) == {
        name for name in files if name not in ("PKG-INFO", "setup.cfg") and ".egg-info/" not in name
    }
    build("build_meta.build_wheel('..')", folder)
    assert wheel_files(tmp_path) == wheel_files(built)


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The Python of an environment with the wheel and what it needs, and no way to this checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    (wheel,) = built.glob("*.whl")
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps", wheel]
    subprocess.run(command, check=True)
    (site,) = {path.parent for path in folder.rglob("modeling_spiralformer")}
    # pip has resolved nothing: the libraries come from where they are here. The .pth files there are not read.
    libraries = {Path(find_spec(name).origin).parents[1]: None for name in ("transformers", "tokenizers", "torch")}
    (site / "libraries.pth").write_text("\n".join(map(str, libraries)))
    return python


def run_installed(python: Path, code: str, folder: Path) -> str:
    """What code prints in that environment, in a folder, without a network."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [python, "-I", "-c", code]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@needs_git
@pytest.mark.processes
def test_the_wheel_alone_runs_the_code_of_the_readme(installed, tmp_path):
    """In an empty folder, without a network; and every configuration loads by its name."""
    code = [offline(text) for text, _ in blocks("README.md", "python")]
    code.append("import modeling_spiralformer")
    code += [f"AutoConfig.from_pretrained(configuration_folder({name!r}))" for name in CONFIGURATIONS]
    code.append("print(modeling_spiralformer.__file__)")
    printed = run_installed(installed, "\n".join(code), tmp_path).splitlines()
    assert Path(printed[-1]).is_relative_to(installed.parents[1])
    assert len(CONFIGURATIONS) == 32 and printed[0].startswith("[")
    assert [path.name for path in tmp_path.iterdir()] == ["my_model"]


@needs_git
@pytest.mark.processes
def test_no_extra_promises_a_command_that_the_wheel_lacks(built):
    """The commands stay in the checkout: the pages install every extra from there, and a wheel declares no command."""
    (information,) = {name.split("/")[0] for name in wheel_files(built)} - {"modeling_spiralformer"}
    assert information.endswith(".dist-info") and f"{information}/entry_points.txt" not in wheel_files(built)
    asked = [
        extra
        for page in PAGES
        for extra in re.findall(r"\S*\[(?:train|eval|molecules|dev)\b[^].]*\]", page.read_text())
    ]
    assert asked and {extra.split("[")[0].strip('`"') for extra in asked} == {"."}


@needs_git
@pytest.mark.processes
def test_a_type_checker_takes_the_types_of_an_installed_package(built):
    """It looks for `py.typed`, and without one for nothing else."""
    assert "modeling_spiralformer/py.typed" in wheel_files(built)


@needs_git
@pytest.mark.processes
def test_the_newest_releases_are_asked_for_by_name_alone(installed, tmp_path):
    """`make test-latest` takes names from the installed metadata, without the bounds of setup.py."""
    (code,) = re.findall(r"^NAMES = (.*)$", MAKEFILE, re.MULTILINE)
    names = run_installed(installed, code, tmp_path).split()
    assert not any(Requirement(name).specifier for name in names) and "lm-eval[hf]" in names
    asked = requirements("train", "eval", "dev", "molecules")
    assert {Requirement(name).name for name in names} == {requirement.name for requirement in asked}
