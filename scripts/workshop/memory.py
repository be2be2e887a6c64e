"""The memory of a cache beside that of full-resolution models of equal depth, and its picture."""

import dataclasses
import itertools

from modeling_spiralformer import SpiralFormerConfig
from modeling_spiralformer.configuration_spiralformer import TOPOLOGY_FIELDS
from workshop.plotting import new_figure, plt, save

MEBIBYTE = 2**20


def equal_depth(config: SpiralFormerConfig) -> dict[str, SpiralFormerConfig]:
    """The looped and the plain model that call attention as often, every time on all tokens."""
    fields = {item.name: getattr(config, item.name) for item in dataclasses.fields(SpiralFormerConfig)}
    fields |= {"chunk_offsets": None, "causal_shifts": None}
    looped = {"chunk_sizes": [1] * config.num_iterations}
    plain = {"num_prelude_layers": config.num_hidden_layers, "num_core_layers": 0, "num_coda_layers": 0}
    plain |= {"chunk_sizes": [], **dict.fromkeys(itertools.chain(*TOPOLOGY_FIELDS.values()))}
    return {
        "looped, all at full resolution": SpiralFormerConfig(**{**fields, **looped}),
        "plain, of equal depth": SpiralFormerConfig(**{**fields, **plain}),
    }


def draw(measured: dict[str, dict[str, int]], title: str, path: str) -> None:
    """One bar a model, made of its blocks and levels."""
    figure, [[axes]] = new_figure(9, 0.9 + 0.8 * len(measured))
    colours = plt.get_cmap("viridis")
    for row, held in enumerate(measured.values()):
        left = 0.0
        for part, (name, count) in enumerate(held.items()):
            width = count / MEBIBYTE
            axes.barh(row, width, left=left, color=colours(0.8 * part / max(1, len(held) - 1)), edgecolor="white")
            if width > 0.06 * max(sum(other.values()) for other in measured.values()) / MEBIBYTE:
                axes.text(
                    left + width / 2, row, name.replace("iteration ", ""), ha="center", va="center", color="white"
                )
            left += width
        axes.text(left, row, f" {left:.1f}", va="center")
    axes.set_yticks(range(len(measured)), list(measured), fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("MiB held")
    axes.set_title(title)
    save(figure, path)
