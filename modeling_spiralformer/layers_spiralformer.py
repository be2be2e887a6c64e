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
"""What a family of layers is: the library's own classes of one model, what they are called with and may be told.

`FAMILIES` has them by the `layer_family` of a configuration. CONTRIBUTING.md says how to add one.
"""

import copy
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.gpt_neox.configuration_gpt_neox import GPTNeoXConfig
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention, GPTNeoXLayer, GPTNeoXRotaryEmbedding
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer, Qwen3RotaryEmbedding

from .cache_name_spiralformer import CACHE_NAME

# The epsilon of each kind of norm, and its default.
NORM_EPS = {"layer_norm": ("layer_norm_eps", 1e-5), "rms_norm": ("rms_norm_eps", 1e-6)}
# Fields of a configuration that some families have and others lack.
FAMILY_FIELDS = (
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "use_parallel_residual",
    "attention_bias",
    "mlp_bias",
    "hidden_dropout",
    "norm",
    *(eps for eps, _ in NORM_EPS.values()),
)


@dataclass(frozen=True)
class LayerFamily:
    """The layers of one model of the library.

    Args:
        config_class: the configuration of that model. A family has those of `FAMILY_FIELDS` that it has, with its
            defaults, and its plan of tensor parallelism.
        layer, attention, rotary_embedding: classes, built with the configuration.
        outputs: submodules of a layer whose product joins the residual stream.
        norm: the kind of its norms, unless a configuration says otherwise.
        norms: submodules of a layer that are norms of `hidden_size` values.
        norms_heads: whether its attention has RMS norms of its own.
        more_fields: those of `FAMILY_FIELDS` that its layers read, though its configuration lacks them, with their
            defaults.
        dropping: what takes the place of a submodule where `hidden_dropout` is above 0 and the library's has none.
        cache_argument: how a layer calls the cache.
        partial_rotary_factor: the default share of a head that rotates; None where it has to be the whole head.
        final_norm: what that model calls its norm before the head.
        unread_fields: fields of its configuration that change nothing in the layers as they are used here.
    """

    config_class: type[PreTrainedConfig]
    layer: type[nn.Module]
    attention: type[nn.Module]
    rotary_embedding: type[nn.Module]
    outputs: tuple[str, ...]
    norm: str
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    norms_heads: bool = False
    more_fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    dropping: dict[str, Callable[[Any, int], nn.Module]] = dataclasses.field(default_factory=dict)
    cache_argument: str = CACHE_NAME
    partial_rotary_factor: float | None = None
    final_norm: str = "norm"
    unread_fields: tuple[str, ...] = ()

    def fields(self, norm: str | None = None) -> dict[str, Any]:
        """The fields of `FAMILY_FIELDS` that this family has, with their defaults; those of heads follow the width.

        Args:
            norm: the kind of norms, whose epsilon is read; None for the family's own.
        """
        norm = norm or self.norm
        kinds = [kind for kind in NORM_EPS if kind == norm or (kind == "rms_norm" and self.norms_heads)]
        own = {item.name: item.default for item in dataclasses.fields(self.config_class)}
        own = self.more_fields | {name: own[name] for name in own if not name.endswith("norm_eps")}
        own |= {"norm": norm, **dict(NORM_EPS[kind] for kind in kinds)}
        return {name: None if "head" in name else own[name] for name in FAMILY_FIELDS if name in own}

    @property
    def layer_tp_plan(self) -> dict[str, str]:
        """How tensor parallelism shards the submodules of a layer."""
        plan: dict[str, str] = self.config_class.base_model_tp_plan or {}
        return {name.removeprefix("layers.*."): style for name, style in plan.items() if name.startswith("layers.*.")}


class SpiralFormerDroppingAttention(LlamaAttention):
    """Llama's attention with dropout on what joins the residual stream."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the library's, in training with some values of the output dropped."""
        output, weights = super().forward(*args, **kwargs)
        return self.dropout(output), weights


class SpiralFormerDroppingMLP(LlamaMLP):
    """Llama's MLP with dropout on what joins the residual stream."""

    def __init__(self, config):
        super().__init__(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the library's, in training with some values of the output dropped."""
        return self.dropout(super().forward(x))


FAMILIES = {
    "gpt_neox": LayerFamily(
        config_class=GPTNeoXConfig,
        layer=GPTNeoXLayer,
        attention=GPTNeoXAttention,
        rotary_embedding=GPTNeoXRotaryEmbedding,
        outputs=("attention.dense", "mlp.dense_4h_to_h"),
        norm="layer_norm",
        cache_argument="layer_past",
        partial_rotary_factor=0.25,
        final_norm="final_layer_norm",
        unread_fields=("is_decoder",),
    ),
    "llama": LayerFamily(
        config_class=LlamaConfig,
        layer=LlamaDecoderLayer,
        attention=LlamaAttention,
        rotary_embedding=LlamaRotaryEmbedding,
        outputs=("self_attn.o_proj", "mlp.down_proj"),
        norm="rms_norm",
        more_fields={"hidden_dropout": 0.0},
        dropping={
            "self_attn": SpiralFormerDroppingAttention,
            "mlp": lambda config, entry: SpiralFormerDroppingMLP(config),
        },
    ),
    "qwen3": LayerFamily(
        config_class=Qwen3Config,
        layer=Qwen3DecoderLayer,
        attention=Qwen3Attention,
        rotary_embedding=Qwen3RotaryEmbedding,
        outputs=("self_attn.o_proj", "mlp.down_proj"),
        norm="rms_norm",
        norms_heads=True,
        unread_fields=("max_window_layers",),  # read where there is a sliding window
    ),
}


def make_norm(config) -> nn.Module:
    """A norm of `hidden_size` values, of the configuration's kind."""
    if config.norm == "layer_norm":
        return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
    return LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


def make_layer(config, entry: int) -> nn.Module:
    """A layer of the configuration's family, `entry` being the first of its entries of the cache."""
    family = FAMILIES[config.layer_family]
    layer = family.layer(config, entry)
    if config.norm != family.norm:
        for name in family.norms:
            setattr(layer, name, make_norm(config))
    # CODEPATH: smollm-* have dropout, no other published model has.
    if config.hidden_dropout:
        for name, make in family.dropping.items():
            setattr(layer, name, make(config, entry))
    for name in family.outputs:
        layer.get_submodule(name).initial_std = config.resolved_output_initializer_range
    return layer


def make_rotary_embedding(config) -> nn.Module:
    """The rotary embedding of the configuration's family."""
    sized = copy.copy(config)
    sized.head_dim = config.resolved_head_dim  # the library's YaRN takes a None for a size
    return FAMILIES[config.layer_family].rotary_embedding(config=sized)


def name_peft_targets(model_type: str) -> None:
    """Gives `model_type` the default `target_modules` of all families, in every tuner of PEFT.

    One model has those of one family, which is what a tuner then finds. Nothing where PEFT is not loaded, and nothing
    is loaded for it: PEFT then asks for `target_modules`.
    """
    constants = sys.modules.get("peft.utils.constants")
    for mapping in vars(constants).values() if constants else ():
        if isinstance(mapping, dict):
            targets = [mapping.get(family.config_class.model_type) for family in FAMILIES.values()]
            known = [names for names in targets if isinstance(names, list)]
            if known:
                mapping.setdefault(model_type, list(dict.fromkeys(name for names in known for name in names)))


__all__ = [
    "FAMILIES",
    "FAMILY_FIELDS",
    "LayerFamily",
    "SpiralFormerDroppingAttention",
    "SpiralFormerDroppingMLP",
    "make_layer",
    "make_norm",
    "make_rotary_embedding",
    "name_peft_targets",
]
