"""
Figures of arXiv 2602.11698: the schedules, parameters and FLOPs of the 22 models of its Table 1, and those of its
perplexities that the experiments of `scripts/experiments/` are compared with. Six models of arXiv 2604.21254
(Hyperloop), and two of arXiv 2605.06322 (SMolLM).
"""

import dataclasses
import json
from dataclasses import dataclass

from transformers import PreTrainedConfig

from modeling_spiralformer import SpiralFormerConfig
from workshop.costs import count_parameters, count_published_flops
from workshop.tables import config_schedule, format_schedule

SPIRAL_B = (8, 4, 2, 1)
SPIRAL_L = (16, 8, 4, 2)
LOOPED = (1, 1)


@dataclass(frozen=True)
class Scale:
    """Width and heads that all models of one scale share."""

    hidden_size: int
    num_attention_heads: int


SCALES = {"160m": Scale(768, 12), "410m": Scale(1024, 16), "1b": Scale(2048, 8), "1.4b": Scale(2048, 16)}


@dataclass(frozen=True)
class PublishedModel:
    """
    One row of Table 1. `layers` are (prelude, core, coda); parameters in millions; `teraflops` are 1e12 floating-point
    operations of a 4096-token prefill. `topology` is None for a plain stack.
    """

    family: str
    scale: str
    topology: str | None
    layers: tuple[int, int, int]
    chunk_sizes: tuple[int, ...]
    parameters: float
    non_embedding: float
    teraflops: float
    share_core: bool = True

    @property
    def name(self) -> str:
        """Its folder in `configuration/`: family, topology where there is one, scale."""
        return "-".join(part for part in (self.family, self.topology, self.scale) if part)


PUBLISHED_MODELS = (
    PublishedModel("pythia", "160m", None, (12, 0, 0), (), 163.5, 85.1, 1.65),
    PublishedModel("looped", "160m", "anchor", (2, 4, 2), LOOPED, 135.2, 56.7, 1.65),
    PublishedModel("looped", "160m", "mesh", (2, 4, 2), LOOPED, 135.2, 56.7, 1.65),
    PublishedModel("spiralformer-b", "160m", "mesh", (2, 4, 2), SPIRAL_B, 135.2, 56.8, 1.48),
    PublishedModel("spiralformer-l", "160m", "mesh", (4, 4, 4), SPIRAL_L, 163.6, 85.1, 1.49),
    PublishedModel("pythia", "410m", None, (24, 0, 0), (), 407.4, 302.3, 4.59),
    PublishedModel("looped", "410m", "anchor", (4, 8, 4), LOOPED, 306.7, 201.5, 4.59),
    PublishedModel("looped", "410m", "mesh", (4, 8, 4), LOOPED, 306.7, 201.6, 4.59),
    PublishedModel("spiralformer-b", "410m", "anchor", (4, 8, 4), SPIRAL_B, 306.7, 201.6, 4.10),
    PublishedModel("spiralformer-b", "410m", "mesh", (4, 8, 4), SPIRAL_B, 306.8, 201.6, 4.11),
    PublishedModel("spiralformer-l", "410m", "mesh", (8, 8, 8), SPIRAL_L, 407.5, 302.4, 4.16),
    PublishedModel("pythia", "1b", None, (16, 0, 0), (), 1020.2, 805.7, 9.67),
    PublishedModel("looped", "1b", "anchor", (3, 5, 3), LOOPED, 768.4, 553.9, 9.67),
    PublishedModel("looped", "1b", "mesh", (3, 5, 3), LOOPED, 768.4, 554.0, 9.67),
    PublishedModel("spiralformer-b", "1b", "mesh", (3, 5, 3), SPIRAL_B, 768.6, 554.1, 8.95),
    PublishedModel("spiralformer-l", "1b", "mesh", (5, 6, 5), SPIRAL_L, 1020.4, 805.9, 8.96),
    PublishedModel("pythia", "1.4b", None, (24, 0, 0), (), 1423.0, 1208.6, 14.08),
    PublishedModel("pythia", "1.4b", "mesh", (4, 8, 4), LOOPED, 1423.1, 1208.7, 14.08, share_core=False),
    PublishedModel("looped", "1.4b", "anchor", (4, 8, 4), LOOPED, 1020.2, 805.7, 14.08),
    PublishedModel("looped", "1.4b", "mesh", (4, 8, 4), LOOPED, 1020.2, 805.8, 14.08),
    PublishedModel("spiralformer-b", "1.4b", "mesh", (4, 8, 4), SPIRAL_B, 1020.4, 805.9, 12.92),
    PublishedModel("spiralformer-l", "1.4b", "mesh", (8, 8, 8), SPIRAL_L, 1423.2, 1208.8, 13.13),
)


@dataclass(frozen=True)
class HyperloopModel:
    """
    One looped or Hyperloop model of arXiv 2604.21254: `layers` run once, the middle ones three times. `parameters` are
    the paper's millions, which hold one of the two matrices of the vocabulary.
    """

    name: str
    hidden_size: int
    layers: tuple[int, int, int]
    topology: str
    parameters: float


HYPERLOOP_MODELS = (
    HyperloopModel("hyperloop-looped-135m", 1024, (2, 4, 2), "base", 135.5),
    HyperloopModel("hyperloop-135m", 1024, (2, 4, 2), "hyper_connections", 135.7),
    HyperloopModel("hyperloop-looped-579m", 2048, (3, 4, 3), "base", 579.4),
    HyperloopModel("hyperloop-579m", 2048, (3, 4, 3), "hyper_connections", 579.7),
    HyperloopModel("hyperloop-looped-990m", 2048, (4, 10, 4), "base", 990.5),
    HyperloopModel("hyperloop-990m", 2048, (4, 10, 4), "hyper_connections", 990.8),
)


@dataclass(frozen=True)
class SmolLMModel:
    """One model of arXiv 2605.06322: a single layer run eight times, with the paper's count of `parameters`."""

    name: str
    hidden_size: int
    intermediate_size: int
    parameters: int


SMOLLM_PASSES = 8
SMOLLM_MODELS = (
    SmolLMModel("smollm-53k", 64, 170, 53_760),
    SmolLMModel("smollm-206k", 128, 341, 206_000),
)

# Perplexity on the Pile, Table 1, the smallest and the largest scale: model of the experiments -> perplexity. GPT-NeoX
# with MeSH and without a loop exists at the largest scale only.
PERPLEXITIES = {
    "160M": {
        "gpt-neox": 11.31,
        "looped-anchor": 11.63,
        "looped-mesh": 11.37,
        "spiralformer-b": 11.29,
        "spiralformer-l": 10.94,
    },
    "1.4B": {
        "gpt-neox": 7.44,
        "gpt-neox-mesh": 7.26,
        "looped-anchor": 7.51,
        "looped-mesh": 7.39,
        "spiralformer-b": 7.30,
        "spiralformer-l": 7.14,
    },
}

# Perplexity on the Pile at 410M of SpiralFormer-B with MeSH, one thing changed: model of the ablations -> perplexity.
ABLATIONS = {
    "published": 9.00,
    "anchor": 9.13,
    "fine-to-coarse": 9.24,
    "no-overlap": 9.10,
    "zero-offsets": 9.01,
    "mean-pooling": 9.01,
    "broadcast": 9.03,
    "neither-learned": 9.03,
}

# The recurrence ratios between which the paper's loss at 410M is lowest (its Figure 3).
BEST_RECURRENCE_RATIOS = (0.3, 0.4)


# -- configurations ------------------------------------------------------------------------------------------------


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


def hyperloop_config(model: HyperloopModel) -> SpiralFormerConfig:
    """The configuration of a model of arXiv 2604.21254: Llama's layers, each pass over all tokens."""
    prelude, core, coda = model.layers
    return SpiralFormerConfig(
        architectures=["SpiralFormerForCausalLM"],
        layer_family="llama",
        vocab_size=32000,
        hidden_size=model.hidden_size,
        intermediate_size=model.hidden_size * 11 // 4,
        num_attention_heads=16,
        num_prelude_layers=prelude,
        num_core_layers=core,
        num_coda_layers=coda,
        chunk_sizes=[1, 1, 1],
        topology=model.topology,
        scale_embeddings=False,
        max_position_embeddings=2048,
        **({"num_streams": 4, "gate_start": "blend"} if model.topology == "hyper_connections" else {}),
    )


def smollm_config(model: SmolLMModel) -> SpiralFormerConfig:
    """
    The configuration of a model of arXiv 2605.06322: Llama's layer with layer norms and dropout, and nothing else.
    Every matrix starts alike. 68 ids are the paper's, of which `tokenization/smiles` has 65.
    """
    return SpiralFormerConfig(
        architectures=["SpiralFormerForCausalLM"],
        layer_family="llama",
        norm="layer_norm",
        vocab_size=68,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_attention_heads=4,
        num_prelude_layers=0,
        num_core_layers=1,
        num_coda_layers=0,
        chunk_sizes=[1] * SMOLLM_PASSES,
        topology="base",
        scale_embeddings=False,
        tie_word_embeddings=True,
        max_position_embeddings=128,
        attention_dropout=0.1,
        hidden_dropout=0.1,
        output_initializer_range=0.02,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def tiny_config(**layers) -> SpiralFormerConfig:
    """SpiralFormer-B with MeSH at about 0.93M parameters, for the tokenizer in `tokenization/`.

    Args:
        layers: fields of the family of layers.
    """
    return SpiralFormerConfig(
        architectures=["SpiralFormerForCausalLM"],
        vocab_size=4096,
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **{"intermediate_size": 256, **layers},
    )


def all_configs() -> dict[str, SpiralFormerConfig]:
    """Every configuration that this project ships, by name."""
    # Queries in pairs, and a gated MLP of nearly as many parameters.
    llama = tiny_config(layer_family="llama", num_key_value_heads=2, intermediate_size=176)
    hyperloop = {model.name: hyperloop_config(model) for model in HYPERLOOP_MODELS}
    published = {model.name: published_config(model) for model in PUBLISHED_MODELS}
    smollm = {model.name: smollm_config(model) for model in SMOLLM_MODELS}
    return {"tiny": tiny_config(), "tiny-llama": llama} | published | hyperloop | smollm


def to_json(config: SpiralFormerConfig) -> str:
    """
    The text of config.json: every field of SpiralFormer's own, spelled out, and nothing that depends on the version
    of transformers that wrote it.
    """
    inherited = {item.name for item in dataclasses.fields(PreTrainedConfig)}
    own = [item.name for item in dataclasses.fields(config) if item.name not in inherited]
    settings = {"architectures": config.architectures, "model_type": config.model_type}
    known = config.to_dict()
    settings |= {name: getattr(config, name) for name in own if name in known}
    return json.dumps(settings, indent=2) + "\n"


# -- what is counted here, beside the paper's ---------------------------------------------------------------------

PREFILL_TOKENS = 4096
TABLE_HEADER = ("model", "layers", "params", "paper", "non-emb.", "paper", "TFLOPs", "paper", "deviation")
SMOLLM_HEADER = ("model", "layers", "params", "paper", "MFLOPs")
HYPERLOOP_HEADER = ("model", "layers", "params", "without embedding", "paper", "TFLOPs")


@dataclass
class Measurement:
    """Counted figures of one model: parameters, and floating-point operations of a prefill (2 per multiply-add)."""

    parameters: int
    non_embedding: int
    flops: int


def measure(config: SpiralFormerConfig) -> Measurement:
    """Counts, with the FLOPs of a prefill of 4096 tokens."""
    return Measurement(*count_parameters(config), count_published_flops(config, PREFILL_TOKENS))


def schedule(model: PublishedModel) -> str:
    """The layers in the paper's notation, such as 2+4x{1/8,1/4,1/2,1}+2."""
    return format_schedule(*model.layers, model.chunk_sizes, model.share_core)


def table_row(model: PublishedModel, measured: Measurement) -> tuple[str, ...]:
    """One line of the table: millions of parameters, 1e12 FLOPs, and by how much the FLOPs deviate."""
    teraflops = measured.flops / 1e12
    return (
        model.name,
        schedule(model),
        f"{measured.parameters / 1e6:.1f}",
        f"{model.parameters:.1f}",
        f"{measured.non_embedding / 1e6:.1f}",
        f"{model.non_embedding:.1f}",
        f"{teraflops:.2f}",
        f"{model.teraflops:.2f}",
        f"{teraflops / model.teraflops - 1:+.1%}",
    )


def without_embedding(config: SpiralFormerConfig, measured: Measurement) -> int:
    """Parameters as arXiv 2604.21254 counts them: of embedding and head, which are not tied, the head alone."""
    return measured.parameters - config.vocab_size * config.hidden_size


def hyperloop_row(model: HyperloopModel) -> tuple[str, ...]:
    """One line of the second table: millions of parameters, 1e12 FLOPs."""
    config = hyperloop_config(model)
    measured = measure(config)
    return (
        model.name,
        config_schedule(config),
        f"{measured.parameters / 1e6:.1f}",
        f"{without_embedding(config, measured) / 1e6:.1f}",
        f"{model.parameters:.1f}",
        f"{measured.flops / 1e12:.2f}",
    )


def smollm_row(model: SmolLMModel) -> tuple[str, ...]:
    """One line of the third table: parameters, 1e6 FLOPs of a prefill of the whole context."""
    config = smollm_config(model)
    parameters, _ = count_parameters(config)
    megaflops = count_published_flops(config, config.max_position_embeddings) / 1e6
    return model.name, config_schedule(config), f"{parameters:,}", f"{model.parameters:,}", f"{megaflops:.1f}"
