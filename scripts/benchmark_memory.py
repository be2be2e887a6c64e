"""Counts the most memory of a prefill, of decoding and of a training step, of all models of the benchmark.

    python scripts/benchmark_memory.py --layer_family llama --output runs/memory.json

Allocations are counted, not timed: other work on the machine changes nothing.
"""

from dataclasses import dataclass, field

import torch
from transformers import HfArgumentParser

from modeling_spiralformer.layers_spiralformer import FAMILIES
from workshop.benchmarks.measuring import small_grids
from workshop.benchmarks.peaks import measure_peaks, peaks_table
from workshop.files import check_file, write_json


@dataclass
class MemoryArguments:
    """Whose layers, and where to write."""

    layer_family: str = field(
        default="gpt_neox",
        metadata={"help": "Whose layers all models have; transformers' own is the first.", "choices": [*FAMILIES]},
    )
    device: str = field(default="cpu", metadata={"help": "cpu, or cuda where there is one."})
    output: str = field(default="runs/benchmark_memory.json", metadata={"help": "Where the counts go."})

    def __post_init__(self):
        check_file("output", self.output)


def main(argv: list[str] | None = None) -> dict:
    (arguments,) = HfArgumentParser(MemoryArguments).parse_args_into_dataclasses(argv)
    found = measure_peaks(small_grids(arguments.layer_family)[0], torch.device(arguments.device))
    write_json(arguments.output, found)
    print(peaks_table(found))
    return found


if __name__ == "__main__":
    main()
