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
"""A checkpoint's tensors into the plug-in's parameters, each of which may hold several, or a rank's share."""

import copy
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from modeling_spiralformer.configuration_spiralformer import SpiralFormerConfig, refuse
from modeling_spiralformer.modeling_spiralformer import SpiralFormerForCausalLM

LAYER = re.compile(r"(model\.(?:prelude|core|coda)\.\d+)\.(.+)\.(weight|bias)")
# What a submodule of a layer is called in a checkpoint, and here; which part of it that is, where it has several.
SUBMODULES: dict[str, tuple[str, Any]] = {
    "attention.query_key_value": ("attention.qkv", None),
    "attention.dense": ("attention.out", None),
    "mlp.dense_h_to_4h": ("mlp.into", None),
    "mlp.dense_4h_to_h": ("mlp.out", None),
    "self_attn.q_proj": ("attention.qkv", "q"),
    "self_attn.k_proj": ("attention.qkv", "k"),
    "self_attn.v_proj": ("attention.qkv", "v"),
    "self_attn.o_proj": ("attention.out", None),
    "self_attn.q_norm": ("attention.query_norm", None),
    "self_attn.k_norm": ("attention.key_norm", None),
    "mlp.gate_proj": ("mlp.into", 0),
    "mlp.up_proj": ("mlp.into", 1),
    "mlp.down_proj": ("mlp.out", None),
}


def place_of(name: str) -> tuple[str, Any]:
    """The parameter that a tensor of a checkpoint belongs to, and its part."""
    layer = LAYER.fullmatch(name)
    if layer is None:
        return name, None
    submodule, part = SUBMODULES.get(layer[2], (layer[2], None))
    return f"{layer[1]}.{submodule}.{layer[3]}", part


def expected_shapes(config: SpiralFormerConfig) -> dict[str, torch.Size]:
    """What a checkpoint of that configuration holds: the parameters of the package's own model."""
    with torch.device("meta"):
        model = SpiralFormerForCausalLM(copy.deepcopy(config))
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def check_shape(name: str, expected: torch.Size | None, found: torch.Size | None) -> None:
    """
    Raises:
        `ValueError`: naming a tensor that is missing, one too many, or of another shape.
    """
    if found != expected:
        refuse(f"checkpoint[{name!r}]", found, "left out" if expected is None else f"of {expected}")


def load_weights(
    model: nn.Module, config: SpiralFormerConfig, weights: Iterable[tuple[str, torch.Tensor]]
) -> set[str]:
    """Loads tensors by name, and returns the parameters that got one.

    Raises:
        `ValueError`: where they are not those of the configuration. vLLM would take a default for some.
    """
    parameters, expected, loaded = dict(model.named_parameters()), expected_shapes(config), set()
    for name, tensor in weights:
        check_shape(name, expected.pop(name, None), tensor.shape)
        place, part = place_of(name)
        if ".query_key_value." in name:  # GPT-NeoX has them head by head, vLLM all queries first
            tensor = tensor.unflatten(0, (config.num_attention_heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        loader = getattr(parameters[place], "weight_loader", default_weight_loader)
        loader(parameters[place], tensor, *([] if part is None else [part]))
        loaded.add(place)
    for name, shape in expected.items():
        check_shape(name, shape, None)
    return loaded


__all__ = ["expected_shapes", "load_weights", "place_of"]
