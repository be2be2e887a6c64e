"""The package as it would stand in transformers: the same model, whole, and linted; docs/upstream.md says the rest."""

import ast
import re
import shutil
import sys

import pytest
import torch
from documents import ROOT, blocks, commands, run
from support import pad_rows, random_ids, small_model

from workshop.upstream import LEFT_OUT, PACKAGE, REWORDED, assemble, names_of

# Runs the assembled model as a part of the library, where this package is not to be found.
CHILD = """
import sys, torch, transformers.models
sys.path[:] = [path for path in sys.path if path != {root!r}]
transformers.models.__path__.append(sys.argv[1])
from transformers.models.spiralformer import SpiralFormerConfig
from transformers.models.spiralformer.modular_spiralformer import SpiralFormerForCausalLM
given = torch.load(sys.argv[2])
config = SpiralFormerConfig.from_dict(given["config"])
config._attn_implementation = "sdpa"
model = SpiralFormerForCausalLM(config).to(torch.float64).eval()
model.load_state_dict(given["weights"], strict=True)
with torch.no_grad():
    logits = model(**given["inputs"]).logits
    ids = model.generate(**given["inputs"], **given["options"])
assert "modeling_spiralformer" not in sys.modules
torch.save((logits, ids, config.layer_types), sys.argv[3])
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """The folder that the command of the page writes, and the lines that it prints."""
    place = tmp_path_factory.mktemp("upstream")
    (command,) = commands("docs/upstream.md")
    _, script, *rest = command.split()
    lines = run([sys.executable, str(ROOT / script), *rest], place).splitlines()
    return place / rest[-1] / "models" / "spiralformer", lines


@pytest.mark.parametrize(
    "options, generation",
    [
        ({}, {}),
        ({"topology": "anchor", "chunk_sizes": [3, 1], "share_core": False}, {"num_beams": 2}),
        ({"topology": "hyper_connections", "chunk_sizes": [3, 1]}, {}),
    ],
)
def test_the_assembled_model_is_the_same_function(options, generation, printed, tmp_path):
    model = small_model(**options)
    ids, mask = pad_rows([random_ids(1, length, seed=length)[0] for length in (13, 6, 11)], "left")
    inputs = {"input_ids": ids, "attention_mask": mask}
    generation |= {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    given = {"config": model.config.to_dict(), "weights": model.state_dict(), "inputs": inputs, "options": generation}
    torch.save(given, tmp_path / "given.pt")
    code = CHILD.format(root=str(ROOT))
    # With an environment it is a new interpreter, not a fork of a server that may have this package already.
    words = [sys.executable, "-c", code, str(printed[0].parent), "given.pt", "found.pt"]
    run(words, tmp_path, OMP_NUM_THREADS="1")
    logits, generated, layer_types = torch.load(tmp_path / "found.pt")
    with torch.no_grad():
        torch.testing.assert_close(logits, model(**inputs).logits, rtol=0, atol=1e-12)
        assert torch.equal(generated, model.generate(**inputs, **generation))
    assert generated.shape == (3, 13 + 9)
    assert set(layer_types) == {"spiralformer_token_attention", "spiralformer_latent_attention"}


def test_mlinter_finds_what_the_page_says(printed):
    _, lines = printed
    (said,) = blocks("docs/upstream.md", "text")
    assert [re.sub(r"\.py:\d+:", ".py:", line) for line in lines[1:]] == said[0].splitlines()
    assert lines[-1] == f"mlinter: {len(lines) - 2} findings"


def definitions(paths) -> dict[str, str]:
    """Everything that files define on top, by name: what it is, docstrings and all."""
    parts = [part for path in paths for part in ast.parse(path.read_text(encoding="utf-8")).body]
    return {name: ast.dump(part) for part in parts for name in names_of(part) if name != "__all__"}


def test_every_definition_of_the_package_is_carried_over(printed):
    folder, _ = printed
    ours, theirs = definitions(PACKAGE.glob("*_spiralformer.py")), definitions(folder.glob("*_spiralformer.py"))
    assert set(ours) - set(theirs) == {name for names in LEFT_OUT.values() for name in names if "." not in name}
    assert not set(theirs) - set(ours)
    changed = {name for name in theirs if theirs[name] != ours[name]}
    heads = {
        f"SpiralFormerFor{kind}" for kind in ("QuestionAnswering", "SequenceClassification", "TokenClassification")
    }
    assert changed == heads | {"SpiralFormerConfig", "LayerFamily", "logger", "LATENT_LAYER_TYPE", "TOKEN_LAYER_TYPE"}
    text = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    assert "auto_map" not in text and "import transformers" not in text and "from transformers" not in text
    assert len(re.findall("^# CODEPATH|    # CODEPATH", text, re.MULTILINE)) > 4


def test_the_assembled_files_are_in_the_style_of_the_library(printed):
    folder, _ = printed
    files = [str(path) for path in folder.glob("*_spiralformer.py")]
    ruff = [sys.executable, "-m", "ruff"]
    options = ["--isolated", "--line-length", "119", "--target-version", "py311"]
    style = ["--select", "E,F,I,W", "--config", "lint.isort.lines-after-imports=2"]
    run([*ruff, "check", *options, *style, *files], folder)
    run([*ruff, "format", "--check", *options, *files], folder)


@pytest.mark.parametrize(
    "name, old, new, message",
    [
        ("storage_", "\n\ndef append_columns", "\n\nprint(1)\n\n\ndef append_columns", "nothing here knows.*print"),
        ("storage_", "\n\ndef append_columns", "\n\nif 1:\n    a = 1\n\n\ndef append_columns", "nothing here knows"),
        ("storage_", "SPARE_SHARE = 1 / 64", "SPARE_SHARE = 1 / 64; a = 1", "one statement"),
        ("storage_", "SPARE_SHARE =", "READ_AGAIN = 1\nSPARE_SHARE =", "'READ_AGAIN' must be one thing"),
        ("storage_", "import torch\n", "import numpy as torch\n", "must import modules or names"),
        ("storage_", "import torch\n", "from torch import *\n", "must import modules or names"),
        ("storage_", "import torch\n", "import torch  # why\n", "nothing here knows.*# why"),
        ("storage_", "# Copyright 2026", "# Copyright 2027", "same licence"),
        ("level_", "import write_columns", "import write_column as write_columns", "must import modules or names"),
        ("storage_", "def write_columns", "def write_other", "'write_columns' of storage_spiralformer"),
        ("topology_", "import torch\n", "import torch\nfrom transformers import AutoModel\n", None),
        (
            "topology_",
            "class SpiralFormerMeSH",
            "X = AutoModel\nclass SpiralFormerMeSH",
            "from transformers import AutoModel",
        ),
        (
            "topology_",
            "class SpiralFormerMeSH",
            "X = AUTO_CLASSES\nclass SpiralFormerMeSH",
            r"nothing uses, but got \['AUTO_CLASSES'\]",
        ),
        (
            "topology_",
            "class SpiralFormerMeSH",
            "def f():\n    import math\n\n\nclass SpiralFormerMeSH",
            "must import on top",
        ),
        ("modeling_", "SpiralFormerHead, GenericForQ", "GenericForQ", "REWORDED.*SpiralFormerHead"),
        ("configuration_", "VERSION = hash", "OTHER = hash", "LEFT_OUT.*'VERSION'"),
        ("configuration_", "CACHE_NAME]", "CACHE_NAME, 1]", "REWORDED.*keys_to_ignore"),
        ("configuration_", "MISSPELT = 0.8", "MISSPELT = 0.8, CACHE_NAME", "'CACHE_NAME' of cache_name_spiralformer"),
    ],
)
def test_what_it_does_not_know_is_refused(name, old, new, message, tmp_path):
    """A later change of the package is carried over, or somebody is told."""
    package = shutil.copytree(PACKAGE, tmp_path / "package", ignore=shutil.ignore_patterns("__pycache__"))
    path = package / f"{name}spiralformer.py"
    text = path.read_text(encoding="utf-8")
    assert old in text
    text = text.replace(old, new, 1)
    if message and "from transformers import" in message:
        text = text.replace("import torch\n", "import torch\nfrom transformers import AutoModel\n", 1)
    path.write_text(text, encoding="utf-8")
    if message is None:  # an import that nothing uses
        assert "AutoModel\n" not in (assemble(tmp_path, package) / "modular_spiralformer.py").read_text(
            encoding="utf-8"
        )
        return
    with pytest.raises(ValueError, match=message):
        assemble(tmp_path, package)
    assert not (tmp_path / "models").exists()


def test_a_new_file_beside_the_others_is_refused(tmp_path):
    package = shutil.copytree(PACKAGE, tmp_path / "package", ignore=shutil.ignore_patterns("__pycache__"))
    (package / "other.py").write_text("a = 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="other.py"):
        assemble(tmp_path, package)
    assert {"configuration_spiralformer", "layers_spiralformer", "modeling_spiralformer"} == set(REWORDED)
