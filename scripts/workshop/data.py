"""Text for training and evaluation: read, tokenized, and packed into blocks of equal length without padding."""

import hashlib
import logging
import warnings
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from pandas.errors import ParserWarning
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerBase

from workshop.corpus import SPLITS, read_corpus
from workshop.files import check_text_file, read_text
from workshop.training_arguments import DataArguments

logger = logging.getLogger(__name__)


def cell_text(cell: str) -> str | None:
    """A cell of a CSV file as it stands there: pandas would read NA as nothing and 007 as 7. An empty one is null."""
    return cell or None


# File ending -> the builder of the `datasets` library and its options.
FILE_BUILDERS = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {"converters": {"text": cell_text}, "keep_default_na": False, "index_col": False}),
}
FILE_ENDINGS = (".txt", *FILE_BUILDERS)


def read_documents(path: str, digest: str) -> Iterator[dict[str, str]]:
    """A file of text as its one document. The digest tells the cache of `datasets` when the file has changed."""
    yield {"text": read_text("path", path)}


def check_documents(field: str, where: str, documents: Dataset) -> Dataset:
    """The column `text` alone; ValueError, naming the data, where it is missing, no text, or null or empty in all."""
    if "text" not in documents.column_names:
        raise ValueError(f"`{field}` must have a column `text`, but {where} has {documents.column_names}.")
    documents = documents.select_columns("text")
    nulls = pc.is_null(documents.with_format("arrow")["text"][:])
    if (row := pc.index(nulls, True).as_py()) >= 0:
        raise ValueError(f"`{field}` must have text in the column `text`, but row {row + 1} of {where} is null.")
    kind = documents.features["text"]
    if getattr(kind, "dtype", None) not in ("string", "large_string"):
        raise ValueError(f"`{field}` must have text in the column `text`, but that of {where} holds {kind}.")
    if not any(documents["text"]):
        raise ValueError(f"`{field}` must hold text, but all {len(documents)} documents of {where} are empty.")
    return documents


def load_file(field: str, path: str) -> Dataset:
    """
    Reads one file as documents in the column `text`.

    Raises ValueError, naming setting, file and row, where it cannot be read, is not UTF-8, or a document is missing.
    """
    suffix = Path(path).suffix
    if suffix not in FILE_ENDINGS:
        raise ValueError(f"`{field}` must end in one of {list(FILE_ENDINGS)}, but got {path!r}.")
    check_text_file(field, path)
    if Path(path).stat().st_size == 0:
        raise ValueError(f"`{field}` must hold text, but {path!r} is empty.")
    if suffix == ".txt":  # the builder for text would make every line end a "\n"
        with open(path, "rb") as file:
            source = {"path": path, "digest": hashlib.file_digest(file, "sha256").hexdigest()}
        documents = Dataset.from_generator(read_documents, gen_kwargs=source)
    else:
        builder, options = FILE_BUILDERS[suffix]
        try:
            with warnings.catch_warnings():
                # Of rows longer than the header pandas would drop cells, or take the first for names of the rows.
                warnings.simplefilter("error", ParserWarning)
                documents = load_dataset(builder, data_files=path, split="train", **options)
        except (DatasetGenerationError, ValueError) as error:
            cause = error.__cause__ or error
            raise ValueError(
                f"`{field}` must be a {suffix} file of rows, but {path!r} cannot be read: {cause}"
            ) from error
    return check_documents(field, repr(path), documents)


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
        for split, documents in splits.items():
            where = f"the {split} split of {arguments.dataset_name!r}"
            splits[split] = check_documents("dataset_name", where, documents)
    elif arguments.train_file or arguments.validation_file:
        files = {"train": arguments.train_file, "validation": arguments.validation_file}
        splits = DatasetDict({split: load_file(f"{split}_file", path) for split, path in files.items() if path})
    else:
        splits = load_standard_library(arguments.validation_split_percentage)
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
        if "train" in needed and 0 < count <= held_out:
            raise ValueError(
                "`validation_split_percentage` must leave a block to train on, but got "
                f"{arguments.validation_split_percentage}, which holds out {held_out} of {count} blocks of "
                f"{block_size} tokens: take a smaller share, more text or a smaller `block_size`."
            )
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


def check_bytes(field: str, blocks: Dataset, byte_lengths: np.ndarray) -> None:
    """Raises ValueError where no predicted token of the blocks stands for a byte: there are no bits per byte then."""
    batches = blocks.with_format("numpy").iter(batch_size=1000)
    if not any(byte_lengths[batch["input_ids"][:, 1:]].any() for batch in batches):
        raise ValueError(
            f"`{field}` must give blocks with text to evaluate on, but all of them are of empty documents."
        )


def token_byte_lengths(tokenizer: PreTrainedTokenizerBase) -> np.ndarray | None:
    """
    UTF-8 bytes that each token id stands for, int64 of length 1 + largest id; None for other than byte-level BPE, and
    for one that puts a space before a text, whose tokens stand for more bytes than the text has.

    Special tokens stand for no byte of the text. A token of the byte-level alphabet has one character per byte.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)  # a tokenizer in Python has none
    if backend is None or not isinstance(backend.decoder, ByteLevel):
        return None
    vocabulary = tokenizer.get_vocab()
    lengths = np.zeros(1 + max(vocabulary.values()), dtype=np.int64)
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
    for token, index in vocabulary.items():
        # Added tokens are kept as plain text, not in the byte-level alphabet.
        lengths[index] = len(added[index].encode()) if index in added else len(token)
    lengths[tokenizer.all_special_ids] = 0
    return lengths if lengths[tokenizer("a", add_special_tokens=False)["input_ids"]].sum() <= 1 else None
