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
"""Topologies: how an iteration's update meets the state (arXiv 2602.11698).

MeSH is arXiv 2510.07739, hyper-connections once per iteration are those of Hyperloop (arXiv 2604.21254).

`topology(v, x)` is InitTopology: it gives h_0 and what is carried along. `topology(update, h_t, carrier)` gives
h_(t+1) and the carrier.

Shape letters: B batch, S new tokens, D hidden size, T iterations, N slots of MeSH or streams.
"""

import math
from typing import Any, NamedTuple

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


def router_starts(cycle: int) -> dict[str, tuple[dict[int, float], dict[int, float]]]:
    """`router_start` -> the shares of slots that a cycle's write and read routers start from; the rest is even.

    Cycle k has slot k + 1 to itself, and slot 1 holds v.
    """
    own, half = {cycle + 1: 0.9}, {1: 0.45, cycle + 1: 0.45}
    return {"uniform": ({}, {}), "pass_through": (own, own), "half_anchor": (own, half if cycle else own)}


def make_router(size: int, slots: int, shares: dict[int, float]) -> nn.Linear:
    """A map from states `(B, S, D)` to the logits of slots `(B, S, N)`, for a new model with the biases of `shares`.

    Args:
        shares: slot -> its share, as far as the weights, which are small in a new model, leave it.
    """
    router: Any = nn.Linear(size, slots)
    rest = (1 - sum(shares.values())) / (slots - len(shares))
    router.initial_biases = [math.log(shares.get(slot, rest) / rest) for slot in range(slots)]
    return router


class SpiralFormerMeSH(nn.Module):
    """MeSH (arXiv 2510.07739): T + 1 write-read cycles on N memory slots per token, each with routers of its own.

    Slot 0 starts as x, the others empty. Cycle k writes m_n += w_(k,n) new_k and reads sum_n r_(k,n) m_n, where new_0
    is v and new_(t+1) the update of iteration t; its routers look at the state that entered the block (those of cycle
    0 at v instead, where the configuration says so). No slot is ever built: what cycle k reads is
    r_(k,0) x + sum_(i <= k) (w_i . r_k) new_i, with one number w_i . r_k per token.
    """

    def __init__(self, config: SpiralFormerConfig):
        super().__init__()
        size, slots = config.hidden_size, config.resolved_num_memory_slots
        starts = [router_starts(k)[config.resolved_router_start] for k in range(config.num_iterations + 1)]
        self.write = nn.ModuleList(make_router(size, slots, shares) for shares, _ in starts)
        self.read = nn.ModuleList(make_router(size, slots, shares) for _, shares in starts)
        self.first_routers = config.resolved_first_routers

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
        if carrier is None and self.first_routers == "prelude":
            state = new
        cycle = len(written) - 1
        write = self.write[cycle](state).softmax(dim=-1)
        read = self.read[cycle](state).softmax(dim=-1)
        written = [*written, (write, new)]
        hidden = read[..., :1] * written[0][1]
        for weights, content in written[1:]:
            hidden = torch.addcmul(hidden, (weights * read).sum(dim=-1, keepdim=True), content)
        return hidden, written


def gate_starts(streams: int) -> dict[str, tuple[float, float, float]]:
    """`gate_start` -> how much of each stream is read and kept, and of a new state written, in a new model.

    "zero" is biases of 0. The others read the mean of the streams, and keep as large a share as they do not write.
    """
    mean = 1 / streams
    return {"blend": (mean, 0.5, 0.5), "replace": (mean, 0.01, 0.99), "zero": (0.5, 0.5, 1.0)}


def logit(share: float) -> float:
    """The number whose sigmoid is `share`."""
    return math.log(share / (1 - share))


class SpiralFormerGate(nn.Module):
    """sigmoid(a W z + b): one number in (0, 1) for each stream of a token.

    Args:
        start: what the gate gives for W z = 0 in a new model.
    """

    initial_scale = 0.01

    def __init__(self, size: int, streams: int, start: float):
        super().__init__()
        self.projection = nn.Linear(size, streams, bias=False)  # W
        self.scale = nn.Parameter(torch.full((1,), self.initial_scale))  # a; FSDP2 shards no parameter without a shape
        self.initial_bias = logit(start)
        self.bias = nn.Parameter(torch.full((streams,), self.initial_bias))  # b

    def forward(self, normed: torch.Tensor) -> torch.Tensor:
        """The gates `(B, S, N)` of streams that are flat and normed, `(B, S, N D)`."""
        return torch.sigmoid(self.scale * self.projection(normed) + self.bias)


class SpiralFormerConnection(nn.Module):
    """What one iteration has of its own: the gates by which it reads, keeps and writes streams, and its loop vector e.

    The norm is torch's: unlike Llama's it stays in float64 where the model does, and its mean square is in float32
    where the streams are shorter.
    """

    def __init__(self, config: SpiralFormerConfig):
        super().__init__()
        streams, size = config.resolved_num_streams, config.hidden_size
        read, keep, write = gate_starts(streams)[config.resolved_gate_start]
        flat = streams * size
        self.norm = nn.RMSNorm(flat, eps=config.rms_norm_eps or config.layer_norm_eps)
        self.read = SpiralFormerGate(flat, streams, read)
        self.keep = SpiralFormerGate(flat, streams, keep)
        self.write = SpiralFormerGate(flat, streams, write / 2)
        self.loop_vector = nn.Parameter(torch.zeros(size))

    def forward(self, streams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gates of streams `(B, S, N, D)`, `(B, S, N, 1)` each: to read, to keep and to write; and e, `(D,)`.

        e is a copy: outside of this call the parameter may be off its device, where weights are offloaded or sharded.
        """
        normed = self.norm(streams.flatten(-2))
        read, keep, write = (gate(normed).unsqueeze(-1) for gate in (self.read, self.keep, self.write))
        return read, keep, 2 * write, self.loop_vector.clone()


class Streams(NamedTuple):
    """The carrier of hyper-connections.

    Args:
        content: Y, the streams `(B, S, N, D)`.
        iteration: which iteration has read them, and writes next; T after the last.
        writing: its gates to keep and to write, `(B, S, N, 1)` each, and its loop vector, `(D,)`; none after the last.
    """

    content: torch.Tensor
    iteration: int
    writing: tuple[torch.Tensor, ...]


class SpiralFormerHyperConnections(nn.Module):
    """Hyper-connections of Hyperloop (arXiv 2604.21254): N streams per token, gated once per iteration.

    Each stream starts as v. Iteration t reads h_t = sum_n p_n Y_n, and its update u joins all streams as
    Y_n <- r_n Y_n + q_n (u + e). The gates p, q and r are made from the streams that iteration t reads, by parameters
    that are its own, as is e. h_T is the mean of the streams.

    A token that no chunk has reached yet has the update 0, and gets e all the same.
    """

    def __init__(self, config: SpiralFormerConfig):
        super().__init__()
        self.num_streams = config.resolved_num_streams
        self.connections = nn.ModuleList(SpiralFormerConnection(config) for _ in range(config.num_iterations))

    def forward(
        self, new: torch.Tensor, state: torch.Tensor, carrier: Streams | None = None
    ) -> tuple[torch.Tensor, Streams]:
        """What is read after a write into the streams; the first call, InitTopology, has no carrier yet.

        Args:
            new: v = f_pre(x), later the shifted update of an iteration, `(B, S, D)`.
            state: not looked at: the streams hold all that is read.
        """
        if carrier is None:
            return self._read(new.unsqueeze(-2).expand(-1, -1, self.num_streams, -1), iteration=0)
        keep, write, loop_vector = carrier.writing
        content = keep * carrier.content + write * (new + loop_vector).unsqueeze(-2)
        return self._read(content, carrier.iteration + 1)

    def _read(self, content: torch.Tensor, iteration: int) -> tuple[torch.Tensor, Streams]:
        if iteration == len(self.connections):
            return content.mean(dim=-2), Streams(content, iteration, ())
        read, *writing = self.connections[iteration](content)
        return (read * content).sum(dim=-2), Streams(content, iteration, tuple(writing))


# What `topology` names. CODEPATH: *-mesh-* have MeSH, hyperloop-* but hyperloop-looped-* hyper-connections, and all
# others a recurrence without parameters.
TOPOLOGIES = {
    "mesh": SpiralFormerMeSH,
    "hyper_connections": SpiralFormerHyperConnections,
    **dict.fromkeys(("anchor", "residual", "base"), SpiralFormerRecurrence),
}


__all__ = [
    "TOPOLOGIES",
    "SpiralFormerConnection",
    "SpiralFormerGate",
    "SpiralFormerHyperConnections",
    "SpiralFormerMeSH",
    "SpiralFormerRecurrence",
]
