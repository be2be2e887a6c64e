"""Writes `configuration/<name>/config.json`: the 22 published models and `tiny`, from one table."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from files import check_folder
from published import PUBLISHED_MODELS, SCALES, PublishedModel
from transformers import HfArgumentParser, PreTrainedConfig

from modeling_spiralformer import SpiralFormerConfig

ROOT = Path(__file__).resolve().parent.parent
CONFIGURATION_FOLDER = ROOT / "configuration"


@dataclass
class OutputArguments:
    """Where to write."""

    output_dir: str = field(
        default=str(CONFIGURATION_FOLDER), metadata={"help": "Folder that gets one folder per model."}
    )


def published_config(model: PublishedModel) -> SpiralFormerConfig:
    """The configuration of one row of Table 1. A plain stack is GPT-NeoX itself, so its embeddings are not scaled."""
    prelude, core, coda = model.layers
    scale = SCALES[model.scale]
    options = {"topology": model.topology} if model.topology else {"scale_embeddings": False}
    return SpiralFormerConfig(
        architectures=["SpiralFormerForCausalLM"],
        hidden_size=scale.hidden_size,
        intermediate_size=4 * scale.hidden_size,
        num_attention_heads=scale.num_attention_heads,
        num_prelude_layers=prelude,
        num_core_layers=core,
        num_coda_layers=coda,
        chunk_sizes=list(model.chunk_sizes),
        share_core=model.share_core,
        **options,
    )


def tiny_config() -> SpiralFormerConfig:
    """SpiralFormer-B with MeSH at about 0.93M parameters, for the tokenizer in `tokenization/`."""
    return SpiralFormerConfig(
        architectures=["SpiralFormerForCausalLM"],
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=256,
        num_attention_heads=4,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def all_configs() -> dict[str, SpiralFormerConfig]:
    """Every configuration that this project ships, by name."""
    return {"tiny": tiny_config()} | {model.name: published_config(model) for model in PUBLISHED_MODELS}


def to_json(config: SpiralFormerConfig) -> str:
    """
    The text of config.json: every field of SpiralFormer's own, spelled out, and nothing that depends on the version
    of transformers that wrote it.
    """
    inherited = {item.name for item in dataclasses.fields(PreTrainedConfig)}
    own = [item.name for item in dataclasses.fields(config) if item.name not in inherited]
    settings = {"architectures": config.architectures, "model_type": config.model_type}
    settings |= {name: getattr(config, name) for name in own}
    return json.dumps(settings, indent=2) + "\n"


def main(output_dir: str):
    configs = all_configs()
    folder = check_folder("output_dir", output_dir, [f"{name}/config.json" for name in configs])
    for name, config in configs.items():
        path = folder / name / "config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_json(config), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(OutputArguments).parse_args_into_dataclasses()
    main(arguments.output_dir)
