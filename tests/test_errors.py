"""Mistakes raise: with torch's type where torch raises, ValueError or TypeError elsewhere, and a message that names the argument."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from combinations import every
from largemargin import (
    LargeMarginCrossEntropyLoss,
    LinearLargeMarginCrossEntropyLoss,
    MulticlassHingeLoss,
    large_margin_cross_entropy,
)
from measure import call_or_error
from registry import HINGES

Call = dict[str, object]

# correct calls, each to be spoilt by one mistake
CALLS: dict[str, Callable[[], Call]] = {
    "(C,)": lambda: {"input": torch.randn(4), "target": torch.tensor(1)},
    "(N, C)": lambda: {"input": torch.randn(3, 4), "target": torch.tensor([0, 1, 2])},
    "(N, C, d)": lambda: {"input": torch.randn(3, 4, 2), "target": torch.zeros(3, 2, dtype=torch.int64)},
    "(N, C, d1, d2)": lambda: {"input": torch.randn(3, 4, 2, 5), "target": torch.zeros(3, 2, 5, dtype=torch.int64)},
    "(C,) probabilities": lambda: {"input": torch.randn(4), "target": torch.rand(4)},
    "(N, C) probabilities": lambda: {"input": torch.randn(3, 4), "target": torch.rand(3, 4)},
    "(N, C, d) probabilities": lambda: {"input": torch.randn(3, 4, 2), "target": torch.rand(3, 4, 2)},
}


def change(name: str, function: Callable) -> Callable[[Call], Call]:
    return lambda call: {**call, name: function(call[name])}


def put(name: str, value: object) -> Callable[[Call], Call]:
    return lambda call: {**call, name: value}


# a mistake is the argument it is made in, and how to make it
MISTAKES: dict[str, tuple[str, Callable[[Call], Call]]] = {
    "input a list": ("input", change("input", torch.Tensor.tolist)),
    "input None": ("input", put("input", None)),
    "input int64": ("input", change("input", torch.Tensor.long)),
    "input bool": ("input", change("input", torch.Tensor.bool)),
    "input complex64": ("input", change("input", lambda x: x.to(torch.complex64))),
    "target a list": ("target", change("target", torch.Tensor.tolist)),
    "target None": ("target", put("target", None)),
    "target int32": ("target", change("target", torch.Tensor.int)),
    "target int16": ("target", change("target", torch.Tensor.short)),
    "target bool": ("target", change("target", torch.Tensor.bool)),
    "target complex64": ("target", change("target", lambda t: t.to(torch.complex64))),
    "target of the other kind's dtype": ("target", change("target", lambda t: t.long() if t.is_floating_point() else t.float())),
    "target with one row more": ("target", change("target", lambda t: torch.cat([t, t[:1]]) if t.dim() else t.expand(2))),
    "target with one row less": ("target", change("target", lambda t: t[:-1] if t.dim() else t.expand(3))),
    "target with a dimension more": ("target", change("target", lambda t: t.unsqueeze(-1).expand(*t.shape, 7))),
    "target with a dimension less": ("target", change("target", lambda t: t[..., 0] if t.dim() > 1 else t)),
    "target with other positions": ("target", change("target", lambda t: t[..., :1] if t.dim() > 1 else t)),
    "label C": ("target", change("target", lambda t: t if t.is_floating_point() else torch.full_like(t, 4))),
    "label -1": ("target", change("target", lambda t: t if t.is_floating_point() else torch.full_like(t, -1))),
    "weight a list": ("weight", put("weight", [1.0] * 4)),
    "weight a number": ("weight", put("weight", 1.0)),
    "weight too short": ("weight", put("weight", torch.ones(3))),
    "weight too long": ("weight", put("weight", torch.ones(5))),
    "label_smoothing 1.5": ("label_smoothing", put("label_smoothing", 1.5)),
    "label_smoothing a word": ("label_smoothing", put("label_smoothing", "0.1")),
    "label_smoothing None": ("label_smoothing", put("label_smoothing", None)),
    "reduction foo": ("reduction", put("reduction", "foo")),
    "reduction None": ("reduction", put("reduction", None)),
    "ignore_index 0 with probabilities": ("ignore_index", lambda call: {**call, "ignore_index": 0} if is_soft(call) else call),
    "ignore_index 1.5": ("ignore_index", put("ignore_index", 1.5)),
    "ignore_index None": ("ignore_index", put("ignore_index", None)),
}


def is_soft(call: Call) -> bool:
    return isinstance(call["target"], torch.Tensor) and call["target"].is_floating_point()


def torchs_answer(call: Call) -> object:
    return call_or_error(F.cross_entropy, **call)


@every("name", CALLS)
def test_the_correct_calls_are_correct(name):
    call = CALLS[name]()
    assert isinstance(large_margin_cross_entropy(**call), torch.Tensor)
    assert isinstance(torchs_answer(call), torch.Tensor)


@pytest.mark.parametrize("mistake", MISTAKES)
@every("name", CALLS)
def test_one_mistake_raises_as_torch_does(name, mistake):
    argument, spoil = MISTAKES[mistake]
    call = spoil(CALLS[name]())
    expected = torchs_answer(call)
    got = call_or_error(large_margin_cross_entropy, **call)
    if isinstance(expected, torch.Tensor):  # for this call it is no mistake
        assert isinstance(got, torch.Tensor), f"torch accepts it: {got!r}"
        return
    assert type(got) is type(expected), f"torch: {expected!r}\nhere: {got!r}"
    assert argument in str(got)


@pytest.mark.parametrize("first", MISTAKES)
@every("name", CALLS)
def test_two_mistakes_raise_for_one_of_them(name, first):
    # torch checks in another order, so its type may be that of the other mistake
    for second in MISTAKES:
        if MISTAKES[first][0] == MISTAKES[second][0]:
            continue  # two mistakes in one argument are one other mistake
        answers = [torchs_answer(MISTAKES[mistake][1](CALLS[name]())) for mistake in (first, second)]
        types = {type(answer) for answer in answers if isinstance(answer, Exception)}
        got = call_or_error(large_margin_cross_entropy, **MISTAKES[second][1](MISTAKES[first][1](CALLS[name]())))
        if types:
            assert type(got) in types, f"{second}: {types}, {got!r}"


def test_what_torch_refuses_by_accident_is_accepted():
    # a uint8 map of labels, and smoothing with one label in a vector: torch takes both in other shapes
    input, target = torch.randn(3, 4, 2), torch.zeros(3, 2, dtype=torch.uint8)
    assert isinstance(torchs_answer({"input": input, "target": target}), RuntimeError)
    assert large_margin_cross_entropy(input, target) == large_margin_cross_entropy(input, target.long())
    input, target = torch.randn(4), torch.tensor([1])
    assert isinstance(torchs_answer({"input": input, "target": target, "label_smoothing": 0.1}), RuntimeError)
    assert large_margin_cross_entropy(input, target, label_smoothing=0.1) == large_margin_cross_entropy(
        input, target[0], label_smoothing=0.1
    )


@every("name", ["(N, C)", "(N, C) probabilities"])
def test_input_without_dimensions(name):
    call = {**CALLS[name](), "input": torch.tensor(1.0)}
    expected, got = torchs_answer(call), call_or_error(large_margin_cross_entropy, **call)
    assert type(got) is type(expected), f"torch: {expected!r}\nhere: {got!r}"
    assert "input" in str(got)


@every(
    "name, weight",
    [("(N, C, d)", torch.ones(1, 4)), ("(N, C, d)", torch.ones(2, 2)), ("(N, C) probabilities", torch.ones(4, dtype=torch.int64))],
)
def test_weights_torch_takes_by_accident_are_refused(name, weight):
    # torch refuses them for other shapes and kinds of target
    call = {**CALLS[name](), "weight": weight}
    assert isinstance(torchs_answer(call), torch.Tensor)
    with pytest.raises(RuntimeError, match="weight"):
        large_margin_cross_entropy(**call)


# what torch does not have, or does not look at


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"label_smoothing": -0.1}, ValueError),
        ({"label_smoothing": math.nan}, ValueError),
        ({"label_smoothing": torch.tensor(0.1)}, TypeError),
        ({"lam": -1}, ValueError),
        ({"lam": math.nan}, ValueError),
        ({"lam": math.inf}, ValueError),
        ({"lam": torch.tensor(0.3)}, TypeError),
        ({"lam": "0.3"}, TypeError),
        ({"lam": None}, TypeError),
        ({"hard_bias": math.inf}, ValueError),
        ({"hard_bias": -math.inf}, ValueError),
        ({"hard_bias": math.nan}, ValueError),
        ({"hard_bias": torch.tensor(1.0)}, TypeError),
        ({"hard_bias": None}, TypeError),
        ({"divergence": "foo"}, ValueError),
        ({"divergence": None}, ValueError),
        ({"divergence": "Symmetric"}, ValueError),
        ({"backend": "foo"}, ValueError),
        ({"backend": torch}, ValueError),
        ({"reduction": []}, ValueError),
    ],
    ids=str,
)
@every("name", ["(N, C)", "(N, C) probabilities"])
def test_bad_options_raise(name, options, error):
    got = call_or_error(large_margin_cross_entropy, **CALLS[name](), **options)
    assert type(got) is error, repr(got)
    assert next(iter(options)) in str(got)


def test_messages_say_what_came_and_what_to_do():
    with pytest.raises(RuntimeError, match=r"target must be int64 .* of shape \(3,\).* got int32 of shape \(3,\); .*target\.long\(\)"):
        large_margin_cross_entropy(torch.randn(3, 4), torch.zeros(3, dtype=torch.int32))
    with pytest.raises(IndexError, match=r"\[0, 4\).*ignore_index=-100.*holds 7 \(2 of 3 labels"):
        large_margin_cross_entropy(torch.randn(3, 4), torch.tensor([7, 0, 9]))
    with pytest.raises(RuntimeError, match=r"weight .* 4 classes.*got float32 of shape \(3,\)"):
        large_margin_cross_entropy(torch.randn(3, 4), torch.tensor([0, 0, 0]), torch.ones(3))


@every("hinge", [hinge.function for hinge in HINGES])
@every("name", [name for name in CALLS if "probabilities" in name])
def test_hinges_refuse_probabilities(name, hinge):
    with pytest.raises(RuntimeError, match="target"):
        hinge(**CALLS[name]())


@every("hinge", [hinge.function for hinge in HINGES])
@pytest.mark.parametrize("mistake", [name for name in MISTAKES if "label_smoothing" not in name])
@every("name", [name for name in CALLS if "probabilities" not in name])
def test_hinges_raise_as_cross_entropy_does(name, mistake, hinge):
    argument, spoil = MISTAKES[mistake]
    call = spoil(CALLS[name]())
    expected, got = torchs_answer(call), call_or_error(hinge, **call)
    if isinstance(expected, torch.Tensor):
        assert isinstance(got, torch.Tensor), repr(got)
        return
    assert type(got) is type(expected), f"torch: {expected!r}\nhere: {got!r}"
    assert argument in str(got)


@every("hinge", [hinge.function for hinge in HINGES])
@every("margin", [math.nan, math.inf, "1", None, torch.tensor(1.0)])
def test_hinges_check_their_margin(margin, hinge):
    with pytest.raises(ValueError if isinstance(margin, float) else TypeError, match="margin"):
        hinge(**CALLS["(N, C)"](), margin=margin)


@every("hinge", [hinge.function for hinge in HINGES])
@every("option", ["label_smoothing", "lam", "divergence", "hard_bias"])
def test_hinges_have_no_such_option(option, hinge):
    with pytest.raises(TypeError, match=option):
        hinge(**CALLS["(N, C)"](), **{option: 0.1})


@pytest.mark.parametrize(
    ("loss", "before", "meant"),
    [
        (LargeMarginCrossEntropyLoss, (), "lam"),
        (LinearLargeMarginCrossEntropyLoss, (3, 4, True), "lam"),
        (MulticlassHingeLoss, (), "margin"),
    ],
)
def test_a_number_in_the_place_of_the_weight_is_named(loss, before, meant):
    with pytest.raises(TypeError, match=rf"weight must be .* got 0.3 \(float\).* {meant}=0.3"):
        loss(*before, 0.3)
