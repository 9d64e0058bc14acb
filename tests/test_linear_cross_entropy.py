"""At lam = 0 the loss of a linear layer is torch's of version 2.13, nn.functional.linear_cross_entropy and nn.LinearCrossEntropyLoss."""

import inspect
import subprocess
import sys
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from largemargin import LinearLargeMarginCrossEntropyLoss, linear_large_margin_cross_entropy
from measure import roundings

pytestmark = [
    pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy"),
    pytest.mark.filterwarnings("ignore:linear_cross_entropy. ``options`` ignored"),
]

# torch's samples, drawn in a process of their own, because importing them changes settings of torch; expecttest is not needed to draw them
DRAW = """
import sys, types, unittest
sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase)
import torch
from torch.testing._internal.common_methods_invocations import op_db
torch.manual_seed(0)
torch.save([
    (info.variant_test_name, dtype, sample.input, *sample.args, sample.kwargs)
    for info in op_db if info.name == "nn.functional.linear_cross_entropy"
    for dtype in (torch.float64, torch.float32, torch.bfloat16)
    for sample in info.sample_inputs("cpu", dtype)
], sys.argv[1])
"""


class Sample(NamedTuple):
    variant: str
    dtype: torch.dtype
    input: Tensor
    linear_weight: Tensor
    target: Tensor
    options: dict[str, Any]


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> list[Sample]:
    file = tmp_path_factory.mktemp("samples") / "samples.pt"
    subprocess.run([sys.executable, "-W", "ignore", "-c", DRAW, str(file)], check=True, capture_output=True)
    return [Sample(*sample) for sample in torch.load(file, weights_only=False)]


def loss_and_gradients(function: Any, sample: Sample, dtype: torch.dtype, of_target: bool, **options: Any) -> list[Tensor]:
    """The loss, and the gradients of features, classifier, bias and probabilities, for one upstream gradient in every dtype."""

    def leaf(value: Any) -> Any:
        return value.to(dtype, copy=True).requires_grad_() if torch.is_tensor(value) and value.is_floating_point() else value

    given = {name: leaf(value) for name, value in sample.options.items() if name != "weight"} | options
    if "weight" in sample.options:
        given["weight"] = sample.options["weight"].to(dtype)
    input, linear_weight, target = map(leaf, (sample.input, sample.linear_weight, sample.target))
    target = target if of_target else target.detach()
    loss = function(input, linear_weight, target, **given)
    leaves = [value for value in (input, linear_weight, given.get("linear_bias"), target) if value is not None and value.requires_grad]
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(0)).bfloat16().to(loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]


@pytest.mark.slow  # torch's samples take 8 s to draw
@pytest.mark.parametrize("of_target", [False, True], ids=["", "gradients of probabilities"])
def test_every_sample_of_torchs_own_tests(samples, of_target):
    counts: Counter[torch.dtype] = Counter()
    for sample in samples:
        if of_target and not sample.target.is_floating_point():
            continue
        counts[sample.dtype] += 1
        truth = loss_and_gradients(F.linear_cross_entropy, sample, torch.float64, of_target, options=None)
        got = loss_and_gradients(linear_large_margin_cross_entropy, sample, sample.dtype, of_target, lam=0)
        torchs = loss_and_gradients(F.linear_cross_entropy, sample, sample.dtype, of_target)
        for mine, theirs, exact in zip(got, torchs, truth, strict=True):
            assert mine.shape == theirs.shape == exact.shape
            scale = exact.abs().max().clamp(min=1)
            error = (mine.double() - exact).abs().max()
            if sample.dtype == torch.bfloat16:
                assert error <= (theirs.double() - exact).abs().max() + 8 * torch.finfo(torch.float32).eps * scale, sample
            else:
                assert roundings(mine, exact, scale).max() <= 8, sample
    if not of_target:
        assert sum(counts.values()) >= 1000 and min(counts.values()) >= 300


def test_the_function_takes_the_arguments_of_torchs(rng):
    ours = inspect.signature(linear_large_margin_cross_entropy).parameters
    torchs = inspect.signature(F.linear_cross_entropy).parameters
    assert [name for name in torchs if name not in ours or ours[name].kind != torchs[name].kind] == []
    input, linear_weight, target = torch.randn(4, 3, generator=rng), torch.randn(5, 3, generator=rng), torch.tensor([0, 1, -100, 4])
    expected = linear_large_margin_cross_entropy(input, linear_weight, target)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2, chunking_method=None)
    assert linear_large_margin_cross_entropy(input, linear_weight, target, ignore_index=None, options=options) == expected


@pytest.mark.parametrize("out_features", [(), (2, 3)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_module_is_torchs_with_the_same_state(bias, out_features, rng):
    options: dict[str, Any] = {
        "out_features": out_features,
        "bias": bias,
        "weight": torch.rand(5, generator=rng) + 0.5,
        "ignore_index": None,
        "label_smoothing": 0.1,
        "reduction": "sum",
        "options": None,
    }
    theirs, ours = torch.nn.LinearCrossEntropyLoss(4, 5, **options), LinearLargeMarginCrossEntropyLoss(4, 5, lam=0, **options)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    input = torch.randn(3, 4, generator=rng)
    for target in (torch.randint(5, (3, *out_features), generator=rng), torch.rand(3, 5, *out_features, generator=rng)):
        torch.testing.assert_close(ours(input, target), theirs(input, target))


def test_the_module_takes_the_arguments_of_torchs_with_another_default_for_the_bias():
    ours = inspect.signature(LinearLargeMarginCrossEntropyLoss).parameters
    torchs = inspect.signature(torch.nn.LinearCrossEntropyLoss).parameters
    differ = {name for name, parameter in torchs.items() if ours[name].default != parameter.default}
    assert differ == {"bias", "ignore_index"}  # torch's None is -100
