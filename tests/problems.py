"""What many laws are about: logits with their targets, a value with its gradient, and how large the terms of a gradient are."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from largemargin import large_margin_cross_entropy


def problem(
    rng: torch.Generator, device: torch.device, rows: int = 8, classes: int = 10, scale: float = 3.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    input = torch.randn(rows, classes, generator=rng, dtype=torch.float64).to(device, dtype) * scale
    return input, torch.randint(classes, (rows,), generator=rng).to(device)


def value_and_gradient(
    function: Callable[..., Tensor], input: Tensor, *arguments: Any, factor: float = 1.0, **options: Any
) -> tuple[Tensor, Tensor]:
    """The value of a function of ``input`` and the gradient of its sum times ``factor``."""
    leaf = input.detach().requires_grad_()  # keeps the strides
    value = function(leaf, *arguments, **options)
    return value.detach(), torch.autograd.grad(value.sum() * factor, leaf)[0]


loss_and_gradient = functools.partial(value_and_gradient, large_margin_cross_entropy)


def vjp_scale(logits: Tensor, target: Tensor, upstream: Sequence[Tensor]) -> Tensor:
    """The size of the terms of each entry of the gradient of the statistics, in float64: q_c = e^z / S is off by |z| roundings."""
    class_dim = 1 if logits.dim() > 1 else 0
    f, y = logits.detach().double().movedim(class_dim, -1), target.clamp(min=0).unsqueeze(-1)
    others = f.scatter(-1, y, -torch.inf)
    z = torch.where(others > -torch.inf, others - others.amax(-1, keepdim=True), 0.0).nan_to_num(nan=0.0, neginf=0.0)
    q = others.softmax(-1).nan_to_num(nan=0.0)
    reach = 1 + z.abs() + (q * z.abs()).sum(-1, keepdim=True)
    g_l, g_e, g_a, g_rho, g_spread = (g.double().abs().unsqueeze(-1) for g in upstream)
    count = (others > -torch.inf).sum(-1, keepdim=True).clamp(min=1)
    size = reach * q * ((g_e + g_spread) * reach + g_l + g_a + g_rho) + (g_a + g_spread) / count + g_rho * (z == 0) * (q > 0)
    return size.scatter(-1, y, g_l).movedim(-1, class_dim)
