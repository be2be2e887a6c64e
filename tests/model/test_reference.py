"""The reference itself: the library's model where no chunk is longer than a token, and no token sees a later one."""

from types import SimpleNamespace

import pytest
import torch
from reference import reference_logits, reference_logits_from_embeddings
from support import ROPE_TYPES, make_exact, seeded
from transformers import GPTNeoXForCausalLM, LlamaForCausalLM, Qwen3ForCausalLM

VOCAB_SIZE, HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_HEADS = 40, 16, 24, 2
STD = 0.15


# The library's model of each family, and what it has instead of GPT-NeoX's fields.
MODELS = {"gpt_neox": GPTNeoXForCausalLM, "llama": LlamaForCausalLM, "qwen3": Qwen3ForCausalLM}
FAMILY_FIELDS = {
    "gpt_neox": {},
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "mlp_bias": False},
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6},
}
GATED = {"norm": "rms_norm", "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False}
GATED |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}


def make_config(**settings):
    """A small config with the attributes of SpiralFormerConfig, without importing its class."""
    family = settings.get("layer_family", "gpt_neox")
    defaults = {
        "layer_family": family,
        "norm": "layer_norm",
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
        "first_routers": None,
        "num_streams": None,
        "share_core": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "scale_embeddings": True,
        "use_parallel_residual": True,
        "attention_bias": True,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "rms_norm_eps": None,
        "tie_word_embeddings": False,
    }
    of_family = FAMILY_FIELDS[family] | ({} if family == "gpt_neox" else GATED)
    return SimpleNamespace(**(defaults | of_family | settings))


def random_weights(config, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every parameter that the config needs, by checkpoint name, float64: N(0, STD), norm weights around 1."""
    generator = seeded(seed)
    weights = {}

    def add(name: str, outputs: int, inputs: int | None = None, bias: bool = True):
        shape = (outputs,) if inputs is None else (outputs, inputs)
        centre = 1.0 if inputs is None else 0.0
        weights[f"{name}.weight"] = centre + STD * torch.randn(shape, generator=generator, dtype=torch.float64)
        if bias:
            weights[f"{name}.bias"] = STD * torch.randn(outputs, generator=generator, dtype=torch.float64)

    width, iterations, has_bias = config.hidden_size, len(config.chunk_sizes), config.norm == "layer_norm"
    core_layers = config.num_core_layers * (1 if config.share_core else iterations)
    add("model.embed_tokens", config.vocab_size, width, bias=False)
    for block, layers in (
        ("prelude", config.num_prelude_layers),
        ("core", core_layers),
        ("coda", config.num_coda_layers),
    ):
        for layer in range(layers):
            name = f"model.{block}.{layer}"
            add(f"{name}.input_layernorm", width, bias=has_bias)
            add(f"{name}.post_attention_layernorm", width, bias=has_bias)
            add_layer = add_neox_layer if config.layer_family == "gpt_neox" else add_llama_layer
            add_layer(config, name, add)
    for t, size in enumerate(config.chunk_sizes):
        if size > 1 and config.down_scaling == "self_aggregation":
            add(f"model.resolutions.{t}.scorer", 1, width)
        if size > 1 and config.up_scaling == "allocation":
            add(f"model.resolutions.{t}.allocator", size, width)
    if config.chunk_sizes and config.topology == "mesh":
        for cycle in range(iterations + 1):
            for router in ("write", "read"):
                add(f"model.topology.{router}.{cycle}", config.num_memory_slots or iterations + 3, width)
    weights |= stream_weights(config, generator)
    add("model.norm", width, bias=has_bias)
    if not config.tie_word_embeddings:
        add("lm_head", config.vocab_size, width, bias=False)
    return weights


def stream_weights(config, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """What hyper-connections add, and nothing for another topology."""
    streams, weights = config.num_streams or 4, {}
    flat = streams * config.hidden_size
    shapes = {"norm.weight": (flat,), "loop_vector": (config.hidden_size,)}
    for gate in ("read", "keep", "write"):
        shapes |= {f"{gate}.projection.weight": (streams, flat), f"{gate}.scale": (1,), f"{gate}.bias": (streams,)}
    for t in range(len(config.chunk_sizes) if config.topology == "hyper_connections" else 0):
        for name, shape in shapes.items():
            weight = torch.randn(shape, generator=generator, dtype=torch.float64)
            weights[f"model.topology.connections.{t}.{name}"] = weight
    return weights


def add_neox_layer(config, name: str, add) -> None:
    width = config.hidden_size
    add(f"{name}.attention.query_key_value", 3 * width, width, bias=config.attention_bias)
    add(f"{name}.attention.dense", width, width, bias=config.attention_bias)
    add(f"{name}.mlp.dense_h_to_4h", config.intermediate_size, width)
    add(f"{name}.mlp.dense_4h_to_h", width, config.intermediate_size)


def add_llama_layer(config, name: str, add) -> None:
    width, inner, bias = config.hidden_size, config.intermediate_size, getattr(config, "mlp_bias", False)
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    for kind, outputs, inputs in (
        ("q", queries, width),
        ("k", keys, width),
        ("v", keys, width),
        ("o", width, queries),
    ):
        add(f"{name}.self_attn.{kind}_proj", outputs, inputs, bias=config.attention_bias)
    for kind, outputs, inputs in (("gate", inner, width), ("up", inner, width), ("down", width, inner)):
        add(f"{name}.mlp.{kind}_proj", outputs, inputs, bias=bias)
    if config.layer_family == "qwen3":
        add(f"{name}.self_attn.q_norm", config.head_dim, bias=False)
        add(f"{name}.self_attn.k_norm", config.head_dim, bias=False)


def random_ids(length: int, seed: int = 0) -> torch.Tensor:
    """A row of token ids (L,)."""
    return torch.randint(VOCAB_SIZE, (length,), generator=seeded(seed))


def library_logits(config, weights: dict[str, torch.Tensor], layers: list[str], input_ids: torch.Tensor):
    """Logits (L, V) of the library's model in float64 under sdpa, its stack made of the named layers in turn."""
    model_class = MODELS[config.layer_family]
    given = {name: value for name, value in vars(config).items() if name in model_class.config_class().to_dict()}
    given |= {"num_hidden_layers": len(layers), "rope_parameters": dict(config.rope_parameters)}
    model = model_class(model_class.config_class(**given, attn_implementation="sdpa"))
    stack, embeddings, norm = (
        ("gpt_neox.layers", "gpt_neox.embed_in", "gpt_neox.final_layer_norm")
        if config.layer_family == "gpt_neox"
        else ("model.layers", "model.embed_tokens", "model.norm")
    )
    renamed = {
        f"{embeddings}.weight": weights["model.embed_tokens.weight"],
        "lm_head.weight": weights.get("lm_head.weight", weights["model.embed_tokens.weight"]),
    }
    renamed |= {name.replace("model.norm", norm): weights[name] for name in weights if name.startswith("model.norm.")}
    for index, layer in enumerate(layers):
        for name, weight in weights.items():
            if name.startswith(f"model.{layer}."):
                renamed[name.replace(f"model.{layer}.", f"{stack}.{index}.")] = weight
    model = make_exact(model).eval()
    model.load_state_dict(renamed)
    with torch.no_grad():
        return model(input_ids=input_ids[None]).logits[0]


ROPES = [{"rope_parameters": {"rope_theta": 1e4} | rope} for rope in ROPE_TYPES]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_parallel_residual": False, "attention_bias": False},
        {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3, "tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4, "partial_rotary_factor": 0.25}},
        *({"rope_parameters": rope["rope_parameters"] | {"partial_rotary_factor": 0.5}} for rope in ROPES),
        *({"layer_family": family, **rope} for family in ("llama", "qwen3") for rope in ROPES),
        {"layer_family": "llama", "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 0.1},
        {"layer_family": "llama", "num_key_value_heads": 4, "head_dim": 10, "tie_word_embeddings": True},
        {"layer_family": "qwen3", "num_key_value_heads": 1, "attention_bias": True, "rms_norm_eps": 0.1},
    ],
    ids=str,
)
def test_an_empty_schedule_is_the_librarys_model(settings):
    config = make_config(chunk_sizes=[], num_core_layers=0, num_prelude_layers=2, scale_embeddings=False, **settings)
    weights, input_ids = random_weights(config), random_ids(33)
    expected = library_logits(config, weights, ["prelude.0", "prelude.1", "coda.0"], input_ids)
    torch.testing.assert_close(reference_logits(config, weights, input_ids), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("share_core", [True, False])
@pytest.mark.parametrize("family", MODELS)
def test_single_token_chunks_under_base_are_a_deeper_model(family, share_core):
    config = make_config(
        layer_family=family,
        chunk_sizes=[1, 1],
        num_core_layers=2,
        topology="base",
        share_core=share_core,
        scale_embeddings=False,
    )
    weights, input_ids = random_weights(config), random_ids(20)
    core = [0, 1, 0, 1] if share_core else [0, 1, 2, 3]
    layers = ["prelude.0", *(f"core.{layer}" for layer in core), "coda.0"]
    expected = library_logits(config, weights, layers, input_ids)
    torch.testing.assert_close(reference_logits(config, weights, input_ids), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"topology": "anchor", "chunk_sizes": [5, 3], "chunk_offsets": [4, 0], "share_core": False},
        {"topology": "residual", "chunk_sizes": [6, 4], "causal_shifts": [6, 9], "down_scaling": "mean"},
        {"topology": "base", "chunk_sizes": [2, 1], "causal_shifts": [1, 2], "up_scaling": "broadcast"},
        {"chunk_sizes": [16, 7], "chunk_offsets": [0, 6], "num_memory_slots": 2, "scale_embeddings": False},
        {"layer_family": "llama", "chunk_sizes": [5, 1]},
        {"topology": "hyper_connections", "chunk_sizes": [3, 1], "num_streams": 3},
        {"layer_family": "qwen3", "topology": "anchor", "chunk_sizes": [3, 2]},
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
