"""Every file of examples/ is run by a test: those that need only the repository here, the others where it says."""

import re
import sys
from importlib.metadata import packages_distributions

import pytest
from documents import ROOT, commands, run
from imports import imports_of

EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
# Examples with a test of their own: the module that runs them, and the page whose commands it runs.
ELSEWHERE = {
    "chat.py": ("tests/scripts/test_compare_generation.py", "docs/real_models.md"),
    "elastic.py": ("tests/model/test_elastic.py", "docs/elastic.md"),
    "finetune.py": ("tests/scripts/test_finetuning.py", "docs/finetuning.md"),
    "lora.py": ("tests/scripts/test_finetuning.py", "docs/finetuning.md"),
    "push_and_pull.py": ("tests/helpers/hub_push.py", "docs/hub.md"),
    "quantise.py": ("tests/model/test_deployment.py", "docs/deployment.md"),
    "tensor_parallel.py": ("tests/model/test_distributed.py", "docs/distributed.md"),
    "uptrain.py": ("tests/tools/test_conversion.py", "docs/conversion.md"),
}
HERE = [name for name in EXAMPLES if name not in ELSEWHERE]


def test_there_are_examples():
    assert {"change_schedule.py", "generate_batch.py", "own_schedule.py"} <= set(HERE)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name in ELSEWHERE])
def test_an_example_that_is_not_run_here_is_named_by_its_module(name):
    module, page = (ROOT / path for path in ELSEWHERE[name])
    assert name in module.read_text() + "\n".join(commands(page))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_says_what_it_shows(name):
    assert re.match(r'""".+\n', (ROOT / "examples" / name).read_text())


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_can_be_copied(name):
    """It needs installed packages and this one, and nothing beside it in the checkout."""
    path = ROOT / "examples" / name
    known = {*sys.stdlib_module_names, *packages_distributions(), "modeling_spiralformer"}
    found = {item.package for item in imports_of(path)}
    assert "modeling_spiralformer" in found and found <= known and "sys.path" not in path.read_text()
    beside = {file.stem for folder in ("scripts", "examples") for file in (ROOT / folder).iterdir()}
    assert not found & beside


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> dict[str, str]:
    """What each example prints, run from a folder that holds nothing else of the repository."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "examples").symlink_to(ROOT / "examples")
    return {name: run([sys.executable, f"examples/{name}"], folder) for name in HERE}


def test_every_other_example_runs(printed):
    assert all(printed[name].strip() for name in HERE)


def test_a_batch_gives_what_each_prompt_gives_alone(printed):
    lines = printed["generate_batch.py"].splitlines()
    texts = [line.split(" -> ")[1] for line in lines if " -> " in line]
    assert len(set(texts)) == 3 and all(text.endswith("(the same alone)") for text in texts)


def test_a_schedule_of_ones_own_learns_its_text(printed):
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed["own_schedule.py"])]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.5 < losses[0]
    assert "return a + b" in printed["own_schedule.py"]


def test_a_changed_schedule_draws_anew_what_depends_on_it(printed):
    lines = [line for line in printed["change_schedule.py"].splitlines() if ": now " in line]
    assert [line.partition("drawn anew: ")[2] == "nothing" for line in lines] == [True, True, True, False]
    assert "allocator" in lines[-1] and "scorer" not in lines[-1] and "topology" not in lines[-1]
