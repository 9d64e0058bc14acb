"""How the loss is called changes nothing: upstream gradients, second passes, layouts, dimensions, batches. Its inputs stay as they are."""

import pytest
import torch
from torch import Tensor

from combinations import every
from largemargin import large_margin_cross_entropy
from largemargin._reduce import row_weights
from measure import assert_within, same_bits
from problems import loss_and_gradient, problem


@every("options", [{}, {"label_smoothing": 0.1}, {"lam": 0.0, "hard_bias": 1.0}])
def test_upstream_gradients_of_each_row(options, rng, device):
    input, target = problem(rng, device, dtype=torch.float64)
    input.requires_grad_()
    losses = large_margin_cross_entropy(input, target, reduction="none", **options)
    rows = torch.stack([torch.autograd.grad(losses[n], input, retain_graph=True)[0][n] for n in range(8)])
    drawn = torch.randn(8, generator=rng, dtype=torch.float64).to(device)
    for upstream in (drawn, torch.zeros_like(drawn), -torch.ones_like(drawn)):
        (gradient,) = torch.autograd.grad(losses, input, upstream, retain_graph=True)
        assert_within(gradient, upstream[:, None] * rows, upstream.abs().max() + 1, 2)


def test_scaled_and_expanded_upstream_gradients(rng, device):
    input, target = problem(rng, device)
    input.requires_grad_()
    losses = large_margin_cross_entropy(input, target, reduction="none")
    for factor in (0.5, 65536.0, -2.0):  # powers of two change no digit
        (plain,) = torch.autograd.grad(losses, input, torch.ones(8, device=device), retain_graph=True)
        (expanded,) = torch.autograd.grad(losses, input, torch.tensor(factor, device=device).expand(8), retain_graph=True)
        (scaled,) = torch.autograd.grad((losses * factor).sum(), input, retain_graph=True)
        assert same_bits(expanded, plain * factor) and same_bits(scaled, plain * factor)


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_two_backward_passes_through_one_graph(kind, rng, device):
    input, target = problem(rng, device)
    if kind == "probabilities":
        target = torch.rand(input.shape, generator=rng).to(device)
    leaf = input.clone().requires_grad_()
    losses = large_margin_cross_entropy(leaf, target, reduction="none", label_smoothing=0.1)
    first_upstream, second_upstream = torch.randn(2, 8, generator=rng).to(device)
    (first,) = torch.autograd.grad(losses, leaf, first_upstream, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(losses, leaf, second_upstream)
    assert same_bits(first, kept)
    for upstream, got in ((first_upstream, first), (second_upstream, second)):
        fresh = input.clone().requires_grad_()
        loss = large_margin_cross_entropy(fresh, target, reduction="none", label_smoothing=0.1)
        assert same_bits(torch.autograd.grad(loss, fresh, upstream)[0], got)


@every("weighted", [False, True])
@every("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@every("kind", ["indices", "probabilities"])
def test_inputs_are_never_modified(kind, dtype, weighted, rng, device):
    leaf = torch.randn(6, 5, generator=rng).to(device, dtype).requires_grad_()
    logits = leaf * 1  # not a leaf: an in-place change would go unnoticed by autograd's own check
    target = torch.tensor([0, 1, -100, 3, 4, 0], device=device) if kind == "indices" else torch.rand(6, 5, generator=rng).to(device, dtype)
    weight = torch.rand(5, generator=rng).to(device, dtype) if weighted else None
    tensors = [tensor for tensor in (logits, target, weight) if tensor is not None]
    before = [(tensor.detach().clone(), tensor._version) for tensor in tensors]
    loss = large_margin_cross_entropy(logits, target, weight, label_smoothing=0.1)
    other = logits.float().softmax(-1).square().sum()  # a second user of the same logits, whose saved tensors must survive
    (loss + other).backward()
    for tensor, (copy, version) in zip(tensors, before, strict=True):
        assert torch.equal(tensor.detach(), copy) and tensor._version == version


def test_changing_the_input_before_backward_is_noticed(rng, device):
    input, target = problem(rng, device)
    logits = input.requires_grad_() * 1
    loss = large_margin_cross_entropy(logits, target, reduction="none").sum()  # whose gradient is not yet computed
    logits.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "every second class": lambda x: torch.stack([x, x + 1], -1).flatten(-2)[..., ::2],
    "sliced off a wider tensor": lambda x: torch.cat([x, x[..., :3]], -1)[..., : x.shape[-1]],
    "rows out of a larger batch": lambda x: torch.cat([x, x])[: len(x)],
    "every second row": lambda x: torch.stack([x, x + 1], 1).flatten(0, 1)[::2],
}


@every("layout", LAYOUTS)
@every("kind", ["indices", "probabilities"])
def test_strided_logits(kind, layout, rng, device):
    input, target = problem(rng, device)
    if kind == "probabilities":
        target = LAYOUTS[layout](torch.rand(input.shape, generator=rng).to(device))
    strided = LAYOUTS[layout](input)
    assert strided.stride() != input.stride() or layout == "rows out of a larger batch"
    for got, expected in zip(loss_and_gradient(strided, target), loss_and_gradient(input, target.contiguous()), strict=True):
        assert_within(got, expected, 32.0, 1)


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_expanded_logits(kind, rng, device):
    row, target = torch.randn(1, 10, generator=rng).to(device), torch.randint(10, (8,), generator=rng).to(device)
    if kind == "probabilities":
        target = torch.rand(1, 10, generator=rng).to(device).expand(8, 10)
    leaf = row.clone().requires_grad_()
    loss = large_margin_cross_entropy(leaf.expand(8, 10), target)
    expected, expected_gradient = loss_and_gradient(row.repeat(8, 1), target.clone())
    assert_within(loss, expected, 4.0, 1)
    assert_within(torch.autograd.grad(loss, leaf)[0], expected_gradient.sum(0, keepdim=True), 1.0, 2)


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_channels_last(kind, rng, device):
    input = torch.randn(2, 5, 3, 4, generator=rng).to(device)
    target = torch.randint(5, (2, 3, 4), generator=rng) if kind == "indices" else torch.rand(2, 5, 3, 4, generator=rng)
    target = target.to(device)
    last = input.to(memory_format=torch.channels_last)
    assert not last.is_contiguous()
    for got, expected in zip(loss_and_gradient(last, target), loss_and_gradient(input, target), strict=True):
        assert_within(got, expected, 4.0, 1)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_strided_and_narrow_targets(dtype, rng, device):
    input, target = problem(rng, device)
    loss = large_margin_cross_entropy(input, target)
    narrow = target.to(dtype)
    for strided in (torch.stack([narrow, narrow], 1)[:, 0], torch.cat([narrow, narrow])[3:11].roll(3), narrow[:1].expand(8)):
        expected = large_margin_cross_entropy(input, strided.long().contiguous())
        assert same_bits(large_margin_cross_entropy(input, strided), expected)
    assert same_bits(large_margin_cross_entropy(input, narrow), loss)


@pytest.mark.parametrize("void", [255, 3])
def test_uint8_targets_with_a_void_label(void, rng, device):
    input = torch.randn(2, 5, 3, 4, generator=rng).to(device)
    target = torch.randint(5, (2, 3, 4), generator=rng).to(device)
    target[0, 0] = void
    expected = large_margin_cross_entropy(input, target, ignore_index=void)
    assert same_bits(large_margin_cross_entropy(input, target.to(torch.uint8), ignore_index=void), expected)


@pytest.mark.parametrize("weight", [None, torch.arange(200.0)], ids=["alone", "weighted"])
def test_uint8_targets_count_as_often(weight, device):
    target = torch.tensor([3, 156, 7, 199], device=device)  # in uint8 156 is -100
    weight = None if weight is None else weight.to(device)
    assert same_bits(row_weights(target.to(torch.uint8), weight, -100), row_weights(target, weight, -100))


@every("weighted", [False, True])
@every("reduction", ["none", "sum", "mean"])
@every("kind", ["indices", "probabilities"])
@every("positions", [(4,), (2, 3), (2, 1, 2)])
def test_k_dimensions_equal_the_flattened_rows(positions, kind, reduction, weighted, rng, device):
    input = torch.randn(3, 5, *positions, generator=rng).to(device)
    shape = (3, *positions) if kind == "indices" else input.shape
    target = torch.randint(5, shape, generator=rng).to(device) if kind == "indices" else torch.rand(shape, generator=rng).to(device)
    if kind == "indices":
        target[0, 0] = -100
    weight = torch.rand(5, generator=rng).to(device) if weighted else None
    loss, gradient = loss_and_gradient(input, target, weight, reduction=reduction, label_smoothing=0.1)

    def rows(x: Tensor) -> Tensor:
        return x.movedim(1, -1).reshape(-1, 5)

    flat_target = target.flatten() if kind == "indices" else rows(target)
    flat, flat_gradient = loss_and_gradient(rows(input), flat_target, weight, reduction=reduction, label_smoothing=0.1)
    assert loss.shape == ((3, *positions) if reduction == "none" else ())
    assert_within(loss.flatten(), flat.flatten(), 40.0, 2)
    assert_within(rows(gradient), flat_gradient, 4.0, 1)


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_one_row_without_a_batch_dimension(kind, rng, device):
    input = torch.randn(5, generator=rng).to(device)
    target = torch.tensor(3, device=device) if kind == "indices" else torch.rand(5, generator=rng).to(device)
    for reduction in ("none", "sum", "mean"):
        loss, gradient = loss_and_gradient(input, target, reduction=reduction)
        batch, batch_gradient = loss_and_gradient(input[None], target[None], reduction=reduction)
        assert loss.shape == () and same_bits(loss, batch.reshape(()))
        assert same_bits(gradient, batch_gradient[0])


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_a_row_does_not_depend_on_its_batch(kind, rng, device):
    input, target = problem(rng, device, rows=64, classes=37)
    if kind == "probabilities":
        target = torch.rand(input.shape, generator=rng).to(device)
    options = {"reduction": "none", "label_smoothing": 0.1}
    loss, gradient = loss_and_gradient(input, target, **options)
    again, gradient_again = loss_and_gradient(input, target, **options)
    assert same_bits(loss, again) and same_bits(gradient, gradient_again)
    order = torch.randperm(64, generator=rng).to(device)
    permuted, permuted_gradient = loss_and_gradient(input[order], target[order], **options)
    assert same_bits(permuted, loss[order]) and same_bits(permuted_gradient, gradient[order])
    for part in (slice(0, 1), slice(5, 12), slice(63, 64)):
        alone, alone_gradient = loss_and_gradient(input[part], target[part], **options)
        assert_within(alone, loss[part], 16.0, 1)  # a vectorised exp may round its last lanes otherwise
        assert_within(alone_gradient, gradient[part], 2.0, 1)


@pytest.mark.parametrize("weighted", [False, True])
def test_micro_batches_with_one_normaliser_equal_the_whole_batch(weighted, rng, device):
    input, target = problem(rng, device, rows=12, dtype=torch.float64)
    target[[1, 5, 6]] = -100
    weight = torch.rand(10, generator=rng, dtype=torch.float64).to(device) + 0.5 if weighted else None
    kept = target[target >= 0]
    normaliser = len(kept) if weight is None else weight[kept].sum()
    expected, expected_gradient = loss_and_gradient(input, target, weight, label_smoothing=0.1)
    leaf, total = input.clone().requires_grad_(), 0.0
    for part in (slice(0, 3), slice(3, 8), slice(8, 12)):
        loss = large_margin_cross_entropy(leaf[part], target[part], weight, reduction="sum", label_smoothing=0.1) / normaliser
        loss.backward()
        total += loss.item()
    assert_within(torch.tensor(total, dtype=torch.float64), expected, 16.0, 2)
    assert_within(leaf.grad, expected_gradient, 1.0, 2)


# without a look at the values nothing has to wait for an accelerator; meta tensors have none to look at
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_off_the_cpu_no_value_is_looked_at(kind, weighted):
    input = torch.empty(3, 5, 2, device="meta", requires_grad=True)
    target = torch.empty(3, 2, dtype=torch.int64, device="meta") if kind == "indices" else torch.empty(3, 5, 2, device="meta")
    weight = torch.empty(5, device="meta") if weighted else None
    for reduction in ("none", "sum", "mean"):
        loss = large_margin_cross_entropy(input, target, weight, label_smoothing=0.1, hard_bias=1.0, reduction=reduction)
        assert loss.shape == ((3, 2) if reduction == "none" else ())
        (gradient,) = torch.autograd.grad(loss.sum(), input)
        assert gradient.device.type == "meta" and gradient.shape == input.shape
