"""A frozen linear layer whose softmax is the target of another layer."""

from typing import NamedTuple

import torch
from torch import Tensor

from .tiles import Layer


class Teacher(NamedTuple):
    input: Tensor  # (N, D), features of its own width
    linear_weight: Tensor  # (C, d1, ..., D)
    linear_bias: Tensor | None  # (C, d1, ...)
    temperature: float

    @classmethod
    def of(cls, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, temperature: float, num_classes: int | None) -> "Teacher":
        """Features (..., D) and the first ``num_classes`` classes of a classifier, by default all; no gradient reaches them."""
        bias = None if linear_bias is None else linear_bias[:num_classes].detach()
        return cls(input.reshape(-1, input.shape[-1]).detach(), linear_weight[:num_classes].detach(), bias, temperature)

    @property
    def tensors(self) -> list[Tensor | None]:
        return [self.input, self.linear_weight, self.linear_bias]

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.dtype  # of its probabilities

    @property
    def layer(self) -> Layer:
        return Layer(self.input, self.linear_weight.flatten(0, -2), None if self.linear_bias is None else self.linear_bias.flatten())

    def probabilities(self, rows: slice) -> Tensor:
        """The targets (n, C, d1, ...) of these rows."""
        layer = self.layer
        logits = layer.input.new_empty((len(layer.input[rows]), len(layer.weight)), dtype=layer.dtype)
        layer.logits_into(logits, rows)
        return self._softmax(logits.div_(self.temperature))

    def all_probabilities(self) -> Tensor:
        return self._softmax(self.layer.logits() / self.temperature)

    def _softmax(self, logits: Tensor) -> Tensor:
        return torch.softmax(logits.unflatten(1, self.linear_weight.shape[:-1]), 1)
