"""Times many requests at once: continuous batching against left-padded batches, and against the plain stack.

python scripts/benchmark_batching.py --output runs/batching.json
python scripts/benchmark_batching.py --results runs/batching.json
"""

import json
from dataclasses import dataclass, field

import torch
from transformers import HfArgumentParser

from modeling_spiralformer.layers_spiralformer import FAMILIES
from workshop.benchmarks.batching import Workload, measure_batching, report_batching
from workshop.benchmarks.models import ModelSize
from workshop.files import check_file, read_text, write_json
from workshop.settings import check_counts, check_left_out


@dataclass
class BatchingArguments:
    """Where to run, how often, and where to write."""

    layer_family: str = field(
        default="llama",
        metadata={
            "help": "Whose layers both models have. GPT-NeoX fails in transformers 5.24.",
            "choices": [*FAMILIES],
        },
    )
    device: str = field(default="cpu", metadata={"help": "cpu, or cuda where there is one."})
    width: int = field(default=512, metadata={"help": "Width of both models, a multiple of 64."})
    requests: int = field(default=64, metadata={"help": "Requests of a round."})
    repeats: int = field(default=3, metadata={"help": "Rounds; one that is not counted comes before."})
    threads: int = field(default=1, metadata={"help": "Threads of the CPU."})
    output: str = field(default="runs/batching.json", metadata={"help": "Where the samples go."})
    results: str | None = field(
        default=None, metadata={"help": "Measure nothing: the table of the samples in this file."}
    )

    def __post_init__(self):
        check_counts(self, "width", "requests", "repeats", "threads")
        if self.width % 64:
            raise ValueError(f"`width` must be a multiple of 64, the size of a head, but got {self.width}.")
        if self.results is None:
            check_file("output", self.output)
        else:
            check_left_out(self, "results")


def main(argv: list[str] | None = None) -> None:
    (arguments,) = HfArgumentParser(BatchingArguments).parse_args_into_dataclasses(argv)
    if arguments.results is None:
        size = ModelSize(width=arguments.width, layers=12, vocabulary=4096, longest=2048)
        device, workload = torch.device(arguments.device), Workload(requests=arguments.requests)
        how = (arguments.repeats, arguments.threads)
        write_json(arguments.output, measure_batching(arguments.layer_family, size, workload, device, *how))
        print(f"samples: {arguments.output}")
    print(report_batching(json.loads(read_text("results", arguments.results or arguments.output))))


if __name__ == "__main__":
    main()
