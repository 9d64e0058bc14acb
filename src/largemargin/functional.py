"""The public functions of logits, features and targets. Each checks its arguments once and delegates to :mod:`.rows`.

:mod:`.loss` defines the losses. :mod:`.losses.hinges` has the hinges and the hard margin.
"""

from typing import TYPE_CHECKING, Unpack

import torch
from torch import Tensor
from torch.fx import Proxy

from . import _checks
from ._backend_names import BackendName
from ._reduce import Reduction
from ._shared import takes
from .loss import Divergence, LinearOptions, LossOptions, Options
from .rows import collectives, dense, dtensors, linear, sharded_linear, shards, whole
from .rows.teacher import Teacher
from .rowstats import RowStats
from .tracing import as_one_call, no_script, record

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # there are builds of torch without it
    from torch.nn import LinearCrossEntropyOptions  # from torch 2.13 on


@as_one_call
def row_stats(input: Tensor, target: Tensor, *, ignore_index: int = -100, backend: BackendName | None = None) -> RowStats:
    r"""The statistics of each row of logits about its target. They are differentiable, and a loss needs nothing else.

    .. math:: l = f_y - L, \quad e = E_q[\log q], \quad a = \tfrac1K \textstyle\sum_{c \neq y} \log q_c, \quad
              \hat\rho = L - f_{c^*} \; (7), \qquad L = \mathrm{LSE}(\{f_c\}_{c \neq y})

    Here :math:`q` is the softmax over the K non-target classes (eq. 9). A class whose logit is -inf is not in the row.

    Args:
        input: logits, shape ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``; any floating dtype; half precision is computed in float32.
        target: class indices in ``[0, C)`` or ``ignore_index``, int64 (or uint8), shape ``()``, ``(N,)`` or ``(N, d1, ..., dk)``.
        ignore_index: rows with this target have statistics 0 and an exactly zero gradient, even if they hold NaN.
        backend: ``"reference"``, ``"cpu"`` or ``"triton"``; ``None`` picks the fastest available one (see docs/backends.md).

    Returns:
        :class:`RowStats`, a named tuple of ``log_odds``, ``neg_entropy``, ``mean_log_q``, ``rho``, ``spread`` and ``num_nontargets``.
        Each field is shaped like ``target``, in float32, or float64 for float64 input. DTensor logits give DTensor fields.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as :func:`large_margin_cross_entropy`.

    Example:
        >>> import torch, largemargin
        >>> logits = torch.tensor([[2.0, 0.0, 0.0]], requires_grad=True)
        >>> stats = largemargin.row_stats(logits, torch.tensor([0]))
        >>> stats.rho  # two equal non-targets: log 2
        tensor([0.6931], grad_fn=<...>)
        >>> focal = ((1 - stats.log_odds.sigmoid()) ** 2 * torch.nn.functional.softplus(-stats.log_odds)).mean()
        >>> focal.backward()  # a loss of your own, in one line

    Source: Kobayashi, *Large Margin In Softmax Cross-Entropy Loss*, BMVC 2019, Sec. 2.
    """
    _checks.check_indices_of(input, target, ignore_index)
    if _checks.is_dtensor(input):
        local = dtensors.local_rows(input, target, None)
        return RowStats(*(local.to_dtensor(field, False) for field in local.stats(local.rows(ignore_index), backend)))
    _checks.check_plain("target", target)
    return dense.stats_of(input, target, ignore_index, backend)


@no_script
def large_margin_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    lam: float = 0.3,
    divergence: Divergence = "symmetric",
    hard_bias: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    backend: BackendName | None = None,
    donate: bool = False,
) -> Tensor:
    r"""Softmax cross-entropy plus a regulariser that widens its margin: a drop-in for :func:`torch.nn.functional.cross_entropy`.

    .. math:: \mathrm{softplus}(b - l) + \lambda \tilde D(q) \quad (11, 15), \qquad l = f_y - \mathrm{LSE}(\{f_c\}_{c \neq y})

    With ``weight`` and ``label_smoothing`` a row's loss is
    :math:`w_y [(1-\epsilon)\,\mathrm{softplus}(b - l) + \lambda D] + \tfrac{\epsilon}{C} \sum_c w_c (-\log p_c)`,
    over the C classes of the row. For probabilities ``t`` the loss is the expectation over :math:`y \sim t`. With ``lam=0`` and
    ``hard_bias=0``, :func:`torch.nn.functional.cross_entropy` has the same value and gradient.

    Args:
        input: floating logits, shape ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``. A class whose logit is -inf is not in the row.
        target: int64 (or uint8) class indices, shape ``()``, ``(N,)`` or ``(N, d1, ..., dk)``, or floating probabilities like ``input``.
        weight: a factor for each class, shape ``(C,)``, floating; it scales both terms.
        lam: the paper's lambda, at least 0; 0 disables the regulariser.
        divergence: ``"symmetric"`` (8), ``"kl_qu"`` or ``"kl_uq"`` (10).
        hard_bias: the constant b of eq. (15), in nats, finite; the paper's modified loss uses 1.
        label_smoothing: the epsilon of eq. (13), in [0, 1].
        ignore_index: rows with this target have loss 0 and an exactly zero gradient; class indices only.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``. As in torch, ``"mean"`` divides all terms by the summed weights of the kept rows
            (class indices) or by the number of rows (probabilities).
        backend: ``"reference"``, ``"cpu"`` or ``"triton"``; ``None`` picks the fastest available one (see docs/backends.md).
        donate: let the kernel overwrite ``input``, which must not be a leaf, with its gradient, to save memory. This needs ``"sum"`` or
            ``"mean"``, and has no effect elsewhere. The loss allows one backward pass. On the CPU the call destroys the logits, and on a
            GPU its backward pass does: read them before the call. On the CPU it has no effect in float16.
            An operation that needs them in its backward pass raises torch's error.

    Returns:
        A scalar, or with ``reduction="none"`` the loss of each row, shaped like class indices; float64 for float64 input, else float32.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as :func:`torch.nn.functional.cross_entropy` for the same mistake; ValueError or
            TypeError for other arguments. On an accelerator and in compiled code a label out of range gives a NaN row instead.

    Example:
        >>> import torch
        >>> from largemargin import large_margin_cross_entropy
        >>> logits = torch.tensor([[3.0, 1.0, 0.0], [0.5, 2.0, -1.0]], requires_grad=True)
        >>> loss = large_margin_cross_entropy(logits, torch.tensor([0, 1]))
        >>> loss
        tensor(0.2586, grad_fn=<...>)
        >>> loss.backward()
        >>> large_margin_cross_entropy(logits, torch.tensor([0, 1]), lam=0)  # = torch.nn.functional.cross_entropy
        tensor(0.2056, grad_fn=<...>)

    Source: Kobayashi, *Large Margin In Softmax Cross-Entropy Loss*, BMVC 2019, eqs. (8), (11), (13) and (15).
    """
    if isinstance(input, Proxy) or isinstance(target, Proxy):  # not by @as_one_call, whose wrapper takes time in every small call
        return record(large_margin_cross_entropy, locals())
    options = LossOptions(lam, divergence, hard_bias, label_smoothing, ignore_index, reduction, backend).checked()
    _checks.check_input(input, target)
    _checks.check_weight(weight, input)
    if _checks.is_dtensor(input):
        dtensors.check_no_probabilities(input, target)
        _checks.check_indices(input, target, ignore_index)
        return dtensors.loss(input, target, weight, options)
    _checks.check_plain("target", target)
    if weight is not None:
        _checks.check_plain("weight", weight)
    _checks.check_target(input, target, ignore_index)
    if donate:
        _checks.check_donated(input)
    return whole.loss(input, target, weight, options, donate)


takes_options = takes(large_margin_cross_entropy, Options.__annotations__)


@no_script
@collectives.eagerly
@takes_options
def sharded_large_margin_cross_entropy(
    input_shard: Tensor,
    target: Tensor,
    *,
    group: "ProcessGroup | None",
    class_start: int | None = None,
    num_classes: int | None = None,
    weight: Tensor | None = None,
    **options: Unpack[Options],
) -> Tensor:
    r"""The large-margin loss of logits whose classes are split over the ranks of a group. It equals the loss of the whole logits.

    .. math:: \ell(\,[f^{(0)} \dots f^{(p-1)}], y), \quad \ell \text{ of eqs. (8), (11), (13), (15)}

    Rank r holds the logits :math:`f^{(r)}` of some classes, in rank order; a rank may hold few or none. One all-gather of six float32 per
    row (eight with weights and smoothing) gives every rank the same loss, bit for bit. The backward pass is local: each rank gets the
    gradient of this one loss, not divided by the number of ranks. Every rank must call ``backward`` on this same loss, once.
    Probabilities need a second all-gather, of eight numbers per row, and as much memory as the reference.

    Args:
        input_shard: logits of this rank's classes, shape ``(N, C_r)``, ``(N, C_r, d1, ..., dk)`` or ``(C_r,)``; the same rows on all ranks.
        target: class indices among all classes, the same on every rank; shape and dtype as in :func:`large_margin_cross_entropy`. Or the
            probabilities of this rank's classes, shaped like ``input_shard``; then neither they nor ``weight`` get a gradient.
        group: the ranks that share the classes; ``None`` computes the loss of ``input_shard`` alone.
        class_start: the index of this rank's first class.
        num_classes: the classes of all ranks together. By default ranks exchange sizes, which synchronises the accelerator; giving
            ``class_start`` and ``num_classes`` on every rank avoids that.
        weight: a factor for each class, shape ``(num_classes,)``.

    Returns:
        On every rank, the result of :func:`large_margin_cross_entropy` for the whole logits.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as :func:`large_margin_cross_entropy`; TypeError if ``group`` is not a process
            group; ValueError if ``class_start`` or ``num_classes`` contradicts the shards; RuntimeError if a rank of the group is lost.

    Example:
        >>> import torch, largemargin
        >>> from torch.distributed import group  # under torchrun: group.WORLD
        >>> largemargin.sharded_large_margin_cross_entropy(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([0]), group=None)
        tensor(0.2045)

    Source: docs/maths.md derives the merge of a row's sums; TransformerEngine also gathers a few numbers per row.
    """
    checked = LossOptions.of("sharded_large_margin_cross_entropy", options)
    _checks.check_input(input_shard, target)
    num_here = _checks.num_classes(input_shard)
    if group is None:
        collectives.check_all_here(num_here, class_start, num_classes)
        return large_margin_cross_entropy(input_shard, target, weight, **options)
    _checks.check_local("input_shard", input_shard, "large_margin_cross_entropy")
    _checks.check_plain("target", target)
    _checks.check_plain("weight", weight)
    collectives.check_eager("sharded_large_margin_cross_entropy")
    labels = target  # the ranks compare their numbers of rows, and the labels
    if _checks.check_target(input_shard, target, checked.ignore_index):
        labels = target.new_zeros(_checks.index_shape(input_shard), dtype=torch.int64)
    shard, _ = collectives.shard_of(num_here, labels, group, class_start, num_classes)
    _checks.check_weight(weight, input_shard, shard.num_classes)
    return shards.loss(input_shard, target, weight, checked, shard)


@as_one_call
@takes_options
def linear_large_margin_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | None = None,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    num_classes: int | None = None,
    teacher_input: Tensor | None = None,
    teacher_linear_weight: Tensor | None = None,
    teacher_linear_bias: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    options: "LinearCrossEntropyOptions | None" = None,
    **others: Unpack[LinearOptions],
) -> Tensor:
    r"""The large-margin loss of ``linear(input, linear_weight, linear_bias)``, without ever storing all logits.

    .. math:: \ell(X W^\top + b, y), \quad \ell \text{ of eqs. (8), (11), (13), (15)}

    The loss equals :func:`large_margin_cross_entropy` of these logits up to rounding. Half precision is accumulated in float32. With
    ``lam=0`` it equals ``torch.nn.functional.linear_cross_entropy``, which torch has from 2.13 on.

    Args:
        input: features, shape ``(N, D)``, ``(B, T, D)`` or any ``(..., D)``, floating.
        linear_weight: the classifier, shape ``(C, D)``, floating; its dtype may differ from the dtype of ``input``. For features ``(N, D)``
            it may have the shape ``(C, d1, ..., dk, D)``, and makes logits ``(N, C, d1, ..., dk)``.
        target: class indices, int64 (or uint8), or floating probabilities. For a classifier ``(C, D)`` their shapes are ``(...)`` and
            ``(..., C)``, for one with more dimensions ``(N, d1, ..., dk)`` and ``(N, C, d1, ..., dk)``. Probabilities that require a
            gradient need all logits. None with a teacher.
        linear_bias: shape ``(C,)`` or ``(C, d1, ..., dk)``, floating; a class whose bias is -inf is not in the row.
        weight: a factor for each class, shape ``(num_classes,)``, floating.
        num_classes: the first ``num_classes`` rows of ``linear_weight`` are classes; the rest is padding with gradient 0. Default: all.
        teacher_input, teacher_linear_weight, teacher_linear_bias: another linear layer over the same rows and classes, of any width. The
            target is the softmax of its logits divided by ``temperature``. Its logits are not stored either, and it gets no gradient.
        temperature: above 0; divides the logits of the teacher alone. To scale the student too, divide ``input`` and
            ``linear_bias``, as in the example.
        ignore_index: as in :func:`large_margin_cross_entropy`; None, torch's default, is -100.
        options: torch's ``LinearCrossEntropyOptions``, which change nothing here: tiles have a size of their own, sums are float32, and
            every backward pass can be repeated.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``; ``"none"`` computes the logits a second time in the backward pass.

    Returns:
        A scalar, or with ``reduction="none"`` the loss of each row, shaped like class indices; float32, or float64 for float64 input or
        probabilities.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as :func:`large_margin_cross_entropy` for the logits; ValueError if features and
            classifier do not fit, or if ``linear_weight`` is empty (gather a sharded parameter first).

    Example:
        >>> import torch
        >>> from largemargin import linear_large_margin_cross_entropy
        >>> features, classifier = torch.eye(3, requires_grad=True), torch.eye(3, requires_grad=True)
        >>> loss = linear_large_margin_cross_entropy(features, classifier, torch.tensor([0, 1, 2]))
        >>> loss
        tensor(0.5514, grad_fn=<...>)
        >>> loss.backward()

        Distillation, with both at the temperature T. T^2 keeps the size of the gradient, and hard labels are a second loss:

        >>> T, teacher = 2.0, {"teacher_input": torch.eye(3), "teacher_linear_weight": 4 * torch.eye(3)}
        >>> soft = T**2 * linear_large_margin_cross_entropy(features / T, classifier, **teacher, temperature=T)
        >>> hard = linear_large_margin_cross_entropy(features, classifier, torch.tensor([0, 1, 2]))
        >>> 0.5 * hard + 0.5 * soft
        tensor(2.0814, grad_fn=<...>)

    Source: Kobayashi, BMVC 2019, eqs. (8), (11), (13) and (15); computing it in chunks of rows is folklore. Hinton et al.,
    *Distilling the Knowledge in a Neural Network*, 2015, for the teacher.
    """
    index = -100 if ignore_index is None else ignore_index
    checked = LossOptions.of("linear_large_margin_cross_entropy", {**others, "ignore_index": index})
    _checks.check_torch_options(options)
    _checks.check_linear(input, linear_weight, linear_bias, num_classes)
    teacher = None
    if teacher_input is None:
        _checks.check_no_teacher(teacher_linear_weight, teacher_linear_bias, temperature)
        _checks.check_linear_target(input, linear_weight, target, num_classes)
    else:
        given = (teacher_input, teacher_linear_weight, teacher_linear_bias)
        _checks.check_teacher(input, linear_weight, target, num_classes, checked.ignore_index, given)
        assert teacher_linear_weight is not None  # checked above
        temperature = _checks.check_positive("temperature", temperature)
        teacher = Teacher.of(teacher_input, teacher_linear_weight, teacher_linear_bias, temperature, num_classes)
    _checks.check_alike(input=input, linear_weight=linear_weight, linear_bias=linear_bias)
    positions = linear_weight.shape[1:-1]
    if not _checks.is_dtensor(input):
        _checks.check_plain("target", target)
        _checks.check_plain("weight", weight)
    elif positions:
        raise NotImplementedError("linear_weight (C, d1, ..., dk, D) is a DTensor; pass linear_weight.full_tensor(), and input too")
    if num_classes is not None and num_classes != len(linear_weight):  # autograd of the slice gives the padding a gradient of 0
        linear_weight = linear_weight[:num_classes]
        linear_bias = None if linear_bias is None else linear_bias[:num_classes]
    features, indices = input.reshape(-1, input.shape[-1]), (*input.shape[:-1], *positions)
    # has the shape, dtype and device of the logits, for the checks of the loss
    like_logits = features[(..., slice(1), *[None for _ in positions])].expand(-1, len(linear_weight), *positions)
    _checks.check_weight(weight, like_logits)
    of = teacher or _rows_of_target(target, indices, like_logits, checked.ignore_index)
    if positions:
        linear_weight = linear_weight.flatten(0, -2)
        linear_bias = None if linear_bias is None else linear_bias.flatten()
    loss = linear.loss(linear.Problem(features, linear_weight, linear_bias, of, weight, checked))
    return loss.reshape(indices) if checked.reduction == "none" else loss


def _rows_of_target(target: Tensor | None, indices: tuple[int, ...], like_logits: Tensor, ignore_index: int) -> Tensor:
    """The checked target for logits (N, C, d1, ...); ``indices`` is the shape of class indices."""
    assert target is not None  # checked above
    target = target.reshape(-1, *like_logits.shape[2:]) if target.shape == indices else target.reshape(like_logits.shape)
    if _checks.check_target(like_logits, target, ignore_index):
        if _checks.is_dtensor(like_logits):
            dtensors.check_no_probabilities(like_logits, target)
        return target
    if _checks.can_look_at(target) and not _checks.all_in_range(target, like_logits.shape[1]):
        _checks.check_range(target, like_logits.shape[1], ignore_index)
    return target.long()


@no_script
@collectives.eagerly
@takes(sharded_large_margin_cross_entropy, Options.__annotations__)
def sharded_linear_large_margin_cross_entropy(
    input: Tensor,
    linear_weight_shard: Tensor,
    target: Tensor,
    *,
    group: "ProcessGroup | None",
    class_start: int | None = None,
    num_classes: int | None = None,
    linear_bias_shard: Tensor | None = None,
    weight: Tensor | None = None,
    **options: Unpack[Options],
) -> Tensor:
    r"""The large-margin loss of a linear classifier whose classes are split over the ranks of a group. It equals the unsplit loss.

    .. math:: \ell(X\,[W^{(0)} \dots W^{(p-1)}]^\top + b, y), \quad \ell \text{ of eqs. (8), (11), (13), (15)}

    Rank r holds the rows :math:`W^{(r)}` of some classes, in rank order; a rank may hold few or none. ``input`` is the same on every rank,
    and every rank gets its whole gradient. The gradient of the classifier is local. As in :func:`sharded_large_margin_cross_entropy`, the
    loss is the same on every rank, bit for bit. Every rank must call ``backward`` once, on this loss and not on a multiple or some rows of
    it. A step takes one all-gather of statistics, or two for probabilities, and one all-reduce of the gradient of ``input``.

    Args:
        input: features, shape ``(N, D)`` or any ``(..., D)``, floating; the same on every rank.
        linear_weight_shard: the classifier's rows for this rank's classes, shape ``(C_r, D)``, floating.
        target: class indices among all classes, shape ``(...)``, the same on every rank; or the probabilities of this rank's classes, shape
            ``(..., C_r)``, which get no gradient.
        group: the ranks that share the classes; ``None`` calls :func:`linear_large_margin_cross_entropy`.
        linear_bias_shard: shape ``(C_r,)``, floating.
        weight: a factor for each class, shape ``(num_classes,)``; it gets no gradient.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``. ``"none"`` computes the gradients in the backward pass, with one more product;
            then either all ranks need the gradient of ``input``, or none does.

    Returns:
        On every rank, the result of :func:`linear_large_margin_cross_entropy` for the whole classifier.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as :func:`linear_large_margin_cross_entropy` and
            :func:`sharded_large_margin_cross_entropy`.

    Example:
        >>> import torch, largemargin
        >>> features, classifier = torch.eye(3, requires_grad=True), torch.eye(3, requires_grad=True)
        >>> largemargin.sharded_linear_large_margin_cross_entropy(features, classifier, torch.tensor([0, 1, 2]), group=None)
        tensor(0.5514, grad_fn=<...>)

    Source: Kobayashi, BMVC 2019, eqs. (8), (11), (13) and (15); see docs/scaling.md.
    """
    checked = LossOptions.of("sharded_linear_large_margin_cross_entropy", options)
    if group is None:
        collectives.check_all_here(len(linear_weight_shard), class_start, num_classes)
        return linear_large_margin_cross_entropy(
            input, linear_weight_shard, target, linear_bias=linear_bias_shard, weight=weight, **options
        )
    _checks.check_linear(input, linear_weight_shard, linear_bias_shard, None, sharded=True)
    _checks.check_linear_target(input, linear_weight_shard, target, None)
    _checks.check_plain("target", target)
    _checks.check_plain("weight", weight)
    _checks.check_alike(input=input, linear_weight_shard=linear_weight_shard, linear_bias_shard=linear_bias_shard)
    _checks.check_local("input", input, "linear_large_margin_cross_entropy")
    collectives.check_eager("sharded_linear_large_margin_cross_entropy")
    features, indices = input.reshape(-1, input.shape[-1]), input.shape[:-1]
    rows = target.reshape(-1) if target.shape == indices else target.reshape(len(features), len(linear_weight_shard))
    problem = linear.Problem(features, linear_weight_shard, linear_bias_shard, rows, weight, checked)
    loss = sharded_linear.loss(problem, group, class_start, num_classes)
    return loss.reshape(indices) if checked.reduction == "none" else loss
