"""The large-margin loss in the Trainer of Hugging Face transformers: from logits, or fused with the head of a language model.

The Trainer counts the labels of all micro-batches of a step that are not -100, ``num_items_in_batch``. The loss is the sum over rows
divided by that number, so accumulated micro-batches equal one large batch.

The fused head needs three hooks. A hook on the model sees whether there are labels. A hook on the head then gives it no rows, so it makes
no logits. A third hook attaches the features to the head's empty output, where ``model.loss_function`` finds them. If a hook does not run,
or the head does more than multiply, the loss takes the logits, and training warns why.
"""

import copy
import functools
import inspect
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from largemargin import (
    LargeMarginCrossEntropyLoss,
    _checks,
    _torch,
    large_margin_cross_entropy,
    linear_large_margin_cross_entropy,
    plain_layer,
)

_IGNORED = -100


def _checked(settings: dict[str, Any]) -> dict[str, Any]:
    for name in ("ignore_index", "reduction"):
        if name in settings:
            raise TypeError(
                f"{name} must not be given, got {settings[name]!r}: the Trainer divides by the number of labels that are not {_IGNORED}; "
                f"set labels to {_IGNORED} to leave them out"
            )
    LargeMarginCrossEntropyLoss(**settings)
    return settings


def _loss(
    input: Tensor, labels: Tensor, num_items: Tensor | float | None, settings: dict[str, Any], head: nn.Linear | None = None
) -> Tensor:
    """The loss of logits (..., C), or of features (..., D) and their ``head``: a sum over ``num_items``, else the mean."""
    if head is not None:
        input = input.to(head.weight.device)  # device_map may put the head on another GPU
    settings = {**settings, "reduction": "mean" if num_items is None else "sum"}
    if isinstance(settings.get("weight"), Tensor):
        settings["weight"] = settings["weight"].to(input.device)
    input = input.flatten(0, -2)
    labels = labels.to(input.device)
    labels = labels.reshape(input.shape) if labels.is_floating_point() else labels.flatten().long()
    if head is None:
        loss = large_margin_cross_entropy(input, labels, **settings)
    else:
        features, weight, bias = _as_multiplied(input, head)
        loss = linear_large_margin_cross_entropy(features, weight, labels, linear_bias=bias, **settings)
    if num_items is None:
        return loss
    return loss / (num_items.to(loss.device) if isinstance(num_items, Tensor) else num_items)


def _as_multiplied(features: Tensor, head: nn.Linear) -> list[Any]:
    """Features, weight and bias in the dtype of their product, which autocast lowers."""
    layer = [features, head.weight, head.bias]
    device = features.device.type
    lowered = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # the second raises for meta tensors
    if not lowered or features.dtype == torch.float64:  # autocast does not change float64
        return layer
    return [None if tensor is None else tensor.to(torch.get_autocast_dtype(device)) for tensor in layer]


def _shifted(labels: Tensor, ignore_index: int = _IGNORED) -> Tensor:
    """The label that each position predicts: the next one, none for the last position."""
    return nn.functional.pad(labels[..., 1:].long(), (0, 1), value=ignore_index)


def _check_smoothing() -> None:
    """Refuse a Trainer with label smoothing, which it ignores beside a ``compute_loss_func``."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "compute_loss":
            smoother = getattr(frame.f_locals.get("self"), "label_smoother", None)
            if smoother is not None:
                raise ValueError(
                    f"label_smoothing_factor must be 0 beside a compute_loss_func, got {smoother.epsilon}: the Trainer ignores it; use "
                    f"LargeMarginLoss(label_smoothing={smoother.epsilon})"
                )
        frame = frame.f_back


class LargeMarginLoss:
    r"""The loss of a model's outputs for ``Trainer(compute_loss_func=...)``.

    It takes logits (N, C) with labels (N,), for sequences and images; logits (N, L, C) with labels (N, L), for tokens; and probabilities
    like the logits. With ``upsample`` it also takes logits (N, C, h, w) of dense prediction with labels (N, H, W). Labels of -100 are
    ignored. The result is the weighted sum over rows divided by ``num_items_in_batch``, or the mean without it. The loss cannot distinguish
    rows of several labels (``multi_label_classification``) from probabilities: do not use it for them. The Trainer ignores its
    ``label_smoothing_factor`` beside a ``compute_loss_func``: use ``label_smoothing`` here.

    Args:
        lam: the paper's lambda, at least 0.
        causal: whether position i predicts label i + 1, as in causal language models.
        upsample: ``"bilinear"`` enlarges the logits of dense prediction to the labels, as the losses of SegFormer, BEiT and UperNet do.
        settings: ``weight``, ``divergence``, ``hard_bias``, ``label_smoothing``, ``backend`` of :class:`.LargeMarginCrossEntropyLoss`.

    Returns:
        A scalar, when called with ``(outputs, labels, num_items_in_batch=None)``. ``outputs`` have logits as ``"logits"``, or first.

    Raises:
        TypeError, ValueError: as :class:`~largemargin.LargeMarginCrossEntropyLoss`; TypeError for ``ignore_index`` and ``reduction``, which
            the Trainer sets; ValueError for labels that are missing or do not fit, and for a Trainer with ``label_smoothing_factor``.

    Warns:
        UserWarning: once, if the outputs have an ``aux_loss``, which is not added.

    Example:
        >>> import torch
        >>> from largemargin.integrations.transformers import LargeMarginLoss
        >>> loss = LargeMarginLoss(lam=0.3)  # Trainer(model, args, compute_loss_func=loss, ...)
        >>> outputs = {"logits": torch.tensor([[3.0, 1.0, 0.0], [3.0, 1.0, 0.0]])}
        >>> loss(outputs, torch.tensor([0, -100]), num_items_in_batch=2)
        tensor(0.1023)

    Source: Kobayashi, BMVC 2019, eqs. (8) and (11); the Trainer defines the signature.
    """

    def __init__(self, *, lam: float = 0.3, causal: bool = False, upsample: Literal["bilinear"] | None = None, **settings: Any) -> None:
        _checks.check_word("upsample", upsample, (None, "bilinear"))
        if causal and upsample is not None:
            raise ValueError(f"upsample must be None with causal=True, got {upsample!r}; it enlarges images")
        self.causal, self.upsample = causal, upsample
        self.settings = _checked({"lam": lam, **settings})
        self.said: set[str] = set()

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | float | None = None) -> Tensor:
        if labels is None:
            raise ValueError("labels must be a torch.Tensor, got None; give the data set a column 'labels'")
        _check_smoothing()
        self._tell_of_routers(outputs)
        logits: Tensor = outputs if isinstance(outputs, Tensor) else outputs["logits" if isinstance(outputs, Mapping) else 0]
        probabilities = labels.is_floating_point()
        dense = logits.dim() == 4 and len(logits) == len(labels) and labels.dim() == 3 + probabilities
        if dense and self.upsample is not None:
            logits = nn.functional.interpolate(logits, labels.shape[-2:], mode=self.upsample, align_corners=False).movedim(1, -1)
            labels = labels.movedim(1, -1) if probabilities else labels
        fits = labels.shape == (logits.shape if probabilities else logits.shape[:-1])
        if not fits or (dense and probabilities and self.upsample is None):  # in the latter, classes are not last
            raise ValueError(
                f"labels must have the shape of the logits {tuple(logits.shape)} without the classes, got {tuple(labels.shape)}; "
                + ('for dense prediction give LargeMarginLoss(upsample="bilinear")' if dense else "logits must be (N, C) or (N, L, C)")
            )
        if self.causal:
            if probabilities:
                raise ValueError("labels must be class indices with causal=True, got probabilities; leave causal out if they are shifted")
            labels = _shifted(labels)
        if probabilities and num_items_in_batch is not None:
            num_items_in_batch = num_items_in_batch / logits.shape[-1]  # the Trainer counts every entry
        return _loss(logits, labels, num_items_in_batch, self.settings)

    def _tell_of_routers(self, outputs: Any) -> None:
        of_routers = outputs.get("aux_loss") if isinstance(outputs, Mapping) else None
        if isinstance(of_routers, Tensor) and of_routers.requires_grad:
            _checks.warn_once(
                self.said,
                "LargeMarginLoss leaves out the aux_loss of the model's outputs, which balances the routers of a mixture of experts: the "
                "Trainer does not pass its coefficient. Use fuse_large_margin_loss(model), which keeps it, or output_router_logits=False",
            )

    def __repr__(self) -> str:
        settings = {"causal": self.causal, "upsample": self.upsample, **self.settings}
        return f"LargeMarginLoss({', '.join(f'{name}={value!r}' for name, value in settings.items())})"


class _CausalLoss:
    """The new ``model.loss_function``. It takes logits, or an empty tensor of logits with features attached."""

    def __init__(self, when: str, settings: dict[str, Any], hooks: list[Any]) -> None:
        self.when, self.settings, self.hooks = when, settings, hooks
        self.awaited = False  # whether the current forward pass has labels, but has not called this loss yet
        self.why_logits: str | None = _HOOKS_ASLEEP  # in words, why there are logits; None if the caller wants them
        self.other_hook: str | None = None  # of the head, in words
        self.said: set[str] = set()

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None = None,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | float | None = None,
        ignore_index: int = _IGNORED,
        shift_labels: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        self.awaited = False
        if shift_labels is None:
            assert labels is not None
            shift_labels = _shifted(labels, ignore_index)
        input, head, version = getattr(logits, "_made_of", (logits, None, None))
        lost = head is None and input.numel() == 0 and shift_labels.numel() > 0
        edited = head is not None and version != _torch.version(logits)
        if lost or edited:
            who = "the model changes them" if self.other_hook is None else f"the head {self.other_hook}, and that or the model changes them"
            raise ValueError(
                f"model must pass the logits of its head to its loss unchanged, but {who} (soft-capping, a scale, a cast, masked tokens); "
                "it cannot be fused: use Trainer(compute_loss_func=LargeMarginLoss(causal=True))"
            )
        if input.shape[:-1] != shift_labels.shape:
            raise ValueError(
                f"labels must have the shape of the tokens {tuple(input.shape[:-1])}, got {tuple(shift_labels.shape)}; "
                f"give one for each token, {ignore_index} where there is none"
            )
        if head is not None:
            _check_weight_is_here(head)
        loss = _loss(input, shift_labels, num_items_in_batch, {**self.settings, "ignore_index": ignore_index}, head)
        if head is None and self.why_logits is not None and loss.requires_grad and not torch.compiler.is_compiling():
            loss.register_hook(functools.partial(self._tell, self.why_logits))  # warns in training only; evaluation needs logits
        return loss

    def _tell(self, why: str, gradient: Tensor) -> None:
        _checks.warn_once(self.said, f"the fused head makes logits in training and saves no memory: {why}. The loss is correct")


_HOOKS_ASLEEP = (
    "the hooks of fuse_large_margin_loss did not run; the model has been wrapped or unwrapped since, as by merge_and_unload: "
    "call fuse_large_margin_loss again"
)


def _why_logits(model: Any, inner: Any, labelled: bool) -> str | None:
    """In words, why a forward pass with labels makes logits; None if the caller wants them."""
    if not labelled:
        return "labels were given by position: give them by name"
    if not model.training and inner.loss_function.when == "training":
        return "the model is in evaluation mode, as after from_pretrained: call model.train()"
    reason = plain_layer.own_forward(inner.get_output_embeddings(), moved=True)
    return (
        f"the head {reason}"
        if reason is not None
        else "its head is new, as after resize_token_embeddings: call fuse_large_margin_loss again"
    )


def _check_weight_is_here(head: nn.Linear) -> None:
    if _checks.is_dtensor(head.weight):
        raise ValueError(
            f"the weight of the head must be whole until the model has its loss, got a DTensor {tuple(head.weight.shape)}; with "
            "fully_shard leave the head in the unit of the model, or give it reshard_after_forward=False; it cannot be tensor parallel"
        )
    if plain_layer.is_offloaded(head):
        raise ValueError(
            "the weight of the head must stay on its device until the model has its loss, but accelerate offloads it after the head's "
            "forward pass; give the head a GPU in device_map, or use LargeMarginLoss(causal=True)"
        )


def _without_adapter(model: Any) -> Any:
    """The language model inside a PEFT model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _ask_head(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    inner = _without_adapter(model)
    if kwargs.get("fused_lm_head"):
        raise ValueError(
            "a fused model must compute its own loss, got fused_lm_head=True: trainers of TRL compute a softmax loss. For supervised "
            "fine-tuning derive class LargeMarginTrainer(SFTTrainer) with the line compute_loss = transformers.Trainer.compute_loss; the "
            "other trainers of TRL cannot use a fused model"
        )
    labelled = kwargs.get("labels") is not None
    if not labelled and not args and kwargs.get("num_items_in_batch") is not None:  # args may contain labels
        raise ValueError(
            "labels must be given to a fused model by name, got None with num_items_in_batch; the Trainer keeps them for compute_loss_func "
            "and label_smoothing_factor: use neither, but fuse_large_margin_loss(model, label_smoothing=...)"
        )
    compiling = torch.compiler.is_compiling()
    if not compiling:
        inner.loss_function = copy.copy(inner.loss_function)  # replicas of nn.DataParallel run in threads and would share one
    inner.loss_function.awaited = labelled
    fused = labelled and (model.training or inner.loss_function.when == "always") and not compiling
    inner.loss_function.why_logits = None if compiling else _why_logits(model, inner, labelled)
    inner.get_output_embeddings()._leave_out_logits = inner.loss_function if fused else None


def _release_head(model: Any, args: tuple[Any, ...], outputs: Any) -> None:
    inner = _without_adapter(model)
    inner.get_output_embeddings()._leave_out_logits = None
    inner.loss_function.why_logits = _HOOKS_ASLEEP  # until they run again
    if inner.loss_function.awaited and outputs is not None:  # None if the forward pass raised an error
        raise ValueError(
            "model must call self.loss_function in a forward pass with labels, but it did not: use_liger_kernel replaces the forward "
            'pass; leave it out, or give liger_kernel_config={"fused_linear_cross_entropy": False}'
        )


def _no_rows(head: Any, args: tuple[Any, ...]) -> tuple[Tensor] | None:
    loss = None if torch.compiler.is_compiling() else getattr(head, "_leave_out_logits", None)
    if loss is None:
        return None
    _check_weight_is_here(head)
    reason = plain_layer.own_forward(head, moved=True) or plain_layer.hook_of(head, called=True) or plain_layer.odd_parameter(head)
    if reason is not None:
        loss.why_logits = f"the head {reason}"
        return None
    loss.other_hook = plain_layer.hook_of(head, but=(_no_rows, _tie_features))
    features = args[0]
    empty = features[..., :0, :]
    empty._features = features
    return (empty,)


def _tie_features(head: Any, args: tuple[Any, ...], logits: Tensor) -> None:
    if hasattr(args[0], "_features"):
        logits._made_of = args[0]._features, head, _torch.version(logits)  # type: ignore[attr-defined]


def _refusal(model: Any) -> str | None:
    """Why ``model`` cannot be fused: the middle part of the message, before the advice."""
    loss = getattr(model, "loss_function", None)
    if loss is None:
        return "which has no loss_function;"
    if model.config.is_encoder_decoder:
        return "which has an encoder too, and without labels needs decoder_input_ids in its batches;"
    name = getattr(loss, "__name__", type(loss).__name__)
    if name not in ("ForCausalLMLoss", _CausalLoss.__name__):
        return f"whose loss is {name};"
    forwards = [inspect.unwrap(vars(base)["forward"]) for base in type(model).__mro__ if "forward" in vars(base)]
    if not any("loss_function" in forward.__code__.co_names for forward in forwards):
        return "whose forward does not call self.loss_function;"
    head = model.get_output_embeddings()
    reason = plain_layer.own_forward(head, moved=True)
    if reason is None:
        return None
    of_adapter = type(head).__module__.startswith("peft.")  # LoRA's layers have the name Linear too
    return f"whose head {reason}{'; fuse the model before the adapters are added, or' if of_adapter else ';'}"


def fuse_large_margin_loss(model: Any, *, lam: float = 0.3, when: Literal["training", "always"] = "training", **settings: Any) -> Any:
    r"""Fuse the large-margin loss with the head of a causal language model, so that the logits N x vocabulary are never stored.

    ``model(input_ids, labels=labels).loss`` is then the large-margin loss of the next tokens, by
    :func:`~largemargin.linear_large_margin_cross_entropy`, and equals the loss of the logits up to rounding. ``outputs.logits`` is empty,
    (N, 0, C). This works in the Trainer (without ``compute_loss_func``) and in loops that do not read the logits of a training step, with
    gradient accumulation, activation checkpointing, tied embeddings and data parallelism. Logits are still made, and used for the loss,
    without labels (as in generation), in compiled code, and if ``labels`` are given by position.

    The loss follows the head's forward pass. With ``fully_shard`` keep the head in the unit of the model or set
    ``reshard_after_forward=False``.

    Args:
        model: a causal language model of transformers whose forward calls ``self.loss_function``, or a PEFT model of one; it is modified.
        lam: the paper's lambda, at least 0.
        when: ``"training"`` still makes logits in evaluation mode, for metrics; ``"always"`` leaves them out there too.
        settings: ``weight``, ``divergence``, ``hard_bias``, ``label_smoothing``, ``backend`` of :class:`.LargeMarginCrossEntropyLoss`.

    Returns:
        The same model. Call again for new settings, after ``resize_token_embeddings``, and after an older PEFT wraps the model.

    Raises:
        TypeError, ValueError: as :class:`~largemargin.LargeMarginCrossEntropyLoss`; TypeError for ``ignore_index`` and ``reduction``, which
            the Trainer sets; ValueError for a model with another loss or an encoder, a forward that does not call ``loss_function``, or a
            head that does more than an ``nn.Linear``. ValueError in the first step if the model changes its logits between head and loss,
            the head is sharded or offloaded before the loss, the forward pass skips ``loss_function`` (``use_liger_kernel``), a trainer of
            TRL has its own loss, or the Trainer keeps the labels (``label_smoothing_factor``, ``compute_loss_func``).

    Warns:
        UserWarning: once for each cause, if a training step makes logits.

    Example:
        >>> from largemargin.integrations.transformers import fuse_large_margin_loss
        >>> model = AutoModelForCausalLM.from_pretrained(folder)  # doctest: +SKIP
        >>> Trainer(fuse_large_margin_loss(model, lam=0.3), args, train_dataset=tokens).train()  # doctest: +SKIP

    Source: Kobayashi, BMVC 2019, eqs. (8) and (11).
    """
    _checks.check_word("when", when, ("training", "always"))
    settings = _checked({"lam": lam, **settings})
    inner = _without_adapter(model)
    refusal = _refusal(inner)
    if refusal is not None:
        raise ValueError(
            f"model must be a causal language model of transformers whose head is an nn.Linear, got {type(inner).__name__}, {refusal} "
            "use Trainer(compute_loss_func=LargeMarginLoss(...))"
        )
    if isinstance(inner.loss_function, _CausalLoss):
        for hook in inner.loss_function.hooks:
            hook.remove()
    head = inner.get_output_embeddings()
    hooks = [
        model.register_forward_pre_hook(_ask_head, with_kwargs=True),
        model.register_forward_hook(_release_head, always_call=True),
        head.register_forward_pre_hook(_no_rows),
        head.register_forward_hook(_tie_features, prepend=True),  # first, so that changes by other hooks are detected
    ]
    inner.loss_function = _CausalLoss(when, settings, hooks)
    return model
