"""The large margin for a Learner of fastai, which asks its loss how outputs become probabilities and classes."""

from typing import Any

from torch import Tensor

from largemargin.losses import LargeMarginCrossEntropyLoss


class LargeMarginLoss(LargeMarginCrossEntropyLoss):
    r"""The loss for ``Learner(loss_func=...)``, in the place of fastai's ``CrossEntropyLossFlat``.

    With it ``get_preds``, ``predict`` and ``show_results`` give probabilities and classes; with a loss that has no ``activation`` and
    ``decodes`` they give logits. As there, outputs and targets are flattened to rows, and mixup interpolates the losses of two targets.

    Args:
        weight: a factor for each class, shape ``(C,)``.
        axis: the dimension of the outputs that has the classes: -1, or 1 for the maps (N, C, H, W) of segmentation.
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

    Source: Kobayashi, BMVC 2019, eqs. (8) and (11); the interface is that of fastai.losses.
    """

    y_int = True  # fastai's mixup asks: targets are class indices, and losses are interpolated instead

    def __init__(self, weight: Tensor | None = None, *, axis: int = -1, **settings: Any) -> None:
        super().__init__(weight, **settings)
        self.axis = axis

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of outputs with the classes along ``axis``, and class indices or probabilities."""
        logits, target = _plain(input).movedim(self.axis, -1), _plain(target)
        rows = logits.reshape(-1, logits.shape[-1])
        if target.is_floating_point() and target.shape == input.shape:
            return super().forward(rows, target.movedim(self.axis, -1).reshape(rows.shape))
        return super().forward(rows, target.reshape(-1))

    def activation(self, logits: Tensor) -> Tensor:
        """Probabilities."""
        return logits.softmax(self.axis)

    def decodes(self, probabilities: Tensor) -> Tensor:
        """Classes."""
        return probabilities.argmax(self.axis)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, axis={self.axis}"


def _plain(tensor: Tensor) -> Tensor:
    """Without fastai's subclass, which the kernels do not take."""
    return tensor.as_subclass(Tensor)
