"""Text for training and evaluation: read, tokenized, and packed into blocks of equal length without padding."""

import logging
from itertools import chain
from pathlib import Path

import numpy as np
from corpus import SPLITS, read_corpus
from datasets import Dataset, DatasetDict, load_dataset
from tokenizers.decoders import ByteLevel
from training_arguments import DataArguments
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# File ending -> the builder of the `datasets` library and its options.
FILE_BUILDERS = {
    ".txt": ("text", {"sample_by": "document"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {}),
}


def load_file(field: str, path: str) -> Dataset:
    """Reads one train_file or validation_file."""
    suffix = Path(path).suffix
    if suffix not in FILE_BUILDERS:
        raise ValueError(f"`{field}` must end in one of {list(FILE_BUILDERS)}, but got {path!r}.")
    if not Path(path).is_file():
        raise FileNotFoundError(f"`{field}` must be an existing file, but got {path!r}.")
    if Path(path).stat().st_size == 0:
        raise ValueError(f"`{field}` must hold text, but {path!r} is empty.")
    builder, options = FILE_BUILDERS[suffix]
    return load_dataset(builder, data_files=path, split="train", **options)


def load_standard_library(validation_percentage: float) -> DatasetDict:
    """Both splits of the default corpus, in memory: a cache on disk could outlive the Python it was made from."""
    splits = DatasetDict()
    for split in SPLITS:
        corpus = read_corpus(split, validation_percentage)
        logger.info("%s: %d files of the standard library", split, len(corpus.texts))
        for path, reason in corpus.skipped.items():
            logger.info("left out: %s (%s)", path, reason)
        splits[split] = Dataset.from_dict({"text": corpus.texts})
    return splits


def load_texts(arguments: DataArguments) -> DatasetDict:
    """Documents of the named data, one a row in the column `text`, in the splits "train" and "validation"."""
    if arguments.dataset_name is not None:
        loaded = load_dataset(arguments.dataset_name, arguments.dataset_config_name)
        splits = DatasetDict({split: loaded[split] for split in SPLITS if split in loaded})
        if not splits:
            raise ValueError(
                f"`dataset_name` must have one of the splits {list(SPLITS)}, but {arguments.dataset_name!r} has "
                f"{list(loaded)}."
            )
    elif arguments.train_file or arguments.validation_file:
        files = {"train": arguments.train_file, "validation": arguments.validation_file}
        splits = DatasetDict({split: load_file(f"{split}_file", path) for split, path in files.items() if path})
    else:
        splits = load_standard_library(arguments.validation_split_percentage)
    for split, documents in splits.items():
        if "text" not in documents.column_names:
            raise ValueError(f"The {split} data must have a column `text`, but has {documents.column_names}.")
        # The other columns would only be carried along.
        splits[split] = documents.select_columns("text")
    return splits


def pack(documents: Dataset, tokenizer: PreTrainedTokenizerBase, block_size: int) -> Dataset:
    """
    Joins the documents, an end-of-sequence token after each, and cuts them into blocks of `block_size` tokens.

    Returns `input_ids` and `labels` (equal; the model shifts them), int64. A rest that fills no block is dropped,
    once per thousand documents. Text that looks like a special token is read as text.
    """

    def tokenize(batch: dict) -> dict:
        encoded = tokenizer(
            batch["text"],
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )
        return {"input_ids": [ids + [tokenizer.eos_token_id] for ids in encoded["input_ids"]]}

    def cut(batch: dict) -> dict:
        stream = list(chain.from_iterable(batch["input_ids"]))
        end = len(stream) // block_size * block_size
        blocks = [stream[start : start + block_size] for start in range(0, end, block_size)]
        return {"input_ids": blocks, "labels": blocks}

    tokens = documents.map(tokenize, batched=True, remove_columns="text", desc="Tokenizing")
    return tokens.map(cut, batched=True, desc=f"Packing into blocks of {block_size} tokens")


def make_blocks(
    arguments: DataArguments, tokenizer: PreTrainedTokenizerBase, block_size: int, needed: list[str]
) -> dict[str, Dataset]:
    """
    Blocks of the splits named in `needed` ("train", "validation"), cut down to max_train_samples, max_eval_samples.

    Data without a validation split gives up the last `validation_split_percentage` of its training blocks where
    "validation" is needed. Raises ValueError where a split is missing, or shorter than one block.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("`tokenizer_name` must name a tokenizer with an eos token: it separates the documents.")
    texts = load_texts(arguments)
    hold_out = "validation" in needed and "validation" not in texts
    sources = {"train"} if hold_out else set()
    sources |= set(needed) - ({"validation"} if hold_out else set())
    blocks = {}
    for split in sources:
        if split not in texts:
            raise ValueError(f"The data must have a {split} split, but has only {list(texts)}.")
        blocks[split] = pack(texts[split], tokenizer, block_size)
    if hold_out:
        count = len(blocks["train"])
        held_out = max(1, round(count * arguments.validation_split_percentage / 100))
        blocks["validation"] = blocks["train"].select(range(max(0, count - held_out), count))
        blocks["train"] = blocks["train"].select(range(max(0, count - held_out)))
    limits = {"train": arguments.max_train_samples, "validation": arguments.max_eval_samples}
    for split in needed:
        count = len(blocks[split])
        if count == 0:
            raise ValueError(f"The {split} text is shorter than one block: `block_size` is {block_size} tokens.")
        if limits[split] is not None:
            blocks[split] = blocks[split].select(range(min(count, limits[split])))
    return {split: blocks[split] for split in needed}


def token_byte_lengths(tokenizer: PreTrainedTokenizerBase) -> np.ndarray | None:
    """
    UTF-8 bytes that each token id stands for, int64 of length len(tokenizer); None for other than byte-level BPE.

    Special tokens stand for no byte of the text. A token of the byte-level alphabet has one character per byte.
    """
    if not isinstance(tokenizer.backend_tokenizer.decoder, ByteLevel):
        return None
    lengths = np.zeros(len(tokenizer), dtype=np.int64)
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
    for token, index in tokenizer.get_vocab().items():
        # Added tokens are kept as plain text, not in the byte-level alphabet.
        lengths[index] = len(added[index].encode()) if index in added else len(token)
    lengths[tokenizer.all_special_ids] = 0
    return lengths
