"""Errors of smaller numbers: bfloat16 and float16 beside float64, level by level, over depth and length."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import nn
from tqdm import tqdm
from transformers import set_seed

from modeling_spiralformer import SpiralFormerConfig, SpiralFormerForCausalLM
from workshop.checkpoints import load_config, load_model
from workshop.settings import check_counts
from workshop.tables import config_schedule, format_resolution, markdown_table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIZES = (8, 4, 2, 1)  # chunk sizes of models that are made, coarse first, each for its share of the iterations


@dataclass
class NumericsArguments:
    """Which models, and on how long a text."""

    checkpoints: list[str] = field(default_factory=list, metadata={"help": "Trained models, beside those made here."})
    iterations: list[int] = field(default_factory=lambda: [4, 8, 16, 32], metadata={"help": "Of models made here."})
    families: list[str] = field(default_factory=lambda: ["gpt_neox", "llama", "qwen3"], metadata={"help": "Layers."})
    topologies: list[str] = field(
        default_factory=lambda: ["mesh", "anchor", "hyper_connections"], metadata={"help": "Of models made here."}
    )
    lengths: list[int] = field(default_factory=lambda: [64, 512, 2048], metadata={"help": "Tokens of the text."})
    hidden_size: int = field(default=64, metadata={"help": "Of models made here."})
    seed: int = field(default=0, metadata={"help": "Of weights and text."})

    def __post_init__(self):
        check_counts(self, "hidden_size")
        for name, least in (("iterations", len(SIZES)), ("lengths", SIZES[0])):
            if min(getattr(self, name), default=least) < least:
                raise ValueError(f"`{name}` must be numbers of at least {least}, but got {getattr(self, name)}.")


def made_config(arguments: NumericsArguments, family: str, topology: str, iterations: int) -> SpiralFormerConfig:
    """One layer in each part, and so many iterations from coarse to fine."""
    shares = [iterations // len(SIZES) + (place < iterations % len(SIZES)) for place in range(len(SIZES))]
    return SpiralFormerConfig(
        layer_family=family,
        topology=topology,
        chunk_sizes=[size for size, count in zip(SIZES, shares, strict=True) for _ in range(count)],
        vocab_size=1024,
        hidden_size=arguments.hidden_size,
        intermediate_size=4 * arguments.hidden_size,
        num_attention_heads=max(1, arguments.hidden_size // 32),
        num_prelude_layers=1,
        num_core_layers=1,
        num_coda_layers=1,
        max_position_embeddings=max(arguments.lengths),
    )


def models(arguments: NumericsArguments) -> Iterator[tuple[str, SpiralFormerForCausalLM]]:
    """Kind and float32 model: those with the library's start, of all families and topologies, then trained ones."""
    for iterations in arguments.iterations:
        for family, topology in product(arguments.families, arguments.topologies):
            set_seed(arguments.seed)
            config = made_config(arguments, family, topology, iterations)
            yield f"{iterations} iterations", SpiralFormerForCausalLM(config).eval()
    for path in arguments.checkpoints:
        model = load_model(path, load_config(path)).eval()
        yield f"{path}: {config_schedule(model.config)}", model


def states_by_level(model: SpiralFormerForCausalLM, ids: torch.Tensor) -> tuple[dict[str, torch.Tensor], float]:
    """The last state of the prelude, of each resolution and the logits, in float64; the largest value on the way."""
    largest = [torch.zeros(())]

    def watch(module: nn.Module, args: tuple, output: object) -> None:
        for value in output if isinstance(output, tuple) else (output,):
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
                largest.append(value.abs().max().float())

    handles = [module.register_forward_hook(watch) for module in model.modules()]
    with torch.no_grad():
        outputs = model(ids, use_cache=False, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    config = model.config
    after = {"prelude": outputs.hidden_states[config.num_prelude_layers]}
    for iteration, size in enumerate(config.chunk_sizes):
        last = config.num_prelude_layers + (iteration + 1) * config.num_core_layers
        after[format_resolution(size)] = outputs.hidden_states[last]
    after["logits"] = outputs.logits
    return {name: state.double() for name, state in after.items()}, float(torch.stack(largest).max())  # NaN stays


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Root of the mean squared difference, over that of the exact values."""
    return float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def measure(arguments: NumericsArguments) -> list[dict]:
    """One entry for each model, length and dtype: relative errors by level, and the largest value on the way."""
    found = []
    for kind, model in tqdm(list(models(arguments)), unit=" models"):
        for length in arguments.lengths:
            if length > model.config.max_position_embeddings:
                continue
            generator = torch.Generator().manual_seed(arguments.seed)
            ids = torch.randint(3, model.config.vocab_size, (1, length), generator=generator)
            exact, _ = states_by_level(copy.deepcopy(model).double(), ids)
            for dtype, torch_dtype in DTYPES.items():
                states, largest = states_by_level(copy.deepcopy(model).to(torch_dtype), ids)
                errors = {level: relative_error(states[level], exact[level]) for level in exact}
                found.append({"kind": kind, "length": length, "dtype": dtype, "errors": errors, "largest": largest})
    return found


def spread(values: list[float], scale: float = 1.0) -> str:
    """The least and the most of some values; one that is no number is the most."""
    if not values:
        return ""
    least, most = (f"{scale * value:.2g}" for value in (min(values), float(torch.tensor(values).max())))
    return least if least == most else f"{least}-{most}"


def format_table(found: list[dict]) -> str:
    """A Markdown table: a row for each kind of model, length and dtype; errors in percent, none without that level."""
    levels = ["prelude", *map(format_resolution, SIZES), "logits"]
    rows = []
    for row in dict.fromkeys((entry["kind"], entry["length"], entry["dtype"]) for entry in found):
        entries = [entry for entry in found if (entry["kind"], entry["length"], entry["dtype"]) == row]
        errors = [[entry["errors"][level] for entry in entries if level in entry["errors"]] for level in levels]
        largest = spread([entry["largest"] for entry in entries])
        rows.append([row[0], str(row[1]), row[2], *[spread(values, 100) for values in errors], largest])
    return markdown_table(["model", "tokens", "dtype", *levels, "largest value"], rows, text_columns=3)
