"""The model files follow the rules that transformers holds its own models to, without an exception."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest
from documents import ROOT
from transformers import PreTrainedConfig

from modeling_spiralformer import SpiralFormerConfig
from workshop.upstream import lint


def findings(folder: Path) -> list[tuple[str, str]]:
    """What the library's linter, with all of its rules, finds in a folder: rule and file name."""
    return [(item["rule"], Path(item["path"]).name) for item in lint(folder)]


def test_the_model_files_are_clean():
    assert findings(ROOT / "modeling_spiralformer") == []


@pytest.mark.parametrize(
    "name, pattern, rule",
    [
        ("configuration_spiralformer.py", r"@auto_docstring\(.*\)\n", "TRF057"),
        ("configuration_spiralformer.py", r"# limitations under the License.\n", "TRF028"),
        ("modeling_spiralformer.py", r" # CODEPATH: pythia-mesh-1.4b alone has core layers.*\n", "TRF041"),
    ],
)
def test_the_linter_reads_these_files(tmp_path, name, pattern, rule):
    """Without one line that it asks for, it asks: the check above does not pass because it looks elsewhere."""
    folder = tmp_path / "modeling_spiralformer"
    folder.mkdir()
    text = (ROOT / "modeling_spiralformer" / name).read_text()
    (folder / name).write_text(re.sub(pattern, "\n", text))
    assert (folder / name).read_text() != text
    assert (rule, name) in findings(folder)


def test_functions_of_the_package_are_short():
    """At most fifty lines with signature and docstring; ruff's PLR0912 and C901 keep them to twelve branches."""
    longest = {}
    for path in (ROOT / "modeling_spiralformer").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                longest[path.name, node.name, node.lineno] = node.end_lineno - node.lineno + 1
    assert len(longest) > 100 and not {name: lines for name, lines in longest.items() if lines > 50}


def test_the_docstring_of_the_configuration_describes_every_field():
    """`@auto_docstring` fills in the fields that the library knows, and drops what it cannot read."""
    common = {item.name for item in dataclasses.fields(PreTrainedConfig)}
    own = {item.name for item in dataclasses.fields(SpiralFormerConfig)} - common
    described = set(re.findall(r"^    (\w+) \(`.*\):\n        \S", SpiralFormerConfig.__doc__, re.MULTILINE))
    assert own <= described and len(own) > 25
    for words in ("arXiv 2602.11698", "StrictDataclassError", "less would leak the future"):
        assert words in SpiralFormerConfig.__doc__
