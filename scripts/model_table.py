"""Prints parameters and prefill FLOPs of every published model beside the figures of Table 1 (arXiv 2602.11698)."""

from dataclasses import dataclass, field

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import HfArgumentParser

from modeling_spiralformer import SpiralFormerConfig
from workshop.experiments.matching import count_parameters, meta_model
from workshop.published import PUBLISHED_MODELS, PublishedModel, published_config
from workshop.tables import format_schedule, markdown_table

PREFILL_TOKENS = 4096


@dataclass
class TableArguments:
    """How to print."""

    markdown: bool = field(default=False, metadata={"help": "Print a Markdown table instead of plain columns."})


@dataclass
class Measurement:
    """Counted figures of one model: parameters, and floating-point operations of a prefill (2 per multiply-add)."""

    parameters: int
    non_embedding: int
    flops: int


def measure(config: SpiralFormerConfig) -> Measurement:
    """
    Counts on the meta device, so that no size costs memory or time.

    The FLOPs are those of a forward over 4096 tokens with logits for all of them. Attention counts the whole square
    of queries and keys, as the paper's figures do: eager attention computes it, masked or not.
    """
    config._attn_implementation = "eager"
    model, input_ids = meta_model(config), torch.zeros(1, PREFILL_TOKENS, dtype=torch.long, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=input_ids, use_cache=False)
    return Measurement(*count_parameters(config), counter.get_total_flops())


def schedule(model: PublishedModel) -> str:
    """The layers in the paper's notation, such as 2+4x{1/8,1/4,1/2,1}+2."""
    return format_schedule(*model.layers, model.chunk_sizes, model.share_core)


HEADER = ("model", "layers", "params", "paper", "non-emb.", "paper", "TFLOPs", "paper", "deviation")


def table_row(model: PublishedModel, measured: Measurement) -> tuple[str, ...]:
    """One line of the table: millions of parameters, 1e12 FLOPs, and by how much the FLOPs deviate."""
    teraflops = measured.flops / 1e12
    return (
        model.name,
        schedule(model),
        f"{measured.parameters / 1e6:.1f}",
        f"{model.parameters:.1f}",
        f"{measured.non_embedding / 1e6:.1f}",
        f"{model.non_embedding:.1f}",
        f"{teraflops:.2f}",
        f"{model.teraflops:.2f}",
        f"{teraflops / model.teraflops - 1:+.1%}",
    )


def format_table(rows: list[tuple[str, ...]], markdown: bool) -> str:
    """Text columns to the left, figures to the right."""
    if markdown:
        return markdown_table(HEADER, rows, text_columns=2)
    lines = [HEADER, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def main(arguments: TableArguments):
    rows = [table_row(model, measure(published_config(model))) for model in PUBLISHED_MODELS]
    print(format_table(rows, arguments.markdown))
    if not arguments.markdown:
        print(f"\nMillions of parameters; 1e12 FLOPs of {PREFILL_TOKENS} tokens; attention counts the full square.")
        print("The paper's totals hold 2 * hidden_size^2 more in every row than its own description accounts for.")


if __name__ == "__main__":
    main(*HfArgumentParser(TableArguments).parse_args_into_dataclasses())
