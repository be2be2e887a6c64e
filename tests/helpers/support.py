"""What the model tests share: small models with large random weights, drawn configurations, padded batches."""

import torch
from hypothesis import strategies as st

from modeling_spiralformer import SpiralFormerConfig, SpiralFormerForCausalLM

VOCAB = 61


def small_config(**options) -> SpiralFormerConfig:
    """A configuration of a few thousand parameters; `options` replace its fields."""
    defaults = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
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


def large_weights(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Draws every weight with std 0.15, so that no term of the model is small enough to hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model


def small_model(
    seed: int = 0, implementation: str = "sdpa", dtype=torch.float64, **options
) -> SpiralFormerForCausalLM:
    """A model in evaluation mode, float64 unless asked otherwise, its weights of std 0.15."""
    config = small_config(**options)
    config._attn_implementation = implementation
    return large_weights(SpiralFormerForCausalLM(config), seed).to(dtype).eval()


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids `(rows, length)`, never the special ones."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


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
def model_options(draw) -> dict:
    """Every option that changes the function a model computes."""
    options = draw(schedules())
    options["topology"] = draw(st.sampled_from(["mesh", "anchor", "residual", "base"]))
    if options["topology"] == "mesh" and options["chunk_sizes"] and draw(st.booleans()):
        options["num_memory_slots"] = draw(st.integers(1, 5))
    options["down_scaling"] = draw(st.sampled_from(["self_aggregation", "mean"]))
    options["up_scaling"] = draw(st.sampled_from(["allocation", "broadcast"]))
    for switch in ("share_core", "scale_embeddings", "use_parallel_residual", "attention_bias", "tie_word_embeddings"):
        options[switch] = draw(st.booleans())
    options["rope_parameters"] = draw(
        st.sampled_from([None, {"rope_type": "linear", "factor": 2.0}, {"partial_rotary_factor": 0.5}])
    )
    return options
