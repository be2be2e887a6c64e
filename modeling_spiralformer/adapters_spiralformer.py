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
"""PEFT's adapters on layers that see latents: those that count tokens are refused, those that count rows get them all.

An adapter acts inside a layer. What it needs to know of the batch, PEFT hands to the layer by hooks: where an
invocation starts, how much each token weighs, which adapter or task a row has. In the core a column is a latent, and a
cached step of a padded batch runs only the rows that fill a chunk. Nothing is imported from PEFT: its hooks and layers
are known by their names.
"""

import sys
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.utils.import_utils import is_torchdynamo_compiling

# Tuners that have no one function here, by the packages of their layers.
REFUSED_TUNERS = {
    "peft.tuners.lily": "Lily mixes its experts by their mean over all tokens and rows of a call: later tokens would "
    "change earlier ones, and a cache or another batch the function. Take LoRA.",
    "peft.tuners.shadow": "ShadowPEFT carries a state of each token from layer to layer, and layers of the core see "
    "latents. Take LoRA.",
}


def meet_adapters(model: nn.Module) -> bool:
    """Refuses adapters that would be silently wrong; returns whether adapters tell the rows of the batch apart.

    Raises:
        `ValueError`: for Lily and ShadowPEFT; where layers see latents, for activated LoRA, X-LoRA and the start of
            EVA by tokens; for DoRA on weights that are 0.
    """
    if "peft" not in sys.modules:  # looking through all modules would take 1% of a decode step
        return False
    for module in model.modules():
        package = type(module).__module__.rpartition(".")[0]
        if package in REFUSED_TUNERS and not getattr(module, "disable_adapters", True):
            raise ValueError(REFUSED_TUNERS[package])
    by_row = False
    latent_parts = [model.get_submodule(name) for name in ("core", "resolutions")]  # these see latents
    if not is_torchdynamo_compiling():
        _refuse_rows_of_zeros(model)
    for module in (module for part in latent_parts for module in part.modules()):
        for key in module._forward_pre_hooks_with_kwargs:
            hook = module._forward_pre_hooks[key]
            if getattr(hook, "func", hook).__module__.startswith("peft."):
                by_row = True
                _refuse_counts_of_tokens(module, getattr(hook, "keywords", {}))
        for hook in module._forward_hooks.values():
            _refuse_choice_of_tokens(getattr(hook, "_prepare_layer_inputs_fn", None))
    return by_row


def _refuse_rows_of_zeros(model: Any) -> None:
    """Refuses DoRA where it would divide 0 by 0: a row's length by itself, of weights that no other model has."""
    parts = [part for part in (model.resolutions, model.topology) if part is not None]
    for layer in (layer for part in parts for layer in part.modules()):
        lengths = getattr(layer, "lora_magnitude_vector", {})
        active = layer.active_adapters if lengths and not layer.disable_adapters else ()
        rows = [lengths[name].weight for name in active if name in lengths]
        if any(not row.is_meta and not row.all() for row in rows):
            raise ValueError(
                "DoRA (`use_dora`) divides by the length of each row of weights, but those of scorers and allocators "
                "are 0 in a new or converted model, and so may be those of routers and gates. Leave them out: "
                r"exclude_modules=r'.*\.(scorer|allocator|topology\..*)', or take plain LoRA."
            )


def _refuse_counts_of_tokens(module: nn.Module, given: dict) -> None:
    """Refuses what a hook (a `functools.partial`) gives to an adapter on latents where it speaks of tokens."""
    meaning = None
    if given.get("scalings") is not None:
        meaning = "X-LoRA weighs its adapters anew for each token"
    if given.get("alora_offsets") is not None:  # plain adapters are given them too, beside activated ones elsewhere
        variants = getattr(module, "lora_variant", {}).values()
        if any(type(variant).__name__.startswith("ALora") for variant in variants):
            meaning = "Activated LoRA (`alora_invocation_tokens`) counts tokens from its invocation on"
    if meaning is not None:
        raise ValueError(
            f"{meaning}, but core layers, scorers and allocators see latents. Adapt prelude and coda alone, "
            r"target_modules=r'.*\.(prelude|coda)\..*', or take plain LoRA."
        )


def _refuse_choice_of_tokens(choice: Callable | None) -> None:
    if getattr(choice, "__name__", None) == "prepare_layer_inputs_fn_language_modeling":
        raise ValueError(
            "The start of EVA picks tokens of a layer's input, but core layers, scorers and allocators see latents. "
            "Give initialize_lora_eva_weights `prepare_layer_inputs_fn=None`, which takes all of them, and batches "
            "without padding."
        )


__all__ = ["meet_adapters"]
