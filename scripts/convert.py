"""Converts a GPT-NeoX, Llama or Qwen3 checkpoint into a SpiralFormer of a chosen layer split, or a plain stack back.

python scripts/convert.py --model_name_or_path EleutherAI/pythia-160m --output_dir runs/converted
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser, PreTrainedModel, set_seed

from modeling_spiralformer.configuration_spiralformer import refuse
from modeling_spiralformer.files_spiralformer import remove_replaced, write_digests
from workshop.checkpoints import CHECKPOINT_FILES, has_tokenizer, parse_overrides, remove_replaced_tokenizer
from workshop.conversion import (
    FAMILY_OF,
    ROUTER_BIAS,
    ROUTER_BIAS_RANGE,
    load_source,
    parse_core_layers,
    to_plain,
    to_spiralformer,
)
from workshop.files import check_folder
from workshop.settings import LARGEST_SEED, check_numbers


@dataclass
class ConversionArguments:
    """What to convert, into what, and where to."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub name of the checkpoint to convert."})
    output_dir: str = field(metadata={"help": "Folder that gets the converted checkpoint and its tokenizer."})
    to: str = field(
        default="spiralformer",
        metadata={
            "help": "The new architecture. A model without a loop goes back to that of its layers.",
            "choices": ["spiralformer", *FAMILY_OF],
        },
    )
    gguf_file: str | None = field(
        default=None, metadata={"help": "The GGUF file of the folder or repository: it is dequantised."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": 'Fields of the loop, such as "num_prelude_layers=2,num_core_layers=4,chunk_sizes=[4,2,1]".'},
    )
    core_layers: list[str] | None = field(
        default=None,
        metadata={"help": 'One entry per core layer: a source layer, "4", or the mean of several, "4+5".'},
    )
    router_bias: float | None = field(
        default=None, metadata={"help": f"How firmly the routers of MeSH start. Default: {ROUTER_BIAS}."}
    )
    max_shard_size: str = field(default="5GB", metadata={"help": "Largest file of weights."})
    seed: int = field(default=42, metadata={"help": "For the parameters that the source does not have."})

    def __post_init__(self):
        check_numbers(self, router_bias=ROUTER_BIAS_RANGE, seed=(0, LARGEST_SEED))
        if self.to != "spiralformer":
            allowed = f'left out with to="{self.to}": what is a SpiralFormer becomes a plain stack'
            for name in ("gguf_file", "config_overrides", "core_layers", "router_bias"):
                if getattr(self, name) is not None:
                    refuse(name, getattr(self, name), allowed)


def convert(arguments: ConversionArguments) -> PreTrainedModel:
    """Reads, converts and writes; returns the converted model."""
    output = check_folder("output_dir", arguments.output_dir)
    if output.resolve() == Path(arguments.model_name_or_path).resolve():
        refuse("output_dir", arguments.output_dir, "another folder than that of the source")
    set_seed(arguments.seed)
    source, tokenizer = load_source(arguments.model_name_or_path, arguments.to, arguments.gguf_file)
    if tokenizer is None and output.is_dir() and has_tokenizer(arguments.output_dir):
        refuse("output_dir", arguments.output_dir, "a folder without a tokenizer, as the source has none")
    if arguments.to != "spiralformer":
        converted = to_plain(source)
    else:
        core_layers = None if arguments.core_layers is None else parse_core_layers(arguments.core_layers)
        overrides = parse_overrides(arguments.config_overrides)
        converted = to_spiralformer(source, core_layers, arguments.router_bias, **overrides)
    converted.save_pretrained(arguments.output_dir, max_shard_size=arguments.max_shard_size)
    remove_replaced(arguments.output_dir)  # a model of the library leaves what was there
    if tokenizer is not None:
        tokenizer.save_pretrained(arguments.output_dir)
        remove_replaced_tokenizer(tokenizer, arguments.output_dir)
    write_digests(arguments.output_dir, CHECKPOINT_FILES)
    return converted


def main(arguments: ConversionArguments) -> None:
    converted = convert(arguments)
    print(f"{type(converted).__name__}, {converted.num_parameters() / 1e6:.2f}M parameters: {arguments.output_dir}")
    if arguments.gguf_file is None and not has_tokenizer(arguments.model_name_or_path):
        print(f"{arguments.model_name_or_path} has no tokenizer: none was written")


if __name__ == "__main__":
    main(*HfArgumentParser(ConversionArguments).parse_args_into_dataclasses())
