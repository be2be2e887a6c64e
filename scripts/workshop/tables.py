"""Markdown tables, and schedules in the paper's notation: what several scripts print."""

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A Markdown table, its first `text_columns` columns to the left and the figures to the right."""
    alignment = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, alignment, *rows))


def format_schedule(prelude: int, core: int, coda: int, chunk_sizes: Sequence[int], share_core: bool = True) -> str:
    """Layers and resolutions as the paper writes them, such as 2+4x{1/8,1/4,1/2,1}+2; a plain stack is its depth."""
    if not chunk_sizes:
        return str(prelude + coda)
    if not share_core:
        return "+".join(str(count) for count in (prelude, *[core] * len(chunk_sizes), coda))
    resolutions = ",".join("1" if size == 1 else f"1/{size}" for size in chunk_sizes)
    return f"{prelude}+{core}x{{{resolutions}}}+{coda}"
