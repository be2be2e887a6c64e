"""
What a looped model writes that is stopped after each of its passes, with its own head or with a linear head that was
trained for that pass alone (SMolLM, arXiv 2605.06322: brackets come first, rings second, valences last).
"""

import copy
from collections.abc import Iterator

import torch
from datasets import Dataset
from tqdm import trange
from transformers import DataCollatorForLanguageModeling, PreTrainedModel, PreTrainedTokenizerBase

from workshop.molecules.judging import judge
from workshop.molecules.rows import make_rows
from workshop.molecules.sampling import sample

ROWS_OF_A_STEP = 256
LEARNING_RATE = 1e-2


def stopped(model: PreTrainedModel, passes: int) -> PreTrainedModel:
    """A view of the model that ends its loop after so many passes."""
    return model.with_schedule(model.config.chunk_sizes[:passes])


def with_own_head(model: PreTrainedModel, passes: int) -> PreTrainedModel:
    """A copy of the model that ends its loop after so many passes; its head is tied to nothing, and alone trains."""
    view = stopped(model, passes)
    config = copy.deepcopy(view.config)
    config.tie_word_embeddings = False
    alone = type(model)(config)
    alone.load_state_dict(view.state_dict())
    alone.generation_config = copy.deepcopy(model.generation_config)
    alone.requires_grad_(False)
    alone.get_output_embeddings().requires_grad_(True)
    return alone.to(device=model.device, dtype=model.dtype).eval()


def train_head(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, steps: int, seed: int
) -> PreTrainedModel:
    """Trains what of the model can be trained, its head, on random batches; at a rate that falls to 0."""
    collate, generator = DataCollatorForLanguageModeling(tokenizer, mlm=False), torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings()
    optimizer = torch.optim.Adam(head.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in trange(steps, desc=f"head after pass {model.config.num_iterations}", leave=False):
        chosen = torch.randint(len(rows), (ROWS_OF_A_STEP,), generator=generator).tolist()
        batch = collate([rows[index] for index in chosen]).to(model.device)
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model


def check_loop(model: PreTrainedModel) -> None:
    """Raises ValueError for a model that has nothing to stop."""
    if not model.config.num_iterations:
        raise ValueError("`by_pass` needs a model with a loop, but its `chunk_sizes` are empty.")


def errors_by_pass(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    molecules: list[str],
    head_steps: int | None,
    **options,
) -> Iterator[dict]:
    """
    What becomes of samples after each pass: with the model's own head, then with heads that are trained for
    `head_steps` on `molecules`, where that is not None.

    Args:
        options: of `sample`.
    """
    check_loop(model)
    heads = ["own"]
    if head_steps is not None:
        heads.append("linear")
        rows = make_rows(molecules, tokenizer, model.config.max_position_embeddings)
    for head in heads:
        for passes in range(1, model.config.num_iterations + 1):
            if head == "own":
                chosen = stopped(model, passes)
            else:
                chosen = train_head(with_own_head(model, passes), tokenizer, rows, head_steps, options["seed"])
            yield {"head": head, "passes": passes, **judge(sample(chosen, tokenizer, **options))}
