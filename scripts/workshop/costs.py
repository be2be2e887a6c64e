"""What models cost, counted and not timed: parameters, FLOPs, bytes of weights and cache, layer calls.

Published models are counted on the meta device, where they have shapes and no numbers: no size costs memory. Those of
experiments are small, and counted with numbers: torch's kernels take less time than its shapes do.
"""

import copy
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from modeling_spiralformer import SpiralFormerConfig, SpiralFormerForCausalLM
from modeling_spiralformer.chunking_spiralformer import ChunkGrid
from modeling_spiralformer.layers_spiralformer import FAMILIES
from modeling_spiralformer.level_spiralformer import LatentEntry

# More steps than any pattern of filling levels is long, and a multiple of every published one.
DECODE_STEPS = 32


def meta_model(config: SpiralFormerConfig) -> SpiralFormerForCausalLM:
    """The model without numbers: counting costs neither memory nor time."""
    with torch.device("meta"):
        return SpiralFormerForCausalLM(copy.deepcopy(config)).eval()


def count_parameters(config: SpiralFormerConfig) -> tuple[int, int]:
    """All parameters, and those outside of the embedding and the head."""
    model = meta_model(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    embeddings = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}  # one where they are tied
    return total, total - sum(weight.numel() for weight in embeddings)


def token_ids(model: PreTrainedModel, batch: int, length: int) -> torch.Tensor:
    """Token ids `(batch, length)` on the model's device."""
    return torch.randint(3, model.config.vocab_size, (batch, length), device=model.device)


# -- layer calls --------------------------------------------------------------------------------------------------


def core_passes(config: SpiralFormerConfig) -> float:
    """sum 1 / g: how often a core layer is called per token, each latent a share of its chunk's tokens."""
    return sum(1 / size for size in config.chunk_sizes)


def layer_equivalents(config: PreTrainedConfig) -> float:
    """N_pre + N_post + N_core sum 1 / g: layer calls, and entries of the cache, per token."""
    if not isinstance(config, SpiralFormerConfig):
        return config.num_hidden_layers  # of a model of the library
    return config.num_prelude_layers + config.num_coda_layers + config.num_core_layers * core_passes(config)


@dataclass(frozen=True)
class LayerCall:
    """One layer in one decode step: which weights, how many rows run, how many keys each of them reads."""

    layer: torch.nn.Module
    rows: int
    keys: int


def decode_calls(model: PreTrainedModel, column: int, padding: list[int]) -> list[LayerCall]:
    """The layer calls that a decode step at that column of the batch needs, one entry of `padding` for each row."""
    rows = len(padding)
    body, config = model.base_model, model.config
    if not isinstance(config, SpiralFormerConfig):
        return [LayerCall(layer, rows, column + 1) for layer in body.layers]
    calls = [LayerCall(layer, rows, column + 1) for layer in body.prelude]
    for grid in ChunkGrid.of(config):
        filling = sum(column % grid.size == grid.phase(pads) for pads in padding)
        if filling:
            calls += [LayerCall(layer, filling, column // grid.size + 1) for layer in body.core]
    return calls + [LayerCall(layer, rows, column + 1) for layer in body.coda]


# -- FLOPs --------------------------------------------------------------------------------------------------------


def heads_of_keys(config: PreTrainedConfig) -> tuple[int, int]:
    """Heads of keys and values, fewer than those of queries where these are grouped, and the size of a head."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def call_lengths(config: PreTrainedConfig, length: int) -> list[int]:
    """How many tokens or latents each layer call of a forward over `length` tokens attends over."""
    if not isinstance(config, SpiralFormerConfig):
        return [length] * config.num_hidden_layers
    latents = [grid.num_filled(length) for grid in ChunkGrid.of(config) for _ in range(config.num_core_layers)]
    return [length] * (config.num_prelude_layers + config.num_coda_layers) + latents


def count_flops(model: PreTrainedModel, length: int) -> dict[str, int]:
    """
    FLOPs (2 per multiply-add) of a prefill, and of forward and backward of a training step, batch 1; the model's
    attention is eager from then on. It counts the whole square of queries and keys, as the paper's figures do; the
    entries "... causal" count the half of it that a causal kernel computes.
    """
    model.set_attn_implementation("eager")
    ids = token_ids(model, 1, length)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids, past_key_values=DynamicCache(config=model.config), use_cache=True, logits_to_keep=1)
    counts = {"prefill": counter.get_total_flops()}
    cache = DynamicCache(config=model.config)  # without one GPT-NeoX reads position ids, which have no values here
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids, past_key_values=cache).loss.backward()
    counts["training"] = counter.get_total_flops()
    # Two products of queries, keys and values forward, four backward.
    width = model.config.num_attention_heads * heads_of_keys(model.config)[1]
    square = sum(4 * n * n * width for n in call_lengths(model.config, length))
    counts["prefill causal"] = counts["prefill"] - square // 2
    counts["training causal"] = counts["training"] - 3 * square // 2
    return counts


def count_published_flops(config: SpiralFormerConfig, length: int) -> int:
    """
    FLOPs (2 per multiply-add) of a forward over `length` tokens as the paper's Table 1 counts them: with logits for
    all tokens, and the whole square of queries and keys, which eager attention computes, masked or not.
    """
    model = meta_model(config)
    model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=token_ids(model, 1, length), use_cache=False)
    return counter.get_total_flops()


def repeated_flops(model: PreTrainedModel, tokens: int) -> int:
    """
    What the loop adds to 6 FLOPs for each token and weight, the estimate of training that the library makes: a core
    layer meets one latent in g tokens, each iteration. Below 0 where it runs less than once a token.
    """
    config = model.config
    if not isinstance(config, SpiralFormerConfig) or not config.chunk_sizes:
        return 0
    weights = sum(parameter.numel() for name, parameter in model.named_parameters() if ".core." in name)
    passes = core_passes(config) / (1 if config.share_core else config.num_iterations)
    return int(6 * tokens * weights * (passes - 1))


# -- bytes --------------------------------------------------------------------------------------------------------


def step_weight_bytes(model: PreTrainedModel, context: int) -> float:
    """Bytes of weights that an average decode step reads: layers once a call, everything outside of them once."""
    embedding = model.get_input_embeddings().weight
    kinds = tuple(family.layer for family in FAMILIES.values())
    in_layers = {id(p) for layer in model.modules() if isinstance(layer, kinds) for p in layer.parameters()}
    outside = sum(p.nbytes for p in model.parameters() if id(p) not in in_layers and p is not embedding)
    steps = [decode_calls(model, column, [0]) for column in range(context, context + DECODE_STEPS)]
    called = sum(p.nbytes for calls in steps for call in calls for p in call.layer.parameters())
    return outside + called / DECODE_STEPS


def layer_bytes(layer: CacheLayerMixin) -> int:
    """Bytes of memory behind the states of a cache layer, what is spare of it included."""
    states = [layer.keys, layer.values]
    if isinstance(layer, LatentEntry) and layer.owns_state:
        states += [layer.state.tokens, layer.state.latents]
    return sum(state.untyped_storage().nbytes() for state in states if state is not None)


def cache_layer_bytes(
    model: PreTrainedModel, length: int, batch: int = 1, cache: DynamicCache | None = None
) -> list[int]:
    """Bytes that each layer of the cache holds after a prefill of `length` tokens; works on the meta device.

    Args:
        cache: an empty one. Default: the usual, unquantised.
    """
    cache = DynamicCache(config=model.config) if cache is None else cache
    with torch.no_grad():
        model(token_ids(model, batch, length), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return list(map(layer_bytes, cache.layers))


def cache_bytes(config: SpiralFormerConfig, length: int, batch: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes that the cache holds after a prefill of `length` tokens: one entry per block and level, in order."""
    names = ["prelude"] * config.num_prelude_layers
    for iteration, size in enumerate(config.chunk_sizes):
        names += [f"iteration {iteration}, 1/{size}"] * config.num_core_layers
    names += ["coda"] * config.num_coda_layers
    held = dict.fromkeys(names, 0)
    layers = cache_layer_bytes(meta_model(config).to(dtype), length, batch)
    for name, count in zip(names, layers, strict=True):
        held[name] += count
    return held


def promised_bytes(config: PreTrainedConfig, itemsize: int) -> float:
    """
    2 H E itemsize (N_pre + N_post + N_core sum 1 / g): bytes of cache per token and row that the method promises, H
    being the heads of keys and E their size: H E = d without grouped queries.
    """
    heads, size = heads_of_keys(config)
    return 2 * heads * size * itemsize * layer_equivalents(config)


# -- everything at once -------------------------------------------------------------------------------------------


def count_costs(config: SpiralFormerConfig, block_size: int) -> dict[str, float]:
    """
    What a model costs, counted on blocks of `block_size` tokens: parameters, FLOPs of a training block and of a
    prefill (2 per multiply-add, attention as the full square), bytes of cache in float32, and layer calls of an
    average decode step.
    """
    parameters, non_embedding = count_parameters(config)
    model = SpiralFormerForCausalLM(copy.deepcopy(config)).eval()
    cached = sum(cache_layer_bytes(model, block_size))
    flops = count_flops(model, block_size)
    return {
        "parameters": parameters,
        "non_embedding_parameters": non_embedding,
        "training_flops_per_block": flops["training"],
        "prefill_flops_per_token": flops["prefill"] / block_size,
        "kv_bytes_per_token": cached / block_size,
        "decode_layer_equivalents": layer_equivalents(config),
    }
