"""What commands read and write: outputs checked before the work, strict JSON, text byte for byte in UTF-8."""

import ast
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from documents import ROOT, run
from support import small_model
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

import benchmark
import cache_memory
import compare_schedules
import convert
import draw_figures
import evaluate_model
import experiment
import make_configurations
import probe
import quickstart
import report
import train
import train_smiles_tokenizer
import train_tokenizer
from workshop import training
from workshop.data import load_file, make_blocks
from workshop.files import check_file, finite, is_finite, write_json
from workshop.hub import read_evaluation
from workshop.model_card import make_card
from workshop.probes import measures
from workshop.provenance import machine
from workshop.starts import ComparisonArguments
from workshop.training_arguments import DataArguments

TOKENIZER = AutoTokenizer.from_pretrained(ROOT / "tokenization")

# -- outputs ----------------------------------------------------------------------------------------------------

RUNS = str(ROOT / "docs" / "results" / "runs.jsonl")
PLAN = str(ROOT / "scripts" / "experiments" / "ablations.yaml")
# Command -> (setting, the function that would do the work, a call with the output).
FILES = {
    "evaluate": (
        "output_file",
        (evaluate_model, "load"),
        lambda path: evaluate_model.main(
            ["--model_name_or_path", "x", "--text_files", "y.txt", "--output_file", path]
        ),
    ),
    "compare_schedules": (
        "output_file",
        (compare_schedules, "load"),
        lambda path: compare_schedules.main(
            ["--model", "x", "--text", "y.txt", "--schedules", "1", "--output_file", path]
        ),
    ),
    "benchmark": ("output", (benchmark, "measure"), lambda path: benchmark.main(["--output", path])),
    "cache_memory": ("plot", (cache_memory, "draw"), lambda path: cache_memory.MemoryArguments("x", plot=path)),
    "picture of the benchmark": ("plot", (benchmark, "measure"), lambda path: benchmark.BenchmarkArguments(plot=path)),
    "experiment": (
        "lines",
        (experiment, "Runner"),
        lambda path: experiment.main(["--experiments", PLAN, "--data_dir", "x", "--lines", path]),
    ),
}
FOLDERS = {
    "train": (
        "output_dir",
        (training, "build_model"),
        lambda path: train.main(["--output_dir", path, "--max_steps", "1", "--report_to", "none"]),
    ),
    "probe": (
        "output_dir",
        (probe, "probe"),
        lambda path: probe.main(["--model", "x", "--text", "y", "--output_dir", path]),
    ),
    "convert": (
        "output_dir",
        (convert, "load_source"),
        lambda path: convert.main(convert.ConversionArguments("x", path)),
    ),
    "draw_figures": (
        "output_dir",
        (draw_figures, "draw_architecture"),
        lambda path: draw_figures.main(SimpleNamespace(output_dir=path)),
    ),
    "make_configurations": ("output_dir", (make_configurations, "to_json"), make_configurations.main),
    "train_tokenizer": (
        "output_dir",
        (train_tokenizer, "train_tokenizer"),
        lambda path: train_tokenizer.main(train_tokenizer.TokenizerArguments(output_dir=path)),
    ),
    "train_smiles_tokenizer": (
        "output_dir",
        (train_smiles_tokenizer, "train_smiles_tokenizer"),
        lambda path: train_smiles_tokenizer.main(
            train_smiles_tokenizer.SmilesTokenizerArguments("x", output_dir=path)
        ),
    ),
    "quickstart": (
        "output_dir",
        (training, "build_model"),
        lambda path: quickstart.run(quickstart.QuickstartArguments(output_dir=path)),
    ),
    "report": (
        "output_dir",
        (report.Picture, "draw"),
        lambda path: report.main(report.ReportArguments(experiments=[PLAN], runs=RUNS, output_dir=path)),
    ),
    "experiment": (
        "runs_dir",
        (experiment, "Runner"),
        lambda path: experiment.main(["--experiments", PLAN, "--data_dir", "x", "--runs_dir", path]),
    ),
}
# Of each folder a file that the command writes into it.
INSIDE = {
    "train": "all_results.json",
    "probe": "heads.png",
    "draw_figures": "cache_grid.png",
    "make_configurations": "tiny/config.json",
    "train_tokenizer": "tokenizer.json",
    "train_smiles_tokenizer": "tokenizer.json",
    "quickstart": "loss.png",
    "report": "ablations.md",
}


def no_work(*args, **options):
    pytest.fail("the work has begun")


def refused(setting: str, work: tuple, call, path: Path, monkeypatch) -> None:
    monkeypatch.setattr(*work, no_work, raising=False)
    with pytest.raises(ValueError, match=f"`{setting}` must "):
        call(str(path))


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(name, tmp_path, monkeypatch):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("kept", encoding="utf-8")
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere" / "at.png")
    # Nobody can write into /proc, root neither.
    for path in (tmp_path / "folder.png", tmp_path / "file" / "in.png", tmp_path / "link.png", Path("/proc/in.png")):
        refused(*FILES[name], path, monkeypatch)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png", "link.png"]
    assert (tmp_path / "file").read_text("utf-8") == "kept"


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(name, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("kept", encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path / "file", tmp_path / "file" / "in", tmp_path / "link", Path("/proc/in")):
        refused(*FOLDERS[name], path, monkeypatch)
    if name in INSIDE:
        (tmp_path / "out" / INSIDE[name]).mkdir(parents=True)
        refused(*FOLDERS[name], tmp_path / "out", monkeypatch)
    assert (tmp_path / "file").read_text("utf-8") == "kept"


@pytest.mark.parametrize("name", ["cache_memory", "picture of the benchmark"])
def test_a_picture_has_an_ending_that_says_what_it_is(name, tmp_path, monkeypatch):
    for path in (tmp_path / "picture", tmp_path / "picture.xyz"):
        refused(*FILES[name], path, monkeypatch)
    FILES[name][2](str(tmp_path / "new" / "picture.svg"))
    assert not any(tmp_path.iterdir())


def test_an_output_that_is_there_stays_as_it_is_until_it_is_written(tmp_path):
    (tmp_path / "figures.json").write_text("{}", encoding="utf-8")
    before = (tmp_path / "figures.json").stat()
    check_file("output_file", tmp_path / "figures.json")
    assert (tmp_path / "figures.json").stat().st_mtime_ns == before.st_mtime_ns


def test_a_conversion_does_not_write_over_its_source(tmp_path):
    arguments = convert.ConversionArguments(str(tmp_path / "a" / ".."), str(tmp_path))
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="`output_dir` must be another folder than that of the source"):
        convert.main(arguments)


# -- JSON -------------------------------------------------------------------------------------------------------


def strict(text: str):
    """Reads JSON as its standard has it: without NaN and Infinity."""
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_figures_that_are_not_finite_are_null(tmp_path):
    figures = {"a": math.nan, "b": [1.5, -math.inf, "x"], "c": {"d": (math.inf, None, 3)}}
    assert not is_finite(figures) and not is_finite((1.0, [math.nan])) and is_finite({"a": [1.5, None, "nan"]})
    write_json(tmp_path / "new" / "figures.json", figures)
    written = strict((tmp_path / "new" / "figures.json").read_text("utf-8"))
    assert written == {"a": None, "b": [1.5, None, "x"], "c": {"d": [None, None, 3]}} == finite(figures)


@pytest.fixture
def diverged(tmp_path) -> Path:
    """A checkpoint whose every logit is NaN."""
    model = small_model(dtype=torch.float32, vocab_size=4096)
    model.model.norm.weight.data.fill_(math.nan)
    model.save_pretrained(tmp_path / "diverged")
    TOKENIZER.save_pretrained(tmp_path / "diverged")
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 200, encoding="utf-8")
    return tmp_path / "diverged"


def test_a_model_that_diverged_is_evaluated_and_probed(diverged, tmp_path, capsys):
    text, output = str(tmp_path / "text.txt"), tmp_path / "figures.json"
    words = ["--model_name_or_path", str(diverged), "--text_files", text, "--window", "32"]
    evaluate_model.main([*words, "--output_file", str(output)])
    assert strict(output.read_text("utf-8"))[text]["perplexity"] is None and "nan" in capsys.readouterr().out
    # The final norm comes after everything that is probed.
    for layer in ("core.0.attention.query_key_value", "norm"):
        model = small_model(dtype=torch.float32, vocab_size=4096)
        model.model.get_submodule(layer).weight.data.fill_(math.nan)
        model.save_pretrained(diverged)
        words = ["--model", str(diverged), "--text", text, "--sequences", "2", "--length", "32"]
        (tmp_path / layer).mkdir()
        (tmp_path / layer / "updates.png").touch()  # of an older run
        probe.main([*words, "--output_dir", str(tmp_path / layer)])
        probed = strict((tmp_path / layer / "probes.json").read_text("utf-8"))
        entropy = probed["models"]["model"]["metrics"]["key-marginal entropy"]["values"][0][0][0]
        assert (entropy is None) == (layer != "norm")
        assert ("no pictures" in capsys.readouterr().out) == (not (tmp_path / layer / "updates.png").is_file())


def test_a_run_that_diverged_leaves_strict_json(diverged, tmp_path):
    output = tmp_path / "run"
    words = ["--model_name_or_path", str(diverged), "--train_file", str(tmp_path / "text.txt"), "--max_steps", "2"]
    words += ["--block_size", "32", "--report_to", "none", "--logging_steps", "1", "--max_eval_samples", "2"]
    train.main([*words, "--output_dir", str(output), "--save_strategy", "no"])
    for name in ("train_results.json", "eval_results.json", "all_results.json", "trainer_state.json"):
        assert "null" in (output / name).read_text("utf-8"), name
        strict((output / name).read_text("utf-8"))


# -- text -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, content, texts",
    [
        ("t.txt", b"a\r\nb\rc\n\n", ["a\r\nb\rc\n\n"]),
        ("bom.txt", b"\xef\xbb\xbfa\x0c\xc2\x85b", ["\ufeffa\x0c\x85b"]),
        ("t.jsonl", b'{"text": "a\\r\\nb"}\r\n{"text": "\\r"}\r\n', ["a\r\nb", "\r"]),
        (
            "t.csv",
            b'n,text\r\n1,"a\r\nb"\r\n2,NA\r\n3,007\r\n4,1.50\r\n5, x \r\n',
            ["a\r\nb", "NA", "007", "1.50", " x "],
        ),
    ],
)
def test_text_is_read_byte_for_byte(name, content, texts, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert load_file("train_file", str(tmp_path / name))["text"][:] == texts


def test_a_text_that_has_changed_is_read_again(tmp_path):
    for content in (b"one\r\n", b"two\r\n"):
        (tmp_path / "t.txt").write_bytes(content)
        assert load_file("train_file", str(tmp_path / "t.txt"))["text"][:] == [content.decode()]


def test_the_bytes_of_an_evaluation_are_those_of_the_file(diverged, tmp_path):
    (tmp_path / "crlf.txt").write_bytes(b"def f(x):\r\n    return x\r\n" * 20)
    words = ["--model_name_or_path", str(diverged), "--window", "32", "--text_files", str(tmp_path / "crlf.txt")]
    assert evaluate_model.main(words)[str(tmp_path / "crlf.txt")]["bytes"] == (tmp_path / "crlf.txt").stat().st_size


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": null}\n',
            "must have text in the column `text`, but row 2 of '.*a.jsonl' is null",
        ),
        (
            "b.jsonl",
            b'{"text": "a"}\n{"other": 1}\n',
            "must have text in the column `text`, but row 2 of '.*b.jsonl' is null",
        ),
        ("c.csv", b"text,n\na,1\n,2\n", "must have text in the column `text`, but row 2 of '.*c.csv' is null"),
        ("d.txt", b"ab\nc\xe9\n", "must be text in UTF-8, but '.*d.txt' is not, in line 2: .*0xe9"),
        ("e.jsonl", b'{"text": "caf\xe9"}\n', "must be text in UTF-8, but '.*e.jsonl' is not, in line 1"),
        ("f.csv", "text\na\n".encode("utf-16"), "must be text in UTF-8, but '.*f.csv' is not, in line 1"),
        ("g.jsonl", b'{"text": ""}\n' * 3, "must hold text, but all 3 documents of '.*g.jsonl' are empty"),
        ("h.jsonl", b'{"text": 5}\n', "must have text in the column `text`, but that of '.*h.jsonl' holds .*int64"),
        ("i.jsonl", b'{"text": "2020-01-01"}\n', "must have text .* but that of '.*i.jsonl' holds .*timestamp"),
        ("j.jsonl", b"{bad\n", "must be a .jsonl file of rows, but '.*j.jsonl' cannot be read"),
        ("k.csv", b"text,n\na,b,c\n", "must be a .csv file of rows, but '.*k.csv' cannot be read"),
        ("l.jsonl", b"\n\n", "must be a .jsonl file of rows, but '.*l.jsonl' cannot be read"),
        ("m.csv", b"other\n1\n", r"must have a column `text`, but '.*m.csv' has \['other'\]"),
        ("n.txt", b"", "must hold text, but '.*n.txt' is empty"),
    ],
)
def test_text_that_cannot_be_used_is_refused_by_file_and_row(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    data = DataArguments(train_file=str(tmp_path / name), block_size=8)
    with pytest.raises(ValueError, match=f"`train_file` {message}"):
        make_blocks(data, TOKENIZER, 8, ["train"])


@pytest.mark.parametrize("share, blocks", [(5, 1), (99, 12)])
def test_a_held_out_share_that_takes_every_block_is_refused_by_their_number(share, blocks, tmp_path):
    (tmp_path / "t.txt").write_text("def f(): pass\n" * 40, encoding="utf-8")
    tokens = len(TOKENIZER("def f(): pass\n" * 40)["input_ids"]) + 1  # the end of the document
    data = DataArguments(train_file=str(tmp_path / "t.txt"), validation_split_percentage=share)
    message = f"`validation_split_percentage` must leave .* got {share}, which holds out {blocks} of {blocks} blocks"
    with pytest.raises(ValueError, match=message):
        make_blocks(data, TOKENIZER, tokens // blocks, ["train", "validation"])
    assert len(make_blocks(data, TOKENIZER, tokens // blocks, ["validation"])["validation"]) == blocks


def test_an_evaluation_on_nothing_but_empty_documents_is_refused_before_the_training(tmp_path, monkeypatch):
    lines = [json.dumps({"text": "def f(): pass\n" * 40})] * 3 + ['{"text": ""}'] * 400
    (tmp_path / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(training, "run_training", no_work)
    with pytest.raises(ValueError, match="`validation_file` must give blocks with text"):
        train.main(
            ["--train_file", str(tmp_path / "t.jsonl"), "--block_size", "32", "--output_dir", str(tmp_path / "o")]
            + ["--validation_split_percentage", "1", "--report_to", "none"]
        )


def test_a_probe_reads_its_text_byte_for_byte(diverged, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(measures, "cut_text", lambda text, *args: seen.append(text) or no_work)
    monkeypatch.setattr(measures, "collect", lambda *args: {})
    (tmp_path / "crlf.txt").write_bytes(b"a\r\nb")
    asked = ({"model": str(diverged)}, str(tmp_path / "crlf.txt"), 32, 32, 4)
    measures.probe(*asked)
    assert seen == ["a\r\nb"]
    (tmp_path / "crlf.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="`text` must be text in UTF-8, but '.*crlf.txt' is not"):
        measures.probe(*asked)
    (tmp_path / "crlf.txt").unlink()
    with pytest.raises(FileNotFoundError, match="`text` must be an existing file, but got '.*crlf.txt'"):
        measures.probe(*asked)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"router_bias": math.nan}, "`router_bias` must be finite, but got nan"),
        ({"router_bias": math.inf}, "`router_bias` must be finite, but got inf"),
        ({"router_bias": -1.0}, "`router_bias` must be in"),
        ({"router_bias": 1e30}, "`router_bias` must be in"),
        ({"seed": -1}, "`seed` must be in"),
    ],
)
def test_numbers_of_a_conversion_are_finite_and_in_range(options, message):
    with pytest.raises(ValueError, match=message):
        convert.ConversionArguments("source", "output", **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"learning_rate": math.nan}, "`learning_rate` must be finite"),
        ({"source_learning_rate": -1.0}, "`source_learning_rate` must be >= 0"),
        ({"batch_size": 0}, "`batch_size` must be an integer >= 1"),
        ({"seeds": [0, -1]}, "`seeds` must be in"),
        ({"seeds": [2**32 - 1]}, "`seeds` must be in"),
        ({"seeds": [2**32 - 1000]}, "`seeds` must be in .0, 4294966295., but got 4294966296"),
    ],
)
def test_numbers_of_a_comparison_are_finite_and_in_range(options, message):
    with pytest.raises(ValueError, match=message):
        ComparisonArguments(**options)


def test_the_memory_of_another_architecture_is_not_that_of_a_spiralformer(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neox"}', encoding="utf-8")
    words = ["cache_memory", "--config", str(tmp_path), "--plot", str(tmp_path / "plot.png")]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(ValueError, match="`config` must be that of a SpiralFormer, but got `model_type` 'gpt_neox'"):
        cache_memory.main()


def test_a_router_bias_has_routers_to_start(tmp_path):
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, num_hidden_layers=4)).save_pretrained(tmp_path / "source")
    split = "num_prelude_layers=1,num_core_layers=1,num_coda_layers=1"
    for options in (f"{split},topology=anchor", f"{split},topology=hyper_connections", "chunk_sizes=[]"):
        arguments = convert.ConversionArguments(
            str(tmp_path / "source"), str(tmp_path / "out"), config_overrides=options, router_bias=3.0
        )
        with pytest.raises(ValueError, match="`router_bias` must be left out of a model without routers of MeSH"):
            convert.main(arguments)
    assert not (tmp_path / "out").exists()


def test_a_report_of_lines_that_are_not_there_is_refused(tmp_path):
    arguments = report.ReportArguments(experiments=[PLAN], runs=str(tmp_path / "no.jsonl"), output_dir=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="`runs` must be an existing file, but got '.*no.jsonl'"):
        report.main(arguments)
    (tmp_path / "no.jsonl").write_text("[]\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"no.jsonl, line 1, must be a JSON object as it was written: it is '\[\]'"):
        report.main(arguments)


def test_figures_that_are_not_finite_stand_in_a_card(tmp_path):
    """With a data set the finite ones are metadata, which holds numbers alone."""
    (tmp_path / "eval_results.json").write_text(
        '{"eval_loss": null, "eval_bytes": 12, "epoch": 1.0}', encoding="utf-8"
    )
    evaluation = read_evaluation(tmp_path)
    assert evaluation == {"Loss": "not finite", "Bytes": 12}
    card = make_card(small_model(), "me/x", dataset="me/texts", evaluation=evaluation | {"Perplexity": math.nan})
    assert [result.metric_name for result in card.data.eval_results] == ["Bytes"]
    assert "| Loss | not finite |" in card.content


# -- platforms --------------------------------------------------------------------------------------------------


def without_encoding(path: Path) -> list[int]:
    """Lines of a file where text is read or written in the encoding of the platform."""
    calls = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
    found = []
    for call in calls:
        words = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        function, values = ast.unparse(call.func), {ast.unparse(value) for value in call.args}
        reads = (
            function == "open" and not values & {"'rb'", "'ab'"} or function.endswith((".read_text", ".write_text"))
        )
        if (reads or words.get("text") == "True") and "encoding" not in words:
            found.append(call.lineno)
    return found


FOLDERS_OF_CODE = ("scripts", "examples", "modeling_spiralformer")


@pytest.mark.parametrize("path", [path for name in FOLDERS_OF_CODE for path in (ROOT / name).rglob("*.py")], ids=str)
def test_text_is_read_and_written_in_utf8_on_every_platform(path):
    assert without_encoding(path) == []


def test_a_text_without_an_encoding_is_found(tmp_path):
    lines = ["open(a)", "open(a, 'rb')", "p.read_text()", "p.write_text(x, encoding='utf-8')", "run(c, text=True)"]
    (tmp_path / "code.py").write_text("\n".join([*lines, "read_text('a', b)", "open(a, 'w')"]), encoding="utf-8")
    assert without_encoding(tmp_path / "code.py") == [1, 3, 5, 7]


@pytest.mark.processes
@pytest.mark.parametrize("example", ["finetune", "lora"])
def test_the_examples_read_utf8_where_the_platform_has_ascii(example, tmp_path):
    model = small_model(dtype=torch.float32, vocab_size=4096)
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("café naïve Ω ✓ " * 4 + "\n", encoding="utf-8")
    words = ["--model", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"), "--max_steps", "1"]
    command = [sys.executable, str(ROOT / "examples" / f"{example}.py"), *words, "--output_dir", str(tmp_path / "out")]
    ascii_platform = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run(command, tmp_path, **ascii_platform)


def test_the_runner_and_the_benchmark_start_on_windows(monkeypatch):
    """There is no fcntl there, and no load of the machine."""
    monkeypatch.delattr("os.getloadavg")
    assert machine(torch.device("cpu"))["load"] is None
    code = "import sys; sys.modules['fcntl'] = None; import experiment"
    run([sys.executable, "-c", code], ROOT, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'scripts'}")


def test_figures_are_measured_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine(torch.device("cpu"))["commit"] == "unknown"
