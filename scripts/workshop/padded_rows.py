"""Training on rows of unequal length: padded to the longest of their batch, grouped by length, loss per token."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    BatchEncoding,
    DataCollatorForLanguageModeling,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.trainer_pt_utils import get_length_grouped_indices

from workshop.elastic import ElasticTrainer
from workshop.training_arguments import rows_per_step

ROWS_AT_ONCE = 256


def row_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed loss in nats and count of the predicted tokens of each row, `(B, 2)`; padding is not predicted."""
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].mT.float(), labels[:, 1:], reduction="none")
    return torch.stack([losses.sum(dim=1), (labels[:, 1:] != -100).sum(dim=1).float()], dim=1)


def nats_per_token(prediction: EvalPrediction) -> dict[str, float]:
    """Loss over all tokens that are predicted: rows of more tokens count more, whatever the batches."""
    losses, counts = prediction.predictions.astype("float64").sum(axis=0)
    return {"nats_per_token": float(losses / counts)}


@torch.no_grad()
def losses_of_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    read: Callable[[BatchEncoding], torch.Tensor] | None = None,
) -> np.ndarray:
    """What a model loses on each row, without a Trainer: `row_losses` in float64, `(rows, 2)`.

    Args:
        read: gives the logits of a batch. Default: one call without a cache.
    """
    collate, found = DataCollatorForLanguageModeling(tokenizer, mlm=False), []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        batch = collate(list(rows.select(range(start, min(start + ROWS_AT_ONCE, len(rows))))))
        labels, batch = batch.pop("labels"), batch.to(model.device)
        logits = model(**batch, use_cache=False).logits if read is None else read(batch)
        found.append(row_losses(logits.cpu(), labels))
    return torch.cat(found).double().numpy()


class LengthGroups(torch.utils.data.Sampler):
    """
    Rows in groups of like length, as the library makes them, and the groups in random order. The library's own
    sampler draws from the global random state, which a resumed run has lost: here seed and epoch decide.

    Args:
        group_size: rows of a group. Those of a whole step make its rows the same, however they are split.
    """

    def __init__(self, lengths: list[int], group_size: int, seed: int):
        self.lengths, self.group_size, self.seed, self.epoch = lengths, group_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called before each pass over the rows."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        (state,) = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)
        generator = torch.Generator().manual_seed(int(state))
        grouped = torch.tensor(get_length_grouped_indices(self.lengths, self.group_size, generator=generator))
        *groups, last = grouped.split(self.group_size)  # the last one may be smaller
        order = torch.randperm(len(groups), generator=generator).tolist()
        return iter(torch.cat([groups[index] for index in order] + [last]).tolist())


class RowTrainer(ElasticTrainer):
    """A Trainer whose grouping by length goes on as it began where a run is resumed."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthGroups([len(ids) for ids in rows["input_ids"]], rows_per_step(self.args), seed)
