"""The checks before the tests are the same everywhere: in `make test`, in pre-commit and in continuous integration."""

import os
import re
import sys
import tomllib

import pytest
import yaml
from documents import MAKEFILE, ROOT, run
from packaging.requirements import Requirement
from test_packaging import requirements

HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]


def recipe(target: str) -> list[str]:
    """The lines of a target of the Makefile, as they run in its own environment."""
    (lines,) = re.findall(rf"^{target}: \$\(STAMP\)\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    return lines.replace("$(RUN)", "$(VENV)/bin/python").replace("$(VENV)", ".venv").replace("\t", "").splitlines()


def test_pre_commit_runs_what_make_test_runs_before_the_tests():
    *checks, tests = recipe("test")
    (local,) = HOOKS
    assert local["repo"] == "local" and "pytest" in tests
    assert [hook["entry"] for hook in local["hooks"]] == checks and len(checks) == 4
    # A tool of the environment, on the whole tree: what a hook is given by default would be the changed files.
    assert all(hook["language"] == "system" and hook["pass_filenames"] is False for hook in local["hooks"])
    run([sys.executable, "-m", "pre_commit", "validate-config"], ROOT)


def test_the_tools_are_those_of_the_extra_for_development():
    named = {requirement.name for requirement in requirements("dev")}
    assert {"codespell", "mypy", "pre-commit", "pytest", "ruff"} <= named


def test_the_workflow_runs_the_script_on_a_supported_python():
    steps = [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    (python,) = (step["with"]["python-version"] for step in steps if "setup-python" in step.get("uses", ""))
    (asked,) = re.findall(r'python_requires="(.*)"', (ROOT / "setup.py").read_text())
    assert Requirement(f"python{asked}").specifier.contains(python)


def test_the_type_checker_reads_the_package_and_the_bodies_of_its_functions():
    assert SETTINGS["mypy"]["files"] == ["modeling_spiralformer", "vllm_plugin/spiralformer_vllm"]
    assert SETTINGS["mypy"]["check_untyped_defs"]


@pytest.mark.parametrize("text, found", [("t" + "eh model\n", True), ("the model\n", False), ('b"caf\\xe9"\n', False)])
def test_spelling_is_checked_beside_escaped_letters(text, found, tmp_path):
    (tmp_path / "page.md").write_text(text)
    check = f"import sys, codespell_lib; sys.exit(bool(codespell_lib.main('page.md')) is not {found})"
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    run([sys.executable, "-c", check], tmp_path)
