"""Parameters and FLOPs of every published model beside those of arXiv 2602.11698, 2604.21254 and 2605.06322."""

from dataclasses import dataclass, field

from transformers import HfArgumentParser

from workshop.published import (
    HYPERLOOP_HEADER,
    HYPERLOOP_MODELS,
    PREFILL_TOKENS,
    PUBLISHED_MODELS,
    SMOLLM_HEADER,
    SMOLLM_MODELS,
    TABLE_HEADER,
    hyperloop_row,
    measure,
    published_config,
    smollm_row,
    table_row,
)
from workshop.tables import markdown_table, plain_table


@dataclass
class TableArguments:
    """How to print."""

    markdown: bool = field(default=False, metadata={"help": "Print a Markdown table instead of plain columns."})


def main(arguments: TableArguments):
    rows = [table_row(model, measure(published_config(model))) for model in PUBLISHED_MODELS]
    hyperloop = [hyperloop_row(model) for model in HYPERLOOP_MODELS]
    smollm = [smollm_row(model) for model in SMOLLM_MODELS]
    if arguments.markdown:
        print(markdown_table(TABLE_HEADER, rows, text_columns=2))
        print(f"\n{markdown_table(HYPERLOOP_HEADER, hyperloop, text_columns=2)}")
        print(f"\n{markdown_table(SMOLLM_HEADER, smollm, text_columns=2)}")
    else:
        print(plain_table([TABLE_HEADER, *rows], text_columns=2))
        print(f"\n{plain_table([HYPERLOOP_HEADER, *hyperloop], text_columns=2)}")
        print(f"\n{plain_table([SMOLLM_HEADER, *smollm], text_columns=2)}")
        print(f"\nMillions of parameters; 1e12 FLOPs of {PREFILL_TOKENS} tokens; attention counts the full square.")
        print("The paper's totals hold 2 * hidden_size^2 more in every row than its own description accounts for.")


if __name__ == "__main__":
    main(*HfArgumentParser(TableArguments).parse_args_into_dataclasses())
