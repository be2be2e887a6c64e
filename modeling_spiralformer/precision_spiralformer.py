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
"""Keys and values as integers of 8 or 4 bits, in as many bits at each resolution as asked for.

What a head keeps of a column becomes a record of bytes. A record follows from its own column alone and never changes:
whatever the cache does to columns and rows, it does to records.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .configuration_spiralformer import SpiralFormerConfig, refuse

FULL, DEFAULT_BITS = 16, 8
BITS = (4, 8, FULL)
# The lowest value and the step of a group, each in bfloat16: the exponents of float32 in two bytes.
PARAMETER_DTYPE, PARAMETER_BYTES = torch.bfloat16, 4


@dataclass(frozen=True)
class Precision:
    """How keys and values are kept as integers: x is about lowest + step * code, per group of a head's channels.

    A value is off by half a step at most, and by what bfloat16 rounds off lowest and step.

    Args:
        bits (`int`): of a code, 4 or 8.
        group_size (`int`): channels that share lowest and step. It divides the size of a head, and is even for 4 bits.
    """

    bits: int
    group_size: int

    def pack(self, states: torch.Tensor) -> torch.Tensor:
        """Records `(..., bytes)` of uint8 for `(..., E)` states: of all groups lowest and step, then the codes."""
        groups = states.unflatten(-1, (-1, self.group_size))
        groups = groups.to(torch.promote_types(states.dtype, torch.float32))
        lowest, highest = groups.aminmax(dim=-1, keepdim=True)
        levels = 2**self.bits - 1
        parameters = torch.cat([lowest, (highest - lowest) / levels], dim=-1).to(PARAMETER_DTYPE)
        lowest, step = parameters.to(groups.dtype).split(1, dim=-1)  # as they will be read
        codes = (groups - lowest) / step  # where the step is 0 any code stands for the lowest value
        codes = codes.round().clamp(0, levels).to(torch.uint8).flatten(-2)
        if self.bits == 4:
            codes = codes[..., ::2] | codes[..., 1::2] << 4
        return torch.cat([parameters.flatten(-2).view(torch.uint8), codes], dim=-1)

    def unpack(self, records: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The states `(..., E)` that records `(..., bytes)` stand for."""
        groups = records.shape[-1] // (PARAMETER_BYTES + self.group_size * self.bits // 8)
        parameters, codes = records.tensor_split([groups * PARAMETER_BYTES], dim=-1)
        # Bytes may be read as another dtype only where their address allows it: a copy's does.
        parameters = parameters.clone(memory_format=torch.contiguous_format).view(PARAMETER_DTYPE)
        wide = torch.promote_types(dtype, PARAMETER_DTYPE)  # float16 by itself would round small steps once more
        lowest, step = parameters.to(wide).unflatten(-1, (groups, 2)).split(1, dim=-1)
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
        codes = codes.unflatten(-1, (groups, self.group_size)).to(wide)
        return torch.addcmul(lowest, codes, step).flatten(-2).to(dtype)


def entry_sizes(config: SpiralFormerConfig) -> list[int]:
    """The chunk size of each entry of the cache; 1 for the layers of prelude and coda, which see tokens."""
    core = [size for size in config.chunk_sizes for _ in range(config.num_core_layers)]
    return [1] * config.num_prelude_layers + core + [1] * config.num_coda_layers


def read_precisions(
    config: SpiralFormerConfig, nbits: int | Mapping[int | str, int], q_group_size: int | None
) -> dict[int, Precision | None]:
    """Chunk size -> how its keys and values are kept; None where they stay as they are.

    Args:
        nbits: 4, 8 or 16, for all chunk sizes or for each by itself; those that are not named stay as they are. JSON
            makes strings of the sizes.
        q_group_size: channels of a head that share a scale. Default all.

    Raises:
        `ValueError`: for other bits, a chunk size that the model lacks, and a group that does not fit a head.
    """
    sizes, head_size = sorted(set(entry_sizes(config))), config.resolved_head_dim
    given = dict(nbits) if isinstance(nbits, Mapping) else dict.fromkeys(sizes, nbits)
    names: dict[int | str, int] = {size: size for size in sizes} | {str(size): size for size in sizes}
    if len({str(size) for size in given}) < len(given):
        refuse("nbits", nbits, "each chunk size once, be it a number or a word")
    bits = dict.fromkeys(sizes, FULL)
    for size, count in given.items():
        if size not in names:
            refuse("nbits", nbits, f"for some of the chunk sizes {sizes}; 1 is that of prelude and coda too")
        if type(count) is not int or count not in BITS:
            refuse("nbits", nbits, f"one of {list(BITS)} for each chunk size; {FULL} keeps what the model computes")
        bits[names[size]] = count
    whole = isinstance(q_group_size, int) and not isinstance(q_group_size, bool)
    if q_group_size is not None and not (whole and q_group_size > 0 and head_size % q_group_size == 0):
        refuse("q_group_size", q_group_size, f"None or a divisor of {head_size}, the size of a head")
    group_size = q_group_size or head_size
    if group_size % 2 and 4 in bits.values():
        refuse("q_group_size", group_size, "even with 4 bits: two codes share a byte")
    return {size: None if count == FULL else Precision(count, group_size) for size, count in bits.items()}


__all__ = ["Precision", "entry_sizes", "read_precisions"]
