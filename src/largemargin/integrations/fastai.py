"""The large-margin loss for fastai's Learner, which calls ``activation`` and ``decodes`` of its loss."""

from typing import Any

from torch import Tensor

from largemargin import LargeMarginCrossEntropyLoss


class LargeMarginLoss(LargeMarginCrossEntropyLoss):
    r"""The loss for ``Learner(loss_func=...)``, instead of fastai's ``CrossEntropyLossFlat``.

    ``get_preds``, ``predict`` and ``show_results`` give probabilities and classes; with a loss without ``activation`` and ``decodes`` they
    give logits. As in fastai, outputs and targets are flattened to rows, and mixup interpolates the losses of two targets.

    Args:
        weight: a factor for each class, shape ``(C,)``.
        axis: the dimension of the classes: -1, or 1 for segmentation maps (N, C, H, W).
        settings: of :class:`~largemargin.LargeMarginCrossEntropyLoss`.

    Raises:
        TypeError, ValueError: as :class:`~largemargin.LargeMarginCrossEntropyLoss`.

    Example:
        >>> import torch
        >>> from largemargin.integrations.fastai import LargeMarginLoss
        >>> loss = LargeMarginLoss(lam=0.3)  # Learner(dls, model, loss_func=loss)
        >>> logits = torch.tensor([[3.0, 1.0, 0.0]])
        >>> loss(logits, torch.tensor([0])), loss.decodes(loss.activation(logits))
        (tensor(0.2045), tensor([0]))

    Source: Kobayashi, BMVC 2019, eqs. (8) and (11); fastai.losses has the interface.
    """

    y_int = True  # tells fastai's mixup that targets are class indices: it interpolates losses

    def __init__(self, weight: Tensor | None = None, *, axis: int = -1, **settings: Any) -> None:
        super().__init__(weight, **settings)
        self.axis = axis

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of outputs with the classes along ``axis``, and class indices or probabilities."""
        # without fastai's subclass, which the kernels do not take
        logits, target = input.as_subclass(Tensor).movedim(self.axis, -1), target.as_subclass(Tensor)
        rows = logits.reshape(-1, logits.shape[-1])
        if target.is_floating_point() and target.shape == input.shape:
            return super().forward(rows, target.movedim(self.axis, -1).reshape(rows.shape))
        return super().forward(rows, target.reshape(-1))

    def activation(self, logits: Tensor) -> Tensor:
        return logits.softmax(self.axis)

    def decodes(self, probabilities: Tensor) -> Tensor:
        return probabilities.argmax(self.axis)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, axis={self.axis}"
