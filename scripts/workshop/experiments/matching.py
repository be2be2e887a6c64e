"""What makes two runs comparable: equal non-embedding parameters, equal tokens, or equal counted FLOPs."""

import copy

from modeling_spiralformer import SpiralFormerConfig
from workshop.costs import count_parameters


def parameters_per_unit(config: SpiralFormerConfig) -> int:
    """Parameters that one more unit of `intermediate_size` costs in all layers: those of a wider model above these."""
    wider = copy.deepcopy(config)
    wider.intermediate_size += 1
    return count_parameters(wider)[1] - count_parameters(config)[1]


def match_parameters(config: SpiralFormerConfig, target: int) -> SpiralFormerConfig:
    """
    The configuration with `intermediate_size` chosen so that the non-embedding parameters come nearest to `target`:
    within half of what one unit costs. Routers, scorers and allocators then do not count in a model's favour.

    Raises ValueError where no intermediate size of at least 1 comes that near.
    """
    unit = parameters_per_unit(config)
    _, count = count_parameters(config)
    width = config.intermediate_size + round((target - count) / unit)
    if width < 1:
        raise ValueError(
            f"`non_embedding_parameters` must be at least {count - (config.intermediate_size - 1) * unit} for this "
            f"model, but got {target}."
        )
    matched = copy.deepcopy(config)
    matched.intermediate_size = width
    matched.validate()
    return matched


def match_steps(budget: dict[str, float], tokens_per_step: int, flops_per_step: int) -> int:
    """
    Optimiser steps that spend a budget, either {"tokens": n}, met exactly, or {"flops": n}, met within half a step.

    Raises ValueError for another budget, or one that is no whole number of steps of tokens or less than one step.
    """
    numbers = isinstance(budget, dict) and all(type(value) in (int, float) for value in budget.values())
    if not numbers or list(budget) not in (["tokens"], ["flops"]):
        raise ValueError(f"`budget` must hold a number, either of `tokens` or of `flops`, but got {budget!r}.")
    if "tokens" in budget:
        if budget["tokens"] % tokens_per_step or budget["tokens"] < tokens_per_step:
            raise ValueError(f"`budget` must be a multiple of {tokens_per_step} tokens, but got {budget['tokens']}.")
        return int(budget["tokens"]) // tokens_per_step
    steps = round(budget["flops"] / flops_per_step)
    if steps < 1:
        raise ValueError(f"`budget` must be at least {flops_per_step} FLOPs, one step, but got {budget['flops']}.")
    return steps
