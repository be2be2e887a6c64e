"""The reference itself: GPT-NeoX where no chunk is longer than a token, and a prefix predicts what the text does."""

from types import SimpleNamespace

import pytest
import torch
from reference import reference_logits, reference_logits_from_embeddings
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

VOCAB_SIZE, HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_HEADS = 40, 16, 24, 2
STD = 0.15


def make_config(**settings):
    """A small config with the attributes of SpiralFormerConfig, without importing the package."""
    defaults = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": INTERMEDIATE_SIZE,
        "num_attention_heads": NUM_HEADS,
        "num_prelude_layers": 1,
        "num_core_layers": 1,
        "num_coda_layers": 1,
        "chunk_sizes": [4, 2, 1],
        "chunk_offsets": None,
        "causal_shifts": None,
        "down_scaling": "self_aggregation",
        "up_scaling": "allocation",
        "topology": "mesh",
        "num_memory_slots": None,
        "share_core": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "scale_embeddings": True,
        "use_parallel_residual": True,
        "attention_bias": True,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    return SimpleNamespace(**(defaults | settings))


def random_weights(config, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every parameter that the config needs, by checkpoint name, float64: N(0, STD), norm weights around 1."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}

    def add(name: str, outputs: int, inputs: int | None = None, bias: bool = True):
        shape = (outputs,) if inputs is None else (outputs, inputs)
        centre = 1.0 if inputs is None else 0.0
        weights[f"{name}.weight"] = centre + STD * torch.randn(shape, generator=generator, dtype=torch.float64)
        if bias:
            weights[f"{name}.bias"] = STD * torch.randn(outputs, generator=generator, dtype=torch.float64)

    width, iterations = config.hidden_size, len(config.chunk_sizes)
    core_layers = config.num_core_layers * (1 if config.share_core else iterations)
    add("model.embed_tokens", config.vocab_size, width, bias=False)
    for block, layers in (
        ("prelude", config.num_prelude_layers),
        ("core", core_layers),
        ("coda", config.num_coda_layers),
    ):
        for layer in range(layers):
            name = f"model.{block}.{layer}"
            add(f"{name}.input_layernorm", width)
            add(f"{name}.post_attention_layernorm", width)
            add(f"{name}.attention.query_key_value", 3 * width, width, bias=config.attention_bias)
            add(f"{name}.attention.dense", width, width, bias=config.attention_bias)
            add(f"{name}.mlp.dense_h_to_4h", config.intermediate_size, width)
            add(f"{name}.mlp.dense_4h_to_h", width, config.intermediate_size)
    for t, size in enumerate(config.chunk_sizes):
        if size > 1 and config.down_scaling == "self_aggregation":
            add(f"model.resolutions.{t}.scorer", 1, width)
        if size > 1 and config.up_scaling == "allocation":
            add(f"model.resolutions.{t}.allocator", size, width)
    if config.chunk_sizes and config.topology == "mesh":
        for cycle in range(iterations + 1):
            for router in ("write", "read"):
                add(f"model.topology.{router}.{cycle}", config.num_memory_slots or iterations + 3, width)
    add("model.norm", width)
    if not config.tie_word_embeddings:
        add("lm_head", config.vocab_size, width, bias=False)
    return weights


def random_ids(length: int, seed: int = 0) -> torch.Tensor:
    """A row of token ids (L,)."""
    return torch.randint(VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed))


def gpt_neox_logits(config, weights: dict[str, torch.Tensor], layers: list[str], input_ids: torch.Tensor):
    """Logits (L, V) of the library's GPT-NeoX in float64 under sdpa, its stack made of the named layers in turn."""
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_attention_heads=config.num_attention_heads,
            num_hidden_layers=len(layers),
            rope_parameters=dict(config.rope_parameters),
            use_parallel_residual=config.use_parallel_residual,
            attention_bias=config.attention_bias,
            hidden_act=config.hidden_act,
            layer_norm_eps=config.layer_norm_eps,
            attn_implementation="sdpa",
        )
    )
    renamed = {
        "gpt_neox.embed_in.weight": weights["model.embed_tokens.weight"],
        "gpt_neox.final_layer_norm.weight": weights["model.norm.weight"],
        "gpt_neox.final_layer_norm.bias": weights["model.norm.bias"],
        "lm_head.weight": weights.get("lm_head.weight", weights["model.embed_tokens.weight"]),
    }
    for index, layer in enumerate(layers):
        for name, weight in weights.items():
            if name.startswith(f"model.{layer}."):
                renamed[name.replace(f"model.{layer}.", f"gpt_neox.layers.{index}.")] = weight
    model = model.double().eval()
    model.load_state_dict(renamed)
    with torch.no_grad():
        return model(input_ids=input_ids[None]).logits[0]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_parallel_residual": False, "attention_bias": False},
        {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3, "tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4, "partial_rotary_factor": 0.25}},
    ],
)
def test_an_empty_schedule_is_gpt_neox(settings):
    config = make_config(chunk_sizes=[], num_core_layers=0, num_prelude_layers=2, scale_embeddings=False, **settings)
    weights, input_ids = random_weights(config), random_ids(33)
    expected = gpt_neox_logits(config, weights, ["prelude.0", "prelude.1", "coda.0"], input_ids)
    torch.testing.assert_close(reference_logits(config, weights, input_ids), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("share_core", [True, False])
def test_single_token_chunks_under_base_are_a_deeper_gpt_neox(share_core):
    config = make_config(
        chunk_sizes=[1, 1], num_core_layers=2, topology="base", share_core=share_core, scale_embeddings=False
    )
    weights, input_ids = random_weights(config), random_ids(20)
    core = [0, 1, 0, 1] if share_core else [0, 1, 2, 3]
    layers = ["prelude.0", *(f"core.{layer}" for layer in core), "coda.0"]
    expected = gpt_neox_logits(config, weights, layers, input_ids)
    torch.testing.assert_close(reference_logits(config, weights, input_ids), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"topology": "anchor", "chunk_sizes": [5, 3], "chunk_offsets": [4, 0], "share_core": False},
        {"topology": "residual", "chunk_sizes": [6, 4], "causal_shifts": [6, 9], "down_scaling": "mean"},
        {"topology": "base", "chunk_sizes": [2, 1], "causal_shifts": [1, 2], "up_scaling": "broadcast"},
        {"chunk_sizes": [16, 7], "chunk_offsets": [0, 6], "num_memory_slots": 2, "scale_embeddings": False},
    ],
)
def test_a_prefix_predicts_what_the_longer_text_predicts(settings):
    config = make_config(**settings)
    weights, input_ids = random_weights(config), random_ids(19)
    whole = reference_logits(config, weights, input_ids)
    for length in range(1, len(input_ids)):
        prefix = reference_logits(config, weights, input_ids[:length].tolist())
        torch.testing.assert_close(prefix, whole[:length], rtol=0, atol=1e-12)


def test_ids_and_their_embeddings_give_the_same_logits():
    config = make_config()
    weights, input_ids = random_weights(config), random_ids(9)
    embeddings = weights["model.embed_tokens.weight"][input_ids]
    from_embeddings = reference_logits_from_embeddings(config, weights, embeddings)
    assert torch.equal(from_embeddings, reference_logits(config, weights, input_ids))
