"""Tables as Markdown and in plain columns, and schedules in the paper's notation."""

from collections.abc import Sequence

from modeling_spiralformer import SpiralFormerConfig


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A Markdown table, its first `text_columns` columns to the left and the figures to the right."""
    alignment = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, alignment, *rows))


def plain_table(lines: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """The header and the rows in plain columns, the first `text_columns` to the left and the figures to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def format_resolution(chunk_size: int) -> str:
    """r = 1 / g as the paper writes it."""
    return "1" if chunk_size == 1 else f"1/{chunk_size}"


def format_schedule(prelude: int, core: int, coda: int, chunk_sizes: Sequence[int], share_core: bool = True) -> str:
    """Layers and resolutions as the paper writes them, such as 2+4x{1/8,1/4,1/2,1}+2; a plain stack is its depth."""
    if not chunk_sizes:
        return str(prelude + coda)
    if not share_core:
        return "+".join(str(count) for count in (prelude, *[core] * len(chunk_sizes), coda))
    resolutions = ",".join(map(format_resolution, chunk_sizes))
    return f"{prelude}+{core}x{{{resolutions}}}+{coda}"


def config_schedule(config: SpiralFormerConfig) -> str:
    """The schedule of a configuration."""
    layers = (config.num_prelude_layers, config.num_core_layers, config.num_coda_layers)
    return format_schedule(*layers, config.chunk_sizes, config.share_core)
