"""SMILES, one a line, as rows for the Trainer: read and tokenized."""

from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

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
