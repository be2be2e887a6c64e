"""Prints how many bytes a model's cache holds per level, beside those of full-resolution models of equal depth.

    python scripts/cache_memory.py --config configuration/spiralformer-b-mesh-160m --context_length 2048

The bytes are counted on the state tensors of a real prefill, on the meta device: shapes without numbers.
"""

from dataclasses import dataclass, field

import torch
from transformers import HfArgumentParser

from modeling_spiralformer import SpiralFormerConfig
from workshop.checkpoints import load_config
from workshop.costs import cache_bytes, promised_bytes
from workshop.files import PICTURES, check_file
from workshop.memory import MEBIBYTE, draw, equal_depth
from workshop.settings import check_counts


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
    promised = promised_bytes(config, dtype.itemsize)
    promised *= arguments.context_length * arguments.batch_size
    print(f"{'the formula of docs/cache.md':<32} {promised / MEBIBYTE:10.3f} MiB")

    draw(measured, f"Cache of {arguments.context_length} tokens ({arguments.dtype})", arguments.plot)
    print(f"bar chart: {arguments.plot}")


if __name__ == "__main__":
    main()
