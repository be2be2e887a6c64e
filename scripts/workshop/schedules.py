"""Views of one model beside each other: what they cost, how well they predict, and how well they draft."""

import math
import time
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from workshop.costs import layer_equivalents
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


class Generation:
    """
    Greedy continuations of prompts, timed, with the calls of the models that it took.

    Args:
        model: the model whose tokens these are.
        draft: a view that drafts `draft_tokens` for each of its calls; None to decode plainly.
    """

    def __init__(self, model: PreTrainedModel, draft: PreTrainedModel | None = None, draft_tokens: int = 5):
        self.model, self.draft = model, draft
        self.tokens, self.seconds, self.calls, self.drafted = 0, 0.0, 0, 0
        if draft is not None:
            draft.generation_config.num_assistant_tokens = draft_tokens
            draft.generation_config.num_assistant_tokens_schedule = "constant"
            draft.generation_config.assistant_confidence_threshold = 0.0

    def run(self, prompt: torch.Tensor, new_tokens: int) -> torch.Tensor:
        """The text `(1, L + new_tokens)` that follows a prompt `(1, L)`."""

        def count(model, args, output):
            self.calls += model is self.model
            self.drafted += model is self.draft

        models = [model for model in (self.model, self.draft) if model is not None]
        hooks = [model.register_forward_hook(count) for model in models]
        how = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False}
        started = time.perf_counter()
        text = self.model.generate(prompt, attention_mask=torch.ones_like(prompt), assistant_model=self.draft, **how)
        self.seconds += time.perf_counter() - started
        self.tokens += new_tokens
        for hook in hooks:
            hook.remove()
        return text

    @property
    def rate(self) -> float:
        """Tokens for each second."""
        return self.tokens / self.seconds

    @property
    def accepted(self) -> float:
        """The share of the drafted tokens that were accepted: each call of the model adds one token of its own."""
        return (self.tokens - self.calls) / self.drafted


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

    All generate in turns, prompt by prompt, so that what else the machine does meets all alike.

    Args:
        sequences: `(N, L)`, to predict.
        prompts: `(N, L)`, to continue.

    Raises:
        `ValueError`: where a text with a draft differs from the plain one by a token.
    """
    views = [model.with_schedule(schedule) for schedule in schedules]
    plain = [Generation(one) for one in (model, *views)]
    drafting = [Generation(model, view, draft_tokens) for view in views]
    for one in (*plain, *drafting):  # not counted: what a first call sets up
        one.run(prompts[:1], 8)
        one.tokens = one.calls = one.drafted = 0
        one.seconds = 0.0
    for prompt in prompts.split(1):
        expected, *_ = [one.run(prompt, new_tokens) for one in plain]
        for one in drafting:
            if not torch.equal(one.run(prompt, new_tokens), expected):
                raise ValueError(
                    f"The text must be that of plain decoding, but {one.draft.config.chunk_sizes} differs."
                )
    rows = []
    for one, draft in zip(plain, [None, *drafting], strict=True):
        row = {
            "schedule": config_schedule(one.model.config),
            "layer_equivalents": layer_equivalents(one.model.config),
            "bits_per_byte": bits_per_byte(one.model, sequences, byte_lengths, rows=8),
            "tokens_per_second": one.rate,
        }
        if draft is not None:
            row |= {"accepted": draft.accepted, "tokens_per_call": draft.tokens / draft.calls}
            row["tokens_per_second_as_draft"] = draft.rate
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
