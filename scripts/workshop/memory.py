"""How many bytes a model's cache holds per level, beside those of full-resolution models of equal depth.

The bytes are counted on the state tensors of a real prefill, on the meta device: shapes without numbers.
"""

from pathlib import Path

import matplotlib
import torch
from transformers import DynamicCache

from modeling_spiralformer import SpiralFormerConfig, SpiralFormerForCausalLM
from workshop.benchmarks.workloads import layer_bytes
from workshop.experiments.matching import layer_equivalents

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  the backend has to be chosen first

MEBIBYTE = 2**20


def cache_bytes(config: SpiralFormerConfig, length: int, batch: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that the cache holds after a prefill of `length` tokens: one entry per block and level, in order."""
    with torch.device("meta"), torch.no_grad():
        model = SpiralFormerForCausalLM(config).to(dtype).eval()
        cache = DynamicCache(config=config)
        model(torch.zeros(batch, length, dtype=torch.long), past_key_values=cache, logits_to_keep=1)
    names = ["prelude"] * config.num_prelude_layers
    for iteration, size in enumerate(config.chunk_sizes):
        names += [f"iteration {iteration}, 1/{size}"] * config.num_core_layers
    names += ["coda"] * config.num_coda_layers
    held = dict.fromkeys(names, 0)
    for name, layer in zip(names, cache.layers, strict=True):
        held[name] += layer_bytes(layer)
    return held


def equal_depth(config: SpiralFormerConfig) -> dict[str, SpiralFormerConfig]:
    """The looped and the plain model that call attention as often, every time on all tokens."""
    fields = {name: value for name, value in config.to_dict().items() if name in SpiralFormerConfig().to_dict()}
    fields |= {"chunk_offsets": None, "causal_shifts": None}
    looped = {"chunk_sizes": [1] * config.num_iterations}
    plain = {"num_prelude_layers": config.num_hidden_layers, "num_core_layers": 0, "num_coda_layers": 0}
    plain |= {"chunk_sizes": [], "num_memory_slots": None}
    return {
        "looped, all at full resolution": SpiralFormerConfig(**{**fields, **looped}),
        "plain, of equal depth": SpiralFormerConfig(**{**fields, **plain}),
    }


def formula_bytes(config: SpiralFormerConfig, length: int, batch: int, itemsize: int) -> float:
    """2 d itemsize (N_pre + N_post + N_core sum 1 / g) per token and row: what the method promises."""
    return batch * length * 2 * config.hidden_size * itemsize * layer_equivalents(config)


def draw(measured: dict[str, dict[str, int]], title: str, path: str) -> None:
    """One bar a model, made of its blocks and levels."""
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.8 * len(measured)), layout="constrained")
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
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
