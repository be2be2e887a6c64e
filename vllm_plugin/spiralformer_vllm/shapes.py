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
"""What vLLM reads from a configuration before it knows the model."""

from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase


class SpiralFormerShapes(ModelArchConfigConvertorBase):
    """As vLLM does, where a field may be None: GPT-NeoX has no heads of keys of its own."""

    def get_total_num_kv_heads(self) -> int:
        return self.hf_text_config.resolved_num_key_value_heads

    def get_head_size(self) -> int:
        return self.hf_text_config.resolved_head_dim


__all__ = ["SpiralFormerShapes"]
