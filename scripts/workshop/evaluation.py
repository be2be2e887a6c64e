"""Sliding-window perplexity of texts, LAMBADA through lm-evaluation-harness, and the table of both."""

from pathlib import Path

import evaluate
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workshop.checkpoints import load_config, load_model, load_tokenizer
from workshop.data import load_file
from workshop.files import ROOT
from workshop.tables import plain_table

METRIC = ROOT / "scripts" / "metrics" / "sliding_window_perplexity"
TASKS = ROOT / "scripts" / "tasks"
LARGEST_DEFAULT_WINDOW = 1024
COLUMNS = ("data", "size", "perplexity", "bits per byte", "accuracy")


def choose_window(window: int | None, longest: int) -> int:
    """Tokens per window; a model is not asked about positions that it does not claim."""
    if window is None:
        return min(LARGEST_DEFAULT_WINDOW, longest)
    if not 1 <= window <= longest:
        raise ValueError(f"`window` must be in [1, max_position_embeddings = {longest}], but got {window}.")
    return window


def load(model_name_or_path: str, tokenizer_name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32, on the accelerator where there is one, and its tokenizer."""
    config = load_config(model_name_or_path)
    tokenizer = load_tokenizer(tokenizer_name, config)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    model = load_model(model_name_or_path, config).to(accelerator or "cpu")
    return model.eval(), tokenizer


def load_by_name(folders: list[str]) -> dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
    """Models and tokenizers by the name of their folder. Raises ValueError, naming `models`, where two have one."""
    names = [Path(folder).resolve().name for folder in folders]
    if len(set(names)) < len(names):
        raise ValueError(f"`models` must be folders of different names, but got {', '.join(folders)}.")
    return {name: load(folder, folder) for name, folder in zip(names, folders, strict=True)}


def evaluate_text(
    path: str, model, tokenizer, window: int | None, stride: int | None, batch_size: int, limit: int | None
) -> dict:
    """Sliding-window figures of the documents of one file, the first `limit` of them."""
    texts = load_file("text_files", path)
    if limit is not None:
        texts = texts.select(range(min(limit, len(texts))))
    metric = evaluate.load(str(METRIC))
    return metric.compute(
        predictions=list(texts["text"]),
        model=model,
        tokenizer=tokenizer,
        window=choose_window(window, model.config.max_position_embeddings),
        stride=stride,
        batch_size=batch_size,
    )


def evaluate_lambada(folder: str, model, tokenizer, batch_size: int, limit: int | None) -> dict:
    """Accuracy (is the last word the most likely continuation, token by token?) and perplexity of the last word."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    tasks = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"lambada_folder": folder})
    results = simple_evaluate(
        harness,
        tasks=["lambada_local"],
        task_manager=tasks,
        limit=limit,
        bootstrap_iters=0,  # a hundred thousand resamplings for one error bar
    )
    figures = results["results"]["lambada_local"]
    return {
        "perplexity": figures["perplexity,none"],
        "accuracy": figures["acc,none"],
        "passages": results["n-samples"]["lambada_local"]["effective"],
    }


def format_table(figures: dict[str, dict]) -> str:
    """One row a file, and one for LAMBADA; a dash where a figure does not exist."""
    rows = [COLUMNS]
    for name, values in figures.items():
        size = f"{values['tokens']} tokens" if "tokens" in values else f"{values['passages']} passages"
        measured = [(values.get(key.replace(" ", "_")), key) for key in COLUMNS[2:]]
        rows.append((name, size, *("-" if value is None else f"{value:.4g}" for value, _ in measured)))
    return plain_table(rows)
