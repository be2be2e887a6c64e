"""Times prefill, training step and decode of SpiralFormer, looped models and plain stacks; tables and a picture of it.

    python scripts/benchmark.py --output runs/benchmark.json --plot runs/benchmark.png
    python scripts/benchmark.py --results runs/benchmark.json --plot runs/benchmark.png
    python scripts/benchmark.py --only compiled_decoding --threads 1 --output runs/compiled.json
    python scripts/benchmark.py --layer_family llama --output runs/llama.json --plot runs/llama.png

`--full` is for an accelerator: widths 768 and 1024, bfloat16, 4096 tokens, 32 rows.
"""

import json
from dataclasses import dataclass, field
from functools import partial

import torch
from transformers import HfArgumentParser

from modeling_spiralformer.layers_spiralformer import FAMILIES
from workshop.benchmarks.measuring import ALONE, full_grids, measure, small_grids, with_compiled, with_counts
from workshop.benchmarks.results import draw, report
from workshop.files import PICTURES, check_file, read_text, write_json
from workshop.settings import check_counts, check_left_out


@dataclass
class BenchmarkArguments:
    """Where to run, how often, and where to write."""

    layer_family: str = field(
        default="gpt_neox",
        metadata={"help": "Whose layers all models have; transformers' own is the first.", "choices": [*FAMILIES]},
    )
    device: str = field(default="cpu", metadata={"help": "cpu, or cuda where there is one."})
    compiled: bool = field(
        default=False, metadata={"help": "Compiled decoding and training too: minutes of compiling."}
    )
    only: str | None = field(
        default=None,
        metadata={"help": "This, and nothing else. Default: all that runs uncompiled.", "choices": [*ALONE]},
    )
    full: bool = field(default=False, metadata={"help": "The full grid, for an accelerator."})
    repeats: int = field(default=5, metadata={"help": "Rounds through all models; a warm-up round comes before."})
    threads: int | None = field(default=None, metadata={"help": "Threads of the CPU. Default: one for each core."})
    output: str = field(default="runs/benchmark.json", metadata={"help": "Where the samples go."})
    plot: str = field(default="runs/benchmark.png", metadata={"help": "Where to draw."})
    results: str | None = field(
        default=None, metadata={"help": "Measure nothing: tables and picture of the samples in this file."}
    )

    def __post_init__(self):
        check_counts(self, "repeats", "threads")
        check_file("plot", self.plot, PICTURES)
        if self.results is None:
            check_file("output", self.output)
            if self.only not in (None, *ALONE):
                raise ValueError(f"`only` must be one of {', '.join(ALONE)}, but got {self.only!r}.")
            if self.compiled and self.only:
                raise ValueError("`compiled` must be left out with `only`, but got True: it adds nothing.")
            if self.full and self.device == "cpu":
                raise ValueError("`device` must be an accelerator with `full`, but got 'cpu': that would take days.")
            return
        check_left_out(self, "results", "plot")


def main(argv: list[str] | None = None) -> None:
    (arguments,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses(argv)
    if arguments.results is None:
        grids = (full_grids if arguments.full else small_grids)(arguments.layer_family)
        grids = with_compiled(grids) if arguments.compiled else grids
        grids = ALONE[arguments.only](grids) if arguments.only else grids
        how = (torch.device(arguments.device), arguments.repeats, arguments.threads)
        results = with_counts(measure(grids, *how, save=partial(write_json, arguments.output)))
        write_json(arguments.output, results)
        print(f"samples: {arguments.output} ({results['minutes']:.1f} minutes)")
    else:
        results = with_counts(json.loads(read_text("results", arguments.results)))
    print(report(results))
    draw(results, arguments.plot)
    print(f"\npicture: {arguments.plot}")


if __name__ == "__main__":
    main()
