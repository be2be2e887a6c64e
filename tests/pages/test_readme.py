"""README and docs are part of the product: their snippets run, their commands exist, their links lead somewhere."""

import re
import shlex
import sys

import pytest
from documents import MAKEFILE, PAGES, ROOT, blocks, commands, offline, run

# Pages whose commands need more than one folder to run in: a test module of their own runs them, all of them.
PAGES_WITH_TESTS = {
    page: test
    for page in PAGES
    if page.stem != "README"
    for folder in ("tests/*", "vllm_plugin/tests")
    for test in ROOT.glob(f"{folder}/test_{page.stem}.py")
}
COMMANDS = [line for page in PAGES if page not in PAGES_WITH_TESTS for line in commands(page)]
SNIPPETS = [(text, network) for page in PAGES for text, network in blocks(page, "python")]
# Snippets that need more of the Hub than one download: a script of tests/ runs them against a Hub on loopback.
SNIPPETS_OF_THE_HUB = [text for text, network in blocks("docs/hub.md", "python") if network]


def test_there_is_something_to_run():
    assert len(SNIPPETS) >= 2 and len(COMMANDS) >= 7


@pytest.mark.parametrize("page, test", PAGES_WITH_TESTS.items())
def test_a_page_with_commands_and_a_test_module_is_run_by_it(page, test):
    assert not commands(page) or f'commands("docs/{page.name}")' in test.read_text()


@pytest.mark.parametrize("text", [text for text, network in SNIPPETS if not network])
def test_python_snippets_run(text, workplace):
    """Configurations and tokenizer are the package's: the folders of a checkout are not there to be named."""
    for name in ("configuration", "tokenization"):
        (workplace / name).unlink()
    run([sys.executable, "-c", text], workplace)


@pytest.mark.parametrize("text", [text for text, network in SNIPPETS if network and text not in SNIPPETS_OF_THE_HUB])
def test_snippets_that_need_the_network_run_but_for_the_download(text, workplace):
    assert offline(text) != text
    run([sys.executable, "-c", f"from modeling_spiralformer import TOKENIZER_FOLDER\n{offline(text)}"], workplace)


@pytest.mark.parametrize("command", [line for line in COMMANDS if "scripts/train.py" in line])
def test_training_commands_run(command, workplace):
    words = shlex.split(command)
    launcher = [sys.executable, "-m", "accelerate.commands.launch"] if words[0] == "accelerate" else [sys.executable]
    run([*launcher, *words[words.index("scripts/train.py") :], "--report_to", "none"], workplace)


def test_the_tokenizer_command_runs(workplace):
    (command,) = (line for line in COMMANDS if "train_tokenizer" in line)
    run([sys.executable, *shlex.split(command)[1:]], workplace)
    settings = (workplace / "my_tokenizer" / "tokenizer_config.json").read_text()
    assert settings == (ROOT / "tokenization" / "tokenizer_config.json").read_text()


def test_every_other_command_is_a_target_of_make_or_an_installation():
    targets = set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))
    named = {words[1] for words in map(shlex.split, COMMANDS) if words[0] == "make"}
    named |= {name for page in PAGES for name in re.findall(r"`make ([\w-]+)`", page.read_text())}
    assert {"quickstart", "test", "fuzz", "test-min", "table", "memory"} <= named <= targets
    others = [line for line in COMMANDS if "scripts/train" not in line and not line.startswith("make ")]
    assert others == ["pip install .", 'pip install -c constraints.txt ".[train]"']  # test_packaging.py
    assert (ROOT / "constraints.txt").is_file()


def test_links_and_images_exist():
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)]+)\)", page.read_text())]
    local = [(page, link) for page, link in links if not link.startswith("http")]
    assert len(local) >= 5
    for page, link in local:
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.is_file(), (page, link)
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in headings}, link


def test_the_table_is_what_the_command_prints():
    printed = run([sys.executable, "scripts/model_table.py", "--markdown"], ROOT)
    assert printed.strip() in (ROOT / "docs" / "published.md").read_text()


def test_the_figures_are_drawn_by_their_script(tmp_path):
    run([sys.executable, "scripts/draw_figures.py", "--output_dir", str(tmp_path)], ROOT)
    # test_cache_memory.py, test_benchmark.py and test_kept_molecules.py draw them.
    by_other_commands = {"cache_memory.png", "benchmark.png", "benchmark_llama.png"}
    by_other_commands |= {"molecules.png", "molecules_passes.png"}
    drawn = {path.name for path in tmp_path.iterdir()} | by_other_commands
    assert drawn == {path.name for path in (ROOT / "docs").glob("*.png")}
