"""The optimiser of a run, and the learning rate of each epoch."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import LabError
from .method import parameter_groups
from .recipe import Recipe


def learning_rates(recipe: Recipe) -> list[float]:
    """One for each epoch."""
    epochs, last = np.arange(recipe.epochs), max(recipe.epochs - 1, 1)
    match recipe.schedule:
        case "log":
            factors: np.ndarray[Any, Any] = np.logspace(0, np.log10(recipe.final_factor), recipe.epochs)
        case "cosine":
            factors = recipe.final_factor + (1 - recipe.final_factor) * (1 + np.cos(np.pi * epochs / last)) / 2
        case "steps":
            factors = recipe.step_factor ** np.searchsorted(np.sort(recipe.milestones), epochs, side="right")
        case _:
            raise LabError(f"schedule must be log, cosine or steps, got {recipe.schedule!r}")
    return [float(rate) for rate in recipe.learning_rate * factors]


class Optimizer(torch.optim.SGD):
    """SGD as the recipe says. A CUDA graph reads the learning rate from the device, which only the fused form does without waiting."""

    def __init__(self, recipe: Recipe, network: nn.Module, device: torch.device) -> None:
        self.fused = True if device.type == "cuda" else None
        self.device, self.rates = device, learning_rates(recipe)
        groups = parameter_groups(recipe, network)
        super().__init__(groups, lr=recipe.learning_rate, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=self.fused)

    def load(self, state: dict[str, Any]) -> None:
        """The state of a checkpoint; that of an earlier version may have been written without ``fused``."""
        self.load_state_dict(state)
        for group in self.param_groups:
            group["fused"] = self.fused

    def set_rate(self, epoch: int) -> None:
        """The learning rate of an epoch: a number, or where the optimiser is fused a tensor that stays the same."""
        for group in self.param_groups:
            rate = self.rates[epoch] * group["factor"]
            if not self.fused:
                group["lr"] = rate
            elif isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = torch.tensor(rate, dtype=torch.float32, device=self.device)
