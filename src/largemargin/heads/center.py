"""Center loss, which draws features to the center of their class. Use it beside a softmax loss, which keeps the centers apart."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import _checks, _state, _torch
from ..rowstats import accumulation_dtype
from ..tracing import as_one_node, refuse_script
from ._target import check_features, rows_of_target


class CenterLoss(nn.Module):
    r"""Half the mean squared distance of features from the centers of their classes.

    .. math:: \frac{1}{2N} \sum_i \|x_i - c_{y_i}\|^2, \qquad
        c_j \leftarrow c_j - \alpha \frac{\sum_{i: y_i = j} (c_j - x_i)}{1 + n_j}, \quad n_j = |\{i: y_i = j\}|

    Rows with a negative target do not count; N is the number of other rows, and without them the loss is 0. Add it to a loss of the logits
    with a small factor, as the paper does: ``loss + 0.003 * center(features, target)``.

    The centers are a buffer that every forward pass in training updates after the loss; an optimizer does not see them. For activation
    checkpointing a second buffer of their size keeps the centers that the last forward pass saw; it is not in the ``state_dict``.
    ``as_parameter=True`` makes them a parameter with the gradient :math:`\sum_{i: y_i = j} (c_j - x_i) / N`; ``alpha`` has no effect then.

    With several processes, each updates its buffer from its own rows, and ``DistributedDataParallel`` overwrites all buffers with the first
    one. So only the rows of the first process count: use :func:`.gather_rows` first, or ``as_parameter=True``.

    Args:
        in_features, num_classes: the width D of the features, and C.
        alpha: the rate of the centers, in [0, 1].
        as_parameter: whether the optimizer moves the centers.
        device, dtype: of the centers.

    Example:
        >>> import torch
        >>> from largemargin.heads.center import CenterLoss
        >>> center = CenterLoss(16, 100)
        >>> center(torch.randn(8, 16), torch.arange(8)).shape
        torch.Size([])

    Source: Wen et al., A Discriminative Feature Learning Approach for Deep Face Recognition, ECCV 2016, and its code.
    """

    centers: Tensor
    __prepare_scriptable__ = refuse_script
    _seen: Tensor  # the centers of the classes of the last forward pass in training, before their update

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        alpha: float = 0.5,
        as_parameter: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.check_at_least_1("in_features", in_features)
        _checks.check_at_least_1("num_classes", num_classes)
        self.alpha = _checks.check_number("alpha", alpha, low=0.0)
        if alpha > 1:
            raise ValueError(f"alpha must be at most 1, got {alpha!r}; a center would jump over the mean of its rows")
        self.in_features, self.num_classes = in_features, num_classes
        centers = torch.empty(num_classes, in_features, device=device, dtype=dtype)
        if as_parameter:
            self.centers = nn.Parameter(centers)
        else:
            self.register_buffer("centers", centers)
            self.register_buffer("_seen", torch.zeros_like(centers), persistent=False)
        self.reset_parameters()

    @property
    def as_parameter(self) -> bool:
        return not _torch.has_buffer(self, "centers")  # nor in self._parameters, if it is pruned or parametrised

    def reset_parameters(self) -> None:
        """Initialise the centers by Xavier's rule, as the authors' code does."""
        nn.init.xavier_uniform_(self.centers)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        _state.forget(self.centers)
        super()._load_from_state_dict(*arguments)
        self._fit()  # load_state_dict(assign=True) may have brought centers of another device, dtype or kind

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if not self.as_parameter and not _torch.has_buffer(self, "_seen"):  # pickled by an older version
            self.register_buffer("_seen", torch.zeros_like(self.centers), persistent=False)

    def _fit(self) -> None:
        """Make ``_seen`` fit ``centers``, which may have been assigned."""
        if tuple(self.centers.shape) != (self.num_classes, self.in_features):
            raise ValueError(
                f"centers must have shape (num_classes, in_features) = {(self.num_classes, self.in_features)}, got "
                f"{_checks.describe(self.centers)}; make a CenterLoss of that size"
            )
        if self.as_parameter:
            return
        seen, centers = ((buffer.device, buffer.dtype, _checks.is_dtensor(buffer)) for buffer in (self._seen, self.centers))
        if seen != centers:
            self._seen = torch.zeros_like(self.centers)

    @as_one_node
    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        """The scalar loss of features (..., D) and class indices (...); in training it updates the centers."""
        _checks.check_tensor("target", target)
        check_features(features, target, self.in_features, self.num_classes, centers=self.centers)
        self._fit()
        dtype = accumulation_dtype(torch.promote_types(features.dtype, self.centers.dtype))
        rows, labels = features.reshape(-1, features.shape[-1]).to(dtype), target.reshape(-1)
        kept = labels >= 0
        moves = self.training and not self.as_parameter
        if not self.training and not self.as_parameter:
            _state.check_evaluation(self.centers)
        centers, alpha = self._centers_and_rate(labels, dtype) if moves else (rows_of_target(self.centers, labels), None)
        difference = torch.where(kept.unsqueeze(-1), centers.to(dtype) - rows, 0.0)  # (N, D)
        loss = difference.square().sum() / (2 * kept.sum().clamp(min=1))
        if alpha is not None:
            self._move(centers.detach(), alpha * difference.detach(), labels.clamp(min=0), kept)
        return loss

    def _centers_and_rate(self, labels: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
        """The center of each label (N, D), and alpha; a recomputation gets the centers of the first pass, and 0."""
        if _checks.is_dtensor(self.centers) and any(placement.is_shard(0) for placement in self.centers.placements):
            raise NotImplementedError(
                "centers is a DTensor whose classes are split over ranks, but a training step writes whole centers in place; replicate it, "
                "or use as_parameter=True"
            )
        first = [rows_of_target(self.centers, labels), self.centers.new_full((), self.alpha, dtype=dtype)]
        again = [rows_of_target(self._seen, labels), self.centers.new_zeros((), dtype=dtype)]
        return _state.first_or_again(self.centers, first, again)

    def _move(self, seen: Tensor, steps: Tensor, labels: Tensor, kept: Tensor) -> None:
        """Move the centers by ``steps`` (N, D), which are 0 for ignored rows; ``seen`` (N, D) are the centers in the loss."""
        counts = steps.new_zeros(len(self.centers)).index_add_(0, labels, kept.to(steps.dtype))
        steps = steps / (1 + counts[labels]).unsqueeze(-1)
        _state.write(self._seen, Tensor.index_copy_, 0, labels, seen)
        _state.write(self.centers, Tensor.index_add_, 0, labels, -steps.to(self.centers.dtype))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_classes={self.num_classes}, alpha={self.alpha}, as_parameter={self.as_parameter}"

    if TYPE_CHECKING:

        def __call__(self, features: Tensor, target: Tensor) -> Tensor: ...
