"""The losses of class indices beside ours, a row each: function, module, options, and the formula of the paper.

The formulas are at 600 digits, and none is the library's: they take the logits of the classes in the row, and the target's position.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import largemargin
import oracle
from largemargin.losses.rows import RowLoss
from oracle import ctx

Number = Any


class Case(NamedTuple):
    function: Callable[..., Tensor]
    module: type[RowLoss]
    options: dict[str, Any]  # beside the defaults
    truth: Callable[..., Number]
    infinite: bool  # where the target is masked

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def takes(self) -> list[str]:
        return list(inspect.signature(self.function).parameters)

    def of_classes(self, num_classes: int) -> dict[str, Tensor]:
        """The options with an entry for each class."""
        counts = torch.tensor([10.0, *(max(1000.0 // (1 + 3 * c), 1.0) for c in range(1, num_classes))], dtype=torch.float64)[:num_classes]
        return {"class_counts": counts} if "class_counts" in self.takes else {}

    def defaults(self) -> dict[str, Any]:
        return {name: p.default for name, p in inspect.signature(self.module).parameters.items() if p.default is not p.empty}

    def loss(self, input: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any) -> Tensor:
        num_classes = input.shape[min(1, input.dim() - 1)]
        of_classes = {name: value.to(input.device) for name, value in self.of_classes(num_classes).items()}
        return self.function(input, target, weight, **{**of_classes, **options})

    def paper(self, f: Sequence[float], y: int, lam: float = 0.0, **options: float) -> Number:
        """The loss of one row by the paper; a masked class is first deleted from the row."""
        kept = [c for c in range(len(f)) if f[c] != -oracle.INF]
        counts = {name: [ctx.mpf(float(value[c])) for c in kept] for name, value in self.of_classes(len(f)).items()}
        defaults = {name: value for name, value in self.defaults().items() if name in inspect.signature(self.truth).parameters}
        with ctx.workdps(600):  # 1 - p is far below 1e-120 at a lead of 300 nats
            row, at = [ctx.mpf(f[c]) for c in kept], kept.index(y)
            loss = self.truth(row, at, **{**defaults, **counts, **options})
            return loss + ctx.mpf(lam) * oracle.symmetric(self.seen(row, **{**self.defaults(), **counts, **options}), at) if lam else loss

    def seen(self, row: list[Number], **options: Any) -> list[Number]:
        """The logits that the loss sees, and the regulariser with it."""
        if self.function is largemargin.logit_adjusted:
            return adjusted(row, options["class_counts"], options["tau"])
        return [ctx.mpf(options["scale"]) * value for value in row] if self.function is largemargin.ldam else row


def softmax(f: list[Number]) -> list[Number]:
    total = ctx.fsum(map(ctx.exp, f))
    return [ctx.exp(value) / total for value in f]


def all_but(p: list[Number], y: int) -> Number:
    return ctx.fsum(p[c] for c in range(len(p)) if c != y)  # 1 - p_y


def generalized(f: list[Number], y: int, q: float) -> Number:
    return (1 - softmax(f)[y] ** ctx.mpf(q)) / ctx.mpf(q)


def reverse(f: list[Number], y: int) -> Number:
    """The cross-entropy of the label under the prediction, with log 0 = -4."""
    return -ctx.fsum(p_c * (0 if c == y else -4) for c, p_c in enumerate(softmax(f)))


def symmetric(f: list[Number], y: int, alpha: float, beta: float) -> Number:
    return -alpha * ctx.log(softmax(f)[y]) + beta * reverse(f, y)


def normalized_reverse(f: list[Number], y: int, alpha: float, beta: float) -> Number:
    log_p = [ctx.log(p_c) for p_c in softmax(f)]
    return beta * reverse(f, y) + (alpha * log_p[y] / ctx.fsum(log_p) if len(f) > 1 else 0)


def taylor(f: list[Number], y: int, order: int) -> Number:
    return ctx.fsum((1 - softmax(f)[y]) ** i / i for i in range(1, order + 1))


def confidence_penalty(f: list[Number], y: int, beta: float) -> Number:
    p = softmax(f)
    return -ctx.log(p[y]) - beta * -ctx.fsum(p_c * ctx.log(p_c) for p_c in p)


def max_suppression(f: list[Number], y: int, alpha: float) -> Number:
    return -ctx.log(softmax(f)[y]) + alpha * (max(f) - ctx.fsum(f) / len(f))


def focal(f: list[Number], y: int, gamma: float) -> Number:
    p = softmax(f)
    return -(all_but(p, y) ** ctx.mpf(gamma)) * ctx.log(p[y])


def dual_focal(f: list[Number], y: int, gamma: float) -> Number:
    p = softmax(f)
    others = [p_c for c, p_c in enumerate(p) if c != y]
    return -((all_but(p, y) + max(others, default=ctx.mpf(0))) ** ctx.mpf(gamma)) * ctx.log(p[y])


def poly1(f: list[Number], y: int, epsilon: float) -> Number:
    p = softmax(f)
    return -ctx.log(p[y]) + epsilon * all_but(p, y)


def margin_label_smoothing(f: list[Number], y: int, margin: float, alpha: float) -> Number:
    excess = [max(ctx.mpf(0), max(f) - value - ctx.mpf(margin)) for value in f]
    return -ctx.log(softmax(f)[y]) + alpha * ctx.fsum(excess) / len(f)


def adjusted(f: list[Number], class_counts: list[Number], tau: float) -> list[Number]:
    total = ctx.fsum(class_counts)
    return [value + ctx.mpf(tau) * ctx.log(n / total) for value, n in zip(f, class_counts, strict=True)]


def logit_adjusted(f: list[Number], y: int, class_counts: list[Number], tau: float) -> Number:
    return -ctx.log(softmax(adjusted(f, class_counts, tau))[y])


def ldam(f: list[Number], y: int, class_counts: list[Number], max_margin: float, scale: float) -> Number:
    roots = [n ** ctx.mpf(-0.25) for n in class_counts]
    margin = ctx.mpf(max_margin) * roots[y] / max(roots)
    return -ctx.log(softmax([ctx.mpf(scale) * (value - (margin if c == y else 0)) for c, value in enumerate(f)])[y])


OTHERS = [
    Case(largemargin.generalized_cross_entropy, largemargin.GeneralizedCrossEntropyLoss, {"q": 0.2}, generalized, False),
    Case(largemargin.symmetric_cross_entropy, largemargin.SymmetricCrossEntropyLoss, {"alpha": 6.0, "beta": 0.1}, symmetric, True),
    Case(
        largemargin.normalized_reverse_cross_entropy,
        largemargin.NormalizedReverseCrossEntropyLoss,
        {"alpha": 10.0, "beta": 0.1},
        normalized_reverse,
        False,
    ),
    Case(largemargin.taylor_cross_entropy, largemargin.TaylorCrossEntropyLoss, {"order": 6}, taylor, False),
    Case(largemargin.focal_cross_entropy, largemargin.FocalCrossEntropyLoss, {"gamma": 0.5}, focal, True),
    Case(largemargin.dual_focal_cross_entropy, largemargin.DualFocalCrossEntropyLoss, {"gamma": 1.0}, dual_focal, True),
    Case(largemargin.poly1_cross_entropy, largemargin.Poly1CrossEntropyLoss, {"epsilon": -1.0}, poly1, True),
    Case(largemargin.confidence_penalty, largemargin.ConfidencePenaltyLoss, {"beta": 1.0}, confidence_penalty, True),
    Case(largemargin.max_suppression, largemargin.MaxSuppressionLoss, {"alpha": 0.5}, max_suppression, True),
    Case(
        largemargin.margin_label_smoothing,
        largemargin.MarginLabelSmoothingLoss,
        {"margin": 0.0, "alpha": 0.5},
        margin_label_smoothing,
        True,
    ),
    Case(largemargin.logit_adjusted, largemargin.LogitAdjustedLoss, {"tau": -1.5}, logit_adjusted, True),
    Case(largemargin.ldam, largemargin.LDAMLoss, {"max_margin": 0.25, "scale": 2.0}, ldam, True),
]
HINGES = [
    Case(largemargin.multiclass_hinge, largemargin.MulticlassHingeLoss, {"margin": 2.0}, oracle.multiclass_hinge, True),
    Case(largemargin.crammer_singer_hinge, largemargin.CrammerSingerHingeLoss, {"margin": 2.0}, oracle.crammer_singer, True),
    Case(largemargin.hard_margin_softplus, largemargin.HardMarginSoftplusLoss, {"margin": 2.0}, oracle.hard_margin_softplus, True),
]
ROW_LOSSES = [*HINGES, *OTHERS]
