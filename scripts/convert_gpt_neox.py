"""Converts a GPT-NeoX (Pythia) checkpoint into a SpiralFormer of a chosen layer split, or a plain stack back.

python scripts/convert_gpt_neox.py --model_name_or_path EleutherAI/pythia-160m --output_dir runs/converted
"""

from dataclasses import dataclass, field

from checkpoints import load_model, parse_overrides
from conversion import ROUTER_BIAS, parse_core_layers, to_gpt_neox, to_spiralformer
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser, PreTrainedModel, set_seed
from transformers.utils import cached_file

from modeling_spiralformer.configuration_spiralformer import refuse

SOURCES = {"spiralformer": "gpt_neox", "gpt_neox": "spiralformer"}
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


@dataclass
class ConversionArguments:
    """What to convert, into what, and where to."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub name of the checkpoint to convert."})
    output_dir: str = field(metadata={"help": "Folder that gets the converted checkpoint and its tokenizer."})
    to: str = field(
        default="spiralformer",
        metadata={
            "help": "The new architecture. A model goes back to gpt_neox where it has no loop.",
            "choices": [*SOURCES],
        },
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
        if self.to == "gpt_neox":
            for name in ("config_overrides", "core_layers", "router_bias"):
                if getattr(self, name) is not None:
                    refuse(name, getattr(self, name), 'left out with to="gpt_neox": it describes a loop')


def load_source(name_or_path: str, model_type: str) -> PreTrainedModel:
    """A checkpoint with all of its weights, in its own dtype; refused where it is another architecture."""
    config = AutoConfig.from_pretrained(name_or_path)
    if config.model_type != model_type:
        refuse(
            "model_name_or_path", name_or_path, f'a checkpoint of model_type "{model_type}", not "{config.model_type}"'
        )
    return load_model(name_or_path, config, dtype="auto", allow_unused=False)


def convert(arguments: ConversionArguments) -> PreTrainedModel:
    """Reads, converts and writes; returns the converted model."""
    set_seed(arguments.seed)
    source = load_source(arguments.model_name_or_path, SOURCES[arguments.to])
    if arguments.to == "gpt_neox":
        converted = to_gpt_neox(source)
    else:
        core_layers = None if arguments.core_layers is None else parse_core_layers(arguments.core_layers)
        router_bias = ROUTER_BIAS if arguments.router_bias is None else arguments.router_bias
        overrides = parse_overrides(arguments.config_overrides)
        converted = to_spiralformer(source, core_layers, router_bias, **overrides)
    converted.save_pretrained(arguments.output_dir, max_shard_size=arguments.max_shard_size)
    return converted


def carry_tokenizer(name_or_path: str, output_dir: str) -> bool:
    """Writes the source's tokenizer beside the converted model; False where the source has none."""
    found = (cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=False) for name in TOKENIZER_FILES)
    if not any(found):
        return False
    AutoTokenizer.from_pretrained(name_or_path).save_pretrained(output_dir)
    return True


def main(arguments: ConversionArguments) -> None:
    converted = convert(arguments)
    print(f"{type(converted).__name__}, {converted.num_parameters() / 1e6:.2f}M parameters: {arguments.output_dir}")
    if not carry_tokenizer(arguments.model_name_or_path, arguments.output_dir):
        print(f"{arguments.model_name_or_path} has no tokenizer: none was written")


if __name__ == "__main__":
    main(*HfArgumentParser(ConversionArguments).parse_args_into_dataclasses())
