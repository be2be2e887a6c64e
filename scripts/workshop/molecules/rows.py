"""SMILES, one a line, as rows for the Trainer: read, tokenized, and grouped by length."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.trainer_pt_utils import get_length_grouped_indices

from workshop.files import read_text


def read_molecules(field: str, path: str | Path) -> list[str]:
    """The SMILES of a file. Raises ValueError for a file without any, and for a line that holds none, or a blank."""
    molecules = read_text(field, path).splitlines()
    if not molecules:
        raise ValueError(f"`{field}` must hold one SMILES a line, but {path} is empty.")
    for number, smiles in enumerate(molecules, start=1):
        if not smiles or smiles.split() != [smiles]:
            raise ValueError(f"`{field}` must hold one SMILES a line, but line {number} of {path} is {smiles!r}.")
    return molecules


def make_rows(molecules: list[str], tokenizer: PreTrainedTokenizerBase, block_size: int) -> Dataset:
    """One row a molecule: bos, its tokens, eos. Raises ValueError for one of more than `block_size` tokens."""

    def tokenize(batch: dict) -> dict:
        return tokenizer(batch["smiles"], return_attention_mask=False, verbose=False)

    rows = Dataset.from_dict({"smiles": molecules}).map(tokenize, batched=True, remove_columns="smiles")
    longest = max(map(len, rows["input_ids"]))
    if longest > block_size:
        raise ValueError(
            f"`block_size` must be at least {longest}, the longest molecule's tokens, but got {block_size}."
        )
    return rows


class LengthGroups(torch.utils.data.Sampler):
    """
    Rows in batches of like length, as the library groups them, and the batches in random order. The library's own
    sampler draws from the global random state, which a resumed run has lost: here seed and epoch decide.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called before each pass over the rows."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        (state,) = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)
        generator = torch.Generator().manual_seed(int(state))
        grouped = torch.tensor(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))
        *batches, last = grouped.split(self.batch_size)  # the last one may be smaller
        order = torch.randperm(len(batches), generator=generator).tolist()
        return iter(torch.cat([batches[index] for index in order] + [last]).tolist())
