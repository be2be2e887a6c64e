"""Evaluates a causal language model: perplexity and bits per byte of text files, and LAMBADA, in one table.

python scripts/evaluate_model.py --model_name_or_path runs/quickstart --text_files text.txt --window 512
"""

import logging
import sys
from dataclasses import dataclass, field

from transformers import HfArgumentParser

from workshop.evaluation import evaluate_lambada, evaluate_text, format_table, load
from workshop.files import check_file, write_json
from workshop.settings import check_counts


@dataclass
class EvaluationArguments:
    """What to evaluate, and on what."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub name of the checkpoint."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Default: the checkpoint's own tokenizer."})
    text_files: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Files of text: .txt (one document), or .json, .jsonl, .csv (a document a row, column `text`)."
        },
    )
    window: int | None = field(
        default=None, metadata={"help": "Tokens seen at once. Default: max_position_embeddings, at most 1024."}
    )
    stride: int | None = field(
        default=None, metadata={"help": "Tokens from one window to the next, at most the window. Default: its half."}
    )
    batch_size: int = field(default=8, metadata={"help": "Windows, or passages of LAMBADA, in one forward pass."})
    lambada_folder: str | None = field(default=None, metadata={"help": "Folder that holds lambada_test.jsonl."})
    limit: int | None = field(
        default=None, metadata={"help": "Only the first so many documents of each file and passages of LAMBADA."}
    )
    output_file: str | None = field(default=None, metadata={"help": "Where to write the figures as JSON."})

    def __post_init__(self):
        self.tokenizer_name = self.tokenizer_name or self.model_name_or_path
        if not self.text_files and self.lambada_folder is None:
            raise ValueError("`text_files` or `lambada_folder` must be given, but got neither.")
        check_counts(self, "batch_size", "limit")
        if self.output_file is not None:
            check_file("output_file", self.output_file)


def main(argv: list[str]) -> dict[str, dict]:
    """Figures by file name, LAMBADA last: printed as a table, written where the command line asks, and returned."""
    (arguments,) = HfArgumentParser(EvaluationArguments).parse_args_into_dataclasses(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    model, tokenizer = load(arguments.model_name_or_path, arguments.tokenizer_name)
    batch_size, limit = arguments.batch_size, arguments.limit
    figures = {
        path: evaluate_text(path, model, tokenizer, arguments.window, arguments.stride, batch_size, limit)
        for path in arguments.text_files
    }
    if arguments.lambada_folder is not None:
        figures["LAMBADA"] = evaluate_lambada(arguments.lambada_folder, model, tokenizer, batch_size, limit)
    print(format_table(figures))
    if arguments.output_file is not None:
        write_json(arguments.output_file, figures, indent=1)
    return figures


if __name__ == "__main__":
    main(sys.argv[1:])
