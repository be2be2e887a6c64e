"""Compares parts of a model's schedule: cost, bits per byte, speed, and how well each drafts for the whole model.

    python scripts/compare_schedules.py --model my_model --text text.txt --schedules 8,4 1

`docs/elastic.md` says what is measured.
"""

import sys
from dataclasses import dataclass, field

from transformers import HfArgumentParser, set_seed

from workshop.data import token_byte_lengths
from workshop.elastic import check_schedules
from workshop.evaluation import choose_window, load
from workshop.files import check_file, read_text, write_json
from workshop.probes.measures import cut_text
from workshop.provenance import machine
from workshop.schedules import compare, format_rows
from workshop.settings import check_counts
from workshop.training_arguments import read_schedule


@dataclass
class ComparisonArguments:
    """What to compare, and on what."""

    model: str = field(metadata={"help": "Folder or Hub name of a SpiralFormer checkpoint with its tokenizer."})
    text: str = field(metadata={"help": "File of UTF-8 text; its first tokens are read."})
    schedules: list[str] = field(metadata={"help": "Parts of the model's schedule, such as 8,4,2 8,4 1."})
    sequences: int = field(default=64, metadata={"help": "How many sequences are cut from the text."})
    length: int | None = field(
        default=None, metadata={"help": "Tokens of a sequence. Default: max_position_embeddings, at most 1024."}
    )
    prompts: int = field(default=8, metadata={"help": "How many of the sequences are continued."})
    new_tokens: int = field(default=128, metadata={"help": "Tokens of a continuation."})
    draft_tokens: int = field(default=4, metadata={"help": "Tokens that are drafted for each call of the model."})
    output_file: str | None = field(default=None, metadata={"help": "Where to write the figures as JSON."})

    def __post_init__(self):
        check_counts(self, "sequences", "prompts", "new_tokens", "draft_tokens")
        for schedule in self.schedules:
            read_schedule(schedule)
        if self.prompts > self.sequences:
            raise ValueError(f"`prompts` must be at most `sequences`, {self.sequences}, but got {self.prompts}.")
        if self.output_file is not None:
            check_file("output_file", self.output_file)


def main(argv: list[str]) -> list[dict]:
    """The rows of the table: printed, written where the command line asks, and returned."""
    (arguments,) = HfArgumentParser(ComparisonArguments).parse_args_into_dataclasses(argv)
    set_seed(0)
    model, tokenizer = load(arguments.model, arguments.model)
    check_schedules(arguments.schedules, model.config)
    length = choose_window(arguments.length, model.config.max_position_embeddings)
    sequences = cut_text(read_text("text", arguments.text), tokenizer, arguments.sequences, length)
    byte_lengths = token_byte_lengths(tokenizer)
    if byte_lengths is None:
        raise ValueError(
            "The tokenizer must be byte-level BPE that puts no space before a text: its bytes can be counted."
        )
    longest = model.config.max_position_embeddings - length // 2
    if length < 2 or arguments.new_tokens > longest:
        raise ValueError(
            f"`length` must be at least 2, and `new_tokens` at most {longest} after half of it, but got {length} and "
            f"{arguments.new_tokens}."
        )
    prompts = sequences[: arguments.prompts, : length // 2].to(model.device)
    rows = compare(
        model,
        [read_schedule(schedule) for schedule in arguments.schedules],
        sequences.to(model.device),
        byte_lengths,
        prompts,
        arguments.new_tokens,
        arguments.draft_tokens,
    )
    print(format_rows(rows))
    if arguments.output_file is not None:
        write_json(arguments.output_file, {"machine": machine(model.device), "rows": rows}, indent=1)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
