"""What tells one model from another, on both sides of a push; needs nothing of the package."""

import torch

# Weights come back bit by bit. The results do not quite: weights read from a file lie at other addresses, where a
# product of matrices sums in another order (2e-7 for `configuration/tiny`).
TOLERANCE = 1e-5


def snapshot(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """The weights of a model in evaluation mode, and all tensors that its forward gives without a cache."""
    with torch.no_grad():
        results = model(**batch, use_cache=False).to_tuple()
    weights = [weight.clone() for weight in model.state_dict().values()]
    return {"weights": weights, "results": [value for value in results if isinstance(value, torch.Tensor)]}


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether results are of the same weights and the same batch."""
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=0, atol=TOLERANCE)


def same(found: dict[str, list[torch.Tensor]], expected: dict[str, list[torch.Tensor]]) -> bool:
    """Whether two snapshots are of the same model."""
    for name, agree in (("weights", torch.equal), ("results", close)):
        if len(found[name]) != len(expected[name]) or not all(map(agree, found[name], expected[name])):
            return False
    return True
