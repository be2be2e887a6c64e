"""What is damaged: a small checkpoint in one file and in shards, a stopped run, lines of runs; and what reads them.

Every load gives all that its files decide, so that two loads can be compared: weights, logits and new tokens bit for
bit, settings, tokens, losses of the run that goes on.
"""

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as library_logging

from modeling_spiralformer import SpiralFormerForCausalLM
from modeling_spiralformer.files_spiralformer import DIGESTS_NAME, write_digests
from workshop.checkpoints import CHECKPOINT_FILES, load_config, load_model, load_tokenizer
from workshop.conversion import load_source
from workshop.corpus import standard_library_root
from workshop.evaluation import load
from workshop.experiments.results import check_line
from workshop.experiments.store import append_line, drop_torn_line, read_lines
from workshop.files import ROOT
from workshop.hub import load_checkpoint
from workshop.resuming import compared_fields
from workshop.serving import ServedModel
from workshop.tokenizers import SMALLEST_VOCABULARY, save_tokenizer, train_tokenizer
from workshop.training import build_model, run
from workshop.training_arguments import parse_arguments

VOCABULARY = SMALLEST_VOCABULARY + 20
LENGTH = 32
STOPPED_AT, STEPS = 2, 4
SIZES = f"vocab_size={VOCABULARY},hidden_size=32,intermediate_size=48,num_attention_heads=2,max_position_embeddings=64"
# Dropout draws random numbers in every step; weights this large make every one of them show.
MODEL = f"{SIZES},num_prelude_layers=1,num_core_layers=1,num_coda_layers=1,chunk_sizes=[4,1],initializer_range=0.15"
MODEL += ",hidden_dropout=0.1"
TEXT = "def add(a, b):\n    return a + b  # \u00e9\u4e2d"

Load = Callable[[Path], Any]

# -- what is damaged ------------------------------------------------------------------------------------------------


def words_of_run(folder: Path, output: Path, **changes: str) -> list[str]:
    """The command line of the short run, in the folder that holds its text and tokenizer."""
    settings = {"config_overrides": MODEL, "tokenizer_name": str(folder / "tokenizer"), "block_size": str(LENGTH)}
    settings |= {"train_file": str(folder / "text.txt"), "per_device_train_batch_size": "2", "learning_rate": "1e-2"}
    settings |= {"max_train_samples": "16", "max_steps": str(STEPS), "save_steps": str(STOPPED_AT)}
    settings |= {"logging_steps": "1", "do_eval": "False", "report_to": "none", "disable_tqdm": "True"}
    settings |= {"dataloader_pin_memory": "False", "output_dir": str(output)} | changes
    return [word for name, value in settings.items() for word in (f"--{name}", value)]


def make_text(folder: Path) -> None:
    """Writes text.txt, and a tokenizer of it: what a run needs."""
    text = (standard_library_root() / "textwrap.py").read_text(encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(text, encoding="utf-8")
    save_tokenizer(train_tokenizer([text], VOCABULARY), folder / "tokenizer", 64)


def quiet() -> None:
    """In a process of its own: a load of thousands is not to say what it does, nor libraries what they find wrong."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(nowhere, stream.fileno())
    library_logging.set_verbosity(library_logging.CRITICAL)
    library_logging.disable_progress_bar()
    logging.disable(logging.ERROR)


def build(folder: Path, digests: bool = True) -> None:
    """Makes what is damaged: the folders `one`, `shards` and `run`, with SHA256SUMS or without, and `runs.jsonl`."""
    quiet()
    make_text(folder)
    trainer = run(*parse_arguments(words_of_run(folder, folder / "trained")))
    model, tokenizer = trainer.model, trainer.processing_class
    model.generation_config.update(do_sample=True, temperature=0.7, top_k=9)
    for name, size in (("one", "5GB"), ("shards", "20KB")):
        model.save_pretrained(folder / name, max_shard_size=size)
        tokenizer.save_pretrained(folder / name)
        write_digests(folder / name, CHECKPOINT_FILES)
    (folder / "trained" / f"checkpoint-{STOPPED_AT}").rename(folder / "run")
    for line in read_lines(ROOT / "docs" / "results" / "runs.jsonl")[:4]:
        append_line(folder / "runs.jsonl", line)
    if not digests:
        for path in folder.glob(f"*/{DIGESTS_NAME}"):
            path.unlink()


# -- what reads them ------------------------------------------------------------------------------------------------


def sha(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(tensor.detach().float().numpy().tobytes() for tensor in tensors)).hexdigest()


def seen_of_model(model: PreTrainedModel) -> dict:
    """Everything that weights, configuration and generation configuration decide."""
    ids = torch.arange(2 * 13).reshape(2, 13) * 7 % VOCABULARY
    model.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        # Nothing can be drawn from weights that are broken.
        tokens = (
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6)
            if logits.isfinite().all()
            else ids
        )
    state = model.state_dict()
    return {
        "weights": sha(*(state[name] for name in sorted(state))),
        "names": sorted(state),
        "logits": sha(logits),
        "tokens": tokens.tolist(),
        "generation": model.generation_config.to_diff_dict(),
        **seen_of_config(model.config),
    }


def seen_of_config(config: PreTrainedConfig) -> dict:
    named = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache")}
    return {"config": compared_fields(config) | named | {"dtype": str(config.dtype)}}


def seen_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict:
    """Everything that a tokenizer decides."""
    batch = tokenizer([TEXT, "x = 1"], padding=True, truncation=True)
    return {
        "ids": batch["input_ids"],
        "mask": batch["attention_mask"],
        "text": tokenizer.decode(batch["input_ids"][0]),
        "vocabulary": tokenizer.get_vocab(),
        "backend": json.loads(tokenizer.backend_tokenizer.to_str()),
        "settings": [tokenizer.special_tokens_map, tokenizer.model_max_length, tokenizer.padding_side],
        "more": [tokenizer.truncation_side, tokenizer.chat_template, tokenizer.clean_up_tokenization_spaces],
    }


def seen(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict:
    return seen_of_model(model) | seen_of_tokenizer(tokenizer)


def probed(path: Path) -> dict:
    """As `scripts/probe.py` and `scripts/quickstart.py` load it."""
    config = load_config(str(path), field="model")
    return seen(load_model(str(path), config), load_tokenizer(str(path), config, field="model"))


def pushed(path: Path) -> dict:
    model = load_checkpoint(str(path))
    return seen(model, load_tokenizer(str(path), model.config, field="checkpoint"))


def trained_on(path: Path) -> dict:
    """As `scripts/train.py` loads what `model_name_or_path` names."""
    output = path.parent / "output"
    model, _, training = parse_arguments(
        ["--model_name_or_path", str(path), "--output_dir", str(output), "--report_to", "none"]
    )
    return seen(*build_model(model, training))


def resumed(path: Path, home: Path) -> dict:
    """As `scripts/train.py` goes on from a checkpoint."""
    words = words_of_run(home, path.parent / "output", resume_from_checkpoint=str(path), save_strategy="no")
    trainer = run(*parse_arguments(words))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    state = trainer.model.state_dict()
    return {"losses": losses, "weights": sha(*(state[name] for name in sorted(state)))}


def run_lines(path: Path) -> dict:
    """As `scripts/experiment.py` and `scripts/report.py` read the finished runs, by their key."""
    drop_torn_line(path)
    lines = read_lines(path)
    for line in lines:
        check_line(line)
    return {line["key"]: line for line in lines}


MODEL_LOADS: dict[str, Load] = {
    "from_pretrained": lambda path: seen_of_model(SpiralFormerForCausalLM.from_pretrained(path)),
    "AutoModelForCausalLM": lambda path: seen_of_model(AutoModelForCausalLM.from_pretrained(path)),
    "serve": lambda path: seen_of_model(ServedModel.from_pretrained(str(path))),
}
# These read the tokenizer too.
CHECKPOINT_LOADS: dict[str, Load] = {
    "evaluate_model": lambda path: seen(*load(str(path), str(path))),
    "probe": probed,
    "push": pushed,
    "convert": lambda path: seen(*load_source(str(path), to="gpt_neox")),
    "train": trained_on,
}


def loads_of(subject: str, file: str, home: Path) -> dict[str, Load]:
    """Name -> what reads a file of a subject."""
    if subject == "run":
        return {"train, resuming": partial(resumed, home=home)}
    if subject == "runs.jsonl":
        return {"experiment, report": run_lines}
    return CHECKPOINT_LOADS | ({} if file.startswith("tokenizer") else MODEL_LOADS)
