"""The passages of LAMBADA (Paperno et al. 2016) from a folder: a model is to predict the last word of each."""

from pathlib import Path

from datasets import DatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError

FILE = "lambada_test.jsonl"


def load_passages(lambada_folder: str | None = None, **metadata) -> DatasetDict:
    """
    Reads `lambada_test.jsonl`, one passage a line in the field `text`, as the split "test".

    The harness hands over everything it knows of the run, the arguments of the model too: `metadata` is not for us.
    Raises ValueError where no folder is given or a line lacks its text, FileNotFoundError where there is no such file.
    """
    if lambada_folder is None:
        raise ValueError(
            "`lambada_folder` must name the folder of the passages, but got None: --metadata lambada_folder=..."
        )
    path = Path(lambada_folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"`lambada_folder` must be a folder with {FILE}, but got {str(lambada_folder)!r}.")
    try:
        passages = load_dataset("json", data_files=str(path), split="train")
    except (DatasetGenerationError, ValueError) as error:  # of no UTF-8, too, and it names no file
        raise ValueError(f"{path} must hold JSON in UTF-8, a passage a line: {error.__cause__ or error}") from error
    if "text" not in passages.column_names:
        raise ValueError(f"{path} must have a field `text` in every line, but has {passages.column_names}.")
    for number, text in enumerate(passages["text"]):
        if not isinstance(text, str) or len(text.split(" ")) < 2:
            raise ValueError(f"{path}: passage {number + 1} must have two words or more, but got {text!r}.")
    return DatasetDict({"test": passages})


def context(passage: dict) -> str:
    """All words but the last."""
    return passage["text"].rsplit(" ", 1)[0]


def last_word(passage: dict) -> str:
    """The last word with the space before it, which byte-level tokenizers join to the word."""
    return " " + passage["text"].rsplit(" ", 1)[1]
