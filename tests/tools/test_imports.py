"""Imports run one way: commands -> workshop -> package, without a circle; and commands are short."""

import ast
import os
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from documents import ROOT, run
from imports import import_graph, imports_of

SCRIPTS = ROOT / "scripts"
COMMANDS = sorted(SCRIPTS.glob("*.py"))
LONGEST_COMMAND = 100
# `save_pretrained` of the configuration imports the model's file: the library follows that import to copy the code.
KNOWN = ("modeling_spiralformer.configuration_spiralformer", "modeling_spiralformer.modeling_spiralformer")


def order(graph: dict[str, set[str]]) -> list[str]:
    """The modules, each after what it imports. Raises CycleError, which names them, where some form a circle."""
    return list(TopologicalSorter(graph).static_order())


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return import_graph((SCRIPTS, "workshop"), (ROOT, "modeling_spiralformer"))


def test_workshop_and_package_import_in_no_circle(graph):
    module, imported = KNOWN
    assert imported in graph[module]
    with pytest.raises(CycleError):
        order(graph)
    ordered = order({**graph, module: graph[module] - {imported}})
    assert {"workshop.costs", "workshop.experiments.plan", "modeling_spiralformer"} <= set(ordered)


def test_the_package_knows_nothing_of_the_workshop_and_the_workshop_nothing_of_commands(graph):
    inside = [module for module in graph if module.startswith("modeling_spiralformer")]
    assert len(inside) > 5 and not any(name.startswith("workshop") for module in inside for name in graph[module])
    commands = {path.stem for path in COMMANDS}
    named = {item.package for path in (SCRIPTS / "workshop").rglob("*.py") for item in imports_of(path)}
    assert not commands & named
    assert not commands & {item.package for path in COMMANDS for item in imports_of(path)}


@pytest.mark.parametrize(
    "files, circle",
    [
        ({"a": "import pack.b", "b": "def f():\n    from pack.a import x"}, True),
        ({"a": "from .b import x", "b": "from . import c", "c": "from pack import a"}, True),
        ({"__init__": "from .a import x", "a": "from pack import x"}, True),
        ({"__init__": "from .a import x", "a": "from .b import y", "b": "import os"}, False),
    ],
)
def test_a_circle_is_found(files, circle, tmp_path):
    (tmp_path / "pack").mkdir()
    for name, text in files.items():
        (tmp_path / "pack" / f"{name}.py").write_text(text, encoding="utf-8")
    graph = import_graph((tmp_path, "pack"))
    assert len(graph) == len(files)
    if circle:
        with pytest.raises(CycleError):
            order(graph)
    else:
        assert order(graph) == ["pack.b", "pack.a", "pack"]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.name)
def test_a_command_is_its_arguments_and_a_call(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_COMMAND
    last = ast.parse(text).body[-1]
    assert isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'"


def imported_by(module: str, folder: Path) -> set[str]:
    """Names of all modules that are loaded after the import of one, in a fresh process."""
    code = f"import sys, {module}; print('loaded:', *sys.modules)"
    printed = run([sys.executable, "-c", code], folder, PYTHONPATH=os.pathsep.join([str(ROOT), str(SCRIPTS)]))
    (line,) = (line for line in printed.splitlines() if line.startswith("loaded: "))
    return set(line.split()[1:])


@pytest.mark.parametrize("module", ["workshop.costs", "workshop.experiments.matching, workshop.provenance"])
def test_counting_and_naming_the_machine_draw_nothing(module, tmp_path):
    loaded = imported_by(module, tmp_path)
    assert "workshop" in loaded and "matplotlib" not in loaded
