"""Views of one model beside each other: what they cost, how well they predict, and how well they draft."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from workshop.costs import layer_equivalents
from workshop.generation import drafting, time_assisted, time_generate
from workshop.tables import config_schedule, markdown_table

COLUMNS = (
    "schedule",
    "layer-equivalents",
    "bits per byte",
    "tokens/s",
    "accepted",
    "tokens a call",
    "tokens/s as draft",
)


@torch.no_grad()
def bits_per_byte(model: PreTrainedModel, sequences: torch.Tensor, byte_lengths: np.ndarray, rows: int) -> float:
    """Bits for each byte of the predicted tokens of sequences `(N, L)`, of which the first has no prediction."""
    loss, count = 0.0, 0
    for part in sequences.split(rows):
        predicted = part.numel() - len(part)
        loss += model(input_ids=part, labels=part, use_cache=False).loss.item() * predicted
        count += int(byte_lengths[part[:, 1:].cpu()].sum())
    return loss / math.log(2) / count


def generate_in_turns(
    model: PreTrainedModel, views: list[PreTrainedModel], prompts: torch.Tensor, new_tokens: int
) -> tuple[list[list[float]], list[list[dict]]]:
    """
    Greedy continuations of prompts `(N, L)`, by each in turn, prompt by prompt: what else the machine does meets all
    alike.

    Returns:
        Seconds of the model and of each view, one per prompt; and for each view `time_assisted` of it as a draft.

    Raises:
        `ValueError`: where a text with a draft differs from the plain one by a token.
    """
    plain: list[list[float]] = [[] for _ in (model, *views)]
    drafted: list[list[dict]] = [[] for _ in views]
    how = {"min_new_tokens": new_tokens, "eos_token_id": model.generation_config.eos_token_id}
    for prompt in prompts.split(1):
        texts = []
        for one, durations in zip((model, *views), plain, strict=True):
            duration, text = time_generate(one, prompt, new_tokens, **how)
            durations.append(duration)
            texts.append(text)
        for view, runs in zip(views, drafted, strict=True):
            run, text = time_assisted(model, view, prompt, new_tokens, **how)
            if not torch.equal(text, texts[0]):
                raise ValueError(f"The text must be that of plain decoding, but {view.config.chunk_sizes} differs.")
            runs.append(run)
    return plain, drafted


def compare(
    model: PreTrainedModel,
    schedules: Sequence[list[int]],
    sequences: torch.Tensor,
    byte_lengths: np.ndarray,
    prompts: torch.Tensor,
    new_tokens: int,
    draft_tokens: int,
) -> list[dict]:
    """
    One row for the model and one for each of its views: costs, quality, speed by itself and as a draft.

    Args:
        sequences: `(N, L)`, to predict.
        prompts: `(N, L)`, to continue.
        draft_tokens: how many a view drafts for each call of the model.

    Raises:
        `ValueError`: where a text with a draft differs from the plain one by a token.
    """
    views = [model.with_schedule(schedule) for schedule in schedules]
    for view in views:
        view.generation_config.num_assistant_tokens = draft_tokens
        view.generation_config.num_assistant_tokens_schedule = "constant"
        view.generation_config.assistant_confidence_threshold = 0.0
    generate_in_turns(model, views, prompts[:1], 8)  # not counted: what a first call sets up
    plain, drafted = generate_in_turns(model, views, prompts, new_tokens)
    rows = []
    for one, durations, runs in zip((model, *views), plain, [None, *drafted], strict=True):
        row = {
            "schedule": config_schedule(one.config),
            "layer_equivalents": layer_equivalents(one.config),
            "bits_per_byte": bits_per_byte(one, sequences, byte_lengths, rows=8),
            "tokens_per_second": new_tokens * len(durations) / sum(durations),
        }
        if runs is not None:
            seconds = sum(run["seconds"] for run in runs)
            row |= {**drafting(runs), "tokens_per_second_as_draft": new_tokens * len(runs) / seconds}
        rows.append(row)
    return rows


def format_rows(rows: Sequence[dict]) -> str:
    """The rows as a Markdown table."""
    lines = []
    for row in rows:
        line = [row["schedule"], f"{row['layer_equivalents']:.2f}", f"{row['bits_per_byte']:.4f}"]
        line.append(f"{row['tokens_per_second']:.1f}")
        if "accepted" in row:
            line += [f"{row['accepted']:.1%}", f"{row['tokens_per_call']:.2f}"]
            line.append(f"{row['tokens_per_second_as_draft']:.1f}")
        lines.append([*line, *["-"] * (len(COLUMNS) - len(line))])
    return markdown_table(COLUMNS, lines)
