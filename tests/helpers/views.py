"""What a view of a model must be, written from the page (docs/elastic.md): its iterations, fields and parameters."""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from hypothesis import strategies as st
from support import model_options


def iterations_of(schedule: Sequence[int], chunk_sizes: Sequence[int]) -> list[int]:
    """The earliest iterations of `schedule` whose chunk sizes these are, in order."""
    left = iter(enumerate(schedule))
    return [next(iteration for iteration, size in left if size == wanted) for wanted in chunk_sizes]


def fields_of(config, iterations: list[int]) -> SimpleNamespace:
    """The fields of a model that runs these iterations alone, for the reference."""
    schedule = config.chunk_sizes
    offsets = [size // 2 for size in schedule] if config.chunk_offsets is None else config.chunk_offsets
    shifts = [size - 1 for size in schedule] if config.causal_shifts is None else config.causal_shifts
    slots = len(schedule) + 3 if config.num_memory_slots is None else config.num_memory_slots
    own = {"chunk_sizes": schedule, "chunk_offsets": offsets, "causal_shifts": shifts}
    own = {field: [values[iteration] for iteration in iterations] for field, values in own.items()}
    return SimpleNamespace(**vars(config) | own | {"num_memory_slots": slots})


def renamed(model, iterations: list[int]) -> dict[str, torch.Tensor]:
    """The parameters of those iterations, by the names that they have in a model of these iterations alone."""
    config, weights = model.config, {}
    own = {"resolutions": dict(zip(iterations, range(9), strict=False))}
    own["connections"] = own["resolutions"]
    own["write"] = own["read"] = {0: 0} | {t + 1: i + 1 for i, t in enumerate(iterations)}
    own["core"] = {i: i for i in range(config.num_core_layers)}
    if not config.share_core:
        size = config.num_core_layers
        own["core"] = {t * size + k: i * size + k for i, t in enumerate(iterations) for k in range(size)}
    for name, weight in model.state_dict().items():
        parts = name.split(".")
        for place, part in enumerate(parts[:-1]):
            if part in own and name.startswith("model.") and parts[place + 1].isdecimal():
                number = own[part].get(int(parts[place + 1]))
                parts[place + 1] = str(number)
        if "None" not in parts:
            weights[".".join(parts)] = weight
    return weights


@st.composite
def models_and_views(draw) -> tuple[dict, list[int] | None]:
    """Options of a model, and the chunk sizes of a view of it: None for the model itself."""
    options = draw(model_options())
    schedule = options["chunk_sizes"]
    chosen = draw(st.lists(st.booleans(), min_size=len(schedule), max_size=len(schedule)))
    part = [size for size, is_chosen in zip(schedule, chosen, strict=True) if is_chosen]
    may_start = bool(part) and (part[0] == 1 or options["num_prelude_layers"] > 0)
    return options, part if may_start else None
