r"""Numbers that change while a model trains: each a module that counts its training steps, so that a resumed run goes on where it was.

    AnnealedLambda     max(lambda_min, base (1 + gamma t)^-power)            L-Softmax and SphereFace, how much the plain logit weighs
    SteppedAlpha       min(start factor^floor((t - 1) / every), maximum)     the margin of Gaussian mixtures
    GradualWeight      start + (end - start) min((t - 1) / num_steps, 1)     a weight that is enforced gradually

The number t of a training step is 1 at the first. In training mode ``schedule()`` goes on to the next step and returns its value, in eval
mode it stays and returns the value of the last one (of the first, before there is one). So one schedule belongs to one caller, which asks
once a forward pass. Several passes a step (accumulated gradients) count as several steps. A forward pass that activation checkpointing
recomputes counts once, and has the same value both times; see the rule in :mod:`largemargin._state`, which all losses with state keep.

The count is a buffer, ``step``, written in place, and the value a 0-d tensor made of it. Nothing waits for the device, and compiled code
sees no changing number.
"""

import math
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from . import _checks, _state
from .tracing import as_one_node

SMALL = 1e-2  # a lambda that counts as none


class Schedule(nn.Module):
    """A number that depends on how many training steps there have been; subclasses say how, in :meth:`at`."""

    step: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def reset(self) -> None:
        """Back to the beginning."""
        self.step.zero_()

    def at(self, step: Tensor) -> Tensor:
        """The value at training steps ``step``, floating and at least 1; elementwise."""
        raise NotImplementedError

    @as_one_node
    def forward(self) -> Tensor:
        """The value of the next step, in training mode, or again of the last: a 0-d tensor."""
        step = self.step
        if self.training:
            (step,) = _state.first_or_again(self.step, [self.step + 1], [self.step])
            _state.write(self.step, Tensor.copy_, step)
        else:
            _state.check_evaluation(step)
        # a 0-d float64 promotes 0-d tensors alone; Apple's GPUs have none
        return self.at(step.clamp(min=1).to(torch.float32 if step.is_mps else torch.float64))

    if TYPE_CHECKING:

        def __call__(self) -> Tensor: ...


class AnnealedLambda(Schedule):
    r"""How much the plain target logit weighs beside the one with a margin: all in the beginning, next to nothing in the end.

    .. math:: \lambda_t = \max(\lambda_{\min}, \text{base} (1 + \gamma t)^{-\text{power}}), \quad f_y = \frac{\lambda_t f_y^{\text{plain}}
        + f_y^{\text{margin}}}{1 + \lambda_t}

    The authors' advice: ``lambda_min`` 0 for easy data, at first 5 or 10 for large or difficult data, and about 0.5 where a run diverges.

    Args:
        base: the value at the beginning, at least 0; 0 leaves ``lambda_min``.
        gamma: the speed, per training step, at least 0.
        power: at least 0.
        lambda_min: what remains, at least 0.

    Example:
        >>> from largemargin.schedules import AnnealedLambda
        >>> schedule = AnnealedLambda(base=1000, gamma=0.12, power=1, lambda_min=5)
        >>> [round(float(schedule()), 1) for _ in range(3)]
        [892.9, 806.5, 735.3]

    Source: Liu et al., ICML 2016, the published code; that of SphereFace (Liu et al., CVPR 2017).
    """

    def __init__(self, base: float, gamma: float, power: float, lambda_min: float = 0.0) -> None:
        for name, value in (("base", base), ("gamma", gamma), ("power", power), ("lambda_min", lambda_min)):
            _checks.check_number(name, value, low=0.0)
        super().__init__()
        self.base, self.gamma, self.power, self.lambda_min = base, gamma, power, lambda_min

    @classmethod
    def mnist(cls, lambda_min: float = 0.0) -> Self:
        """The authors' for MNIST, with an angular multiplier of 4."""
        return cls(1000.0, 2.5e-5, 35.0, lambda_min)

    @classmethod
    def cifar10(cls, lambda_min: float = 0.0) -> Self:
        """The authors' for CIFAR-10 without augmentation."""
        return cls(1000.0, 2e-5, 45.0, lambda_min)

    @classmethod
    def cifar10_augmented(cls, lambda_min: float = 0.0) -> Self:
        """The authors' for CIFAR-10 with shifts and flips."""
        return cls(1000.0, 1e-5, 45.0, lambda_min)

    @classmethod
    def sphereface(cls, lambda_min: float = 5.0) -> Self:
        """That of SphereFace, which keeps a lambda of 5."""
        return cls(1000.0, 0.12, 1.0, lambda_min)

    @classmethod
    def for_steps(cls, num_steps: int, base: float = 1000.0, power: float = 35.0, lambda_min: float = 0.0) -> Self:
        """That of a run which ends, at ``num_steps``, at 0.01 (or ``lambda_min``): gamma = ((100 base)^(1/power) - 1) / num_steps."""
        _checks.check_at_least_1("num_steps", num_steps)
        _checks.check_positive("power", power)
        _checks.check_number("base", base, low=0.0)
        growth = math.expm1(math.log(max(base / SMALL, 1.0)) / power)
        return cls(base, growth / num_steps * (1 + 1e-12), power, lambda_min)  # not above it, however that is rounded

    def at(self, step: Tensor) -> Tensor:
        decay = torch.exp(-self.power * torch.log1p(self.gamma * step))
        return (self.base * decay).clamp(min=self.lambda_min)

    def extra_repr(self) -> str:
        return f"base={self.base}, gamma={self.gamma}, power={self.power}, lambda_min={self.lambda_min}"


class SteppedAlpha(Schedule):
    r"""The margin alpha of a Gaussian mixture, multiplied by ``factor`` every so many steps.

    .. math:: \alpha_t = \min(\text{start} \cdot \text{factor}^{\lfloor (t - 1) / \text{every} \rfloor}, \text{maximum})

    Args:
        start: the value of the first ``every`` steps, above 0.
        factor: at least 1.
        every: training steps between two changes, at least 1; the authors' 5,000 are a 24th of their run on CIFAR-100.
        maximum: where it stays, at least 0.

    Example:
        >>> from largemargin.schedules import SteppedAlpha
        >>> schedule = SteppedAlpha(every=2)
        >>> [round(float(schedule()), 2) for _ in range(6)]
        [0.1, 0.1, 0.2, 0.2, 0.3, 0.3]

    Source: Wan et al., CVPR 2018, its published code (STEPUP).
    """

    def __init__(self, start: float = 0.1, factor: float = 2.0, every: int = 5000, maximum: float = 0.3) -> None:
        _checks.check_positive("start", start)
        _checks.check_number("factor", factor, low=1.0)
        _checks.check_at_least_1("every", every)
        _checks.check_number("maximum", maximum, low=0.0)
        super().__init__()
        self.start, self.factor, self.every, self.maximum = start, factor, every, maximum

    @classmethod
    def for_steps(cls, num_steps: int, start: float = 0.1, factor: float = 2.0, maximum: float = 0.3) -> Self:
        """The authors' changes at the same parts of a run of ``num_steps`` steps as of their 120,000."""
        _checks.check_at_least_1("num_steps", num_steps)
        return cls(start, factor, max(1, round(num_steps / 24)), maximum)

    def at(self, step: Tensor) -> Tensor:
        changes = torch.floor((step - 1) / self.every)
        return (self.start * torch.pow(self.factor, changes)).clamp(max=self.maximum)

    def extra_repr(self) -> str:
        return f"start={self.start}, factor={self.factor}, every={self.every}, maximum={self.maximum}"


class GradualWeight(Schedule):
    r"""A weight that goes from ``start``, at the first step, straight to ``end``, at step ``num_steps`` + 1, and stays there.

    .. math:: w_t = \text{start} + (\text{end} - \text{start}) \min((t - 1) / \text{num\_steps}, 1)

    Args:
        num_steps: training steps on the way, at least 1.
        start: finite.
        end: finite.

    Example:
        >>> from largemargin.schedules import GradualWeight
        >>> schedule = GradualWeight(4)
        >>> [float(schedule()) for _ in range(6)]
        [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]

    Source: folklore.
    """

    def __init__(self, num_steps: int, start: float = 0.0, end: float = 1.0) -> None:
        _checks.check_at_least_1("num_steps", num_steps)
        _checks.check_number("start", start)
        _checks.check_number("end", end)
        super().__init__()
        self.num_steps, self.start, self.end = num_steps, start, end

    def at(self, step: Tensor) -> Tensor:
        part = ((step - 1) / self.num_steps).clamp(max=1.0)
        return self.start * (1 - part) + self.end * part

    def extra_repr(self) -> str:
        return f"num_steps={self.num_steps}, start={self.start}, end={self.end}"


def check_schedule(name: str, value: object, otherwise: str) -> None:
    if not isinstance(value, Schedule):
        raise TypeError(f"{name} must be {otherwise}, or a Schedule such as those of largemargin.schedules; got {_checks.describe(value)}")
