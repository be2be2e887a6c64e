"""SECURITY.md is kept: no pickle is read unguarded, and no example runs code of a revision that it does not name."""

import ast
import pickle
import re

import pytest
import torch
from documents import PAGES, ROOT
from support import small_model
from transformers import AutoModelForCausalLM

# What users are shown: pages, examples, cards, and the docstrings of all code.
SHOWN = [*PAGES, *ROOT.glob("scripts/**/*.md"), *ROOT.glob("checkpoints/*/README.md")]
CODE = [
    path
    for folder in ("modeling_spiralformer", "scripts", "examples", "vllm_plugin")
    for path in ROOT.glob(f"{folder}/**/*.py")
]
CODE = [path for path in CODE if "tests" not in path.parts]
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def unpinned(text: str) -> list[str]:
    """Calls of `from_pretrained` that let code of the Hub run without the commit that was read."""
    calls = re.findall(r"from_pretrained\([^()]*trust_remote_code=True[^()]*\)", text)
    return [call for call in calls if 'revision="COMMIT"' not in call and "(...)" not in call and "(..., " not in call]


def test_examples_name_the_commit_that_was_read():
    found = {str(path.relative_to(ROOT)): unpinned(path.read_text(encoding="utf-8")) for path in {*SHOWN, *CODE}}
    assert not {name: calls for name, calls in found.items() if calls}
    assert sum("trust_remote_code=True" in path.read_text(encoding="utf-8") for path in SHOWN) >= 3
    assert unpinned('from_pretrained("me/x", trust_remote_code=True)') and unpinned(
        'from_pretrained("me/x", revision="main", trust_remote_code=True)'
    )


def unguarded(tree: ast.AST) -> list[str]:
    """Imports of a reader of pickles, and reads by torch or NumPy that would run one."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [item.name for item in node.names]
            found += [name for name in names if name.partition(".")[0] in UNPICKLERS]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
            owner = getattr(node.func.value, "id", "")
            settings = {item.arg: getattr(item.value, "value", None) for item in node.keywords}
            if owner == "torch" and settings.get("weights_only", True) is not True:
                found.append(ast.unparse(node))
            if owner in ("np", "numpy") and settings.get("allow_pickle", False) is not False:
                found.append(ast.unparse(node))
    return found


def test_no_code_reads_a_pickle_unguarded():
    found = {str(path.relative_to(ROOT)): unguarded(ast.parse(path.read_text(encoding="utf-8"))) for path in CODE}
    assert len(found) > 50 and not {name: calls for name, calls in found.items() if calls}
    for line in (
        "import pickle",
        "from dill import loads",
        "torch.load(p, weights_only=False)",
        "np.load(p, allow_pickle=True)",
    ):
        assert unguarded(ast.parse(line)), line


class Trap:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_weights_that_are_a_pickle_run_nothing(tmp_path):
    model = small_model(dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    sprung = tmp_path / "sprung"
    torch.save({**model.state_dict(), "trap": Trap(sprung)}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError, match="open"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not sprung.exists()
    torch.load(tmp_path / "model" / "pytorch_model.bin", weights_only=False)
    assert sprung.exists()  # the trap works
