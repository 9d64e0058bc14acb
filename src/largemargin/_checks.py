"""Checks of arguments. Each message names the argument, the value received, the value expected and the likely fix.

The type of an error is the one :func:`torch.nn.functional.cross_entropy` raises for the same mistake, else ValueError or TypeError.
The values of labels are checked where that needs no synchronisation. The values of other tensors are not checked.
"""

import math
import numbers
import sys
import warnings
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NoReturn, TypeGuard

import torch
from torch import Tensor

from . import _torch

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def describe(value: object) -> str:
    """The value received, in the words of an error message."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return f"{value!r} ({type(value).__name__})"


def warn(message: str) -> None:
    """Warn at the user's line, even if modules of torch lie between it and this library."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("largemargin.", "torch.")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def warn_once(said: set[str], message: str) -> None:
    """Warn unless ``said`` has the message. Compiled code does not warn when it runs, so it does not warn while it is compiled."""
    if not torch.compiler.is_compiling() and message not in said:
        said.add(message)
        warn(message)


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {describe(value)}; pass torch.as_tensor({name})")


def check_is_weight(weight: object, meant: str | None = None) -> None:
    """``meant`` is the option that a user may have meant, if the weight is the first argument, as in torch."""
    if weight is None or isinstance(weight, Tensor):
        return
    fix = "convert one factor for each class with torch.as_tensor(weight)"
    if meant is not None and (is_number(weight) or isinstance(weight, str)):
        fix = f"pass every other argument by name: {meant}={weight!r}"
    raise TypeError(f"weight must be a torch.Tensor or None, got {describe(weight)}; {fix}")


def check_known(function: str, options: Iterable[str], known: Collection[str]) -> None:
    """Raise TypeError, in the name of ``function``, for an option that is not known."""
    for name in options:
        if name not in known:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


def check_word(name: str, value: object, allowed: Collection[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}, not a valid value for {name}")


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a real number of Python or numpy. torch.compile can trace the first test only."""
    return isinstance(value, (int, float)) or isinstance(value, numbers.Real)


def check_number(name: str, value: object, *, low: float = -sys.float_info.max) -> float:
    """The number without numpy's type, which torch.compile cannot trace in a module."""
    if not is_number(value):
        raise TypeError(f"{name} must be a Python number, got {describe(value)}; for a 0-d tensor pass {name}.item()")
    if type(value) not in (int, float):
        value = float(value)
    if not low <= value < math.inf:  # not math.isfinite: in dynamic compilation the value is a symbol
        raise ValueError(f"{name} must be finite{f' and at least {low:g}' if low > -1 else ''}, got {value!r}")
    return value


def check_positive(name: str, value: object, hint: str = "") -> float:
    number = check_number(name, value)
    if not number > 0:
        raise ValueError(f"{name} must be above 0, got {value!r}{hint and f'; {hint}'}")
    return number


def check_at_least_1(name: str, value: object) -> None:
    check_integer(name, value)
    if not value >= 1:  # type: ignore[operator]  # checked above
        raise ValueError(f"{name} must be at least 1, got {value!r}")


def check_sizes(name: str, value: object) -> None:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name} must be a tuple of ints, got {describe(value)}")
    for size in value:
        check_at_least_1(name, size)


def check_label_smoothing(value: object) -> None:
    if not is_number(value):
        raise TypeError(f"label_smoothing must be a Python number in [0, 1], got {describe(value)}")
    if not 0 <= value <= 1:
        # torch raises above 1 and reads a negative value as 0
        raise (RuntimeError if value > 1 else ValueError)(f"label_smoothing must be between 0.0 and 1.0, got {value!r}")


def check_input(input: object, target: object) -> None:
    check_tensor("input", input)
    check_tensor("target", target)
    assert isinstance(input, Tensor) and isinstance(target, Tensor)
    if input.dim() == 0:
        same = target.dim() == 0 and not target.is_floating_point()
        raise (RuntimeError if same else IndexError)("input must be logits (C,), (N, C) or (N, C, d1, ..., dk), got a 0-d tensor")
    if input.dtype not in FLOATING:
        words = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
        raise NotImplementedError(f"input must be logits in one of {words}; got {describe(input)}; convert it with input.float()")


def check_indices_of(input: object, target: object, ignore_index: object) -> None:
    check_input(input, target)
    assert isinstance(input, Tensor) and isinstance(target, Tensor)
    check_indices(input, target, ignore_index)


def check_floating(name: str, value: Tensor, error: type[RuntimeError]) -> None:
    if value.dtype not in FLOATING:
        raise error(f"{name} must have a floating dtype, got {describe(value)}; convert it with {name}.float()")


def check_same_device(name: str, value: Tensor, input: Tensor) -> None:
    if value.is_cpu and input.is_cpu:
        return
    if value.device != input.device:
        raise RuntimeError(f"{name} must be on the device of input, {input.device}, got {value.device}; use {name}.to(input.device)")


def is_probabilities(input: Tensor, target: Tensor) -> bool:
    """Whether the target holds class probabilities. The rule is torch's: it has the shape of the input."""
    return target.dim() == input.dim() and target.shape == input.shape


def check_probabilities(input: Tensor, target: Tensor, ignore_index: int) -> None:
    check_integer("ignore_index", ignore_index)
    if target.dtype not in FLOATING:
        raise RuntimeError(
            f"target has the shape of the logits, {tuple(input.shape)}, so it must hold class probabilities in a floating dtype; got "
            f"{describe(target)}; class indices would have the shape {index_shape(input)}; if target is one-hot, pass target.float()"
        )
    check_same_device("target", target, input)
    if ignore_index >= 0:
        raise RuntimeError(f"ignore_index={ignore_index} needs class indices, got probabilities; to skip a row, set its target to 0")


def check_target(input: Tensor, target: Tensor, ignore_index: int) -> bool:
    """Check class indices or probabilities; return whether they are probabilities."""
    probabilities = is_probabilities(input, target)
    (check_probabilities if probabilities else check_indices)(input, target, ignore_index)
    return probabilities


def is_dtensor(value: object) -> TypeGuard[Any]:
    """Whether it is a DTensor; this does not import torch.distributed.tensor."""
    if type(value) is Tensor:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def check_plain(name: str, value: object) -> None:
    """Refuse a DTensor beside plain logits."""
    if is_dtensor(value):
        raise TypeError(f"{name} is a DTensor, but input is not; pass {name}.full_tensor(), or input as a DTensor too")


def check_local(name: str, value: object, otherwise: str) -> None:
    if is_dtensor(value):
        raise TypeError(f"{name} is a DTensor, which knows its ranks itself: pass {name}.to_local(), or the DTensor to {otherwise}")


def check_alike(**tensors: Tensor | None) -> None:
    """Refuse a mix of DTensors and plain tensors, which cannot meet in one product."""
    given = {name: is_dtensor(tensor) for name, tensor in tensors.items() if tensor is not None}
    if len(set(given.values())) > 1:
        placed, plain = next(name for name in given if given[name]), next(name for name in given if not given[name])
        raise TypeError(f"{placed} is a DTensor, but {plain} is not; pass {placed}.full_tensor(), or {plain} as a DTensor too")


def check_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not (isinstance(value, int) or isinstance(value, numbers.Integral)):
        raise TypeError(f"{name} must be an int, got {describe(value)}")
    if not -(2**63) <= int(value) < 2**63:
        raise ValueError(f"{name} must fit in 64 bits, as labels do, got {value}")


def num_classes(input: Tensor) -> int:
    return input.shape[min(1, input.dim() - 1)]


def classes_last(input: Tensor) -> Tensor:
    """A view (..., C) of ``input`` (C,), (N, C) or (N, C, d1, ..., dk), with C >= 1."""
    logits = input.movedim(1, -1) if input.dim() > 2 else input
    # torch accepts C = 0 if every row is ignored; one masked class means the same
    return logits if logits.shape[-1] else torch.nn.functional.pad(logits, (0, 1), value=-torch.inf)


def index_shape(input: Tensor) -> tuple[int, ...]:
    if input.dim() == 2:
        return (input.shape[0],)
    return (*input.shape[:1], *input.shape[2:]) if input.dim() > 1 else ()


def check_indices(input: Tensor, target: Tensor, ignore_index: object) -> None:
    check_integer("ignore_index", ignore_index)
    shape, dtype = target.shape, target.dtype
    if input.dim() == 2 and len(shape) == 1 and shape[0] == input.shape[0] and dtype is torch.int64 and input.is_cpu and target.is_cpu:
        return  # the fast path of the usual case
    expected = index_shape(input)
    # torch also accepts the shape (1,) for a row without a batch dimension
    shape_fits = shape == expected or (input.dim() == 1 and shape == (1,))
    if not shape_fits or (dtype is not torch.int64 and dtype is not torch.uint8) or shape == input.shape:
        _refuse_indices(input, target, expected, shape_fits)
    check_same_device("target", target, input)


def _refuse_indices(input: Tensor, target: Tensor, expected: tuple[int, ...], shape_fits: bool) -> NoReturn:
    said = f"target must be int64 class indices of shape {expected} for input of shape {tuple(input.shape)}, got {describe(target)}"
    if target.shape == input.shape:
        raise RuntimeError(f"{said}; the statistics need one class per row, and do not take probabilities")
    if not shape_fits:
        batch_differs = target.shape[:1] != input.shape[:1] if input.dim() > 1 else target.dim() == 1 and not target.is_floating_point()
        raise (ValueError if batch_differs else RuntimeError)(f"{said}; class probabilities would have the shape of input")
    if target.is_floating_point():
        raise RuntimeError(f"{said}; class probabilities have the shape {tuple(input.shape)}")
    raise RuntimeError(f"{said}; convert it with target.long()")


def can_look_at(target: Tensor) -> bool:
    """Whether reading the labels is free: they are on the CPU, and neither traced nor batched."""
    if torch.compiler.is_compiling() or _torch.is_transformed() or _torch.is_dispatched():
        return False
    return type(target) is Tensor and target.is_cpu and not _torch.is_traced()


def check_donated(input: Tensor) -> None:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not input.requires_grad:  # compiled code does not donate
        return
    base = _torch.base(input)
    if input.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        what = "a leaf" if base is None else "a view of a leaf"
        raise ValueError(f"donate=True overwrites input, but input is {what} that requires a gradient; donate computed logits only")


def all_in_range(target: Tensor, num_classes: int) -> bool:
    """Whether all labels are classes and there are any. Two numbers tell, which is faster than :func:`check_range`."""
    if not target.numel():
        return False
    low, high = map(int, target.aminmax())
    return 0 <= low and high < num_classes


def check_range(target: Tensor, num_classes: int, ignore_index: int) -> None:
    bad = target[(target != ignore_index) & ((target < 0) | (target >= num_classes))]
    if bad.numel():
        raise IndexError(
            f"target must hold class indices in [0, {num_classes}) or ignore_index={ignore_index}, but holds {int(bad[0])} "
            f"({bad.numel()} of {target.numel()} labels are out of range); check num_classes, or pass ignore_index"
        )


def check_weight(weight: object, input: Tensor, of_classes: int | None = None) -> None:
    """``of_classes`` is the number of classes, if ``input`` has only some of them."""
    if weight is None:
        return
    check_is_weight(weight)
    assert isinstance(weight, Tensor)
    expected = (num_classes(input) if of_classes is None else of_classes,)
    if tuple(weight.shape) != expected:
        raise RuntimeError(f"weight must have one entry for each of the {expected[0]} classes, shape {expected}, got {describe(weight)}")
    check_floating("weight", weight, RuntimeError)
    check_same_device("weight", weight, input)


def check_class_counts(class_counts: object, input: Tensor) -> Tensor:
    """The counts, as a plain tensor. Their values are checked where that is free."""
    check_tensor("class_counts", class_counts)
    assert isinstance(class_counts, Tensor)
    counts: Tensor = class_counts.full_tensor() if is_dtensor(input) and is_dtensor(class_counts) else class_counts
    check_plain("class_counts", counts)
    expected = (num_classes(input),)
    if tuple(counts.shape) != expected or counts.dtype not in (*FLOATING, torch.int64):
        raise ValueError(
            f"class_counts must be the number of training samples of each of the {expected[0]} classes, floating or int64 of shape "
            f"{expected}, got {describe(counts)}; torch.bincount(labels, minlength={expected[0]}) counts them"
        )
    check_same_device("class_counts", counts, input)
    if can_look_at(counts) and not bool((counts > 0).all()):
        raise ValueError(f"class_counts must be above 0, but holds {float(counts.min()):g}; leave a class without samples out of input")
    return counts


def check_multi_hot(input: object, target: object) -> None:
    """Check logits (N, C) and a target of the same shape."""
    check_tensor("input", input)
    check_tensor("target", target)
    assert isinstance(input, Tensor) and isinstance(target, Tensor)
    if input.dim() != 2 or input.dtype not in FLOATING:
        raise ValueError(f"input must be floating logits of shape (N, C), got {describe(input)}; move other dimensions into N")
    if target.shape != input.shape or target.dtype.is_complex:
        raise ValueError(
            f"target must have the shape of input, {tuple(input.shape)}, and be above 0 where a sample has a class, got "
            f"{describe(target)}; torch.nn.functional.one_hot converts class indices"
        )
    for name, value in (("input", input), ("target", target)):
        if is_dtensor(value):
            raise TypeError(f"{name} is a DTensor, but a class is compared over all samples; pass {name}.full_tensor()")
    check_same_device("target", target, input)


def check_linear(
    input: object, linear_weight: object, linear_bias: object, num_classes: object, whose: str = "", sharded: bool = False
) -> None:
    """``whose`` is the prefix of the names. If ``sharded``, ``linear_weight`` may be (0, D), for a rank without classes."""
    check_tensor(f"{whose}input", input)
    check_tensor(f"{whose}linear_weight", linear_weight)
    assert isinstance(input, Tensor) and isinstance(linear_weight, Tensor)
    if linear_weight.numel() == 0 and not (sharded and linear_weight.dim() == 2):
        raise ValueError(f"{whose}linear_weight is empty, {describe(linear_weight)}; gather a sharded parameter before its loss")
    positions = tuple(linear_weight.shape[1:-1])
    dims_fit = input.dim() == 2 and not sharded if positions else linear_weight.dim() == 2 and input.dim() >= 1
    if not dims_fit or input.shape[-1] != linear_weight.shape[-1]:
        raise ValueError(
            f"{whose}linear_weight must have shape (C, D) for {whose}input (..., D)"
            f"{'' if sharded else f', or (C, d1, ..., dk, D) for {whose}input (N, D)'}, got {describe(linear_weight)} for {describe(input)}"
        )
    check_floating(f"{whose}input", input, NotImplementedError)
    check_floating(f"{whose}linear_weight", linear_weight, NotImplementedError)
    check_same_device(f"{whose}linear_weight", linear_weight, input)
    if linear_bias is not None:
        check_tensor(f"{whose}linear_bias", linear_bias)
        assert isinstance(linear_bias, Tensor)
        if linear_bias.shape != linear_weight.shape[:-1] or linear_bias.dtype not in FLOATING:
            words = "(C, d1, ..., dk)" if positions else f"(C,), with C = {len(linear_weight)}"
            raise ValueError(f"{whose}linear_bias must be floating of shape {words}, got {describe(linear_bias)}")
        check_same_device(f"{whose}linear_bias", linear_bias, input)
    if num_classes is not None:
        check_integer("num_classes", num_classes)
        if not 1 <= num_classes <= len(linear_weight):  # type: ignore[operator]
            raise ValueError(f"num_classes must be between 1 and the {len(linear_weight)} rows of {whose}linear_weight, got {num_classes}")


def check_linear_target(input: Tensor, linear_weight: Tensor, target: object, num_classes: int | None) -> None:
    if target is None:
        raise TypeError("target must be a torch.Tensor, got None; only a teacher (teacher_input=...) can replace it")
    check_tensor("target", target)
    assert isinstance(target, Tensor)
    rows, positions = tuple(input.shape[:-1]), tuple(linear_weight.shape[1:-1])
    indices, probabilities = (*rows, *positions), (*rows, len(linear_weight) if num_classes is None else num_classes, *positions)
    if target.shape not in (indices, probabilities):
        raise ValueError(
            f"target must be int64 class indices of shape {indices} for input {describe(input)}, got {describe(target)}; class "
            f"probabilities have the shape {probabilities}"
        )


def check_no_gradient(reason: str, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} must not require a gradient if {reason}; pass {name}.detach()")


def check_no_teacher(linear_weight: object, linear_bias: object, temperature: object) -> None:
    """For a loss without ``teacher_input``."""
    for name, value in (("teacher_linear_weight", linear_weight), ("teacher_linear_bias", linear_bias)):
        if value is not None:
            raise TypeError(f"{name} needs teacher_input, the features that go into the teacher's classifier")
    if temperature != 1:
        raise ValueError(f"temperature needs teacher_input, whose logits it divides; got {temperature!r}; for the student divide input")


def check_teacher(
    input: Tensor, linear_weight: Tensor, target: object, num_classes: int | None, ignore_index: int, teacher: tuple[object, object, object]
) -> None:
    """``teacher`` has the features, the classifier and its bias."""
    if target is not None:
        raise ValueError(
            "target must be None with teacher_input, because the teacher's softmax is the target; add the loss of labels in a second call"
        )
    features, classifier, bias = teacher
    check_linear(features, classifier, bias, num_classes, "teacher_")
    assert isinstance(features, Tensor) and isinstance(classifier, Tensor)
    names = ("input", "teacher_input", "teacher_linear_weight", "teacher_linear_bias")
    for name, value in zip(names, (input, *teacher), strict=True):
        if is_dtensor(value):
            raise NotImplementedError(f"{name} is a DTensor, but a teacher takes plain tensors only; pass {name}.full_tensor()")
    check_same_device("teacher_input", features, input)
    if features.shape[:-1] != input.shape[:-1]:
        raise ValueError(f"teacher_input must have the rows of input, {tuple(input.shape[:-1])}, got {describe(features)}")
    outputs = (len(classifier) if num_classes is None else num_classes, *classifier.shape[1:-1])
    expected = (len(linear_weight) if num_classes is None else num_classes, *linear_weight.shape[1:-1])
    if outputs != expected:
        raise ValueError(
            f"teacher_linear_weight must have the classes of linear_weight, shape {(*expected, classifier.shape[-1])}, got "
            f"{describe(classifier)}; if one of them is padded, give num_classes"
        )
    if ignore_index >= 0:
        raise RuntimeError(f"ignore_index={ignore_index} needs class indices, but the target is a teacher; leave rows out of input instead")


def check_torch_options(options: object) -> None:
    """The ``options`` of torch's linear_cross_entropy. They say how torch cuts and rounds, and change nothing here."""
    kind = getattr(torch.nn, "LinearCrossEntropyOptions", None)  # torch 2.13 has it
    if options is not None and not (kind is not None and isinstance(options, kind)):
        raise TypeError(
            f"options must be None or a torch.nn.LinearCrossEntropyOptions, got {describe(options)}; give other options by name: lam=0.3"
        )
