"""
SpiralFormer written from its equations: one row, token by token, in float64. Slow and obvious, to test against.

Shares no code with the package. Sources: arXiv 2602.11698 (SpiralFormer) for chunks, down-scaling, up-scaling, shift
and anchor; arXiv 2510.07739 (MeSH) for the memory slots; arXiv 2604.21254 (Hyperloop) for the streams; the layers of
GPT-NeoX, Llama and Qwen3 as in transformers; arXiv 2309.00071 (YaRN) and 2407.21783 (Llama 3) for their rotary
frequencies. No dropout; gradients flow into weights and embeddings. `config` is anything with the attributes of
SpiralFormerConfig.

Letters: L tokens, K latents (chunks) of a level, G tokens in a chunk, D hidden size, H heads of queries, J heads of
keys and values, E size of a head, T iterations, S slots, N streams, V vocabulary. A state is a (D,) vector; a sequence
of states is a list of them, one per token or one per latent.
"""

import math

import torch
from torch import Tensor
from transformers.activations import ACT2FN

State = Tensor
States = list[Tensor]
Weights = dict[str, Tensor]


def reference_logits(config, state_dict: Weights, input_ids) -> Tensor:
    """Logits (L, V) in float64 of one unpadded row of L >= 1 token ids (a 1-D LongTensor or a list)."""
    embeddings = state_dict["model.embed_tokens.weight"]
    return reference_logits_from_embeddings(config, state_dict, embeddings[torch.as_tensor(input_ids)])


def reference_logits_from_embeddings(config, state_dict: Weights, embeddings: Tensor) -> Tensor:
    """
    Logits (L, V) of one row of embeddings (L, D), not yet scaled. The whole of Algorithm 1:
    x -> v = f_pre(x) -> T iterations -> head(norm(f_post(h_T))).
    """
    scale = math.sqrt(config.hidden_size) if config.scale_embeddings else 1.0
    x = [scale * embedding for embedding in embeddings.to(torch.float64)]
    v = run_layers(config, state_dict, "model.prelude", range(config.num_prelude_layers), x)
    h = run_loop(config, state_dict, x, v) if config.chunk_sizes else v
    y = run_layers(config, state_dict, "model.coda", range(config.num_coda_layers), h)
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    return torch.stack(
        [linear(state_dict, head, norm(config, state_dict, "model.norm", state), bias=False) for state in y]
    )


# -- topology: how the update of an iteration meets the state -----------------------------------------------------


def run_loop(config, weights: Weights, x: States, v: States) -> States:
    """h_T from the embeddings x and the prelude's output v: h_{t+1} = Topology(ut_t, h_t, carrier, t)."""
    if config.topology == "mesh":
        return run_mesh_loop(config, weights, x, v)
    if config.topology == "hyper_connections":
        return run_streams_loop(config, weights, v)
    h = v
    for t in range(len(config.chunk_sizes)):
        update = run_iteration(config, weights, t, h)
        if config.topology == "anchor":  # h_{t+1} = ut_t + h_0, with h_0 = v
            h = [new + first for new, first in zip(update, v, strict=True)]
        elif config.topology == "residual":  # h_{t+1} = ut_t + h_t
            h = [new + old for new, old in zip(update, h, strict=True)]
        elif config.topology == "base":  # h_{t+1} = ut_t
            h = update
        else:
            known = "mesh, hyper_connections, anchor, residual or base"
            raise ValueError(f"`topology` must be {known}, but got {config.topology!r}.")
    return h


def run_mesh_loop(config, weights: Weights, x: States, v: States) -> States:
    """h_T of MeSH: m_0 = x and the other slots zero; cycle 0 stores v, cycle t + 1 the update of iteration t."""
    iterations = len(config.chunk_sizes)
    num_slots = iterations + 3 if config.num_memory_slots is None else config.num_memory_slots
    empty = [torch.zeros_like(state) for state in x]
    memory = [x] + [empty] * (num_slots - 1)  # S slots of L states
    memory, h = run_mesh_cycle(weights, 0, memory, new=v, entered=v if config.first_routers == "prelude" else x)
    for t in range(iterations):
        update = run_iteration(config, weights, t, h)
        memory, h = run_mesh_cycle(weights, t + 1, memory, new=update, entered=h)
    return h


def run_mesh_cycle(
    weights: Weights, cycle: int, memory: list[States], new: States, entered: States
) -> tuple[list[States], States]:
    """
    One write and read, per token: m_b += w_b * new, then h = sum_b r_b * m_b. Both routers look at the state that
    entered the block, not at what it made of it. Returns the new memory and h.
    """
    num_slots = len(memory)
    written = [[] for _ in range(num_slots)]
    h = []
    for token, state in enumerate(entered):
        write = linear(weights, f"model.topology.write.{cycle}", state).softmax(dim=-1)  # (S,)
        read = linear(weights, f"model.topology.read.{cycle}", state).softmax(dim=-1)  # (S,)
        if len(write) != num_slots or len(read) != num_slots:
            raise ValueError(f"The routers of cycle {cycle} must have {num_slots} slots, but got {len(write)}.")
        for slot in range(num_slots):
            written[slot].append(memory[slot][token] + write[slot] * new[token])
        h.append(sum(read[slot] * written[slot][token] for slot in range(num_slots)))
    return written, h


def run_streams_loop(config, weights: Weights, v: States) -> States:
    """h_T of hyper-connections: every stream starts as v."""
    num_streams = 4 if config.num_streams is None else config.num_streams
    streams = [[state] * num_streams for state in v]  # L tokens, N streams each
    for t in range(len(config.chunk_sizes)):
        h = read_streams(config, weights, t, streams)
        streams = write_streams(config, weights, t, streams, run_iteration(config, weights, t, h))
    return read_streams(config, weights, len(config.chunk_sizes), streams)


def read_streams(config, weights: Weights, t: int, streams: list[States]) -> States:
    """h_t = sum_n p_n Y_n of every token, its gates those of iteration t; after the last the mean of the streams."""
    if t == len(config.chunk_sizes):
        return [sum(of_token) / len(of_token) for of_token in streams]
    h = []
    for of_token in streams:
        read, _, _ = stream_gates(config, weights, t, of_token)
        h.append(sum(gate * stream for gate, stream in zip(read, of_token, strict=True)))
    return h


def write_streams(config, weights: Weights, t: int, streams: list[States], update: States) -> list[States]:
    """o = u + e, Y_n <- r_n Y_n + q_n o, with the gates of the streams that iteration t has read."""
    written = []
    for of_token, new in zip(streams, update, strict=True):
        _, keep, write = stream_gates(config, weights, t, of_token)
        output = new + weights[f"model.topology.connections.{t}.loop_vector"]
        written.append([keep[n] * stream + write[n] * output for n, stream in enumerate(of_token)])
    return written


def stream_gates(config, weights: Weights, t: int, streams: States) -> tuple[Tensor, Tensor, Tensor]:
    """p, r and q (N,) of one token's streams: sigmoid(a W z + b), the last of them twice that; z is normed."""
    name = f"model.topology.connections.{t}"
    flat = torch.cat(streams)
    eps = config.layer_norm_eps if config.rms_norm_eps is None else config.rms_norm_eps
    z = flat / torch.sqrt((flat * flat).mean() + eps) * weights[f"{name}.norm.weight"]
    gates = []
    for kind in ("read", "keep", "write"):
        scale, bias = weights[f"{name}.{kind}.scale"], weights[f"{name}.{kind}.bias"]
        logits = scale * linear(weights, f"{name}.{kind}.projection", z, bias=False) + bias
        gates.append(1 / (1 + torch.exp(-logits)))
        if len(gates[-1]) != len(streams):
            raise ValueError(f"{name}.{kind} must have {len(streams)} streams, but got {len(gates[-1])}.")
    read, keep, write = gates
    return read, keep, 2 * write


# -- one iteration: down-scale, core, up-scale, shift -------------------------------------------------------------


def run_iteration(config, weights: Weights, t: int, h: States) -> States:
    """The shifted update ut_t, L states: Down_t, f_loop, Up_t, and shift by s_t."""
    size = config.chunk_sizes[t]
    offset = size // 2 if config.chunk_offsets is None else config.chunk_offsets[t]
    shift = size - 1 if config.causal_shifts is None else config.causal_shifts[t]
    chunk_of = [(i + offset) // size for i in range(len(h))]  # pi(i)
    place_of = [(i + offset) % size for i in range(len(h))]  # rho(i)
    num_chunks = (len(h) + offset) // size  # every filled chunk, also where size does not divide L

    z = [
        down_scale(config, weights, t, [h[i] for i in range(len(h)) if chunk_of[i] == chunk])
        for chunk in range(num_chunks)
    ]
    first_layer = 0 if config.share_core else t * config.num_core_layers
    layers = range(first_layer, first_layer + config.num_core_layers)
    zhat = run_layers(config, weights, "model.core", layers, z)

    u = []  # u_i = lambda beta_{pi(i), rho(i)} zhat_{pi(i)}; ends with the last filled chunk
    for i in range(len(h)):
        if chunk_of[i] < num_chunks:
            latent = zhat[chunk_of[i]]
            beta = allocate(config, weights, t, latent)[place_of[i]]
            u.append(math.sqrt(size) * beta * latent)

    # ut[p] = u[p - s]; s >= g - 1 makes the token p - s belong to a chunk that is full at p.
    return [u[p - shift] if p >= shift else torch.zeros_like(h[p]) for p in range(len(h))]


def down_scale(config, weights: Weights, t: int, members: States) -> State:
    """z_j from the members of chunk j (the first may be short): softmax of their scores a_t h_i + c_t, or the mean."""
    if config.chunk_sizes[t] == 1 or config.down_scaling == "mean":
        pooling = torch.full((len(members),), 1 / len(members), dtype=torch.float64)
    else:
        scores = [linear(weights, f"model.resolutions.{t}.scorer", member) for member in members]  # (1,) each
        pooling = torch.cat(scores).softmax(dim=-1)
    return sum(weight * member for weight, member in zip(pooling, members, strict=True))


def allocate(config, weights: Weights, t: int, latent: State) -> Tensor:
    """beta_j (G,): softmax(B_t zhat_j) over all places, also in the short first chunk, or 1 / g."""
    size = config.chunk_sizes[t]
    if size == 1 or config.up_scaling == "broadcast":
        return torch.full((size,), 1 / size, dtype=torch.float64)
    return linear(weights, f"model.resolutions.{t}.allocator", latent).softmax(dim=-1)


# -- the layers of the families ------------------------------------------------------------------------------------


def run_layers(config, weights: Weights, block: str, layers: range, states: States) -> States:
    """The states (tokens, or latents counted by chunk) after the given layers of a block; nothing in, nothing out."""
    run_layer = run_neox_layer if config.layer_family == "gpt_neox" else run_llama_layer
    for layer in layers:
        states = run_layer(config, weights, f"{block}.{layer}", states)
    return states


def run_neox_layer(config, weights: Weights, name: str, states: States) -> States:
    """Parallel: y = x + attn(ln1 x) + mlp(ln2 x). Sequential: the MLP reads x + attn(ln1 x) instead."""
    normed = [norm(config, weights, f"{name}.input_layernorm", state) for state in states]
    queries, keys, values = project_fused(config, weights, f"{name}.attention.query_key_value", normed)
    attended = attend(config, queries, keys, values)
    outputs = []
    for state, heads in zip(states, attended, strict=True):
        attention = linear(weights, f"{name}.attention.dense", heads, bias=config.attention_bias)
        mlp_input = state if config.use_parallel_residual else state + attention
        normed = norm(config, weights, f"{name}.post_attention_layernorm", mlp_input)
        inner = ACT2FN[config.hidden_act](linear(weights, f"{name}.mlp.dense_h_to_4h", normed))
        outputs.append(state + attention + linear(weights, f"{name}.mlp.dense_4h_to_h", inner))
    return outputs


def run_llama_layer(config, weights: Weights, name: str, states: States) -> States:
    """Llama and Qwen3: y = x + attn(n1 x), then y + W_down(act(W_gate n2 y) * W_up n2 y)."""
    normed = [norm(config, weights, f"{name}.input_layernorm", state) for state in states]
    queries, keys, values = project_apart(config, weights, f"{name}.self_attn", normed)
    attended = attend(config, queries, keys, values)
    bias = config.layer_family == "llama" and config.mlp_bias
    outputs = []
    for state, heads in zip(states, attended, strict=True):
        state = state + linear(weights, f"{name}.self_attn.o_proj", heads, bias=config.attention_bias)
        normed = norm(config, weights, f"{name}.post_attention_layernorm", state)
        gate = ACT2FN[config.hidden_act](linear(weights, f"{name}.mlp.gate_proj", normed, bias=bias))
        inner = gate * linear(weights, f"{name}.mlp.up_proj", normed, bias=bias)
        outputs.append(state + linear(weights, f"{name}.mlp.down_proj", inner, bias=bias))
    return outputs


def project_fused(config, weights: Weights, name: str, states: States) -> tuple[States, States, States]:
    """Queries, keys and values, (H, E) per state; the fused weight holds q, k, v head by head."""
    head_size = size_of_head(config)
    queries, keys, values = [], [], []
    for state in states:
        fused = linear(weights, name, state, bias=config.attention_bias)
        query, key, value = fused.view(config.num_attention_heads, 3 * head_size).split(head_size, dim=-1)
        queries.append(query)
        keys.append(key)
        values.append(value)
    return queries, keys, values


def project_apart(config, weights: Weights, name: str, states: States) -> tuple[States, States, States]:
    """Queries (H, E), keys and values (J, E) per state; Qwen3 norms each head of queries and keys."""
    queries, keys, values = [], [], []
    for state in states:
        query, key, value = (
            linear(weights, f"{name}.{kind}_proj", state, bias=config.attention_bias).view(-1, size_of_head(config))
            for kind in ("q", "k", "v")
        )
        if config.layer_family == "qwen3":
            query = torch.stack([rms_norm(config, weights, f"{name}.q_norm", head) for head in query])
            key = torch.stack([rms_norm(config, weights, f"{name}.k_norm", head) for head in key])
        queries.append(query)
        keys.append(key)
        values.append(value)
    return queries, keys, values


def attend(config, queries: States, keys: States, values: States) -> States:
    """Causal softmax attention with rotary positions 0, 1, ...: the joined heads (H * E,) of each state.

    Grouped queries: H / J heads of queries in a row read one head of keys and values.
    """
    angles = rotary_angles(config, len(queries))
    queries = [rotate(query, *angle) for query, angle in zip(queries, angles, strict=True)]
    keys = [rotate(key, *angle) for key, angle in zip(keys, angles, strict=True)]
    outputs = []
    for position, query in enumerate(queries):
        seen_keys, seen_values = torch.stack(keys[: position + 1]), torch.stack(values[: position + 1])
        heads = []
        for head in range(config.num_attention_heads):
            read = head * seen_keys.shape[1] // config.num_attention_heads
            scores = seen_keys[:, read] @ query[head] / math.sqrt(size_of_head(config))
            heads.append(scores.softmax(dim=-1) @ seen_values[:, read])
        outputs.append(torch.cat(heads))
    return outputs


def size_of_head(config) -> int:
    """E, which GPT-NeoX cannot choose."""
    own = None if config.layer_family == "gpt_neox" else config.head_dim
    return own or config.hidden_size // config.num_attention_heads


def rotary_angles(config, length: int) -> list[tuple[Tensor, Tensor]]:
    """
    Cosines and sines (rotary_dims / 2,) of every position. The library computes them in float32 whatever the dtype of
    the model; so does this, in one table and with the library's order of operations, for equality far below the 1e-7
    that float32 would leave. YaRN makes the angles' vectors longer.
    """
    rope = config.rope_parameters
    rotary_dims = int(size_of_head(config) * rope.get("partial_rotary_factor", 1.0))
    wavelengths = rope["rope_theta"] ** (torch.arange(0, rotary_dims, 2, dtype=torch.float32) / rotary_dims)
    frequencies = 1.0 / wavelengths  # of wavelengths in units of 2 pi tokens
    length_of_vectors = 1.0
    if rope["rope_type"] == "linear":
        frequencies = frequencies / rope["factor"]
    elif rope["rope_type"] == "yarn":
        slow = yarn_share_of_slow(rope, rotary_dims)
        frequencies = 1.0 / (rope["factor"] * wavelengths) * slow + frequencies * (1 - slow)
        length_of_vectors = 0.1 * math.log(rope["factor"]) + 1.0
    elif rope["rope_type"] == "llama3":
        frequencies = torch.stack([llama3_frequency(rope, frequency) for frequency in frequencies])
    elif rope["rope_type"] != "default":
        raise ValueError(f"`rope_type` must be one that the reference knows, but got {rope['rope_type']!r}.")
    table = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    cosines, sines = table.cos() * length_of_vectors, table.sin() * length_of_vectors
    return list(zip(cosines.double(), sines.double(), strict=True))


def yarn_share_of_slow(rope: dict, rotary_dims: int) -> Tensor:
    """YaRN: how far each frequency is slowed by the factor: 0 for those that turn often in the original length."""

    def index_that_turns(turns: float) -> float:
        original = rope["original_max_position_embeddings"]
        return rotary_dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    first = max(math.floor(index_that_turns(rope.get("beta_fast", 32))), 0)
    last = min(math.ceil(index_that_turns(rope.get("beta_slow", 1))), rotary_dims - 1)
    last = last + 0.001 if first == last else last
    index = torch.arange(rotary_dims // 2, dtype=torch.float32)
    return 1 - (1 - ((index - first) / (last - first)).clamp(0, 1))


def llama3_frequency(rope: dict, frequency: Tensor) -> Tensor:
    """Llama 3: short waves stay, long ones are slowed by the factor, and those between are mixed."""
    original, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    waves = original / (2 * math.pi / frequency)  # in the original length
    if waves < low:
        return frequency / rope["factor"]
    if waves > high:
        return frequency
    share = (waves - low) / (high - low)
    return (1 - share) * frequency / rope["factor"] + share * frequency


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Each head of (H, E): dims i and i + rotary_dims / 2 turn together, those after rotary_dims stay."""
    half = len(cosine)
    first, second, rest = heads[:, :half], heads[:, half : 2 * half], heads[:, 2 * half :]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine, rest], dim=-1)


def norm(config, weights: Weights, name: str, state: State) -> State:
    """The norm of one state that the configuration asks for."""
    return (layer_norm if config.norm == "layer_norm" else rms_norm)(config, weights, name, state)


def layer_norm(config, weights: Weights, name: str, state: State) -> State:
    """LayerNorm of one state, with weight and bias."""
    centred = state - state.mean()
    normed = centred / torch.sqrt(centred.square().mean() + config.layer_norm_eps)
    return normed * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def rms_norm(config, weights: Weights, name: str, state: State) -> State:
    """RMSNorm of one state, or of one head, with a weight."""
    return state / torch.sqrt(state.square().mean() + config.rms_norm_eps) * weights[f"{name}.weight"]


def linear(weights: Weights, name: str, state: State, bias: bool = True) -> Tensor:
    """W x + c of one state, or W x where `bias` is False."""
    product = weights[f"{name}.weight"] @ state
    return product + weights[f"{name}.bias"] if bias else product
