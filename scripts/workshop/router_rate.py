"""Routers of MeSH with a learning rate of their own."""

import torch
from torch import nn

from modeling_spiralformer.topology_spiralformer import SpiralFormerMeSH
from workshop.model_card import CardTrainer


def separate_routers(optimizer: torch.optim.Optimizer, model: nn.Module, ratio: float) -> None:
    """Moves the routers of MeSH into a parameter group with `ratio` of the learning rate and without weight decay.

    Raises ValueError where no router is trained.
    """
    meshes = [module for module in model.modules() if isinstance(module, SpiralFormerMeSH)]
    routers = [parameter for mesh in meshes for parameter in mesh.parameters() if parameter.requires_grad]
    if not routers:
        raise ValueError(
            f"`router_learning_rate_ratio` must be left out where no router of MeSH is trained, but got {ratio}."
        )
    moved = set(map(id, routers))
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in moved]
    rate = optimizer.param_groups[0]["lr"] * ratio
    optimizer.add_param_group({"params": routers, "lr": rate, "weight_decay": 0.0})


class RouterRateTrainer(CardTrainer):
    """
    A `Trainer` that gives the routers of MeSH a rate of their own.

    Args:
        router_learning_rate_ratio: how many times the learning rate, without weight decay; None: like all others.
    """

    def __init__(self, *args, router_learning_rate_ratio: float | None = None, **kwargs):
        self.router_learning_rate_ratio = router_learning_rate_ratio
        super().__init__(*args, **kwargs)

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """As the library's, with the routers in a group of their own."""
        is_new, ratio = self.optimizer is None, self.router_learning_rate_ratio
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and ratio is not None:
            separate_routers(optimizer, self.model, ratio)
        return optimizer
