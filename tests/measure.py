"""How far a result is from the truth, in roundings: units of eps times the natural scale of the result.

The truth is always of higher precision (the oracle, or float64 for a lower dtype), never the code under test in the same dtype. The
natural scale is the size of the terms that a result is the sum or difference of, so a bound of a few units is as sharp in the tails
and at a common offset of 1e5 as it is in the middle. Tensors may live on any device: they are compared on the CPU.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle

INF = float("inf")

# torch.compile of an autograd.Function instantiates it, against torch's own advice; warnings are errors here
compiles = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def roundings(got: Tensor, truth: object, scale: object, dtype: torch.dtype | None = None) -> Tensor:
    """The error of ``got`` in units of eps(dtype) * scale, elementwise; equal infinities and NaN at NaN count as right."""
    info = torch.finfo(dtype or got.dtype)
    got = got.detach().to("cpu", torch.float64)
    truth = torch.as_tensor(truth, dtype=torch.float64, device="cpu").expand(got.shape)
    scale = torch.as_tensor(scale, dtype=torch.float64, device="cpu").expand(got.shape)
    # below the normal range a number has no more than the spacing of the subnormals
    error = (got - truth).abs() / (info.eps * scale + info.eps * info.tiny)
    right = (got == truth) | (got.isnan() & truth.isnan())
    return torch.where(right, 0.0, error.nan_to_num(nan=INF, posinf=INF))


def assert_within(got: Tensor, truth: object, scale: object, units: float, dtype: torch.dtype | None = None) -> None:
    """Every element of ``got`` is at most ``units`` roundings from the truth."""
    error = roundings(got, truth, scale, dtype).flatten()
    if error.numel() and error.max() > units:
        worst = int(error.argmax())
        values = [torch.as_tensor(x, dtype=torch.float64).detach().expand(got.shape).flatten()[worst].item() for x in (got, truth, scale)]
        raise AssertionError(
            "{:.3g} roundings, allowed {:g}: got {!r}, truth {!r}, scale {:g}, at element {} of {}".format(
                error[worst], units, *values, worst, tuple(got.shape)
            )
        )


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal shape, dtype and values, NaN equal to NaN."""
    left, right = left.cpu(), right.cpu()
    return left.shape == right.shape and left.dtype == right.dtype and bool(((left == right) | (left.isnan() & right.isnan())).all())


class RowScale:
    """The natural scales of the statistics of a row whose target is in it."""

    def __init__(self, f: Sequence[float], y: int) -> None:
        others = [value for c, value in enumerate(f) if c != y and value != -INF]
        top = max(others, default=f[y])
        self.log_count = math.log(max(len(others), 1))
        self.reach = abs(f[y] - top)  # how far the target is from the largest other
        self.depth = sum(top - value for value in others) / max(len(others), 1)  # how far the others are below it on average
        self.rho = self.neg_entropy = 1 + self.log_count
        self.log_odds = 1 + self.log_count + self.reach
        self.mean_log_q = self.spread = 1 + self.log_count + self.depth
        self.num_nontargets = 0.0  # exact
        self.divergence = {"symmetric": self.spread, "kl_qu": self.neg_entropy, "kl_uq": self.mean_log_q}


def loss_scale(
    f: Sequence[float],
    y: int,
    weight: Sequence[float] | None = None,
    *,
    lam: float = 0.3,
    divergence: str = "symmetric",
    hard_bias: float = 0.0,
    label_smoothing: float = 0.0,
) -> float:
    """The natural scale of a row's loss; its first term is as small as the loss itself when the target leads."""
    row = RowScale(f, y)
    softplus = float(oracle.modified(f, y, hard_bias))
    w = [1.0] * len(f) if weight is None else weight
    hard = min(softplus, 1.0) * (row.log_odds + abs(hard_bias)) + softplus
    scale = w[y] * ((1 - label_smoothing) * hard + lam * row.divergence[divergence])
    if label_smoothing > 0:
        kept = [c for c in range(len(f)) if f[c] != -INF]
        top = max(f[c] for c in kept)
        scale += label_smoothing * sum(w[c] * (1 + math.log(len(kept)) + top - f[c]) for c in kept) / len(kept)
    return scale


@contextlib.contextmanager
def waiting_refused() -> Iterator[None]:
    """What would make the host wait for the GPU raises meanwhile."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*prototype feature.*")  # torch's, of the mode itself
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def call_or_error(function: Callable[..., Tensor], *args: object, **options: Any) -> Tensor | Exception:
    try:
        return function(*args, **options)
    except Exception as error:
        return error


def peak_bytes(step: Callable[[], object]) -> int:
    """The most memory that torch takes during a step (CPU)."""
    held = peak = 0
    with torch.profiler.profile(profile_memory=True) as profiler:
        step()
    taken = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(taken, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def flop_of_products(profiler: torch.profiler.profile) -> int:
    """FLOP of the matrix products in a profile taken with ``with_flops=True``."""
    return sum(event.flops for event in profiler.key_averages() if event.key in ("aten::mm", "aten::addmm"))
