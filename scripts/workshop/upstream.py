"""The package as it would stand in the library's own tree, `models/spiralformer/`, and what the library's linter says.

The flat files become a configuration and one modular file. The text of every statement is kept, with the comments
before it. What is left out, and what reads otherwise in the library, stands in the tables below. Anything else is
carried over or refused with a ValueError, so that no later change of the package can be lost.
"""

import ast
import json
import subprocess
import sys
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from tempfile import TemporaryDirectory

import transformers

from workshop.files import ROOT

PACKAGE = ROOT / "modeling_spiralformer"
LIBRARY = Path(transformers.__file__).parent
CONFIGURATION, LAYERS, MODELING, MODULAR = (
    f"{kind}_spiralformer" for kind in ("configuration", "layers", "modeling", "modular")
)
# The file of the configuration there: with it goes what its fields are read from.
CONFIGURATION_FILES = (LAYERS, CONFIGURATION)
LINTER = [sys.executable, "-m", "mlinter", "--no-progress", "--no-cache", "--enable-all-trf-rules"]

DEFINITIONS = (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
# Registration with the Auto classes, which the library has in lists of its own, and the folders of a wheel.
OTHER_FILES = {"__init__.py", "published.py"}
# What checkpoints need that bring their code along: names of statements, of a module or ("Class.name") of a class.
LEFT_OUT = {
    CONFIGURATION: ("CODE", "VERSION", "SpiralFormerConfig.save_pretrained"),
    MODELING: ("AUTO_CLASSES", "for (names, model_class)", "SpiralFormerHead"),
}
# What reads otherwise where there is one version of the code and of the library: text here, text there, how often.
REWORDED = {
    CONFIGURATION: (
        (
            "# A child of the library's own logger, so that its verbosity rules; "
            "the name of this module would not be one.\n"
            'logger = logging.get_logger(f"transformers.{__name__}")',
            "logger = logging.get_logger(__name__)",
            1,
        ),
        (
            'TOKEN_LAYER_TYPE = f"spiralformer_token_attention_{VERSION}"',
            '# Layer types of the KV cache.\nTOKEN_LAYER_TYPE = "spiralformer_token_attention"',
            1,
        ),
        ('f"spiralformer_latent_attention_{VERSION}"', '"spiralformer_latent_attention"', 1),
        ("keys_to_ignore_at_inference = [CACHE_NAME]", 'keys_to_ignore_at_inference = ["cache"]', 1),
    ),
    LAYERS: (("cache_argument: str = CACHE_NAME", 'cache_argument: str = "cache"', 1),),
    MODELING: (
        (
            "(\n    SpiralFormerHead, GenericForSequenceClassification, SpiralFormerPreTrainedModel\n)",
            "(GenericForSequenceClassification, SpiralFormerPreTrainedModel)",
            1,
        ),
        ("(SpiralFormerHead, GenericFor", "(GenericFor", 2),
    ),
}

INIT = """from typing import TYPE_CHECKING

from ...utils import _LazyModule
from ...utils.import_utils import define_import_structure


if TYPE_CHECKING:
    from .configuration_spiralformer import *
    from .modeling_spiralformer import *
else:
    import sys

    _file = globals()["__file__"]
    sys.modules[__name__] = _LazyModule(__name__, _file, define_import_structure(_file), module_spec=__spec__)
"""


@dataclass
class Module:
    """One file of the package, taken apart.

    Args:
        license: the comment on top.
        docstring: that of the module.
        imports: local name -> module and name that it stands for; the name is None of a plain `import`.
        siblings: names that other files of the package give -> the file's name without ending.
        statements: everything else but `__all__`, with comments and blank lines before it.
        exported: what `__all__` holds and is not left out.
    """

    name: str
    license: str
    docstring: str
    imports: dict[str, tuple[str, str | None]]
    siblings: dict[str, str]
    statements: list[tuple[ast.stmt, str]]
    exported: list[str]

    @property
    def used(self) -> set[str]:
        """All names that the statements read or write."""
        nodes = [node for statement, _ in self.statements for node in ast.walk(statement)]
        return {node.id for node in nodes if isinstance(node, ast.Name)}


# -- taking a file apart ---------------------------------------------------------------------------------------------


def names_of(statement: ast.stmt) -> list[str]:
    """The names that a definition or an assignment binds; "for (a, b)" of a loop; nothing of any other statement."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.For):
        return [f"for {ast.unparse(statement.target)}"]
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    parts = [part for target in targets for part in getattr(target, "elts", [target])]
    return [part.id for part in parts if isinstance(part, ast.Name)]


def with_comments(body: list[ast.stmt], lines: list[str], start: int = 0) -> list[tuple[ast.stmt, int, int]]:
    """Each statement with the lines it takes, those before it from the end of the last one on."""
    found = []
    for statement in body:
        end = statement.end_lineno or 0
        if end <= start:
            raise ValueError(f"A line must hold one statement, but got {lines[start - 1]!r}.")
        found.append((statement, start, end))
        start = end
    return found


def leave_out(text: str, names: tuple[str, ...]) -> str:
    """The text without the statements of these names; each must be there once."""
    lines, body = text.splitlines(), ast.parse(text).body
    ranges = defaultdict(list)
    for statement, start, end in with_comments(body, lines):
        ranges[", ".join(names_of(statement))].append((start, end))
        if isinstance(statement, ast.ClassDef):
            for part, first, last in with_comments(statement.body, lines, statement.body[0].lineno - 1):
                ranges[f"{statement.name}.{', '.join(names_of(part))}"].append((first, last))
    for name in names:
        if len(ranges[name]) != 1:
            raise ValueError(f"LEFT_OUT must name a statement that is there once, but got {name!r}: {ranges[name]}.")
    for start, end in sorted((ranges[name][0] for name in names), reverse=True):
        del lines[start:end]
    return "\n".join(lines)


def read_module(path: Path) -> Module:
    """Takes a file of the package apart. Raises ValueError, naming file and statement, for what cannot be placed."""
    text = path.read_text(encoding="utf-8")
    for old, new, times in REWORDED.get(path.stem, ()):
        if text.count(old) != times:
            raise ValueError(f"REWORDED must name text of {path.name} that is there {times} times, but got {old!r}.")
        text = text.replace(old, new)
    text = leave_out(text, LEFT_OUT.get(path.stem, ()))
    lines, tree = text.splitlines(), ast.parse(text)
    module = Module(path.stem, text.partition('"""')[0], ast.get_docstring(tree) or "", {}, {}, [], [])
    parts = with_comments(tree.body, lines)
    if not module.docstring or any(line.strip() for line in lines[parts[-1][2] :]):
        raise ValueError(f"{path.name} must begin with a docstring and end with a statement.")
    for statement, start, end in parts[1:]:
        source = "\n".join(lines[start:end])
        if isinstance(statement, ast.Import | ast.ImportFrom) and "#" not in source:
            read_import(module, statement)
        elif isinstance(statement, ast.Assign) and names_of(statement) == ["__all__"]:
            module.exported = [name for name in ast.literal_eval(statement.value) if name not in LEFT_OUT[MODELING]]
        elif isinstance(statement, DEFINITIONS) and names_of(statement):
            module.statements.append((statement, source))
        else:
            raise ValueError(f"{path.name} holds a statement of a kind that nothing here knows: {source.strip()!r}.")
    for node in (node for statement, _ in module.statements for node in ast.walk(statement)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            raise ValueError(f"{path.name} must import on top, but got {ast.unparse(node)!r}.")
    return module


def read_import(module: Module, statement: ast.Import | ast.ImportFrom) -> None:
    """Enters what an import binds."""
    for alias in statement.names:
        bound, plain = alias.asname or alias.name, isinstance(statement, ast.Import)
        origin, level = getattr(statement, "module", None), getattr(statement, "level", 0)
        if plain and bound == alias.name and "." not in bound:
            module.imports[bound] = (bound, None)
        elif origin and level == 0 and origin != "__future__" and bound != "*":
            module.imports[bound] = (origin, alias.name)
        elif origin and level == 1 and bound == alias.name != "*":
            module.siblings[bound] = origin
        else:
            raise ValueError(f"{module.name}.py must import modules or names, but got {ast.unparse(statement)!r}.")


# -- putting them together -------------------------------------------------------------------------------------------


def relative(module: str, name: str | None) -> str:
    """What the library's modules are called from `models/spiralformer/`; other modules keep their name."""
    if module.startswith("transformers.models."):
        return module.replace("transformers.models.", "..", 1)
    if module == "transformers" and not (LIBRARY / f"{name}.py").is_file():
        raise ValueError(f"`from transformers import {name}` must name the module that holds it.")
    return module.replace("transformers", "...", 1).replace("....", "...") if is_library(module) else module


def is_library(module: str) -> bool:
    """Whether a module is one of transformers."""
    return module.partition(".")[0] == "transformers"


def import_lines(imports: dict[str, tuple[str, str | None]]) -> str:
    """The imports in three groups: standard library, other packages, the library."""
    groups: tuple[set[str], ...] = (set(), set(), set())
    together: dict[tuple[str, str | None], set[str]] = defaultdict(set)
    for bound, (module, name) in imports.items():
        if name is None:
            together[module, None].add(bound)
        else:
            together[relative(module, name), module].add(name if name == bound else f"{name} as {bound}")
    for (module, origin), found in together.items():
        names = sorted(found, key=lambda name: (not name.isupper(), name[0].islower(), name))  # as ruff sorts them
        package = (origin or module).partition(".")[0]
        group = 2 if module.startswith(".") else 0 if package in sys.stdlib_module_names else 1
        plain, inside = f"from {module} import {', '.join(names)}", "".join(f"    {name},\n" for name in names)
        line = plain if len(plain) <= 119 else f"from {module} import (\n{inside})"
        groups[group].add(f"import {module}" if origin is None else line)
    return "\n\n".join("\n".join(sorted(group, key=lambda line: (line[0] == "f", line))) for group in groups if group)


def meanings(modules: list[Module], used: set[str]) -> dict[str, tuple[str, str | None]]:
    """Every name of the modules, in their order -> the module and the name there that it stands for.

    Raises ValueError where a name would stand for two things in one file, or for something that is not there.
    """
    known: dict[str, tuple[str, str | None]] = {}
    for module in modules:
        defined = [name for statement, _ in module.statements for name in names_of(statement)]
        elsewhere = set(CONFIGURATION_FILES) - {other.name for other in modules}
        foreign = {name: (f".{CONFIGURATION}", name) for name, file in module.siblings.items() if file in elsewhere}
        own = {name: (module.name, name) for name in defined}
        for name, origin in [*module.imports.items(), *foreign.items(), *own.items()]:
            if known.setdefault(name, origin) != origin:
                raise ValueError(f"{name!r} must be one thing in all files, but got {known[name]} and {origin}.")
        for name, file in module.siblings.items():
            if name in used and name not in foreign and known.get(name) != (file, name):
                raise ValueError(f"{module.name}.py must use what is there, but got {name!r} of {file}.py.")
    return known


def join(modules: list[Module], exported: list[str]) -> str:
    """One file out of several, in their order; what none of them uses is not imported."""
    used: set[str] = set().union(*(module.used for module in modules))
    known, files = meanings(modules, used), {module.name for module in modules}
    imports = {name: origin for name, origin in known.items() if name in used and origin[0] not in files}
    gone = {name for names in LEFT_OUT.values() for name in names} & used | set(exported) - set(known)
    if gone:
        raise ValueError(f"LEFT_OUT must name what nothing uses, but got {sorted(gone)}.")
    docstring = modules[-1].docstring + "\n" * ("\n" in modules[-1].docstring)
    text = f'{modules[0].license}"""{docstring}"""\n\n{import_lines(imports)}\n\n'
    for module in modules:
        if len(modules) > 1:
            text += "\n" * (1 if module is modules[0] else 2) + title(module, described=module is not modules[-1])
        text += "".join(f"{source}\n" for _, source in module.statements)
    names = "".join(f'    "{name}",\n' for name in sorted(exported))
    return f"{text}\n\n__all__ = [\n{names}]\n"


def title(module: Module, described: bool) -> str:
    """A comment where a file of the package begins, with its docstring."""
    lines = [f"-- {module.name} --"]
    for paragraph in module.docstring.split("\n\n") if described else []:
        lines += ["", *textwrap.wrap(paragraph, 117, break_on_hyphens=False)]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def assemble(output: str | Path, package: Path = PACKAGE) -> Path:
    """Writes `models/spiralformer/` into a folder, and returns it. Nothing is written where something is refused."""
    paths = {path.stem: path for path in sorted(package.glob("*_spiralformer.py"))}
    others = {path.name for path in package.glob("*.py")} - {path.name for path in paths.values()}
    if others != OTHER_FILES:
        raise ValueError(f"Beside *_spiralformer.py there must be {sorted(OTHER_FILES)}, but got {sorted(others)}.")
    modules = {stem: read_module(path) for stem, path in paths.items()}
    if len({module.license for module in modules.values()}) != 1:
        raise ValueError("All files of the package must begin with the same licence.")
    graph = {stem: sorted(set(module.siblings.values())) for stem, module in modules.items()}
    order = [stem for stem in TopologicalSorter(graph).static_order() if stem not in CONFIGURATION_FILES]
    if order[-1] != MODELING:
        raise ValueError(f"{MODELING} must import every other file, but {order[-1]} comes last.")
    configuration = modules[CONFIGURATION]
    files = {
        "__init__.py": configuration.license + INIT,
        f"{CONFIGURATION}.py": join([modules[stem] for stem in CONFIGURATION_FILES], configuration.exported),
        f"{MODULAR}.py": join([modules[stem] for stem in order], modules[MODELING].exported),
    }
    folder = Path(output) / "models" / "spiralformer"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


# -- the library's linter --------------------------------------------------------------------------------------------


def lint(folder: Path) -> list[dict]:
    """What mlinter finds with all of its rules, each with rule, path, line and message."""
    with TemporaryDirectory() as place:
        report = Path(place) / "report.json"
        result = subprocess.run(
            [*LINTER, "--output-json", str(report), str(folder)], capture_output=True, encoding="utf-8"
        )
        found = json.loads(report.read_text(encoding="utf-8"))["findings"] if report.is_file() else []
    if (result.returncode == 0) != (not found):
        raise RuntimeError(f"mlinter failed: {result.stderr}")
    return found
