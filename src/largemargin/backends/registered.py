"""The kernels as operators of torch, for compiled code only: ``torch.ops.largemargin.row_stats`` and its backward, on any device.

Compiled code cannot trace a kernel, but can call an operator without a graph break. ``import largemargin`` imports this module, because
stored programs may name the operators. It must import nothing but torch: the rest of the package may be half imported.
"""

from typing import Any

import torch
from torch import Tensor

Seven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("largemargin::row_stats", mutates_args=())
def row_stats(logits: Tensor, target: Tensor) -> Seven:
    """The six fields of RowStats, and the state (3, ...) for their gradient."""
    from . import ladder

    stats, softmax = ladder.kernels_of(logits).row_stats(logits, target)
    return (*stats, softmax.state)


@row_stats.register_fake
def _(logits: Tensor, target: Tensor) -> Seven:
    shape, dtype = logits.shape[:-1], torch.float64 if logits.dtype == torch.float64 else torch.float32
    l, e, a, rho, spread, count = (logits.new_empty(shape, dtype=dtype) for _ in range(6))
    return l, e, a, rho, spread, count, logits.new_empty((3, *shape), dtype=dtype)


@torch.library.custom_op("largemargin::row_stats_backward", mutates_args=())
def row_stats_backward(
    logits: Tensor,
    target: Tensor,
    num_nontargets: Tensor,
    state: Tensor,
    g_l: Tensor | None,
    g_e: Tensor | None,
    g_a: Tensor | None,
    g_rho: Tensor | None,
    g_spread: Tensor | None,
) -> Tensor:
    """The gradient of the logits, from the gradients of the first five fields."""
    from ..rowstats import Cotangents, Softmax
    from . import ladder

    cotangents = Cotangents(g_l, g_e, g_a, g_rho, g_spread)
    return ladder.kernels_of(logits).row_stats_backward(logits, target, Softmax(state, num_nontargets), cotangents)


@row_stats_backward.register_fake
def _(logits: Tensor, *_: Tensor | None) -> Tensor:
    return torch.empty_like(logits)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Seven) -> None:
    ctx.save_for_backward(*inputs, output[5], output[6])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None]:
    return row_stats_backward(*ctx.saved_tensors, *grads[:5]), None


row_stats.register_autograd(_backward, setup_context=_save)
