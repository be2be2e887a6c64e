"""The models of the benchmark: plain stacks of transformers, looped models and SpiralFormers of their layers."""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from modeling_spiralformer import SpiralFormerConfig
from modeling_spiralformer.layers_spiralformer import FAMILIES
from workshop.published import SPIRAL_B, SPIRAL_L

SMALL_CACHE = (8, 4, 2)
HEAD_SIZE = 64


@dataclass(frozen=True)
class BenchmarkModel:
    """
    One model of the set: all have the same layers of parameters, but for the `deeper` plain stack, which has as many
    as a core that runs twice makes of them. `topology` is None for transformers' own model of the family of layers.
    """

    name: str
    family: str
    chunk_sizes: tuple[int, ...] = ()
    topology: str | None = "mesh"
    zero_offsets: bool = False
    deeper: bool = False

    def split(self, layers: int) -> tuple[int, int, int]:
        """Layers of prelude, core and coda, a third of `layers` each; a plain stack is all prelude."""
        if self.topology is None:
            return (layers * 4 // 3 if self.deeper else layers), 0, 0
        return layers // 3, layers - 2 * (layers // 3), layers // 3

    def build(self, size: "ModelSize", device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
        """The model in evaluation mode with random weights, under sdpa; on the meta device it costs nothing."""
        config = self.config(size)
        torch.manual_seed(0)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype).eval()

    def config(self, size: "ModelSize") -> PreTrainedConfig:
        """Its configuration at the given size: queries in groups of four, and a gated MLP of as many parameters."""
        prelude, core, coda = self.split(size.layers)
        family, heads = FAMILIES[self.family], size.width // HEAD_SIZE
        common = {
            "vocab_size": size.vocabulary,
            "hidden_size": size.width,
            "intermediate_size": 4 * size.width,
            "num_attention_heads": heads,
            "max_position_embeddings": 2 * size.longest,
        }
        if "num_key_value_heads" in family.fields():
            gated = round(8 / 3 * size.width / HEAD_SIZE) * HEAD_SIZE
            common |= {"num_key_value_heads": max(1, heads // 4), "head_dim": HEAD_SIZE, "intermediate_size": gated}
        if self.topology is None:
            return family.config_class(num_hidden_layers=prelude, **common)
        return SpiralFormerConfig(
            layer_family=self.family,
            num_prelude_layers=prelude,
            num_core_layers=core,
            num_coda_layers=coda,
            chunk_sizes=list(self.chunk_sizes),
            chunk_offsets=[0] * len(self.chunk_sizes) if self.zero_offsets else None,
            topology=self.topology,
            **common,
        )


@dataclass(frozen=True)
class ModelSize:
    """What all models of one benchmark share: width, layers of parameters, vocabulary, longest text in tokens."""

    width: int
    layers: int
    vocabulary: int
    longest: int


def plain_name(family: str) -> str:
    """What the benchmark calls transformers' own model of a family of layers."""
    return family.replace("_", "-")


def deeper_name(family: str) -> str:
    """What it calls the deeper one."""
    return f"{plain_name(family)}, deeper"


def models_of(family: str) -> dict[str, BenchmarkModel]:
    """Every model of the benchmark by name, with layers of one family."""
    models = (
        BenchmarkModel(plain_name(family), family, topology=None),
        BenchmarkModel(deeper_name(family), family, topology=None, deeper=True),
        BenchmarkModel("looped {1,1}", family, (1, 1)),
        BenchmarkModel("looped {1,1,1,1}", family, (1, 1, 1, 1)),
        BenchmarkModel("spiralformer-b", family, SPIRAL_B),
        BenchmarkModel("spiralformer-b, anchor", family, SPIRAL_B, topology="anchor"),
        BenchmarkModel("spiralformer-b, offsets 0", family, SPIRAL_B, zero_offsets=True),
        BenchmarkModel("spiralformer-l", family, SPIRAL_L),
        BenchmarkModel("spiralformer-l, offsets 0", family, SPIRAL_L, zero_offsets=True),
        BenchmarkModel("small cache {1/8,1/4,1/2}", family, SMALL_CACHE),
    )
    return {model.name: model for model in models}
