r"""Numbers that change in training. Each is a module that counts training steps, so that a resumed run continues.

The first training step has t = 1. In training mode ``schedule()`` advances and returns the value of the new step. In eval mode it returns
the value of the last step (at first, of step 1). So a schedule needs one caller, with one call per forward pass. Several passes per step
(accumulated gradients) count as several steps. A recomputation by activation checkpointing does not count, and gets the same value; see
:mod:`largemargin._state`. The count is the buffer ``step``, written in place; nothing synchronises the device or recompiles code.
"""

import math
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from . import _checks, _state
from .tracing import as_one_node, refuse_script

SMALL = 1e-2  # a lambda that counts as 0


class Schedule(nn.Module):
    """A number that depends on the count of training steps; a subclass defines it by :meth:`at`."""

    step: Tensor
    __prepare_scriptable__ = refuse_script
    _shown: tuple[str, ...] = ()  # attributes that repr() shows

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def reset(self) -> None:
        """Set the count to 0."""
        _state.forget(self.step)
        self.step.zero_()

    def _load_from_state_dict(self, *arguments: Any) -> None:
        _state.forget(self.step)
        super()._load_from_state_dict(*arguments)

    def at(self, step: Tensor) -> Tensor:
        """The value at training steps ``step``, floating and at least 1, elementwise."""
        raise NotImplementedError

    @as_one_node
    def forward(self) -> Tensor:
        """In training mode the value of the next step, else of the last: a 0-d tensor."""
        step = self.step
        if self.training:
            (step,) = _state.first_or_again(self.step, [self.step + 1], [self.step])
            _state.write(self.step, Tensor.copy_, step)
        else:
            _state.check_evaluation(step)
        # a 0-d float64 promotes only 0-d tensors; Apple's GPUs have no float64
        return self.at(step.clamp(min=1).to(torch.float32 if step.is_mps else torch.float64))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)}" for name in self._shown)

    if TYPE_CHECKING:

        def __call__(self) -> Tensor: ...


class AnnealedLambda(Schedule):
    r"""The weight of the plain target logit beside the one with a margin: large at the beginning, small at the end.

    .. math:: \lambda_t = \max(\lambda_{\min}, \text{base} (1 + \gamma t)^{-\text{power}}), \quad f_y = \frac{\lambda_t f_y^{\text{plain}}
        + f_y^{\text{margin}}}{1 + \lambda_t}

    The authors advise a ``lambda_min`` of 0 for easy data, first 5 or 10 for large or difficult data, and about 0.5 if a run diverges.

    Args:
        base: the value at the beginning, at least 0; with 0 the value is always ``lambda_min``.
        gamma: the speed, per training step, at least 0.
        power: the exponent, at least 0.
        lambda_min: the final value, at least 0.

    Example:
        >>> from largemargin.schedules import AnnealedLambda
        >>> schedule = AnnealedLambda(base=1000, gamma=0.12, power=1, lambda_min=5)
        >>> [round(float(schedule()), 1) for _ in range(3)]
        [892.9, 806.5, 735.3]

    Source: the published codes of Liu et al., ICML 2016, and of SphereFace (Liu et al., CVPR 2017).
    """

    _shown = ("base", "gamma", "power", "lambda_min")

    def __init__(self, base: float, gamma: float, power: float, lambda_min: float = 0.0) -> None:
        super().__init__()
        self.base = _checks.check_number("base", base, low=0.0)
        self.gamma = _checks.check_number("gamma", gamma, low=0.0)
        self.power = _checks.check_number("power", power, low=0.0)
        self.lambda_min = _checks.check_number("lambda_min", lambda_min, low=0.0)

    @classmethod
    def mnist(cls, lambda_min: float = 0.0) -> Self:
        """The authors' schedule for MNIST, with an angular multiplier of 4."""
        return cls(1000.0, 2.5e-5, 35.0, lambda_min)

    @classmethod
    def cifar10(cls, lambda_min: float = 0.0) -> Self:
        """The authors' schedule for CIFAR-10 without augmentation."""
        return cls(1000.0, 2e-5, 45.0, lambda_min)

    @classmethod
    def cifar10_augmented(cls, lambda_min: float = 0.0) -> Self:
        """The authors' schedule for CIFAR-10 with shifts and flips."""
        return cls(1000.0, 1e-5, 45.0, lambda_min)

    @classmethod
    def sphereface(cls, lambda_min: float = 5.0) -> Self:
        """The schedule of SphereFace, which ends at 5."""
        return cls(1000.0, 0.12, 1.0, lambda_min)

    @classmethod
    def for_steps(cls, num_steps: int, base: float = 1000.0, power: float = 35.0, lambda_min: float = 0.0) -> Self:
        """A schedule that reaches 0.01 (or ``lambda_min``) at ``num_steps``: gamma = ((100 base)^(1/power) - 1) / num_steps."""
        _checks.check_at_least_1("num_steps", num_steps)
        _checks.check_positive("power", power)
        _checks.check_number("base", base, low=0.0)
        growth = math.expm1(math.log(max(base / SMALL, 1.0)) / power)
        return cls(base, growth / num_steps * (1 + 1e-12), power, lambda_min)  # rounding must not leave it above

    def at(self, step: Tensor) -> Tensor:
        decay = torch.exp(-self.power * torch.log1p(self.gamma * step))
        return (self.base * decay).clamp(min=self.lambda_min)


class SteppedAlpha(Schedule):
    r"""The margin alpha of a Gaussian mixture, which grows by ``factor`` after ``every`` steps.

    .. math:: \alpha_t = \min(\text{start} \cdot \text{factor}^{\lfloor (t - 1) / \text{every} \rfloor}, \text{maximum})

    Args:
        start: the value of the first ``every`` steps, above 0.
        factor: at least 1.
        every: training steps between two changes, at least 1; the authors' 5,000 are 1/24 of their run on CIFAR-100.
        maximum: the final value, at least 0.

    Example:
        >>> from largemargin.schedules import SteppedAlpha
        >>> schedule = SteppedAlpha(every=2)
        >>> [round(float(schedule()), 2) for _ in range(6)]
        [0.1, 0.1, 0.2, 0.2, 0.3, 0.3]

    Source: Wan et al., CVPR 2018, its published code (STEPUP).
    """

    _shown = ("start", "factor", "every", "maximum")

    def __init__(self, start: float = 0.1, factor: float = 2.0, every: int = 5000, maximum: float = 0.3) -> None:
        super().__init__()
        _checks.check_at_least_1("every", every)
        self.start, self.factor = _checks.check_positive("start", start), _checks.check_number("factor", factor, low=1.0)
        self.every, self.maximum = int(every), _checks.check_number("maximum", maximum, low=0.0)

    @classmethod
    def for_steps(cls, num_steps: int, start: float = 0.1, factor: float = 2.0, maximum: float = 0.3) -> Self:
        """The authors' schedule, scaled from their 120,000 steps to ``num_steps``."""
        _checks.check_at_least_1("num_steps", num_steps)
        return cls(start, factor, max(1, round(num_steps / 24)), maximum)

    def at(self, step: Tensor) -> Tensor:
        changes = torch.floor((step - 1) / self.every)
        return (self.start * torch.pow(self.factor, changes)).clamp(max=self.maximum)


class GradualWeight(Schedule):
    r"""A weight that changes linearly from ``start`` at step 1 to ``end`` at step ``num_steps`` + 1, and then stays.

    .. math:: w_t = \text{start} + (\text{end} - \text{start}) \min((t - 1) / \text{num\_steps}, 1)

    Args:
        num_steps: training steps of the change, at least 1.
        start, end: the first and the final value, finite.

    Example:
        >>> from largemargin.schedules import GradualWeight
        >>> schedule = GradualWeight(4)
        >>> [float(schedule()) for _ in range(6)]
        [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]

    Source: folklore.
    """

    _shown = ("num_steps", "start", "end")

    def __init__(self, num_steps: int, start: float = 0.0, end: float = 1.0) -> None:
        super().__init__()
        _checks.check_at_least_1("num_steps", num_steps)
        self.num_steps = int(num_steps)
        self.start, self.end = _checks.check_number("start", start), _checks.check_number("end", end)

    def at(self, step: Tensor) -> Tensor:
        part = ((step - 1) / self.num_steps).clamp(max=1.0)
        return self.start * (1 - part) + self.end * part


def check_schedule(name: str, value: object, otherwise: str) -> None:
    if not isinstance(value, Schedule):
        raise TypeError(f"{name} must be {otherwise}, or a Schedule such as those of largemargin.schedules; got {_checks.describe(value)}")
