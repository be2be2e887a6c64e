"""What the model tests share: small models with large random weights, drawn configurations, padded batches."""

import torch
from hypothesis import strategies as st
from transformers import Cache, DynamicCache, StaticCache
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from modeling_spiralformer import SpiralFormerConfig, SpiralFormerForCausalLM

VOCAB = 61
# Heads of a small model of each family: grouped queries, and in Qwen3 more values in all heads than in a state.
HEADS = {
    "gpt_neox": {"num_attention_heads": 2},
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6},
}
ROPE_TYPES = (
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 3.0},
    {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 32}
    | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
)


def small_config(**options) -> SpiralFormerConfig:
    """A configuration of a few thousand parameters; `options` replace its fields."""
    defaults = HEADS.get(options.get("layer_family"), HEADS["gpt_neox"]) | {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_prelude_layers": 1,
        "num_core_layers": 2,
        "num_coda_layers": 1,
        "chunk_sizes": [4, 2, 1],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "max_position_embeddings": 512,
    }
    return SpiralFormerConfig(**{**defaults, **options})


def seeded(seed: int) -> torch.Generator:
    """A generator of random numbers on the device of the tests."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def large_weights(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Draws every weight with std 0.15, so that no term of the model is small enough to hide."""
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model


class ExactRMSNorm(LlamaRMSNorm):
    """The library's RMS norm without its cast to float32.

    The cast makes 1e-8 of a difference of 1e-16 where float32 rounds the other way: about one value in 1e10, which
    tests that draw models would meet now and then.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        mean_square = hidden_states.square().mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(mean_square + self.variance_epsilon)


def make_exact(model: torch.nn.Module) -> torch.nn.Module:
    """The model in float64, with RMS norms that are in float64 too."""
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.__class__ = ExactRMSNorm
    return model.double()


def small_model(
    seed: int = 0, implementation: str = "sdpa", dtype=torch.float64, **options
) -> SpiralFormerForCausalLM:
    """A model in evaluation mode, float64 and exact unless asked otherwise, its weights of std 0.15."""
    config = small_config(**options)
    config._attn_implementation = implementation
    model = large_weights(SpiralFormerForCausalLM(config), seed).eval()
    return make_exact(model) if dtype == torch.float64 else model.to(dtype)


def new_cache(model: SpiralFormerForCausalLM, static: bool, columns: int) -> Cache:
    """A cache that holds nothing: of so many columns, or one that grows."""
    return StaticCache(model.config, max_cache_len=columns) if static else DynamicCache(config=model.config)


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids `(rows, length)`, never the special ones."""
    return torch.randint(3, VOCAB, (rows, length), generator=seeded(seed))


def pad_rows(rows: list[torch.Tensor], side: str, total: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads 1-D rows of ids with rubbish ids on one side; returns ids and mask, both `(B, total)`."""
    total = max(len(row) for row in rows) if total is None else total
    ids = random_ids(len(rows), total, seed=99)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        columns = slice(total - len(row), total) if side == "left" else slice(0, len(row))
        ids[index, columns], mask[index, columns] = row, 1
    return ids, mask


def ragged_pads(most: int = 20) -> st.SearchStrategy[list[int]]:
    """Left padding of one to three rows: as it comes, or of every row."""
    return st.integers(0, 1).flatmap(lambda least: st.lists(st.integers(least, most), min_size=1, max_size=3))


@st.composite
def schedules(draw, max_size: int = 16, max_iterations: int = 4) -> dict:
    """Chunk sizes with offsets and shifts, each left at its default or drawn, edges included."""
    sizes = draw(st.lists(st.integers(1, max_size), max_size=max_iterations))
    options: dict = {"chunk_sizes": sizes, "num_core_layers": draw(st.integers(1, 2)) if sizes else 0}
    if draw(st.booleans()):
        options["chunk_offsets"] = [draw(st.sampled_from([0, g - 1, g // 2, g // 3])) for g in sizes]
    if draw(st.booleans()):
        options["causal_shifts"] = [g - 1 + draw(st.sampled_from([0, 1, g, 2 * g + 1])) for g in sizes]
    starts_coarse = bool(sizes) and sizes[0] > 1
    options["num_prelude_layers"] = draw(st.integers(1 if starts_coarse or not sizes else 0, 2))
    options["num_coda_layers"] = draw(st.integers(0, 2))
    return options


@st.composite
def family_options(draw) -> dict:
    """A family of layers, and each of its fields: at its default or drawn, edges included."""
    family = draw(st.sampled_from(list(HEADS)))
    options: dict = {"layer_family": family, **HEADS[family]}
    if family == "gpt_neox":
        options["use_parallel_residual"] = draw(st.booleans())
    else:
        options["num_attention_heads"] = heads = draw(st.sampled_from([2, 4]))
        options["num_key_value_heads"] = draw(st.sampled_from([None, 1, heads // 2]))
        options["head_dim"] = draw(st.sampled_from([None, 2, 6, 10]))
    if family == "llama":
        options["mlp_bias"] = draw(st.booleans())
    options["norm"] = draw(st.sampled_from([None, "layer_norm", "rms_norm"]))
    options["attention_bias"] = draw(st.booleans())
    options["hidden_act"] = draw(st.sampled_from([None, "gelu_new", "relu"]))
    norm = options["norm"] or ("layer_norm" if family == "gpt_neox" else "rms_norm")
    for eps in {f"{norm}_eps", *(["rms_norm_eps"] if family == "qwen3" else [])}:
        options[eps] = draw(st.sampled_from([None, 0.1]))
    options["rope_parameters"] = rope = draw(st.sampled_from([None, *ROPE_TYPES]))
    if rope is not None and family == "gpt_neox" and draw(st.booleans()):
        options["rope_parameters"] = rope | {"partial_rotary_factor": 0.5}
    return options


@st.composite
def model_options(draw, max_size: int = 16) -> dict:
    """Every option that changes the function a model computes."""
    options = draw(schedules(max_size)) | draw(family_options())
    options["topology"] = draw(st.sampled_from(["mesh", "hyper_connections", "anchor", "residual", "base"]))
    if options["topology"] == "mesh" and options["chunk_sizes"] and draw(st.booleans()):
        options["num_memory_slots"] = draw(st.integers(1, 5))
    if options["topology"] == "mesh" and options["chunk_sizes"]:
        options["first_routers"] = draw(st.sampled_from([None, "embeddings", "prelude"]))
    if options["topology"] == "hyper_connections" and options["chunk_sizes"]:
        options["num_streams"] = draw(st.sampled_from([None, 2, 3, 8]))
        options["gate_start"] = draw(st.sampled_from([None, "blend", "replace", "zero"]))
    options["down_scaling"] = draw(st.sampled_from(["self_aggregation", "mean"]))
    options["up_scaling"] = draw(st.sampled_from(["allocation", "broadcast"]))
    for switch in ("share_core", "scale_embeddings", "tie_word_embeddings"):
        options[switch] = draw(st.booleans())
    return options
