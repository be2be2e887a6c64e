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
"""SpiralFormer in vLLM: a plug-in that vLLM finds by its entry point. `docs/vllm.md` is its page."""

from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.model_executor.models.registry import ModelRegistry
from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

import modeling_spiralformer  # registers the configuration with `AutoConfig`

from .refusals import SpiralFormerSettings
from .shapes import SpiralFormerShapes

ARCHITECTURE = modeling_spiralformer.SpiralFormerForCausalLM.__name__


def register() -> None:
    """What vLLM calls in each of its processes, once or more often: the model, and who reads settings for it."""
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
    MODEL_ARCH_CONFIG_CONVERTORS[modeling_spiralformer.SpiralFormerConfig.model_type] = SpiralFormerShapes
    MODELS_CONFIG_MAP[ARCHITECTURE] = SpiralFormerSettings


__all__ = ["ARCHITECTURE", "register"]
