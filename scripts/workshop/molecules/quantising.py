"""
What int8 and int4 weights do to a model of molecules: its loss on the same molecules before and after, paired.

torchao's int4 kernels need an accelerator: these weights are int4 in their values, each in a byte, on every device.
"""

import copy
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from datasets import Dataset
from scipy.stats import norm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from workshop.molecules.judging import CONFIDENCE
from workshop.padded_rows import losses_of_rows


def check_torchao() -> None:
    """Raises ImportError, with the remedy, where torchao is not installed."""
    if find_spec("torchao") is None:
        raise ImportError('Quantising needs torchao: pip install ".[molecules]".')


@dataclass(frozen=True)
class Weights:
    """How weights are quantised: their bits, and how many in a row share a scale; None: all of a row."""

    bits: int
    group_size: int | None = None

    @property
    def name(self) -> str:
        """Bits and group in words."""
        return f"int{self.bits}, {'rows' if self.group_size is None else f'groups of {self.group_size}'}"

    def config(self, grouped: bool):
        """torchao's, for the layers whose rows the group size divides, or for the others."""
        from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup

        granularity = PerGroup(self.group_size) if grouped else PerAxis(0)
        return IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{self.bits}"), granularity=granularity)


PARTS_WAY = Weights(4)  # how the parts of a model are quantised alone


def linear_layers(model: PreTrainedModel, part: str | None = None) -> dict[str, torch.nn.Linear]:
    """All linear layers but the head, which is as a rule the embeddings; with `part` those of one of `parts_of`."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return {
        name: module
        for name, module in found.items()
        if module is not model.get_output_embeddings() and part in (None, part_of(name))
    }


def part_of(name: str) -> str:
    """The part of the body that a layer belongs to, such as `core`."""
    return name.removeprefix("model.").split(".")[0]


def parts_of(model: PreTrainedModel) -> list[str]:
    """The parts of the body that hold linear layers, in its order."""
    return list(dict.fromkeys(map(part_of, linear_layers(model))))


def quantise(
    model: PreTrainedModel, weights: Weights, part: str | None = None
) -> tuple[PreTrainedModel, dict[str, float]]:
    """
    A quantised copy, and shares of all parameters: `quantised`, and `grouped`, those with scales of `group_size`.

    Where the group size does not divide the inputs of a layer, each of its rows has one scale. With `part` only one of
    `parts_of` is quantised. Raises ValueError where a matrix other than embeddings and head stays as it was.
    """
    from torchao.quantization import quantize_
    from torchao.utils import TorchAOBaseTensor

    quantised, sizes = copy.deepcopy(model), {"quantised": 0, "grouped": 0}
    layers = linear_layers(quantised, part)
    fits = {
        name: weights.group_size is not None and layer.in_features % weights.group_size == 0
        for name, layer in layers.items()
    }
    for grouped in set(fits.values()):

        def chosen(module: torch.nn.Module, name: str, grouped: bool = grouped) -> bool:
            return fits.get(name) is grouped

        quantize_(quantised, weights.config(grouped), filter_fn=chosen)
    kept = {quantised.get_input_embeddings().weight, quantised.get_output_embeddings().weight}
    for name, weight in quantised.named_parameters():
        meant = weight.ndim > 1 and weight not in kept and part in (None, part_of(name))
        if meant and not isinstance(weight, TorchAOBaseTensor):
            raise ValueError(f"Every matrix but embeddings and head must be quantised, but {name} is not.")
    for name, layer in layers.items():
        sizes["quantised"] += layer.weight.numel()
        sizes["grouped"] += layer.weight.numel() * fits[name]
    total = sum(parameter.numel() for parameter in model.parameters())
    return quantised, {name: size / total for name, size in sizes.items()}


def ratio(sums: np.ndarray, counts: np.ndarray) -> dict[str, float | list[float]]:
    """
    A sum over molecules per token, with its 95% interval over draws of molecules: a ratio of two means, whose error is
    that of the mean of what each molecule is above its share.
    """
    value = sums.sum() / counts.sum()
    above = sums - value * counts
    half = norm.ppf((1 + CONFIDENCE) / 2) * above.std(ddof=1) * np.sqrt(len(sums)) / counts.sum()
    return {"value": float(value), "interval": [float(value - half), float(value + half)]}


def compare_quantised(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    ways: list[Weights],
) -> tuple[dict, dict[str, np.ndarray]]:
    """
    Nats per token before and after each way of quantising, the difference with its interval, and the shares of the
    parameters; and for each way what each molecule gained in nats.

    Among the figures, as `parts`, are the differences of `PARTS_WAY` with each part of the body quantised alone.
    """
    before = losses_of_rows(model, tokenizer, rows)
    figures: dict = {"nats_per_token": before[:, 0].sum() / before[:, 1].sum(), "ways": {}, "parts": {}}
    gains = {}
    for way in ways:
        quantised, shares = quantise(model, way)
        after = losses_of_rows(quantised, tokenizer, rows)
        gains[way.name] = after[:, 0] - before[:, 0]
        figures["ways"][way.name] = {
            **{"nats_per_token": after[:, 0].sum() / after[:, 1].sum(), **shares},
            "difference": ratio(gains[way.name], before[:, 1]),
        }
    for part in parts_of(model):
        quantised, _ = quantise(model, PARTS_WAY, part)
        after = losses_of_rows(quantised, tokenizer, rows)
        figures["parts"][part] = ratio(after[:, 0] - before[:, 0], before[:, 1])
    return figures, gains
