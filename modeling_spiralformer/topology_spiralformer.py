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
"""Topologies: how an iteration's update meets the state (arXiv 2602.11698; MeSH is arXiv 2510.07739).

`topology(v, x)` is InitTopology: it gives h_0 and what is carried along. `topology(update, h_t, carrier)` gives
h_(t+1) and the carrier.

Shape letters: B batch, S new tokens, D hidden size, T iterations, N slots of MeSH.
"""

import torch
from torch import nn

from .configuration_spiralformer import SpiralFormerConfig


class SpiralFormerRecurrence(nn.Module):
    """The recurrences without parameters: base h' = u, residual h' = u + h, anchor h' = u + h_0, with h_0 = v.

    The first call, without a carrier, is InitTopology.
    """

    def __init__(self, config: SpiralFormerConfig):
        super().__init__()
        self.topology = config.topology

    def forward(
        self, new: torch.Tensor, state: torch.Tensor, carrier: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """h_0 = v where there is no carrier yet, else h_(t+1), with the carrier v.

        Args:
            new: v = f_pre(x), later the shifted update of an iteration, `(B, S, D)`.
            state: x, later h_t, `(B, S, D)`.
        """
        if carrier is None:
            return new, new
        if self.topology == "base":
            return new, carrier
        return new + (state if self.topology == "residual" else carrier), carrier


class SpiralFormerMeSH(nn.Module):
    """MeSH (arXiv 2510.07739): T + 1 write-read cycles on N memory slots per token, each with routers of its own.

    Slot 0 starts as x, the others empty. Cycle k writes m_n += w_(k,n) new_k and reads sum_n r_(k,n) m_n, where new_0
    is v and new_(t+1) the update of iteration t; its routers look at the state that entered the block. No slot is ever
    built: what cycle k reads is r_(k,0) x + sum_(i <= k) (w_i . r_k) new_i, with one number w_i . r_k per token.
    """

    def __init__(self, config: SpiralFormerConfig):
        super().__init__()
        size, slots = config.hidden_size, config.resolved_num_memory_slots
        self.write = nn.ModuleList(nn.Linear(size, slots) for _ in range(config.num_iterations + 1))
        self.read = nn.ModuleList(nn.Linear(size, slots) for _ in range(config.num_iterations + 1))

    def forward(
        self, new: torch.Tensor, state: torch.Tensor, carrier: list | None = None
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor | None, torch.Tensor]]]:
        """One cycle: writes `new`, routed by `state`, and reads; the first one, InitTopology, has no carrier yet.

        Args:
            new: v = f_pre(x), later the shifted update of an iteration, `(B, S, D)`.
            state: x, later h_t, `(B, S, D)`.
            carrier: what has been written, as (write weights `(B, S, N)`, content `(B, S, D)`): x first, in slot 0
                alone, with weights None.
        """
        written = [(None, state)] if carrier is None else carrier
        cycle = len(written) - 1
        write = self.write[cycle](state).softmax(dim=-1)
        read = self.read[cycle](state).softmax(dim=-1)
        written = [*written, (write, new)]
        hidden = read[..., :1] * written[0][1]
        for weights, content in written[1:]:
            hidden = torch.addcmul(hidden, (weights * read).sum(dim=-1, keepdim=True), content)
        return hidden, written


__all__ = ["SpiralFormerMeSH", "SpiralFormerRecurrence"]
