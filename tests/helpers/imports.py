"""What Python files import, read from their sources: nothing is run, and imports inside functions count."""

import ast
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Import:
    """A module that a file names, whole and with a package before it, and whether it is imported inside a function."""

    module: str
    lazy: bool

    @property
    def package(self) -> str:
        """The first part of the name."""
        return self.module.partition(".")[0]


def module_name(path: Path, root: Path) -> str:
    """The name that a file below a root has in an import."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, root: Path | None = None) -> set[Import]:
    """
    Every import of a file. `from a import b` names `a` and `a.b`, as b may be a module; relative imports need `root`,
    the folder that holds the package.
    """
    found = set()

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.Import):
            found.update(Import(alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module_name(path, root).split(".") + ["__init__"] * (path.stem == "__init__")
                base = ".".join([*parts[: -node.level], *filter(None, [node.module])])
            found.add(Import(base, lazy))
            found.update(Import(f"{base}.{alias.name}", lazy) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child, lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(ast.parse(path.read_text(encoding="utf-8")), False)
    return found


def import_graph(*roots: tuple[Path, str]) -> dict[str, set[str]]:
    """
    Module -> the modules that it imports, of packages that are given as (root, name). A package is an edge only where
    nothing but names of its `__init__` is taken.
    """
    files = {module_name(path, root): (path, root) for root, name in roots for path in (root / name).rglob("*.py")}
    graph = {}
    for module, (path, root) in files.items():
        named = {item.module for item in imports_of(path, root)} & set(files)
        graph[module] = {name for name in named if not any(other.startswith(f"{name}.") for other in named)} - {module}
    return graph
