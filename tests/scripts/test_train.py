"""The training script: it learns, resumes bit for bit, reads settings from anywhere, refuses what cannot work."""

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

import train
from workshop.checkpoints import load_config, parse_overrides
from workshop.corpus import read_corpus, standard_library_root
from workshop.data import token_byte_lengths
from workshop.training_arguments import parse_arguments

SMALL = "hidden_size=32,intermediate_size=64,num_attention_heads=2,num_prelude_layers=1,num_core_layers=1"
TOKENIZER = AutoTokenizer.from_pretrained("tokenization")


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    """A small real text: four modules of the standard library."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    names = ("textwrap.py", "string.py", "shlex.py", "heapq.py")
    path.write_text("".join((standard_library_root() / name).read_text(encoding="utf-8") for name in names))
    return path


def flags(text_file: Path, output_dir: Path, *more: str) -> list[str]:
    return [
        *("--train_file", str(text_file), "--output_dir", str(output_dir), "--config_overrides", SMALL),
        *(
            "--block_size",
            "64",
            "--per_device_train_batch_size",
            "8",
            "--learning_rate",
            "1e-2",
            "--report_to",
            "none",
        ),
        *("--logging_steps", "1", "--max_eval_samples", "8", "--disable_tqdm", "True", *more),
    ]


def losses_of(trainer) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def test_fifty_steps_beat_the_unigram_entropy(text_file, tmp_path):
    trainer = train.main(flags(text_file, tmp_path, "--max_steps", "50", "--save_strategy", "no"))
    ids = TOKENIZER.encode(text_file.read_text())
    entropy = -sum(n / len(ids) * math.log(n / len(ids)) for n in Counter(ids).values())
    losses = losses_of(trainer)
    assert losses[1] > entropy > losses[50], (losses[1], entropy, losses[50])

    evaluation = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert evaluation["eval_perplexity"] == pytest.approx(math.exp(evaluation["eval_loss"]), rel=1e-6)
    blocks = np.array(trainer.eval_dataset["input_ids"])[:, 1:]
    count = sum(len(TOKENIZER.decode([token]).encode()) for token in blocks.flatten() if token < 128 + 3)
    bits = evaluation["eval_loss"] * blocks.size / math.log(2) / evaluation["eval_bytes"]
    assert evaluation["eval_bits_per_byte"] == pytest.approx(bits) and evaluation["eval_bytes"] > count > 0
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)).__name__ == "SpiralFormerForCausalLM"
    assert (tmp_path / "model.safetensors").is_file() and AutoTokenizer.from_pretrained(tmp_path).vocab_size == 4096


def test_smoothed_labels_change_no_figure_of_an_evaluation(text_file, tmp_path):
    trainer = train.main(flags(text_file, tmp_path, "--max_steps", "20", "--label_smoothing_factor", "0.3"))
    metrics = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    blocks = torch.tensor(trainer.eval_dataset["input_ids"])
    with torch.no_grad():
        loss = trainer.model.eval()(blocks, labels=blocks).loss.item()
    assert metrics["eval_loss"] == pytest.approx(loss, abs=1e-5)
    bits = loss * blocks[:, 1:].numel() / math.log(2) / metrics["eval_bytes"]
    assert metrics["eval_bits_per_byte"] == pytest.approx(bits, abs=1e-5)


@pytest.mark.parametrize(
    "more", ["num_core_layers=1", "num_core_layers=1,share_core=false", "num_core_layers=0,chunk_sizes=[]"]
)
def test_the_operations_of_a_run_count_the_core_once_for_each_latent(more, text_file, tmp_path):
    overrides = ("--config_overrides", SMALL.replace("num_core_layers=1", more), "--do_eval", "False")
    trainer = train.main(flags(text_file, tmp_path, "--max_steps", "1", *overrides))
    model = trainer.model
    weights = {name: sum(w.numel() for w in part.parameters()) for name, part in model.model.named_children()}
    passes = 1 / 8 + 1 / 4 + 1 / 2 + 1
    core = weights["core"] * passes / (4 if "share" in more else 1)
    expected = core + sum(weights.values()) - weights["core"] - weights["embed_tokens"] + model.lm_head.weight.numel()
    assert trainer.state.total_flos == pytest.approx(6 * 8 * 64 * expected, rel=1e-9)


def test_bytes_of_every_token_add_up():
    lengths = token_byte_lengths(TOKENIZER)
    text = "def caf\u00e9(x):\n    return '\U0001f40d' * x  # \u4e2d\u6587\n"
    assert lengths[TOKENIZER.encode(text)].sum() == len(text.encode()) and lengths[TOKENIZER.eos_token_id] == 0


def test_ids_with_a_gap_between_them_have_bytes():
    gap = Tokenizer(models.BPE({"a": 0, "bc": 5}, []))
    gap.decoder = decoders.ByteLevel()
    assert token_byte_lengths(PreTrainedTokenizerFast(tokenizer_object=gap)).tolist() == [1, 0, 0, 0, 0, 2]


@pytest.mark.parametrize("kind", ["in Python", "with a space before a text"])
def test_bytes_that_cannot_be_counted_are_left_out(kind, text_file, tmp_path, caplog):
    tokenizer = ByT5Tokenizer()
    if kind != "in Python":
        tokenizer = AutoTokenizer.from_pretrained("tokenization")
        digits = pre_tokenizers.Digits()
        spaced = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=True)])
        tokenizer.backend_tokenizer.pre_tokenizer = spaced
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    more = ("--tokenizer_name", str(tmp_path / "tokenizer"), "--max_steps", "1", "--save_strategy", "no")
    trainer = train.main(flags(text_file, tmp_path / "run", *more))
    (evaluation,) = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert "eval_perplexity" in evaluation and "eval_bits_per_byte" not in evaluation
    assert "bits per byte is left out" in caplog.text


def test_a_resumed_run_is_the_uninterrupted_one(text_file, tmp_path):
    whole = train.main(flags(text_file, tmp_path / "whole", "--max_steps", "12", "--save_steps", "6"))
    resumed = train.main(
        flags(
            text_file,
            tmp_path / "resumed",
            *("--max_steps", "12", "--resume_from_checkpoint", str(tmp_path / "whole/checkpoint-6")),
        )
    )
    expected, found = losses_of(whole), losses_of(resumed)
    assert {step: found[step] for step in range(7, 13)} == {step: expected[step] for step in range(7, 13)}
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_settings_from_one_file(suffix, text_file, tmp_path):
    settings = {"train_file": str(text_file), "output_dir": str(tmp_path / "run"), "learning_rate": 0.001}
    settings |= {"config_overrides": "chunk_sizes=[4,2,1],topology=anchor"}
    path = tmp_path / f"settings.{suffix}"
    path.write_text(json.dumps(settings))  # JSON is YAML
    model, data, training = parse_arguments([str(path)])
    assert (data.train_file, training.learning_rate) == (str(text_file), 0.001)
    config = load_config(model.config_name, parse_overrides(model.config_overrides))
    assert config.chunk_sizes == [4, 2, 1] and config.topology == "anchor"
    path.write_text(json.dumps(settings | {"no_such_setting": 1}))
    with pytest.raises(ValueError, match="no_such_setting"):
        parse_arguments([str(path)])


def test_defaults_are_the_papers_optimiser():
    _, _, training = parse_arguments([])
    assert (training.adam_beta1, training.adam_beta2, training.weight_decay) == (0.9, 0.95, 0.01)
    assert training.lr_scheduler_kwargs == {"min_lr_rate": 0.1} and training.lr_scheduler_type == "cosine_with_min_lr"
    assert training.learning_rate == 6e-4 and training.warmup_steps == 0.01


def test_the_default_corpus_is_split_by_file():
    train_corpus, validation = read_corpus("train"), read_corpus("validation")
    assert not set(train_corpus.paths) & set(validation.paths)
    assert 0.01 < len(validation.paths) / len(train_corpus.paths) < 0.12
    assert not any("test" in path.split("/")[:-1] for path in train_corpus.paths)
    assert "textwrap.py" in train_corpus.paths + validation.paths


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--config_overrides", "vocab_size=100"), "vocab_size"),
        (("--config_overrides", "no_such_field=1"), "no_such_field"),
        (("--config_overrides", "chunk_sizes=[0]"), "chunk_sizes"),
        (("--block_size", "100000"), "block_size"),
        (("--train_file", "missing.txt"), "missing.txt"),
        (("--auto_find_batch_size", "True"), "`auto_find_batch_size` must be off, but got True"),
        (("--push_to_hub", "True", "--bf16_full_eval", "True"), "`bf16_full_eval` must be off with `push_to_hub`"),
        (("--push_to_hub", "True", "--fp16_full_eval", "True"), "`fp16_full_eval` must be off with `push_to_hub`"),
        (("--num_train_epochs", "0"), "`num_train_epochs` must be above 0, but got 0.0"),
        (
            ("--dataloader_drop_last", "True", "--max_train_samples", "7", "--max_steps", "1"),
            "`dataloader_drop_last` must be off .* with 7 rows for a batch of 8",
        ),
    ],
)
def test_what_cannot_work_is_refused(more, message, text_file, tmp_path):
    with pytest.raises((ValueError, OSError, StrictDataclassError), match=message):
        train.main(flags(text_file, tmp_path, *more))


def test_an_evaluation_reads_the_last_rows_too(text_file, tmp_path):
    """Where training drops those that fill no batch."""
    dropped = ("--dataloader_drop_last", "True", "--per_device_eval_batch_size", "5", "--max_steps", "1")
    trainer = train.main(flags(text_file, tmp_path, *dropped))
    lengths = token_byte_lengths(TOKENIZER)[np.array(trainer.eval_dataset["input_ids"])[:, 1:]]
    (evaluation,) = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(lengths) == 8 and evaluation["eval_bytes"] == lengths.sum()
    assert len(trainer.get_train_dataloader()) == len(trainer.train_dataset) // 8


def test_empty_text_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="empty"):
        train.main(flags(tmp_path / "empty.txt", tmp_path))


def test_damaged_checkpoints_are_refused(text_file, tmp_path):
    train.main(flags(text_file, tmp_path / "run", "--max_steps", "1", "--save_strategy", "no"))
    checkpoint = ("--model_name_or_path", str(tmp_path / "run"))
    weights = tmp_path / "run/model.safetensors"
    whole = weights.read_bytes()
    state = load_file(weights)
    save_file({name: weight for name, weight in state.items() if "norm" not in name}, weights, {"format": "pt"})
    continued = [flag for flag in flags(text_file, tmp_path / "next") if flag not in ("--config_overrides", SMALL)]
    with pytest.raises(ValueError, match="as its SHA256SUMS says, but model.safetensors has other content"):
        train.main([*continued, *checkpoint])
    (tmp_path / "run/SHA256SUMS").unlink()
    with pytest.raises(ValueError, match="lacks"):
        train.main([*continued, *checkpoint])
    weights.write_bytes(whole[:1000])
    with pytest.raises(ValueError, match="damaged"):
        train.main([*continued, *checkpoint])
    weights.unlink()
    with pytest.raises(OSError, match="model.safetensors"):
        train.main([*continued, *checkpoint])


def test_accelerate_launch(text_file, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "scripts/train.py"]
    arguments = flags(text_file, tmp_path, "--max_steps", "2", "--save_strategy", "no")
    subprocess.run([*launch, *arguments], check=True, capture_output=True, text=True)
    assert (tmp_path / "model.safetensors").is_file()
