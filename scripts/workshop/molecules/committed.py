"""
Models of molecules that the repository holds: what their folders hold, and what their cards say.

`figures.json` in such a folder has all that was measured; `check` in it is a smaller measure that a test repeats.
"""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import ModelCard
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME

from modeling_spiralformer.files_spiralformer import check_digests, write_digests
from workshop.checkpoints import CHECKPOINT_FILES
from workshop.files import write_json
from workshop.model_card import make_card
from workshop.molecules.judging import SAMPLE_CLASSES, judge, share
from workshop.molecules.passes import errors_by_pass
from workshop.molecules.rows import make_rows
from workshop.molecules.sampling import SAMPLING, sample
from workshop.molecules.tables import cell
from workshop.padded_rows import losses_of_rows
from workshop.resuming import read_state, saved_record

FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
CHECKED, SHOWN = 500, 5  # samples that the test draws, and those whose spelling it compares
SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "adam_beta2",
    "rows_per_step",
    "seed",
)


def check_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict:
    """What the test repeats: how many of CHECKED samples are valid, and the first of them."""
    samples = sample(model, tokenizer, CHECKED, seed=0, **SAMPLING)
    return {"count": CHECKED, "valid": judge(samples)["valid"], "first": samples[:SHOWN]}


def read_run(folder: Path) -> dict:
    """What a finished run of `train_molecules.py` was: its settings, its steps, and the digest of its rows.

    Raises ValueError for a folder that is none.
    """
    if not (folder / TRAINER_STATE_NAME).is_file():
        raise ValueError(
            f"`model` must be the folder of a finished run, but {str(folder)!r} lacks {TRAINER_STATE_NAME}."
        )
    check_digests(folder, [TRAINER_STATE_NAME])
    record, state = saved_record(folder), read_state(folder)
    settings = {name: record[name] for name in SETTINGS} | {"steps": state["global_step"]}
    return {"settings": settings, "training_rows": record["training text"]}


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, validation: list[str], count: int) -> dict:
    """What the model is worth: loss on validation molecules; what becomes of samples, whole and after each pass."""
    options = {"seed": 0, **SAMPLING}
    passes = errors_by_pass(model, tokenizer, [], None, count=max(1, count // 5), **options)
    rows = make_rows(validation, tokenizer, model.config.max_position_embeddings)
    losses, tokens = losses_of_rows(model, tokenizer, rows).sum(axis=0).tolist()
    return {
        "validation": {"molecules": len(rows), "tokens": int(tokens), "nats_per_token": losses / tokens},
        "samples": judge(sample(model, tokenizer, count, **options)),
        "passes": list(passes),
        "check": check_of(model, tokenizer),
        "torch": torch.__version__.split("+")[0],
    }


def write_folder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, figures: dict, folder: Path, repo_id: str
) -> None:
    """Weights, configuration and tokenizer without the code, which the package holds; figures and card."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        tokenizer.save_pretrained(saved)
        for name in FILES:
            shutil.copyfile(Path(saved) / name, folder / name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("auto_map", None)  # where code is that this folder does not hold
    write_json(folder / "config.json", config, indent=2)
    write_digests(folder, CHECKPOINT_FILES)
    write_json(folder / "figures.json", figures, indent=1)
    card_of(model, tokenizer, figures, repo_id).save(folder / "README.md")


def card_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, figures: dict, repo_id: str) -> ModelCard:
    """The card of a model: where it came from, and its figures."""
    validation, samples, total = figures["validation"], figures["samples"], figures["samples"]["count"]
    parts = {kind: cell(share(samples[kind], total), percent=True) for kind in SAMPLE_CLASSES}
    evaluation = {
        f"nats per token, {validation['molecules']} validation molecules": f"{validation['nats_per_token']:.4f}",
        f"valid, of {total} samples (95% interval)": "{} ({})".format(*parts["valid"]),
        "different, of the valid ones": cell(share(samples["unique"], samples["valid"]), percent=True)[0],
    }
    evaluation |= {f"{kind} errors": parts[kind][0] for kind in SAMPLE_CLASSES[1:]}
    settings = figures["settings"] | {"command": f"`{figures['command']}`", "commit": figures["commit"]}
    return make_card(
        model,
        repo_id,
        license=figures["license"],
        training_data=f"{figures['training_data']}: {figures['training_rows']}.",
        evaluation=evaluation,
        evaluated_on="molecules held out of the training data, and on samples that the model drew",
        settings=settings,
        with_code=False,
        tokenizer=tokenizer,
        sampling=SAMPLING,
    )
