"""The models of the benchmark: GPT-NeoX from transformers, looped models and SpiralFormers, all of one width."""

from dataclasses import dataclass

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from modeling_spiralformer import SpiralFormerConfig, SpiralFormerForCausalLM
from workshop.published import SPIRAL_B, SPIRAL_L

SMALL_CACHE = (8, 4, 2)
HEAD_SIZE = 64


@dataclass(frozen=True)
class BenchmarkModel:
    """
    One model of the set: all have the same layers of parameters, but for the `deeper` GPT-NeoX, which has as many as a
    core that runs twice makes of them. `topology` is None for transformers' own GPT-NeoX.
    """

    name: str
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
        config._attn_implementation = "sdpa"
        model_class = GPTNeoXForCausalLM if self.topology is None else SpiralFormerForCausalLM
        torch.manual_seed(0)
        with torch.device(device):
            return model_class(config).to(dtype).eval()

    def config(self, size: "ModelSize") -> GPTNeoXConfig | SpiralFormerConfig:
        """Its configuration at the given size."""
        prelude, core, coda = self.split(size.layers)
        common = {
            "vocab_size": size.vocabulary,
            "hidden_size": size.width,
            "intermediate_size": 4 * size.width,
            "num_attention_heads": size.width // HEAD_SIZE,
            "max_position_embeddings": 2 * size.longest,
        }
        if self.topology is None:
            return GPTNeoXConfig(num_hidden_layers=prelude, **common)
        return SpiralFormerConfig(
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


PLAIN = "gpt-neox"
DEEP = "gpt-neox, deeper"
MODELS = {
    model.name: model
    for model in (
        BenchmarkModel(PLAIN, topology=None),
        BenchmarkModel(DEEP, topology=None, deeper=True),
        BenchmarkModel("looped {1,1}", (1, 1)),
        BenchmarkModel("looped {1,1,1,1}", (1, 1, 1, 1)),
        BenchmarkModel("spiralformer-b", SPIRAL_B),
        BenchmarkModel("spiralformer-b, anchor", SPIRAL_B, topology="anchor"),
        BenchmarkModel("spiralformer-b, offsets 0", SPIRAL_B, zero_offsets=True),
        BenchmarkModel("spiralformer-l", SPIRAL_L),
        BenchmarkModel("spiralformer-l, offsets 0", SPIRAL_L, zero_offsets=True),
        BenchmarkModel("small cache {1/8,1/4,1/2}", SMALL_CACHE),
    )
}
