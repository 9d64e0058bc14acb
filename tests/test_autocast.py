"""Products that promise float32 have it on every path to their values and derivatives, whatever autocast says."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from combinations import every
from largemargin import LinearLargeMarginCrossEntropyLoss, linear_large_margin_cross_entropy
from largemargin.heads.gaussian_mixture import GaussianMixtureHead
from largemargin.heads.super_symmetric import SuperSymmetricLinear, super_symmetry_penalty
from measure import compiles

# torch's own: forward-mode formulas and inductor are scripted, and inductor lowers QR by a deprecated function; warnings are errors here
pytestmark = [
    compiles,
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch._prims_common.check. is deprecated:FutureWarning"),
]

ROWS, WIDTH, CLASSES = 6, 64, 9
TARGET = torch.arange(ROWS)
Scalar = Callable[..., Tensor]


def leaves(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng) for shape in shapes]


def call(module: torch.nn.Module, parameters: dict[str, Tensor], *inputs: Tensor) -> Tensor:
    """The forward pass of a module, in training mode, with these parameters."""
    return torch.func.functional_call(module, parameters, inputs)


class Likelihood(torch.nn.Module):
    """The likelihood of a mixture, as the forward pass of a module."""

    def __init__(self, head: GaussianMixtureHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        return self.head.likelihood(features, TARGET)


def linear_loss(features: Tensor, classifier: Tensor, **options: object) -> Tensor:
    return linear_large_margin_cross_entropy(features, classifier, TARGET, **options)


def weighted_loss(features: Tensor, classifier: Tensor, weight: Tensor) -> Tensor:
    return linear_loss(features, classifier, weight=weight.square(), label_smoothing=0.1)


def linear_module(features: Tensor, classifier: Tensor, bias: Tensor) -> Tensor:
    return call(LINEAR, {"linear.weight": classifier, "linear.bias": bias}, features, TARGET)


def mixture(features: Tensor, means: Tensor, *log_variances: Tensor) -> Tensor:
    head = DIAGONAL if log_variances else IDENTITY
    logits = call(head, dict(zip(("means", "log_variances"), (means, *log_variances), strict=False)), features, TARGET)
    assert logits.dtype == features.dtype
    return (0.1 * logits).sin().sum()


def likelihood(features: Tensor, means: Tensor, log_variances: Tensor) -> Tensor:
    return call(LIKELIHOOD, {"head.means": means, "head.log_variances": log_variances}, features)


class Weight(torch.nn.Module):
    """The classifier that a learned frame makes."""

    def __init__(self) -> None:
        super().__init__()
        self.head = SuperSymmetricLinear(WIDTH, CLASSES, frame="learned", learn_scale=True)

    def forward(self) -> Tensor:
        return self.head.weight


def learned_frame(frame: Tensor, log_scale: Tensor) -> Tensor:
    return (3 * call(LEARNED, {"head.frame": frame, "head.log_scale": log_scale})).sin().sum()


LINEAR = LinearLargeMarginCrossEntropyLoss(WIDTH, CLASSES)
IDENTITY, DIAGONAL = (GaussianMixtureHead(WIDTH, CLASSES, covariance=covariance) for covariance in ("identity", "diagonal"))
LIKELIHOOD, LEARNED = Likelihood(DIAGONAL), Weight()
FEATURES, CLASSIFIER, BIAS = (ROWS, WIDTH), (CLASSES, WIDTH), (CLASSES,)
PRODUCTS: dict[str, tuple[Scalar, tuple[tuple[int, ...], ...]]] = {
    "linear": (linear_loss, (FEATURES, CLASSIFIER)),
    "linear_none": (lambda x, w: linear_loss(x, w, reduction="none").sin().sum(), (FEATURES, CLASSIFIER)),
    "linear_weighted": (weighted_loss, (FEATURES, CLASSIFIER, BIAS)),
    "linear_module": (linear_module, (FEATURES, CLASSIFIER, BIAS)),
    "mixture": (mixture, (FEATURES, CLASSIFIER)),
    "mixture_diagonal": (mixture, (FEATURES, CLASSIFIER, CLASSIFIER)),
    "likelihood": (likelihood, (FEATURES, CLASSIFIER, CLASSIFIER)),
    "penalty": (super_symmetry_penalty, (CLASSIFIER,)),
    "learned_frame": (learned_frame, ((CLASSES - 1, WIDTH), ())),
}


class Subclass(Tensor):
    """A tensor with a type of its own."""


def gradients(function: Scalar, inputs: list[Tensor], autocast: Callable[[], torch.autocast]) -> list[Tensor]:
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    with autocast():
        value = function(*inputs)
    return [value, *torch.autograd.grad(value, inputs)]


def eager(function: Scalar, inputs: list[Tensor], autocast: Callable[[], torch.autocast]) -> list[Tensor]:
    return gradients(function, inputs, autocast)


def backward_inside(function: Scalar, inputs: list[Tensor], autocast: Callable[[], torch.autocast]) -> list[Tensor]:
    with autocast():
        return gradients(function, inputs, autocast)


def backward_alone_inside(function: Scalar, inputs: list[Tensor], autocast: Callable[[], torch.autocast]) -> list[Tensor]:
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    value = function(*inputs)
    with autocast():
        return [value, *torch.autograd.grad(value, inputs)]


def create_graph(function: Scalar, inputs: list[Tensor], autocast: Callable[[], torch.autocast]) -> list[Tensor]:
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    with autocast():
        value = function(*inputs)
        first = torch.autograd.grad(value, inputs, create_graph=True)
        curvature = sum((gradient * direction).sum() for gradient, direction in zip(first, directions(inputs), strict=True))
        second = torch.autograd.grad(curvature, inputs, allow_unused=True, materialize_grads=True)
    return [value, *first, *second]


def directions(inputs: list[Tensor]) -> list[Tensor]:
    return [tensor.to(inputs[0].dtype) for tensor in leaves(1, *(tensor.shape for tensor in inputs))]


def func_grad(function: Scalar, inputs: list[Tensor], autocast: Callable[[], torch.autocast]) -> list[Tensor]:
    with autocast():
        return list(torch.func.grad(function, tuple(range(len(inputs))))(*inputs))


def func_jvp(function: Scalar, inputs: list[Tensor], autocast: Callable[[], torch.autocast]) -> list[Tensor]:
    with autocast():
        return list(torch.func.jvp(function, tuple(inputs), tuple(directions(inputs))))


def forward_mode(function: Scalar, inputs: list[Tensor], autocast: Callable[[], torch.autocast]) -> list[Tensor]:
    with autocast(), forward_ad.dual_level():
        value = function(*map(forward_ad.make_dual, inputs, directions(inputs)))
        return list(forward_ad.unpack_dual(value))


def hessian_vector(function: Scalar, inputs: list[Tensor], autocast: Callable[[], torch.autocast]) -> list[Tensor]:
    """Forward over reverse."""
    gradient = torch.func.grad(function, tuple(range(len(inputs))))
    with autocast():
        return list(torch.func.jvp(gradient, tuple(inputs), tuple(directions(inputs)))[1])


def per_sample(function: Scalar, inputs: list[Tensor], autocast: Callable[[], torch.autocast]) -> list[Tensor]:
    """Gradients for three values of the first argument, at one value of the others."""
    first = torch.stack([inputs[0], 2 * inputs[0], -inputs[0]])
    batched = torch.func.vmap(torch.func.grad(function, tuple(range(len(inputs)))), in_dims=(0, *[None] * (len(inputs) - 1)))
    with autocast():
        return list(batched(first, *inputs[1:]))


def ensemble(function: Scalar, inputs: list[Tensor], autocast: Callable[[], torch.autocast]) -> list[Tensor]:
    """Gradients for two values of every argument."""
    stacked = [torch.stack([tensor, tensor.flip(0) if tensor.dim() else -tensor]) for tensor in inputs]
    with autocast():
        return list(torch.func.vmap(torch.func.grad(function, tuple(range(len(inputs)))))(*stacked))


def subclass(function: Scalar, inputs: list[Tensor], autocast: Callable[[], torch.autocast]) -> list[Tensor]:
    return gradients(function, [tensor.as_subclass(Subclass) for tensor in inputs], autocast)


def compiled_by(backend: str) -> Callable[..., list[Tensor]]:
    def path(function: Scalar, inputs: list[Tensor], autocast: Callable[[], torch.autocast]) -> list[Tensor]:
        return gradients(torch.compile(function, backend=backend, fullgraph=True), inputs, autocast)

    return path


EAGER = [
    eager,
    backward_inside,
    backward_alone_inside,
    create_graph,
    func_grad,
    func_jvp,
    forward_mode,
    hessian_vector,
    per_sample,
    ensemble,
    subclass,
]
# each compiles: make test has one of each kind
QUICK = ("linear", "linear_weighted", "mixture_diagonal", "likelihood", "penalty", "learned_frame")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def error(got: list[Tensor], truth: list[Tensor]) -> float:
    """The largest error of any of the tensors, relative to the size of that tensor."""
    return max(
        float((g.detach().double() - t.detach()).norm() / t.detach().norm().clamp(min=1e-30)) for g, t in zip(got, truth, strict=True)
    )


def assert_float32(name: str, path: Callable[..., list[Tensor]], without_autocast: Callable[..., list[Tensor]] | None = None) -> None:
    """A product and its derivatives on a path, under autocast, are as exact as without it, on ``without_autocast`` if that is given."""
    half = (torch.bfloat16, torch.float16)[list(PRODUCTS).index(name) % 2]  # every path sees both
    if name == "linear_module" and path is subclass:
        pytest.skip("a weight of another class is computed from the logits of its layer, in the precision of that")
    function, shapes = PRODUCTS[name]
    inputs = leaves(0, *shapes)
    plain = without_autocast or path
    truth = plain(function, [tensor.double() for tensor in inputs], lambda: torch.autocast("cpu", enabled=False))
    without = plain(function, inputs, lambda: torch.autocast("cpu", enabled=False))
    got = path(function, inputs, lambda: torch.autocast("cpu", dtype=half))
    assert error(got, truth) <= 2 * error(without, truth) + 1e-6
    assert [tensor.dtype for tensor in got] == [tensor.dtype for tensor in without]


@pytest.mark.parametrize("path", EAGER)
@every("name", PRODUCTS)
def test_products_and_their_derivatives_are_float32_under_autocast(name, path):
    assert_float32(name, path)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in PRODUCTS])
def test_compiled_products_and_their_gradients_are_float32_under_autocast(name):
    assert_float32(name, compiled_by("aot_eager"), without_autocast=eager)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_compiled_by_inductor_are_float32_under_autocast(name):
    assert_float32(name, compiled_by("inductor"))


@pytest.mark.parametrize(
    "path",
    [
        *EAGER,
        pytest.param(compiled_by("aot_eager"), id="aot_eager"),
        pytest.param(compiled_by("inductor"), id="inductor", marks=pytest.mark.slow),
    ],
)
def test_logits_beyond_half_precision_survive_autocast(path):
    features, classifier = (300 * tensor for tensor in leaves(0, FEATURES, CLASSIFIER))
    for got in path(linear_loss, [features, classifier], lambda: torch.autocast("cpu", dtype=torch.float16)):
        assert got.isfinite().all()
