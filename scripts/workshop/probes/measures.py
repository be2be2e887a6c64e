"""Probes of the core: how its heads attend at each resolution, and how much every block changes the state.

Entropy and local mass are the paper's (arXiv 2602.11698, section 4); the relative update size is the first diagnostic
of MeSH (arXiv 2510.07739).

Shape letters: B sequences, L tokens, K latents of a level (queries and keys), D hidden size, T iterations, N layers of
the core, H heads, M keys in the local window.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from modeling_spiralformer import SpiralFormerConfig
from modeling_spiralformer.chunking_spiralformer import ChunkGrid
from modeling_spiralformer.layers_spiralformer import FAMILIES
from workshop.checkpoints import load_config, load_model, load_tokenizer
from workshop.files import read_text
from workshop.molecules.rows import read_molecules
from workshop.probes.routers import average, router_figures
from workshop.tables import config_schedule

ENTROPY, LOCAL_MASS = METRICS = ("key-marginal entropy", "local attention mass")
LARGEST_DEFAULT_LENGTH = 1024
LOCAL_TOKENS = 32  # what the paper's local window spans, in tokens of the text
DYNAMIC_SHARE = 0.4  # of all heads

# -- metrics ----------------------------------------------------------------------------------------------------------


def key_marginal_entropy(attention: torch.Tensor) -> torch.Tensor:
    """H = -sum_k p(k) log p(k) / log K, where p(k) is the mean over queries of A(q, k), normalised.

    Args:
        attention: `(..., K, K)`, rows are queries and columns are keys.

    Returns:
        `(...)`, in [0, 1]: 0 where all queries attend to one key, 1 where all keys get the same attention.

    Raises:
        `ValueError`: for K = 1, where log K is zero.
    """
    keys = attention.shape[-1]
    if keys < 2:
        raise ValueError(f"`attention` must have two keys or more, but got {keys}: give a longer text.")
    marginal = attention.mean(dim=-2)
    marginal = marginal / marginal.sum(dim=-1, keepdim=True)
    return torch.special.entr(marginal).sum(dim=-1) / math.log(keys)


def local_window(chunk_size: int, local_tokens: int = LOCAL_TOKENS) -> int:
    """M = ceil(32 r): how many latents of resolution r = 1 / g make the window of 32 tokens, or of another number."""
    return math.ceil(local_tokens / chunk_size)


def local_attention_mass(attention: torch.Tensor, window: int) -> torch.Tensor:
    """The mean over queries q of the attention to the keys q - M ... q - 1; the query itself is not counted.

    Args:
        attention: `(..., K, K)`, rows are queries and columns are keys.
        window: M; early queries have fewer keys before them.

    Returns:
        `(...)`, in [0, 1).
    """
    keys = attention.shape[-1]
    band = attention.new_ones(keys, keys).tril(-1).triu(-window)
    return (attention * band).sum(dim=-1).mean(dim=-1)


def measure(attention: torch.Tensor, chunk_size: int, local_tokens: int = LOCAL_TOKENS) -> torch.Tensor:
    """Both metrics of the attention `(..., K, K)` of a level, in the order of `METRICS`: `(2, ...)`."""
    mass = local_attention_mass(attention, local_window(chunk_size, local_tokens))
    return torch.stack([key_marginal_entropy(attention), mass])


def uniform_attention(keys: int) -> torch.Tensor:
    """`(K, K)`: every query attends equally to itself and to all keys before it."""
    return torch.ones(keys, keys).tril() / torch.arange(1, keys + 1)[:, None]


def dynamic_heads(values: torch.Tensor) -> list[tuple[int, int]]:
    """The 40% of the heads, rounded up, whose metric has the largest range (max - min) over iterations.

    Args:
        values: `(T, N, H)`, one metric.

    Returns:
        (layer, head) pairs, the largest range first; of equal ranges the first in (layer, head) order.
    """
    ranges = (values.amax(dim=0) - values.amin(dim=0)).flatten()
    count = math.ceil(DYNAMIC_SHARE * len(ranges))
    order = ranges.argsort(descending=True, stable=True)[:count]
    return [divmod(index, values.shape[-1]) for index in order.tolist()]


def relative_update(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """||out - in|| / ||in|| of states `(B, L, D)`, the mean over the tokens of each sequence: `(B,)`.

    A token whose state is zero has no relative update and is left out: the base recurrence leaves zeros where a causal
    shift has moved the updates away.
    """
    size = before.norm(dim=-1)
    ratio = (after - before).norm(dim=-1) / size
    return ratio.masked_fill(size == 0, torch.nan).nanmean(dim=-1)


# -- recording --------------------------------------------------------------------------------------------------------


@dataclass
class Recording:
    """What one forward pass leaves behind.

    Args:
        heads: the metrics of each call of a core layer in order, `(2, B, H)` each.
        embeddings, prelude, coda: `(B, L, D)`: x, v = f_pre(x), and f_post(h_T) before the final norm.
        states: h_0 ... h_T, `(B, L, D)` each.
        routers: with MeSH the weights of its routers "write" and "read" in each cycle, `(B, L, S)` each, S slots.
    """

    heads: list[torch.Tensor] = field(default_factory=list)
    states: list[torch.Tensor] = field(default_factory=list)
    routers: dict[str, list[torch.Tensor]] = field(default_factory=lambda: {"write": [], "read": []})
    embeddings: torch.Tensor | None = None
    prelude: torch.Tensor | None = None
    coda: torch.Tensor | None = None

    def updates(self, config: SpiralFormerConfig) -> dict[str, torch.Tensor]:
        """The relative update `(B,)` of each block, all at token resolution; a block without layers has none.

        The prelude's is that of v against the embeddings x, iteration t's that of h_(t+1) against h_t, and the coda's
        that of its output, before the final norm, against h_T.
        """
        blocks = {}
        if config.num_prelude_layers:
            blocks["prelude"] = (self.embeddings, self.prelude)
        for iteration, pair in enumerate(zip(self.states, self.states[1:], strict=False)):
            blocks[f"iteration {iteration}"] = pair
        if config.num_coda_layers:
            blocks["coda"] = (self.states[-1], self.coda)
        return {name: relative_update(before, after) for name, (before, after) in blocks.items()}


@contextmanager
def recorded(model: PreTrainedModel, local_tokens: int = LOCAL_TOKENS) -> Iterator[Recording]:
    """Records the one forward pass that runs inside; afterwards, errors or not, the model is as it was.

    Attention is measured where it arises and dropped: held for all layers, it would take most of the memory.
    """
    body, config, recording = model.base_model, model.config, Recording()

    def record_state(topology, inputs, outputs):
        if not recording.states:  # h_0 comes of v and x
            recording.prelude, recording.embeddings = inputs
        recording.states.append(outputs[0])

    def record_heads(attention, inputs, outputs):
        iteration = len(recording.heads) // config.num_core_layers
        recording.heads.append(measure(outputs[1], config.chunk_sizes[iteration], local_tokens))

    def record_coda(norm, inputs):
        (recording.coda,) = inputs

    def record_router(kind: str, router, inputs, outputs):
        recording.routers[kind].append(outputs.softmax(dim=-1))

    attention = FAMILIES[config.layer_family].attention
    with ExitStack() as stack:
        stack.callback(body.topology.register_forward_hook(record_state).remove)
        for module in body.core.modules():
            if isinstance(module, attention):
                stack.callback(module.register_forward_hook(record_heads).remove)
        for kind in recording.routers if config.topology == "mesh" else ():
            for router in getattr(body.topology, kind):
                stack.callback(router.register_forward_hook(partial(record_router, kind)).remove)
        stack.callback(body.norm.register_forward_pre_hook(record_coda).remove)
        yield recording


@contextmanager
def eager_evaluation(model: PreTrainedModel) -> Iterator[None]:
    """Attention that returns its matrices, and no dropout; afterwards the model is as it was."""
    implementation, training = model.config._attn_implementation, model.training
    try:
        model.set_attn_implementation("eager")
        model.eval()
        yield
    finally:
        model.set_attn_implementation(implementation)
        model.train(training)


# -- collection -------------------------------------------------------------------------------------------------------


def cut_text(text: str, tokenizer: PreTrainedTokenizerBase, sequences: int, length: int) -> torch.Tensor:
    """The first tokens of a text, nothing added to them, as ids `(sequences, length)`.

    Raises:
        `ValueError`: where the text has too few tokens.
    """
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    needed = sequences * length
    if len(ids) < needed:
        raise ValueError(
            f"`text` must hold {sequences} sequences of {length} tokens, {needed} in all, but got {len(ids)}: give a "
            "longer text, or a smaller `sequences` or `length`."
        )
    return torch.tensor(ids[:needed]).view(sequences, length)


def choose_molecules(
    molecules: list[str], tokenizer: PreTrainedTokenizerBase, sequences: int, length: int
) -> torch.Tensor:
    """The first molecules that have `length` tokens, bos and eos among them, as ids `(sequences, length)`.

    Raises:
        `ValueError`: where there are too few.
    """
    ids = tokenizer(molecules, verbose=False)["input_ids"]
    found = [row for row in ids if len(row) == length][:sequences]
    if len(found) < sequences:
        raise ValueError(
            f"`text` must hold {sequences} molecules of {length} tokens, but has {len(found)}: give more molecules, a "
            "smaller `sequences` or another `length`."
        )
    return torch.tensor(found)


def check_looped(config: PreTrainedConfig) -> None:
    """Raises ValueError where a checkpoint has no iterations that could be compared."""
    if not isinstance(config, SpiralFormerConfig):
        raise ValueError(f"The checkpoint must be a SpiralFormer, but got `model_type` {config.model_type!r}.")
    if config.num_iterations < 2:
        raise ValueError(f"`chunk_sizes` must have two iterations or more to compare, but got {config.chunk_sizes}.")


def check_length(config: SpiralFormerConfig, length: int) -> None:
    """Raises ValueError where sequences of `length` tokens are too short or too long for a model."""
    # Entropy needs two latents, and some token must come after the shift to have an update.
    shortest = max(max(2 * grid.size - grid.offset, grid.shift + 1) for grid in ChunkGrid.of(config))
    longest = config.max_position_embeddings
    if not shortest <= length <= longest:
        raise ValueError(
            f"`length` must be in [{shortest}, max_position_embeddings = {longest}] for `chunk_sizes` "
            f"{config.chunk_sizes}, but got {length}."
        )


def collect(
    model: PreTrainedModel, sequences: torch.Tensor, batch_size: int, local_tokens: int = LOCAL_TOKENS
) -> dict:
    """Probes a looped model on token ids `(sequences, L)`, without padding or cache.

    Returns:
        what JSON can hold: the schedule, the latents K and window M of each iteration, both metrics, the relative
        update of each block, and of MeSH what `average` gives of its routers, else None. A metric has `values`,
        `[iteration][core layer][head]`, the mean over sequences; `samples`, the same of each sequence; `uniform`, what
        uniform attention over as many latents gives, for each iteration; and `dynamic_heads`, (layer, head) pairs.

    Raises:
        `ValueError`: where there are fewer than two iterations to compare, or sequences are too short or too long.
    """
    config = model.config
    check_looped(config)
    check_length(config, sequences.shape[1])
    heads, updates, routers = [], [], []
    with eager_evaluation(model), torch.no_grad():
        for batch in tqdm(sequences.split(batch_size), desc="probing", unit="batch"):
            with recorded(model, local_tokens) as recording:
                model.base_model(input_ids=batch.to(model.device), use_cache=False)
            heads.append(torch.stack(recording.heads, dim=2).cpu())
            updates.append({name: size.cpu() for name, size in recording.updates(config).items()})
            if config.topology == "mesh":
                figures = router_figures(recording.routers["write"], recording.routers["read"])
                routers.append({name: [value.cpu() for value in values] for name, values in figures.items()})
    # (2, sequences, T * N, H) as `[metric][sequence][iteration][core layer][head]`
    samples = torch.cat(heads, dim=1).double().unflatten(2, (config.num_iterations, config.num_core_layers))
    counts = [grid.num_filled(sequences.shape[1]) for grid in ChunkGrid.of(config)]
    levels = zip(counts, config.chunk_sizes, strict=True)
    uniform = [measure(uniform_attention(k), g, local_tokens).tolist() for k, g in levels]
    return {
        "schedule": config_schedule(config),
        "topology": config.topology,
        "chunk_sizes": list(config.chunk_sizes),
        "latents": counts,
        "windows": [local_window(size, local_tokens) for size in config.chunk_sizes],
        "metrics": {
            name: describe_metric(metric, [level[index] for level in uniform])
            for index, (name, metric) in enumerate(zip(METRICS, samples, strict=True))
        },
        "updates": {name: torch.cat([batch[name] for batch in updates]).double().mean().item() for name in updates[0]},
        "routers": average(routers) if routers else None,
    }


def describe_metric(samples: torch.Tensor, uniform: list[float]) -> dict:
    """One metric of `collect` from its samples `(sequences, T, N, H)` and its value for uniform attention."""
    values = samples.mean(dim=0)
    return {
        "values": values.tolist(),
        "samples": samples.tolist(),
        "uniform": uniform,
        "dynamic_heads": dynamic_heads(values),
    }


def probe(
    checkpoints: dict[str, str | None],
    text_file: str,
    sequences: int,
    length: int | None,
    batch_size: int,
    smiles: bool = False,
    local_tokens: int = LOCAL_TOKENS,
) -> dict:
    """
    What was asked and what `collect` found, for each checkpoint that is named, on the same text.

    Args:
        checkpoints: role, which is the setting that names it -> folder or Hub name; None for a role that is left out.
        length: tokens of a sequence. Default: what all of them claim, at most 1024.
        smiles: whether the text holds a molecule a line, each a sequence of its own.
    """
    paths = {role: path for role, path in checkpoints.items() if path is not None}
    configs = {role: load_config(path, field=role) for role, path in paths.items()}
    for config in configs.values():
        check_looped(config)
    if length is None:
        length = min(LARGEST_DEFAULT_LENGTH, *(config.max_position_embeddings for config in configs.values()))
    for config in configs.values():  # before one of them takes its time and the other is refused
        check_length(config, length)
    text = (read_molecules if smiles else read_text)("text", text_file)
    choose = choose_molecules if smiles else cut_text
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    results = {"text": Path(text_file).name, "sequences": sequences, "length": length, "local_tokens": local_tokens}
    results["models"] = {}
    for role, config in configs.items():
        tokenizer = load_tokenizer(paths[role], config, field=role)
        ids = choose(text, tokenizer, sequences, length)
        model = load_model(paths[role], config).to(device)
        results["models"][role] = {
            "checkpoint": Path(paths[role]).name,
            **collect(model, ids, batch_size, local_tokens),
        }
    return results
