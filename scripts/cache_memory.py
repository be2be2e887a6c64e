"""Prints how many bytes a model's cache holds per level, beside those of full-resolution models of equal depth.

    python scripts/cache_memory.py --config configuration/spiralformer-b-mesh-160m --context_length 2048

The bytes are counted on the state tensors of a real prefill, on the meta device: shapes without numbers.
"""

from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
from benchmark_workloads import layer_bytes
from checkpoints import load_config
from files import PICTURES, check_file
from matching import layer_equivalents
from training_arguments import check_counts
from transformers import DynamicCache, HfArgumentParser

from modeling_spiralformer import SpiralFormerConfig, SpiralFormerForCausalLM

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  the backend has to be chosen first

MEBIBYTE = 2**20


@dataclass
class MemoryArguments:
    """What to measure."""

    config: str = field(metadata={"help": "Folder or Hub name of a SpiralFormer configuration."})
    context_length: int = field(default=2048, metadata={"help": "Tokens in the cache."})
    batch_size: int = field(default=1, metadata={"help": "Rows in the cache."})
    dtype: str = field(
        default="bfloat16",
        metadata={"help": "Type of the states.", "choices": ["float32", "bfloat16", "float16"]},
    )
    plot: str = field(default="runs/cache_memory.png", metadata={"help": "Where to draw the bar chart."})

    def __post_init__(self):
        check_counts(self, "context_length", "batch_size")
        check_file("plot", self.plot, PICTURES)


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
    figure.savefig(path, dpi=150)


def main() -> None:
    (arguments,) = HfArgumentParser(MemoryArguments).parse_args_into_dataclasses()
    config = load_config(arguments.config, field="config")
    if not isinstance(config, SpiralFormerConfig):
        raise ValueError(f"`config` must be that of a SpiralFormer, but got `model_type` {config.model_type!r}.")
    dtype = getattr(torch, arguments.dtype)
    size = (arguments.context_length, arguments.batch_size, dtype)
    models = {"this model": config, **equal_depth(config)}
    measured = {name: cache_bytes(model, *size) for name, model in models.items()}

    print(f"{arguments.config}: {arguments.context_length} tokens, {arguments.batch_size} rows, {arguments.dtype}")
    for name, held in measured["this model"].items():
        print(f"  {name:<20} {held / MEBIBYTE:10.3f} MiB")
    for name, held in measured.items():
        total = sum(held.values())
        per_token = total / arguments.context_length / arguments.batch_size
        print(f"{name:<32} {total / MEBIBYTE:10.3f} MiB, {per_token:10.1f} bytes a token and row")
    promised = formula_bytes(config, arguments.context_length, arguments.batch_size, dtype.itemsize)
    print(f"{'the formula of docs/cache.md':<32} {promised / MEBIBYTE:10.3f} MiB")

    Path(arguments.plot).parent.mkdir(parents=True, exist_ok=True)
    draw(measured, f"Cache of {arguments.context_length} tokens ({arguments.dtype})", arguments.plot)
    print(f"bar chart: {arguments.plot}")


if __name__ == "__main__":
    main()
