"""Evaluation: windows and lm-evaluation-harness against counts by hand, the script, and the commands of the page."""

import json
import math
import shlex
import socket
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from documents import ROOT, commands, run
from hypothesis import given
from hypothesis import strategies as st
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from support import small_config, small_model
from transformers import AutoTokenizer

import evaluate_model
from modeling_spiralformer import SpiralFormerForCausalLM
from workshop.data import token_byte_lengths
from workshop.evaluation import choose_window

METRIC = str(ROOT / "scripts" / "metrics" / "sliding_window_perplexity")
TEXTS = ["def add(a, b):\n    return a + b\n\nclass Tree:\n    pass", "é", "# <|eos|> is no token here\nimport os"]
PASSAGES = [
    "He put the old key in his coat and went home, and at the door he could not find the key",
    "She read the letter twice, and he asked her what was in the letter",
    "They sailed for nine days before anybody on the ship saw any land",
    "The dog ran into the garden, so we had to look for the dog",
    "I never liked that song, but my brother plays nothing else than that song",
    "Nobody told the baker that the queen herself had ordered this bread",
    "It was cold; we lit a fire\nand for an hour nobody spoke, we looked at the fire",
]
LEARNT = 4  # passages that the trained model has seen; of the others it does not know the last word


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "tokenization")


@pytest.fixture(scope="module")
def model():
    """float64, weights of std 0.15."""
    return small_model(vocab_size=4096)


@pytest.fixture(scope="module")
def metric():
    return evaluate.load(METRIC)


@pytest.fixture(scope="module")
def lambada(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lambada")
    lines = [json.dumps({"text": text}) for text in PASSAGES]
    (folder / "lambada_test.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer) -> Path:
    """A saved model, with its code beside it, that has learnt some of the passages by heart."""
    torch.manual_seed(0)
    config = small_config(vocab_size=4096, hidden_size=32, intermediate_size=64, max_position_embeddings=128)
    model = SpiralFormerForCausalLM(config).train()
    batch = tokenizer(PASSAGES[:LEARNT], padding=True, padding_side="right", return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(**batch, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def next_token_scores(model, ids: list[int]) -> torch.Tensor:
    """Log-probabilities `(vocab_size,)` of the token after `ids`, from one text alone without padding."""
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0, -1].double().log_softmax(-1)


def plain_ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def loss_by_hand(model, tokenizer, texts: list[str], window: int, stride: int) -> tuple[float, int, int]:
    """Summed loss, tokens and bytes: one forward for each token, on what the first window with its target shows."""
    total, count, bytes_count = 0.0, 0, 0
    lengths = token_byte_lengths(tokenizer)
    for text in texts:
        ids = [tokenizer.eos_token_id, *plain_ids(tokenizer, text)]
        for target in range(1, len(ids)):
            begin = max(0, math.ceil((target - window) / stride)) * stride
            total -= float(next_token_scores(model, ids[begin:target])[ids[target]])
            count += 1
            bytes_count += int(lengths[ids[target]])
    return total, count, bytes_count


# -- sliding windows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "window, stride",
    [
        pytest.param(512, 256, id="text shorter than the window"),
        pytest.param(8, 8, id="stride = window"),
        pytest.param(7, 3, id="stride does not divide the window"),
        pytest.param(6, 1, id="one token at a time"),
        pytest.param(1, 1, id="window of one token"),
    ],
)
def test_windows_are_a_count_by_hand(model, tokenizer, metric, window, stride):
    options = {"model": model, "tokenizer": tokenizer, "window": window, "stride": stride}
    total, tokens, size = loss_by_hand(model, tokenizer, TEXTS, window, stride)
    assert size == sum(len(text.encode()) for text in TEXTS)
    for batch_size in (1, 7):
        figures = metric.compute(predictions=TEXTS, batch_size=batch_size, **options)
        assert (figures["tokens"], figures["bytes"]) == (tokens, size)
        assert figures["loss"] == pytest.approx(total / tokens, rel=1e-9)
        assert figures["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-9)
        assert figures["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-9)


@given(length=st.integers(0, 60), window=st.integers(1, 20), data=st.data())
def test_every_token_is_scored_exactly_once(metric, length, window, data):
    stride = data.draw(st.integers(1, window))
    scored = []
    for number, (begin, end, count) in enumerate(
        sys.modules[type(metric).__module__].make_windows(length, window, stride)
    ):
        assert begin == number * stride and 1 <= count <= end - begin <= window
        assert number == 0 or count <= stride
        scored += range(end - count + 1, end + 1)
    assert scored == list(range(1, length + 1))


def test_the_default_stride_is_half_of_the_window(model, tokenizer, metric):
    options = {"predictions": TEXTS, "model": model, "tokenizer": tokenizer}
    assert metric.compute(window=6, **options) == metric.compute(window=6, stride=3, **options)
    assert metric.compute(window=6, **options) != metric.compute(window=6, stride=6, **options)


def test_the_start_token_is_the_end_of_sequence_or_the_given_one(model, tokenizer, metric):
    options = {"predictions": ["x"], "model": model, "tokenizer": tokenizer, "window": 4}
    for start in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        loss = -float(next_token_scores(model, [start])[plain_ids(tokenizer, "x")[0]])
        assert metric.compute(start_token_id=start, **options)["loss"] == pytest.approx(loss, rel=1e-9)
    assert metric.compute(**options) == metric.compute(start_token_id=tokenizer.eos_token_id, **options)


def test_a_model_in_training_mode_is_scored_without_dropout_and_put_back(tokenizer, metric):
    model = small_model(vocab_size=4096, hidden_dropout=0.5)
    options = {"predictions": TEXTS, "tokenizer": tokenizer, "window": 8, "model": model}
    expected = metric.compute(**options)
    model.train()
    assert metric.compute(**options) == expected and model.training


@pytest.mark.parametrize(
    "options, message",
    [
        ({"window": 0}, r"`window` must be an integer >= 1, but got 0"),
        ({"window": 4, "stride": 5}, r"`stride` must be an integer in \[1, 4\], but got 5"),
        ({"window": 4, "stride": 0}, r"`stride` must be an integer in \[1, 4\], but got 0"),
        ({"window": 4, "batch_size": 0}, r"`batch_size` must be an integer >= 1, but got 0"),
        ({"window": 4, "predictions": ["", ""]}, r"`predictions` must hold text"),
    ],
)
def test_bad_windows_are_refused(model, tokenizer, metric, options, message):
    with pytest.raises(ValueError, match=message):
        metric.compute(**{"predictions": TEXTS, "model": model, "tokenizer": tokenizer, **options})


def test_a_tokenizer_without_end_of_sequence_needs_a_start_token(model, metric):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tokenization", eos_token=None)
    with pytest.raises(ValueError, match="`start_token_id` must be given"):
        metric.compute(predictions=TEXTS, model=model, tokenizer=tokenizer, window=4)


def test_the_metric_loads_without_a_network(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("something asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert evaluate.load(METRIC).name == "sliding_window_perplexity"


# -- lm-evaluation-harness --------------------------------------------------------------------------------------------


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, argument, index) for index, argument in enumerate(arguments)]


def likelihood_by_hand(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Summed log-probability of a continuation, and whether it is the greedy one."""
    total, greedy = 0.0, True
    for index, token in enumerate(continuation):
        scores = next_token_scores(model, context + continuation[:index])
        total += float(scores[token])
        greedy &= int(scores.argmax()) == token
    return total, greedy


def test_loglikelihoods_are_a_count_by_hand(model, tokenizer):
    # A text split at two places would share one forward in the harness, and its scores be wrong with any model.
    pairs = [(text[:cut], f"{text[cut:]} {cut}") for text in PASSAGES for cut in (3, 14, 31)] + [("", "class A")]
    greedy_context = plain_ids(tokenizer, "import")
    greedy_id = int(next_token_scores(model, greedy_context).argmax())
    pairs.append(("import", tokenizer.decode([greedy_id])))
    expected = []
    for context, continuation in pairs:
        whole, start = plain_ids(tokenizer, context + continuation), plain_ids(tokenizer, context.rstrip())
        # As in the harness: the context's last spaces go to the continuation, and no context is one start token.
        if not context:
            whole, start = [tokenizer.bos_token_id, *whole], [tokenizer.bos_token_id]
        expected.append(likelihood_by_hand(model, start, whole[len(start) :]))
    assert {greedy for _, greedy in expected} == {True, False}
    for batch_size in (1, 7):
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found = harness.loglikelihood(requests("loglikelihood", pairs))
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        assert np.allclose([score for score, _ in found], [score for score, _ in expected], rtol=1e-9, atol=0)


def test_rolling_loglikelihoods_are_a_count_by_hand(model, tokenizer):
    texts = [" ".join(PASSAGES[:3]), *PASSAGES[3:]]
    longest = 12
    expected = []
    for text in texts:
        ids = [tokenizer.bos_token_id, *plain_ids(tokenizer, text)]
        total = 0.0
        for target in range(1, len(ids)):
            # Windows of the harness do not overlap; the last one reaches back to be full.
            number, last = (target - 1) // longest, (len(ids) - 2) // longest
            begin = max(0, len(ids) - 1 - longest) if number == last else number * longest
            total += float(next_token_scores(model, ids[begin:target])[ids[target]])
        expected.append(total)
    for batch_size in (1, 7):
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=longest)
        found = harness.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in texts]))
        assert np.allclose(found, expected, rtol=1e-9, atol=0)


def test_generation_tasks_give_the_greedy_text_in_padded_batches(tokenizer):
    model = small_model(5, vocab_size=4096, hidden_size=32)
    contexts = [text[: 5 + 9 * index] for index, text in enumerate(PASSAGES)]
    expected = []
    for context in contexts:
        ids = plain_ids(tokenizer, context)
        for _ in range(9):
            ids.append(int(next_token_scores(model, ids).argmax()))
        expected.append(tokenizer.decode(ids[-9:], skip_special_tokens=True))
    assert len(set(expected)) == len(expected)
    for batch_size in (1, 7):
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        until = {"until": ["no such text"], "max_gen_toks": 9}
        found = harness.generate_until(requests("generate_until", [(context, until) for context in contexts]))
        assert found == expected


def run_lambada(model, tokenizer, folder: Path | None, **options) -> dict:
    tasks = TaskManager(
        include_path=str(ROOT / "scripts" / "tasks"),
        include_defaults=False,
        metadata={} if folder is None else {"lambada_folder": str(folder)},
    )
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)
    results = simple_evaluate(harness, tasks=["lambada_local"], task_manager=tasks, bootstrap_iters=0, **options)
    return results["results"]["lambada_local"]


def lambada_by_hand(model, tokenizer, passages: list[str]) -> tuple[float, float]:
    """Accuracy and perplexity of the last words."""
    found = []
    for text in passages:
        words, last = text.rsplit(" ", 1)
        context = plain_ids(tokenizer, words)
        found.append(likelihood_by_hand(model, context, plain_ids(tokenizer, text)[len(context) :]))
    return np.mean([greedy for _, greedy in found]), math.exp(-np.mean([score for score, _ in found]))


def test_lambada_is_a_count_by_hand(checkpoint, lambada, tokenizer):
    model = SpiralFormerForCausalLM.from_pretrained(checkpoint).double()
    accuracy, perplexity = lambada_by_hand(model, tokenizer, PASSAGES)
    assert LEARNT / len(PASSAGES) <= accuracy < 1
    found = run_lambada(model, tokenizer, lambada)
    assert found["acc,none"] == pytest.approx(accuracy)
    assert found["perplexity,none"] == pytest.approx(perplexity, rel=1e-9)
    found = run_lambada(model, tokenizer, lambada, limit=2)
    assert found["perplexity,none"] == pytest.approx(lambada_by_hand(model, tokenizer, PASSAGES[:2])[1], rel=1e-9)


@pytest.mark.parametrize(
    "lines, error, message",
    [
        (None, FileNotFoundError, "`lambada_folder` must be a folder with lambada_test.jsonl"),
        ('{"passage"', ValueError, "lambada_test.jsonl must hold JSON in UTF-8, a passage a line"),
        ('{"passage": "a b"}', ValueError, "must have a field `text`"),
        ('{"text": "a b"}\n{"text": "word"}', ValueError, "passage 2 must have two words or more, but got 'word'"),
    ],
)
def test_a_bad_lambada_folder_is_refused(model, tokenizer, tmp_path, lines, error, message):
    if lines is not None:
        (tmp_path / "lambada_test.jsonl").write_text(lines)
    with pytest.raises(error, match=message):
        run_lambada(model, tokenizer, tmp_path)


def test_lambada_without_a_folder_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="`lambada_folder` must name the folder"):
        run_lambada(model, tokenizer, None)


# -- the script -------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path) -> list[str]:
    """A .txt file and a .jsonl file of three documents."""
    (tmp_path / "one.txt").write_text(PASSAGES[0])
    (tmp_path / "three.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in PASSAGES[1:4]))
    return [str(tmp_path / "one.txt"), str(tmp_path / "three.jsonl")]


def evaluate_files(checkpoint, *options: str) -> dict:
    return evaluate_model.main(["--model_name_or_path", str(checkpoint), *options])


def test_the_table_and_the_json_file_hold_the_figures(checkpoint, lambada, tokenizer, files, tmp_path, capsys):
    output = tmp_path / "new folder" / "figures.json"
    figures = evaluate_files(
        checkpoint,
        *("--text_files", *files, "--window", "8", "--stride", "3", "--batch_size", "2"),
        *("--lambada_folder", str(lambada), "--output_file", str(output)),
    )
    assert json.loads(output.read_text()) == figures and list(figures) == [*files, "LAMBADA"]
    model = SpiralFormerForCausalLM.from_pretrained(checkpoint)
    for path, texts in zip(files, (PASSAGES[:1], PASSAGES[1:4]), strict=True):
        total, tokens, size = loss_by_hand(model, tokenizer, texts, window=8, stride=3)
        assert figures[path]["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)
        assert figures[path]["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-4)
    accuracy, perplexity = lambada_by_hand(model, tokenizer, PASSAGES)
    assert figures["LAMBADA"]["accuracy"] == pytest.approx(accuracy)
    assert figures["LAMBADA"]["perplexity"] == pytest.approx(perplexity, rel=1e-4)
    title, *rows = (line.split() for line in capsys.readouterr().out.splitlines()[-4:])
    assert title == ["data", "size", "perplexity", "bits", "per", "byte", "accuracy"]
    assert [row[0] for row in rows] == [*files, "LAMBADA"]
    for (name, *cells), values in zip(rows, figures.values(), strict=True):
        shown = [values.get(key) for key in ("perplexity", "bits_per_byte", "accuracy")]
        assert cells[2:] == ["-" if value is None else f"{value:.4g}" for value in shown], name
    assert rows[2][1:3] == [str(len(PASSAGES)), "passages"]


def test_limit_takes_the_first_documents_and_passages(checkpoint, lambada, files):
    options = ("--text_files", files[1], "--lambada_folder", str(lambada), "--window", "16")
    figures, fewer = evaluate_files(checkpoint, *options), evaluate_files(checkpoint, *options, "--limit", "2")
    assert fewer[files[1]]["bytes"] == sum(len(text.encode()) for text in PASSAGES[1:3]) < figures[files[1]]["bytes"]
    assert (fewer["LAMBADA"]["passages"], figures["LAMBADA"]["passages"]) == (2, len(PASSAGES))


def test_the_default_window_is_what_the_model_claims(checkpoint, files, metric):
    assert choose_window(None, 128) == 128 and choose_window(None, 4096) == 1024
    given = ("--text_files", files[0], "--window", "128", "--stride", "64", "--batch_size", "8")
    assert evaluate_files(checkpoint, *given) == evaluate_files(checkpoint, "--text_files", files[0])


def test_a_tokenizer_of_ones_own_is_used(checkpoint, files, tmp_path, tokenizer):
    other = AutoTokenizer.from_pretrained(checkpoint)
    other.backend_tokenizer.model.dropout = 1.0  # no merges: one token a byte
    other.save_pretrained(tmp_path / "bytes")
    figures = evaluate_files(checkpoint, "--text_files", files[0], "--tokenizer_name", str(tmp_path / "bytes"))
    assert figures[files[0]]["tokens"] == len(PASSAGES[0]) > len(plain_ids(tokenizer, PASSAGES[0]))


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "`text_files` or `lambada_folder` must be given"),
        (
            ["--text_files", "a.txt", "--window", "129"],
            r"`window` must be in \[1, max_position_embeddings = 128\], but",
        ),
        (["--text_files", "a.txt", "--limit", "0"], "`limit` must be an integer >= 1, but got 0"),
        (["--text_files", "a.txt", "--batch_size", "0"], "`batch_size` must be an integer >= 1, but got 0"),
        (["--text_files", "a.csv"], "`text_files` must have a column `text`"),
        (["--text_files", "a.pdf"], "`text_files` must end in one of"),
    ],
)
def test_bad_settings_are_refused(checkpoint, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("some text")
    Path("a.csv").write_text("column\nvalue\n")
    with pytest.raises(ValueError, match=message):
        evaluate_files(checkpoint, *options)


# -- the page's commands ----------------------------------------------------------------------------------------------

SCRIPT, HARNESS = commands("docs/evaluation.md")


@pytest.fixture
def prepared(workplace, checkpoint, lambada) -> Path:
    """The folder of the page's commands: a saved model, a text, a folder with LAMBADA."""
    (workplace / "my_model").symlink_to(checkpoint)
    (workplace / "lambada").symlink_to(lambada)
    return workplace


def test_the_script_runs_as_the_page_says(prepared):
    words = shlex.split(SCRIPT)
    assert words[:2] == ["python", "scripts/evaluate_model.py"]
    printed = run([sys.executable, *words[1:]], prepared)
    assert [line.split()[0] for line in printed.splitlines()[-3:]] == ["data", "text.txt", "LAMBADA"]
    assert json.loads((prepared / "figures.json").read_text())["text.txt"]["bits_per_byte"] > 0


@pytest.mark.processes
def test_the_harness_finds_a_saved_model_by_its_own_code(prepared, tokenizer):
    words = shlex.split(HARNESS)
    assert words[0] == "lm_eval"
    command = [str(Path(sys.executable).parent / "lm_eval"), *words[1:]]
    # Away from the package: what the harness runs is the code in the checkpoint.
    run(command, prepared, PYTHONPATH="", HF_HUB_OFFLINE="1", DISABLE_MULTIPROC="1")
    (results,) = (prepared / "runs").rglob("results_*.json")
    found = json.loads(results.read_text())["results"]["lambada_local"]
    model = SpiralFormerForCausalLM.from_pretrained(prepared / "my_model")
    accuracy, perplexity = lambada_by_hand(model, tokenizer, PASSAGES)
    assert found["acc,none"] == pytest.approx(accuracy)
    assert found["perplexity,none"] == pytest.approx(perplexity, rel=1e-4)
