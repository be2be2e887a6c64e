# Copyright 2026 The SpiralFormer maintainers
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Elastic compute: a view of a model that runs some iterations of its schedule, on the same parameters.

A view is a model of the same class with a configuration and caches of its own. Its parts are the very modules of its
model: nothing is copied. `docs/elastic.md` says what follows from that.
"""

import copy
import sys
from typing import Any

import torch
from torch import nn
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from .configuration_spiralformer import SpiralFormerConfig

# What the library keeps on a model itself, beside its modules, that holds for their views.
KEPT_BY_MODEL = [
    *("hf_quantizer", "is_quantized", "quantization_method", "peft_config", "_hf_peft_config_loaded"),
    *("_loss_function", "hf_device_map"),
    *("_tp_size", "_tp_plan", "_device_mesh", "_mesh_manager", "_is_distributed_loading_by_transformers"),
]


def choose_iterations(config: SpiralFormerConfig, chunk_sizes: list[int] | tuple[int, ...]) -> list[int]:
    """The iterations whose chunk sizes these are, in order: the earliest that fit.

    Raises:
        `ValueError`: where the schedule of `config` has no such iterations in this order, and for an empty list.
    """
    is_list = isinstance(chunk_sizes, (list, tuple)) and all(type(size) is int for size in chunk_sizes)
    schedule = list(config.chunk_sizes)
    iterations: list[int] = []
    for size in chunk_sizes if is_list else ():
        first = iterations[-1] + 1 if iterations else 0
        if size not in schedule[first:]:
            break
        iterations.append(schedule.index(size, first))
    if not iterations or len(iterations) < len(chunk_sizes):
        raise ValueError(
            f"`chunk_sizes` must be a list of at least one chunk size of the model's {schedule}, in that order, but "
            f"got {chunk_sizes!r}."
        )
    return iterations


def view_config(config: SpiralFormerConfig, iterations: list[int]) -> SpiralFormerConfig:
    """The configuration of a model that runs these iterations alone; what defaults to the schedule stays as it was."""
    chosen = copy.deepcopy(config)
    for field, values in (
        ("chunk_sizes", config.chunk_sizes),
        ("chunk_offsets", config.resolved_chunk_offsets),
        ("causal_shifts", config.resolved_causal_shifts),
    ):
        setattr(chosen, field, [values[iteration] for iteration in iterations])
    # CODEPATH: *-mesh-* have MeSH, *-anchor-* a recurrence without slots.
    if config.topology == "mesh":
        chosen.num_memory_slots = config.resolved_num_memory_slots
    chosen.validate()
    return chosen


def make_view(model: Any, chunk_sizes: list[int] | tuple[int, ...]) -> Any:
    """A model of the class of `model` that runs the iterations of these chunk sizes, on its modules."""
    body = model.base_model
    for module in model.modules():
        if hasattr(module, "unshard"):
            raise ValueError("`with_schedule` must be called on a model that is not sharded by FSDP.")
        if getattr(getattr(module, "_hf_hook", None), "offload", False):
            raise ValueError("`with_schedule` must be called on a model none of whose modules are offloaded.")
    iterations = choose_iterations(model.config, chunk_sizes)
    with torch.device("meta"):  # modules that are about to be replaced cost neither memory nor random numbers
        view = type(model)(view_config(model.config, iterations))
    if not isinstance(body.topology, type(view.base_model.topology)):  # a view has parts of it alone
        raise ValueError(
            "`with_schedule` must be called on a model whose topology PEFT's `modules_to_save` does not wrap, but it "
            f"is a {type(body.topology).__name__}: merge it first, by `merge_and_unload()`."
        )
    _share_body(view.base_model, body, iterations)
    for name, child in model.named_children():
        if body is not model and body is not child:
            _share(view.base_model, view, model, {name: name})
    if model.can_generate():
        view.generation_config = copy.deepcopy(model.generation_config)
    for name in KEPT_BY_MODEL:
        if name in vars(model):
            setattr(view, name, vars(model)[name])
    for module, original in {view: model, view.base_model: body}.items():
        module.training = original.training
        _follow_devices(module, original)
    return view


def _share_body(view: Any, body: Any, iterations: list[int]) -> None:
    """Puts the modules of `body` into a view of it, and says which entries of the cache they have there."""
    whole = ("embed_tokens", "emb_dropout", "prelude", "coda", "norm", "rotary_emb")
    _share(view, view, body, {name: name for name in whole})
    layers = [index for t in iterations for index in body.core_layers[t]]
    layers = list(dict.fromkeys(layers))  # each iteration has its own, or all have the same
    _share(view, view.core, body.core, {str(own): str(index) for own, index in enumerate(layers)})
    _share(view, view.resolutions, body.resolutions, {str(own): str(t) for own, t in enumerate(iterations)})
    # MeSH has routers for each cycle, the first of which is no iteration's; streams have gates for each iteration.
    cycles = [0, *(t + 1 for t in iterations)]
    numbers = {"write": cycles, "read": cycles, "connections": iterations}
    kinds = [kind for kind, _ in body.topology.named_children()]
    for kind in kinds:
        parts = getattr(view.topology, kind), getattr(body.topology, kind)
        _share(view, *parts, {str(own): str(number) for own, number in enumerate(numbers[kind])})
    if kinds:
        _follow_devices(view.topology, body.topology)
    else:  # a recurrence without parameters
        _share(view, view, body, {"topology": "topology"})
    view.core_offsets = [
        own.start - (body.core_entries[t].start - body.core_offsets[t])
        for own, t in zip(view.core_entries, iterations, strict=True)
    ]
    view.coda_offset = body.coda_offset + view.config.num_hidden_layers - body.config.num_hidden_layers
    view.layer_config, view.gradient_checkpointing = body.layer_config, body.gradient_checkpointing


def _share(view: Any, own: nn.Module, original: nn.Module, names: dict[str, str]) -> None:
    """Makes children of `original` children of `own`, a module of `view`: own name -> name there."""
    for own_name, name in names.items():
        own._modules[own_name] = original._modules[name]
        view.shared.append((own, own_name, original, name))


def check_shared(view: Any) -> None:
    """Raises `ValueError` where a module that a view shares has been replaced, in the view or in its model."""
    replaced = [
        f"{type(original).__name__}.{name}"
        for own, own_name, original, name in view.shared
        if own._modules[own_name] is not original._modules[name]
    ]
    if view.embed_tokens.weight.shape[0] != view.config.vocab_size:  # the library resizes them in place
        replaced.append(f"{type(view).__name__}.embed_tokens")
    if replaced:
        raise ValueError(
            f"A view must share the modules of its model, but {replaced[0]} has been replaced in one of them (by an "
            "adapter, quantisation or resized embeddings): call `with_schedule` again."
        )
    (_, _, body, _), *_ = view.shared
    if body.shared:  # a view of a view
        check_shared(body)


def record_outputs(view: Any) -> None:
    """Installs the hooks that record states and attentions where they are not yet: in all layers of the model.

    They sit in the layers. Installed for the model and for a view, they would record what runs there twice.
    """
    (_, _, body, _), *_ = view.shared
    maybe_install_capturing_hooks(body)


def _follow_devices(module: nn.Module, original: nn.Module) -> None:
    """Gives a module of a view the hook by which accelerate moves the inputs of the original to their device."""
    if hasattr(original, "_hf_hook"):  # accelerate is there then; an import would ask for it wherever this is loaded
        sys.modules["accelerate.hooks"].add_hook_to_module(module, copy.copy(original._hf_hook))


__all__ = ["check_shared", "choose_iterations", "make_view", "record_outputs", "view_config"]
