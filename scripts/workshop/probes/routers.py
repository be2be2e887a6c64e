"""
Who is read: how much of embeddings, prelude and updates there is in what MeSH reads (arXiv 2510.07739).

Shape letters: B sequences, L tokens, N slots, T iterations, which make T + 1 cycles.
"""

import math

import torch


def coefficients(writes: list[torch.Tensor], reads: list[torch.Tensor]) -> list[torch.Tensor]:
    """
    What stands before x, v, u_0, u_1, ... in the state that each cycle reads, `(B, L, k + 2)` for cycle k.

    Slot 0 starts as x, and cycle i writes its content, v or u_(i - 1), into all slots: cycle k reads
    r_(k,0) x + sum_(i <= k) (w_i . r_k) content_i.

    Args:
        writes, reads: w and r of each cycle, `(B, L, N)`, which add up to 1.
    """
    found = []
    for cycle, read in enumerate(reads):
        contents = [(write * read).sum(dim=-1) for write in writes[: cycle + 1]]
        found.append(torch.stack([read[..., 0], *contents], dim=-1))
    return found


def router_entropy(weights: torch.Tensor) -> torch.Tensor:
    """Entropy of a router's weights `(..., N)` over log N: 1 where all slots get the same, 0 where one has all."""
    slots = weights.shape[-1]
    return torch.special.entr(weights).sum(dim=-1) / math.log(slots) if slots > 1 else torch.zeros(weights.shape[:-1])


def router_figures(writes: list[torch.Tensor], reads: list[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """Coefficients and entropies of each cycle, the mean over the tokens of each sequence: `(B, ...)` each."""
    return {
        "coefficients": [values.mean(dim=1) for values in coefficients(writes, reads)],
        "read entropy": [router_entropy(read).mean(dim=1) for read in reads],
        "write entropy": [router_entropy(write).mean(dim=1) for write in writes],
    }


def average(batches: list[dict[str, list[torch.Tensor]]]) -> dict:
    """The figures of `router_figures` over all sequences, as JSON can hold them, and what the coefficients are of."""
    figures = {
        name: [
            torch.cat([batch[name][cycle] for batch in batches]).double().mean(dim=0).tolist()
            for cycle in range(len(batches[0][name]))
        ]
        for name in batches[0]
    }
    updates = len(figures["coefficients"]) - 1
    return {"sources": ["x", "v", *(f"u_{t}" for t in range(updates))], **figures}
