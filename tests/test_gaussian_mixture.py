"""Gaussian mixtures against their definition, which takes every difference of features and means."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from combinations import every
from largemargin import LargeMarginCrossEntropyLoss, MulticlassHingeLoss
from largemargin.heads.gaussian_mixture import MIN_VARIANCE, GaussianMixtureHead
from largemargin.schedules import SteppedAlpha
from measure import assert_within, compiles, same_bits

COVARIANCES = ("identity", "diagonal")
each_covariance = pytest.mark.parametrize("covariance", COVARIANCES)


class Truth:
    """Distances and log-determinants in float64, by a tensor (N, C, D)."""

    def __init__(self, head: GaussianMixtureHead, x: torch.Tensor) -> None:
        means, count = head.means.detach().double(), math.sqrt(head.in_features) if head.scale_by_dimension else 1.0
        free = None if head.log_variances is None else head.log_variances.detach().double()
        variances = torch.ones_like(means) if free is None else free.exp() + MIN_VARIANCE
        self.distance = 0.5 * ((x.double()[:, None] - means).square() / variances).sum(-1) / count  # (N, C)
        self.half_log_det = 0.5 * variances.log().sum(-1) / count  # (C,)
        center = means.mean(0)
        far = (x.double() - center).square().sum(-1, keepdim=True) + (means - center).square().sum(-1)
        self.scale = 1 + far / variances.amin() / count + self.half_log_det.abs().max()

    def logits(self, target: torch.Tensor | None = None, alpha: float = 0.0) -> torch.Tensor:
        logits = -self.distance - self.half_log_det
        for n, y in enumerate([] if target is None else target.tolist()):
            if y >= 0:
                logits[n, y] -= alpha * self.distance[n, y]
        return logits

    def likelihood(self, target: torch.Tensor) -> float:
        terms = [float(self.distance[n, y] + self.half_log_det[y]) for n, y in enumerate(target.tolist()) if y >= 0]
        return sum(terms) / max(len(terms), 1)


def mixture(rng, device: torch.device, covariance="identity", dtype=torch.float64, rows=16, classes=7, width=5, **options):
    head = GaussianMixtureHead(width, classes, covariance=covariance, dtype=dtype, **options).to(device)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(classes, width, generator=rng, dtype=torch.float64).to(device))
    x = torch.randn(rows, width, generator=rng, dtype=torch.float64).to(device, dtype)
    return head, x, torch.randint(classes, (rows,), generator=rng).to(device)


# logits and likelihood


@every("dtype", [torch.float32, torch.float64])
@every("scaled", [False, True])
@each_covariance
def test_logits_and_likelihood_are_the_definition(covariance, scaled, dtype, rng, device):
    head, x, target = mixture(rng, device, covariance, dtype, 64, width=9, alpha=0.25, likelihood_weight=0.5, scale_by_dimension=scaled)
    target[::5] = -100
    truth = Truth(head, x)
    assert_within(head(x).detach(), truth.logits(), truth.scale, 4)
    assert_within(head(x, target).detach(), truth.logits(target, 0.25), truth.scale, 4)
    assert_within(head.likelihood(x, target).detach(), 0.5 * truth.likelihood(target), truth.scale.max(), 4)


@each_covariance
def test_without_a_margin_training_is_the_mixture_itself(covariance, rng, device):
    head, x, target = mixture(rng, device, covariance, torch.float32, alpha=0.0)
    assert same_bits(head(x, target), head(x))


def test_the_posterior_is_bayes_rule_for_gaussians(rng, device):
    head, x, _ = mixture(rng, device, "diagonal")
    variances = head.log_variances.detach().exp() + MIN_VARIANCE
    normals = [torch.distributions.Normal(*moments) for moments in zip(head.means, variances.sqrt(), strict=True)]
    densities = torch.stack([normal.log_prob(x).sum(-1) for normal in normals], dim=1)
    posterior = densities.exp() / densities.exp().sum(1, keepdim=True)
    assert_within(head(x).softmax(1).detach(), posterior.detach(), 1.0, 1000)


def test_a_new_diagonal_head_has_variances_of_1(rng, device):
    head, x, _ = mixture(rng, device, "identity", torch.float32)
    diagonal = GaussianMixtureHead(5, 7, covariance="diagonal").to(device)
    with torch.no_grad():
        diagonal.means.copy_(head.means)
    assert_within(diagonal(x).detach(), head(x).detach().double(), Truth(head, x).scale, 8)


@every("dtype", [torch.float32, torch.float64])
@every("offset", [1e2, 1e4])
@each_covariance
def test_a_common_offset_of_features_and_means_costs_only_its_own_rounding(covariance, offset, dtype, rng, device):
    head, x, _ = mixture(rng, device, covariance, dtype)
    with torch.no_grad():
        head.means.add_(offset)
    x = x + offset
    if covariance == "diagonal":
        head.log_variances.data.clamp_(min=-1)  # else the scale, by the smallest variance, is not sharp
    truth = Truth(head, x)
    # the center, rounded to eps * offset, moves features and means alike; each difference then has roundings of its own small size
    assert_within(head(x).detach(), truth.logits(), truth.scale, 8)
    naive = -0.5 * x.square().sum(1, keepdim=True) + x @ head.means.detach().t() - 0.5 * head.means.detach().square().sum(1)
    if covariance == "identity":
        assert (naive.double() - truth.logits()).abs().max() > 30 * (head(x).detach().double() - truth.logits()).abs().max()


@pytest.mark.parametrize("distance", [1e2, 1e4, 1e6])
def test_features_far_from_all_means_lose_no_more_than_the_rounding_of_their_distance(distance, rng, device):
    head, x, target = mixture(rng, device, "identity", torch.float32)
    x = distance * F.normalize(x, dim=1)
    truth = Truth(head, x)
    assert_within(head(x, target).detach(), truth.logits(target, 0.1), truth.distance + 1, 4)
    at_target = truth.distance[torch.arange(16, device=device), target]
    assert_within(head.likelihood(x, target).detach() / 0.1, at_target.mean(), at_target.mean(), 4)


def test_the_distance_to_the_own_mean_is_exact_where_features_sit_on_it(rng, device):
    head, _, target = mixture(rng, device, "identity", torch.float32)
    with torch.no_grad():
        head.means.mul_(1e3)
    x = head.means.detach()[target] * (1 + 2e-6)  # a few roundings from it, thousands from the center
    assert_within(head.likelihood(x, target).detach(), 0.1 * Truth(head, x).likelihood(target), 0.1 * Truth(head, x).likelihood(target), 8)


@each_covariance
def test_no_target_and_eval_mode_give_plain_logits(covariance, rng, device):
    head, x, target = mixture(rng, device, covariance, torch.float32, alpha=SteppedAlpha(every=1))
    plain = head(x)
    assert same_bits(head.eval()(x, target), plain) and same_bits(head(x), plain)
    assert head.alpha.step == 0


def test_rows_without_a_class_are_plain_and_leave_the_likelihood_alone(rng, device):
    head, x, target = mixture(rng, device, "diagonal", torch.float32)
    target[::3], target[1] = -100, -1
    assert same_bits(head(x, target)[target < 0], head(x)[target < 0])
    expected = head.likelihood(x[target >= 0], target[target >= 0])
    x[target < 0] = math.nan
    x.requires_grad_()
    loss = head.likelihood(x, target)
    assert_within(loss.detach(), expected.detach().double(), Truth(head, x.detach()[target >= 0]).scale.max(), 2)
    loss.backward()
    assert not x.grad[target < 0].any() and x.grad.isfinite().all() and head.means.grad.isfinite().all()
    nothing = head.likelihood(x, torch.full_like(target, -100))
    assert nothing == 0 and not torch.autograd.grad(nothing, head.means)[0].any()


@every("shape", [(), (4,), (2, 3), (2, 1, 3), (0,)])
@each_covariance
def test_any_leading_dimensions(covariance, shape, rng, device):
    head, _, _ = mixture(rng, device, covariance, torch.float32)
    x, target = torch.randn(*shape, 5, generator=rng).to(device), torch.randint(7, shape, generator=rng).to(device)
    got, flat = head(x, target), head(x.reshape(-1, 5), target.reshape(-1))
    assert got.shape == (*shape, 7)
    scale = Truth(head, x.reshape(-1, 5)).scale
    assert_within(got.reshape(-1, 7).detach(), flat.detach().double(), scale, 4)
    likelihood = head.likelihood(x.reshape(-1, 5), target.reshape(-1)).detach()
    assert_within(head.likelihood(x, target).detach(), likelihood.double(), scale.max() if scale.numel() else 1.0, 4)


def test_no_tensor_of_rows_by_classes_by_features(rng, device):
    head, x, target = mixture(rng, device, "diagonal", torch.float32, rows=64, classes=32, width=48)
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor)]
            largest = max([largest, *(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in tensors)])
            return out

    with Largest():
        (head(x, target).sum() + head.likelihood(x, target)).backward()
    assert largest <= 64 * 48


# many dimensions


@pytest.mark.parametrize("means", ["as initialised", "like features"])
def test_thousands_of_features_saturate_the_softmax_unless_scaled(means, rng, device):
    """The features know nothing of the targets, so p_y should be of the size of 1/C, less a margin of a few nats."""
    width, classes = 4096, 10
    torch.manual_seed(0)
    x, target = torch.randn(64, width, generator=rng).to(device), torch.randint(classes, (64,), generator=rng).to(device)
    posteriors = {}
    for scaled in (False, True):
        head = GaussianMixtureHead(width, classes, alpha=0.1, scale_by_dimension=scaled).to(device)
        if means == "like features":
            with torch.no_grad():
                head.means.copy_(torch.randn(classes, width, generator=rng).to(device))
        posteriors[scaled] = head(x, target).softmax(1).gather(1, target[:, None]).detach()
    assert posteriors[False].median() < 1e-20
    assert math.exp(-10) / classes < posteriors[True].median() and posteriors[True].max() < 0.5
    assert posteriors[True].min() > 1e-7  # a gradient in float32, for every row


# schedule and state


def test_alpha_follows_its_schedule_and_a_resumed_head_goes_on_identically(rng, device, tmp_path):
    head, x, target = mixture(rng, device, "diagonal", alpha=SteppedAlpha(every=2))
    truth = Truth(head, x)
    for alpha in (0.1, 0.1, 0.2):
        head(x)  # without a target nothing is counted
        assert_within(head(x, target).detach(), truth.logits(target, alpha), truth.scale, 4)
    torch.save(head.state_dict(), tmp_path / "state")
    resumed = GaussianMixtureHead(5, 7, covariance="diagonal", alpha=SteppedAlpha(every=2), dtype=torch.float64).to(device)
    resumed.load_state_dict(torch.load(tmp_path / "state"))
    duplicate = copy.deepcopy(head)
    for alpha in (0.2, 0.3, 0.3):
        logits = head(x, target)
        assert_within(logits.detach(), truth.logits(target, alpha), truth.scale, 4)
        assert same_bits(logits, resumed(x, target)) and same_bits(logits, duplicate(x, target))


def test_param_groups_double_the_learning_rate_of_the_means():
    head = GaussianMixtureHead(5, 7, covariance="diagonal")
    optimiser = torch.optim.SGD(head.param_groups(0.1), lr=0.1, weight_decay=5e-4)
    assert [(group["lr"], group["params"]) for group in optimiser.param_groups] == [(0.2, [head.means]), (0.1, [head.log_variances])]
    assert {id(p) for group in optimiser.param_groups for p in group["params"]} == {id(p) for p in head.parameters()}
    assert [group["lr"] for group in GaussianMixtureHead(5, 7).param_groups(0.1, means_factor=1.0)] == [0.1]


# gradients


@pytest.mark.parametrize("scaled", [False, True])
@each_covariance
def test_gradient(covariance, scaled, rng, device):
    head, x, target = mixture(rng, device, covariance, rows=6, classes=4, width=3, scale_by_dimension=scaled)
    target[2] = -100
    names = [name for name, _ in head.named_parameters()]

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = head

        def forward(self, x):
            return self.head(x, target), self.head.likelihood(x, target)

    def outputs(x, *parameters):
        return torch.func.functional_call(Both(), {f"head.{n}": p for n, p in zip(names, parameters, strict=True)}, (x,))

    leaves = (x.requires_grad_(), *(p.detach().clone().requires_grad_() for p in head.parameters()))
    assert torch.autograd.gradcheck(outputs, leaves)
    assert torch.autograd.gradgradcheck(outputs, leaves)


@pytest.mark.parametrize("log_variance", [-1e4, -100.0, 0.0, 100.0, 1e4])
def test_variances_never_run_to_0(log_variance, rng, device):
    head, x, target = mixture(rng, device, "diagonal", torch.float32)
    with torch.no_grad():
        head.log_variances.fill_(log_variance)
    loss = F.cross_entropy(head(x, target), target) + head.likelihood(x, target)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in head.parameters())
    if log_variance <= -100:
        assert_within(head(x).detach(), Truth(head, x).logits(), Truth(head, x).scale, 8)


@each_covariance
def test_gradients_are_finite_at_zero(covariance, device):
    head = GaussianMixtureHead(5, 7, covariance=covariance).to(device)
    torch.nn.init.zeros_(head.means)
    x = torch.zeros(3, 5, requires_grad=True, device=device)
    (head(x, torch.arange(3, device=device)).sum() + head.likelihood(x, torch.arange(3, device=device))).backward()
    assert not x.grad.any() and all(p.grad.isfinite().all() for p in head.parameters())


# with the rest of the world


@pytest.mark.parametrize("criterion", [torch.nn.CrossEntropyLoss(), LargeMarginCrossEntropyLoss(), MulticlassHingeLoss()])
def test_every_loss_takes_its_logits(criterion, rng, device):
    head, x, target = mixture(rng, device, "diagonal", torch.float32)
    target[2] = -100
    (criterion(head(x, target), target) + head.likelihood(x, target)).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in head.parameters())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@each_covariance
def test_autocast_changes_nothing(covariance, half, rng, device):
    head, x, target = mixture(rng, device, covariance, torch.float32)
    expected = head(x, target), head.likelihood(x, target)
    with torch.autocast(device.type, dtype=half):
        got = head(x, target), head.likelihood(x, target)
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@each_covariance
def test_half_precision_is_computed_in_float32(covariance, half, rng, device):
    head, x, target = mixture(rng, device, covariance, half)
    got, truth = head(x, target), Truth(head, x)
    assert got.dtype == torch.float32
    assert_within(got.detach(), truth.logits(target, 0.1), truth.scale, 4)
    (got.sum() + head.likelihood(x, target)).backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())


@compiles
@pytest.mark.parametrize("alpha", [0.1, SteppedAlpha(every=1)])
@each_covariance
def test_compiled_code_computes_the_same(covariance, alpha, rng, device):
    torch._dynamo.reset()
    head, x, target = mixture(rng, device, covariance, torch.float32, alpha=copy.deepcopy(alpha))
    twin = copy.deepcopy(head)

    def loss(head):
        return F.cross_entropy(head(x, target), target) + head.likelihood(x, target)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    scale = Truth(head, x).scale.max()
    for _ in range(3):
        got, expected = compiled(head), loss(twin)
        assert_within(got.detach(), expected.detach().double(), scale, 4)
        leaves = list(head.parameters()), list(twin.parameters())
        for a, b in zip(torch.autograd.grad(got, leaves[0]), torch.autograd.grad(expected, leaves[1]), strict=True):
            assert_within(a, b.double(), scale, 4)
    assert not isinstance(alpha, SteppedAlpha) or head.alpha.step == 3


def test_it_learns(rng, device):
    torch.manual_seed(0)
    target = torch.arange(4, device=device).repeat(16)
    x = torch.randn(4, 8, generator=rng).to(device)[target] + 0.3 * torch.randn(64, 8, generator=rng).to(device)
    head = GaussianMixtureHead(8, 4).to(device)
    optimiser = torch.optim.SGD(head.param_groups(0.05), lr=0.05, momentum=0.9)
    for _ in range(100):
        optimiser.zero_grad()
        (F.cross_entropy(head(x, target), target) + head.likelihood(x, target)).backward()
        optimiser.step()
    assert (head.eval()(x).argmax(1) == target).all()


# mistakes


@every(
    "options, error, words",
    [
        ({"in_features": 0}, ValueError, "in_features must be at least 1, got 0"),
        ({"num_classes": 2.0}, TypeError, "num_classes must be an int"),
        ({"covariance": "full"}, ValueError, "covariance must be one of 'identity', 'diagonal'; got 'full'"),
        ({"alpha": -0.1}, ValueError, "alpha must be finite and at least 0"),
        ({"alpha": None}, TypeError, "alpha must be a number, or a Schedule"),
        ({"alpha": "0.1"}, TypeError, "alpha must be a number, or a Schedule"),
        ({"likelihood_weight": -1.0}, ValueError, "likelihood_weight must be finite and at least 0"),
    ],
)
def test_mistaken_options_name_the_argument(options, error, words):
    with pytest.raises(error, match=words):
        GaussianMixtureHead(**{"in_features": 5, "num_classes": 7, **options})


def test_mistaken_inputs_name_the_argument():
    head = GaussianMixtureHead(5, 7)
    with pytest.raises(ValueError, match=r"features must be floating of shape \(\.\.\., in_features=5\)"):
        head(torch.zeros(3, 4))
    for call in (head, head.likelihood):
        with pytest.raises(ValueError, match=r"target must be int64 class indices of shape \(3,\)"):
            call(torch.zeros(3, 5), torch.zeros(4, dtype=torch.int64))
        with pytest.raises(IndexError, match="holds 7"):
            call(torch.zeros(3, 5), torch.tensor([0, 7, -100]))  # on a GPU labels are not looked at


def test_one_row_without_a_batch_takes_a_schedule(rng, device):
    head = GaussianMixtureHead(6, 4, alpha=SteppedAlpha()).to(device)
    features = torch.randn(6, generator=rng).to(device)
    assert head(features, torch.tensor(1, device=device)).dtype == head(features).dtype == torch.float32
