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
"""What of vLLM's settings the model cannot follow, or nobody has run: refused by name before an engine starts."""

import math
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend

from modeling_spiralformer.chunking_spiralformer import ChunkGrid
from modeling_spiralformer.configuration_spiralformer import refuse

# Where vLLM keeps a setting, and the values that are allowed. The first is what it is where nobody sets it.
ALLOWED: dict[str, tuple[Any, ...]] = {
    "parallel_config.pipeline_parallel_size": (1,),  # the core would stand in one stage, and be passed T times
    "parallel_config.decode_context_parallel_size": (1,),
    "parallel_config.prefill_context_parallel_size": (1,),
    "parallel_config.enable_dbo": (False,),
    "parallel_config.ubatch_size": (0,),
    "speculative_config": (None,),  # a state holds one past: what a rejected token did to it stays
    "lora_config": (None,),
    "kv_transfer_config": (None,),
    "model_config.quantization": (None,),
    "model_config.runner_type": ("generate",),
    "cache_config.cache_dtype": ("auto",),
    "offload_config.uva.cpu_offload_gb": (0,),
    "offload_config.prefetch.offload_group_size": (0,),
}


class SpiralFormerSettings(VerifyAndUpdateConfig):
    """What vLLM calls with the settings of an engine for this architecture, in the process that asks for it."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """
        Raises:
            `ValueError`: naming the setting.
        """
        for path, allowed in ALLOWED.items():
            value: Any = vllm_config
            for name in path.split("."):
                value = getattr(value, name)
            if value not in allowed:
                refuse(path, getattr(value, "method", value), f"{allowed[0]!r} for SpiralFormer")
        if not current_platform.is_cpu() and not vllm_config.model_config.enforce_eager:
            refuse("model_config.enforce_eager", False, "True for SpiralFormer: a step has no fixed number of latents")


def check_head_size(head_size: int, backend: type[AttentionBackend]) -> None:
    """Refuses heads of a size that the attention of this platform has no kernel for.

    Raises:
        `ValueError`: naming `head_dim`.
    """
    sizes = backend.get_supported_head_sizes()
    if sizes and head_size not in sizes:
        refuse("head_dim", head_size, f"one of {sizes} for {backend.get_name()}")


def least_slots(backend: type[AttentionBackend], of_latents: bool = False) -> int:
    """A kernel of attention takes blocks of a multiple of this.

    On a CPU those over latents may be half as long as its list says: such blocks it calls "vec16".
    """
    if of_latents and backend.get_name().startswith("CPU"):
        return 16
    return min(getattr(size, "base", size) for size in backend.get_supported_kernel_block_sizes())


def check_block_size(grids: list[ChunkGrid], block_size: int, backend: type[AttentionBackend]) -> None:
    """Refuses blocks in which the latents of a resolution are no whole number of a kernel's blocks.

    Raises:
        `ValueError`: naming `block_size` and the smallest that does.
    """
    latents = least_slots(backend, of_latents=True)
    smallest = math.lcm(least_slots(backend), *(latents * grid.size for grid in grids if grid.size > 1))
    if block_size % smallest:
        sizes = [grid.size for grid in grids]
        refuse("block_size", block_size, f"a multiple of {smallest} for chunk sizes {sizes} and {backend.get_name()}")


__all__ = ["ALLOWED", "SpiralFormerSettings", "check_block_size", "check_head_size", "least_slots"]
