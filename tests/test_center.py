"""Center loss: its distances, and the step of its centers, class by class as the paper writes them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.prune import random_unstructured

from devices import CPU
from largemargin import LargeMarginCrossEntropyLoss
from largemargin.heads.center import CenterLoss
from measure import assert_within, compiles, peak_bytes, same_bits


def make(device: torch.device, dtype: torch.dtype = torch.float64, **options) -> CenterLoss:
    torch.manual_seed(3)
    return CenterLoss(6, 5, dtype=dtype, **options).to(device)


def rows(rng: torch.Generator, device: torch.device, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(8, 6, generator=rng, dtype=torch.float64).to(device, dtype), torch.tensor([0, 1, 2, 3, 2, 0, -100, 2], device=device)


def loss_and_centers(center: CenterLoss, x: Tensor, y: Tensor) -> tuple[float, Tensor]:
    """Eqs. (2) and (4), in loops."""
    kept = [(row, label) for row, label in zip(x.tolist(), y.tolist(), strict=True) if label >= 0]
    before = center.centers.tolist()
    loss = sum((a - b) ** 2 for row, label in kept for a, b in zip(row, before[label], strict=True)) / (2 * len(kept))
    after = []
    for j, c in enumerate(before):
        mine = [row for row, label in kept if label == j]
        after.append([c_d - center.alpha * sum(c_d - row[d] for row in mine) / (1 + len(mine)) for d, c_d in enumerate(c)])
    return loss, torch.tensor(after, dtype=torch.float64)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_equals_the_paper_step_by_step(alpha, rng, device):
    center = make(device, alpha=alpha)
    for _ in range(3):
        x, y = rows(rng, device)
        loss, centers = loss_and_centers(center, x, y)
        assert_within(center(x, y), loss, 16.0, 2)
        assert_within(center.centers, centers, 8.0, 2)


def test_centers_come_to_the_means_of_their_classes(rng, device):
    center = make(device)
    x, y = rows(rng, device)
    for _ in range(200):
        center(x, y)
    for j in range(4):
        assert_within(center.centers[j], x[y == j].mean(0), 4.0, 4)
    assert same_bits(center.centers[4], make(device).centers[4])  # no row


def test_centers_stand_still_in_eval_and_see_no_optimizer(rng, device):
    center = make(device).eval()
    before = center.centers.clone()
    center(*rows(rng, device))
    assert same_bits(center.centers, before) and not list(center.parameters())


def test_as_a_parameter_the_centers_have_the_plain_gradient(rng, device):
    center = make(device, as_parameter=True)
    x, y = rows(rng, device)
    before = center.centers.detach().clone()
    loss = center(x.requires_grad_(), y)
    loss.backward()
    assert same_bits(center.centers.detach(), before)
    assert_within(loss, loss_and_centers(center, x.detach(), y)[0], 16.0, 2)
    truth = torch.stack([(before[j] - x.detach()[y == j]).sum(0) / 7 for j in range(5)])
    assert_within(center.centers.grad, truth, 4.0, 2)
    kept = (y >= 0).unsqueeze(-1)
    assert_within(x.grad, torch.where(kept, (x.detach() - before[y.clamp(min=0)]) / 7, 0.0), 4.0, 2)


@pytest.mark.parametrize("as_parameter", [False, True])
def test_gradcheck(as_parameter, rng, device):
    center = make(device, as_parameter=as_parameter).eval()
    x, y = rows(rng, device)
    centers = center.centers.detach().clone().requires_grad_(as_parameter)
    assert torch.autograd.gradcheck(lambda x, c: torch.func.functional_call(center, {"centers": c}, (x, y)), (x.requires_grad_(), centers))


def test_the_gradient_is_of_the_centers_before_their_step(rng, device):
    center = make(device)
    x, y = rows(rng, device)
    before = center.centers.clone()
    (gradient,) = torch.autograd.grad(center(x.requires_grad_(), y), x)
    assert not torch.equal(center.centers, before)
    assert_within(gradient[0], (x[0].detach() - before[0]) / 7, 4.0, 2)


@pytest.mark.parametrize("as_parameter", [False, True])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 3e38])
def test_ignored_rows_take_no_part(garbage, as_parameter, rng, device):
    center, other = make(device, as_parameter=as_parameter), make(device, as_parameter=as_parameter)
    x, y = rows(rng, device)
    x[6] = garbage
    loss = center(x.requires_grad_(), y)
    assert_within(loss, other(x.detach()[y >= 0], y[y >= 0]).detach(), 16.0, 2)
    assert_within(center.centers, other.centers.detach(), 4.0, 2)
    (gradient,) = torch.autograd.grad(loss, x)
    assert not gradient[6].any() and gradient.isfinite().all()


def test_without_rows_the_loss_is_zero(rng, device):
    center = make(device)
    before = center.centers.clone()
    for x, y in (
        (torch.zeros(0, 6, dtype=torch.float64, device=device), torch.zeros(0, dtype=torch.long, device=device)),
        (rows(rng, device)[0], torch.full((8,), -100, device=device)),
    ):
        loss = center(x.requires_grad_(), y)
        (gradient,) = torch.autograd.grad(loss, x)
        assert loss == 0 and not gradient.any() and same_bits(center.centers, before)


def test_leading_dimensions_are_rows(rng, device):
    center, other = make(device), make(device)
    x, y = rows(rng, device)
    assert_within(center(x.reshape(2, 4, 6), y.reshape(2, 4)), other(x, y), 16.0, 2)
    assert_within(center.centers, other.centers, 4.0, 2)
    assert center(x[0], y[0]).shape == ()


def test_rotations_and_shifts_of_features_and_centers_change_nothing(rng, device):
    center, other = make(device), make(device)
    x, y = rows(rng, device)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=rng, dtype=torch.float64).to(device)).Q
    shift = torch.randn(6, generator=rng).to(device)
    other.centers.copy_(center.centers @ rotation + shift)
    assert_within(other(x @ rotation + shift, y), center(x, y), 64.0, 4)
    assert_within(other.centers, center.centers @ rotation + shift, 8.0, 8)


def test_rows_times_classes_are_never_held():
    center = CenterLoss(4, 20000)
    x, y = torch.randn(2000, 4), torch.randint(20000, (2000,))
    assert peak_bytes(lambda: center(x, y)) < 2**20  # of the 160 MB that they would take


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("as_parameter", [False, True])
def test_half_precision_and_autocast_are_computed_in_float32(dtype, as_parameter, rng, device):
    center, other = make(device, torch.float32, as_parameter=as_parameter), make(device, torch.float32, as_parameter=as_parameter)
    x, y = rows(rng, device, dtype)
    leaf = (200 * x).requires_grad_()  # the sum of squares is beyond float16
    with torch.autocast(device.type, dtype):
        loss = center(leaf, y)
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert_within(loss, other(leaf.detach().float(), y).detach().double(), 64 + loss.item(), 2)
    assert_within(center.centers, other.centers.detach().double(), 200.0, 2)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert gradient.dtype == dtype and gradient.isfinite().all()


@compiles
@pytest.mark.parametrize("as_parameter", [False, True])
def test_compiled_code_computes_the_same(as_parameter, rng, device):
    torch._dynamo.reset()
    center, other = make(device, torch.float32, as_parameter=as_parameter), make(device, torch.float32, as_parameter=as_parameter)
    compiled = torch.compile(center, backend="aot_eager", fullgraph=True)
    x, y = rows(rng, device, torch.float32)
    gradients = []
    for module in (compiled, other):
        leaf = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(module(leaf, y), leaf)[0])
    assert_within(gradients[0], gradients[1].double(), 4.0, 2)
    assert_within(center.centers, other.centers.detach().double(), 4.0, 2)


@pytest.mark.parametrize("as_parameter", [False, True])
def test_state_dict_and_copies(as_parameter, rng, device):
    center, other = make(device, as_parameter=as_parameter), CenterLoss(6, 5, as_parameter=not as_parameter, dtype=torch.float64).to(device)
    x, y = rows(rng, device)
    center(x, y)
    assert list(center.state_dict()) == ["centers"]
    other.load_state_dict(center.state_dict())
    duplicate = copy.deepcopy(center)
    assert_within(other(x, y), duplicate(x, y).detach(), 16.0, 1)
    assert as_parameter or not torch.equal(duplicate.centers, center.centers)


@pytest.mark.parametrize(
    "change", [weight_norm, lambda center, name: random_unstructured(center, name, 0.5)], ids=["parametrised", "pruned"]
)
def test_a_parameter_that_is_computed_is_still_one(change, rng, device):
    center = make(device, as_parameter=True)
    change(center, "centers")
    x, y = rows(rng, device)
    for _ in range(2):  # the second pass would see centers that the first has moved
        assert_within(center(x, y), loss_and_centers(center, x, y)[0], 16.0, 4)


def test_joint_training_with_a_softmax_loss(rng, device):
    center, head = make(device), torch.nn.Linear(6, 5, dtype=torch.float64).to(device)
    x, y = rows(rng, device)
    for loss_of in (F.cross_entropy, LargeMarginCrossEntropyLoss()):
        (loss_of(head(x.requires_grad_()), y) + 0.003 * center(x, y)).backward()
        assert x.grad.isfinite().all()


def test_errors(rng):
    x, y = rows(rng, CPU)
    with pytest.raises(ValueError, match="alpha must be at most 1"):
        CenterLoss(6, 5, alpha=1.5)
    with pytest.raises(ValueError, match="alpha must be finite and at least 0"):
        CenterLoss(6, 5, alpha=-1.0)
    with pytest.raises(ValueError, match="num_classes must be at least 1"):
        CenterLoss(6, 0)
    with pytest.raises(ValueError, match=r"features must be floating of shape \(\.\.\., in_features=6\)"):
        make(CPU)(x[:, :4], y)
    with pytest.raises(IndexError, match=r"holds [5-7]"):
        make(CPU)(x, y + 3)  # on a GPU labels are not looked at
