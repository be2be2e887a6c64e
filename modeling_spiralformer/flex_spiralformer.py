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
"""Flex attention: what it computes exactly, and what is refused by name. `docs/limits.md` has the reasons.

The library draws its masks, at every level, and runs torch's kernel; nothing of that is written here.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers.utils.import_utils import is_torchdynamo_compiling

from .cache_name_spiralformer import CACHE_ARGUMENT
from .configuration_spiralformer import SpiralFormerConfig, processes_of, refuse

FLEX = "flex_attention"
SMALLEST_HEAD = 16  # of torch's kernel
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NOT_COMPILED = "sdpa or eager where the model is compiled, traced or exported"


class UnfusedFlex:
    """A context in which flex attention, and the drawing of its masks, run without being compiled.

    On a CPU torch 2.13 compiles a kernel that reads past the last key, for heads of 8 and 16 values, and one that its
    compiler refuses where lengths vary. How torch compiles is said for the whole process: threads that are in here
    together enter it once.
    """

    def __init__(self):
        self.lock = threading.Lock()
        self.inside = 0
        self.stance: Any = None

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0:
                try:
                    self.stance = torch.compiler.set_stance("force_eager")
                except RuntimeError:  # a graph broke on the way here, and what is around it is compiled
                    refuse("attn_implementation", FLEX, NOT_COMPILED)
            self.inside += 1

    def __exit__(self, *error) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self.stance.__exit__(*error)


UNFUSED = UnfusedFlex()


def uses_flex(config: SpiralFormerConfig) -> bool:
    """Whether the layers of this configuration have flex attention."""
    # CODEPATH: no published configuration names its attention.
    return config._attn_implementation == FLEX


def unfused_on_cpu(forward: Callable) -> Callable:
    """A model's `forward`, whose flex attention is not compiled where the tokens are on a CPU.

    The weights may be nowhere, offloaded, until a layer is called.
    """

    @functools.wraps(forward)
    def run(self, *args, **kwargs):
        if not uses_flex(self.layer_config) or is_torchdynamo_compiling():
            return forward(self, *args, **kwargs)
        tokens = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        if any(value.device.type != "cpu" for value in tokens):
            return forward(self, *args, **kwargs)
        with UNFUSED:
            return forward(self, *args, **kwargs)

    return run


def check_flex(model: Any, inputs_embeds: torch.Tensor, cache: Any, options: dict[str, Any]) -> None:
    """Refuses a call that flex attention would not compute exactly, or that nobody has run.

    Args:
        model (`SpiralFormerModel`): of any attention; others than flex attention take every call.
        inputs_embeds: `(B, S, D)`, of the dtype and on the device of the call.
        cache: the one that the user gave, or None.
        options: what the layers are given besides.

    Raises:
        `ValueError`: naming the argument or field, what came, and what is allowed.
    """
    if not uses_flex(model.layer_config):
        return
    config: SpiralFormerConfig = model.config
    device, dtype = inputs_embeds.device.type, inputs_embeds.dtype
    if is_torchdynamo_compiling() or torch.jit.is_tracing() or torch.compiler.is_exporting():
        refuse("attn_implementation", FLEX, NOT_COMPILED)
    if device not in ("cpu", "cuda"):
        refuse("attn_implementation", FLEX, f"sdpa or eager on {device}, where nobody has run another")
    # CODEPATH: smollm-53k and smollm-206k drop attention in training, no other does.
    if config.attention_dropout and model.emb_dropout.training:  # the mode of modules that a view shares
        refuse("attention_dropout", config.attention_dropout, f"0 in training with {FLEX}, which drops nothing")
    if options.get("output_attentions", config.output_attentions):
        refuse("output_attentions", True, f"False with {FLEX}, which keeps no weights: take eager")
    if cache is not None and getattr(cache, "is_compileable", False):
        refuse(CACHE_ARGUMENT, type(cache).__name__, f"dynamic with {FLEX}: a static cache is for compiled steps")
    if (processes := processes_of(config)) > 1:
        refuse("tp_size", processes, f"1 with {FLEX}")
    trains = inputs_embeds.requires_grad or any(parameter.requires_grad for parameter in model.parameters())
    if device == "cpu" and torch.is_grad_enabled() and trains:
        refuse("attn_implementation", FLEX, "sdpa or eager for gradients on a CPU, or the call under torch.no_grad()")
    if device == "cuda" and dtype not in KERNEL_DTYPES:
        refuse("dtype", dtype, f"one of {KERNEL_DTYPES} with {FLEX}")
    # CODEPATH: no published configuration has smaller heads.
    if device == "cuda" and config.resolved_head_dim < SMALLEST_HEAD:
        refuse("head_dim", config.resolved_head_dim, f"at least {SMALLEST_HEAD} with {FLEX} on {device}")
    heads, shared = config.num_attention_heads, config.resolved_num_key_value_heads
    if device == "cuda" and shared < heads and heads & (heads - 1) == 0:  # of other numbers the library repeats keys
        allowed = f"{heads}, the heads of queries, with {FLEX} on {device}: torch finds no kernel for grouped queries"
        refuse("num_key_value_heads", shared, allowed)


__all__ = ["FLEX", "check_flex", "unfused_on_cpu", "uses_flex"]
