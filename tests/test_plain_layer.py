"""The loss that is fused with a layer is that of the logits which the layer predicts, whatever was done to the layer."""

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize, prune

import plain_on_ranks
from combinations import every
from largemargin import LinearLargeMarginCrossEntropyLoss, large_margin_cross_entropy, plain_layer
from largemargin.lab._torchvision import import_torchvision
from largemargin.losses import large_margin
from measure import compiles

with contextlib.suppress(ImportError):
    import_torchvision()  # which peft imports where it is installed

D, C = 6, 11


class Scaled(nn.Linear):
    def forward(self, features):
        return 3 * super().forward(features)


class Called(nn.Linear):
    def __call__(self, features):
        return 3 * super().__call__(features)


class Inherits(nn.Linear):
    """A subclass that changes nothing about the call."""


class LowRank(nn.Module):
    """As an adapter of PEFT: the layer, and a trained product of two thin matrices beside it."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.down, self.up = nn.Linear(D, 2, bias=False), nn.Linear(2, C, bias=False)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, features):
        return self.base_layer(features) + self.up(self.down(features))


def with_forward(layer):
    original = layer.forward
    layer.forward = lambda features: 3 * original(features)
    return layer


def with_wrapped_forward(layer):
    original = layer.forward
    layer.forward = functools.update_wrapper(lambda features: 3 * original(features), original)  # which looks like the original
    return layer


def hooked(register, hook):
    def do(layer):
        getattr(layer, register)(hook)
        return layer

    return do


def replaced(make):
    def do(layer):
        new = make(D, C)
        new.load_state_dict(layer.state_dict())
        return new

    return do


def pruned(layer):
    prune.random_unstructured(layer, "weight", 0.5)
    with torch.no_grad():
        layer.weight_orig.mul_(2)  # a step of the optimiser: weight is of before it until the layer is called
    return layer


def pruned_bias(layer):
    prune.l1_unstructured(layer, "bias", 0.5)
    with torch.no_grad():
        layer.bias_orig.add_(1)
    return layer


def old_spectral_norm(layer):
    return nn.utils.spectral_norm(layer)


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = nn.utils.weight_norm(layer)
    with torch.no_grad():
        layer.weight_g.mul_(2)
    return layer


def quantised(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear})[0]


def fake_quantised(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer.qconfig = torch.ao.quantization.get_default_qat_qconfig()
        return torch.ao.nn.qat.Linear.from_float(layer)


def compiled(layer):
    return torch.compile(layer, backend="eager")


def offloaded(layer):
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu", offload=True, weights_map=dict(layer.state_dict())))
    assert layer.weight.is_meta
    return layer


class Doubling(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Tagged(torch.Tensor):
    """A tensor whose products are its own, as those of quantised weights are."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        return 3 * result if function is F.linear else result


def of_a_subclass(layer):
    weight = layer.weight.detach().as_subclass(Tagged)
    del layer.weight
    layer.weight = weight
    return layer


def sparse(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer.weight = nn.Parameter(layer.weight.detach().to_sparse_csr(), requires_grad=False)
    return layer


def with_call(layer):
    layer._call_impl = lambda features: 3 * layer.forward(features)
    return layer


def compiled_in_place(layer):
    layer.compile(backend="eager")
    return layer


def of_another_class(layer):
    layer.__class__ = Scaled
    return layer


def traced(layer):
    return torch.fx.symbolic_trace(layer)


def checkpointed(layer):
    return checkpoint_wrapper(layer)


def averaged(layer):
    return torch.optim.swa_utils.AveragedModel(layer)


def in_a_sequence(layer):
    return nn.Sequential(nn.Identity(), layer)


def peft_adapter(layer):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(nn.Sequential(layer), peft.LoraConfig(target_modules=["0"], r=2, init_lora_weights=False))
    return model.base_model.model[0]


# what was done to the layer, and a word of the cause that the warning names
OTHER = {
    "subclass": (replaced(Scaled), "Scaled"),
    "subclass with a call": (replaced(Called), "Called"),
    "replaced forward": (with_forward, "forward replaced"),
    "wrapped forward": (with_wrapped_forward, "forward replaced"),
    "forward hook": (hooked("register_forward_hook", lambda layer, args, output: 3 * output), "forward hook"),
    "forward pre-hook": (hooked("register_forward_pre_hook", lambda layer, args: (3 * args[0],)), "forward pre-hook"),
    "pruned": (pruned, "prune|Unstructured"),
    "pruned bias": (pruned_bias, "prune|Unstructured"),
    "spectral_norm, by a hook": (old_spectral_norm, "SpectralNorm"),
    "weight_norm, by a hook": (old_weight_norm, "WeightNorm"),
    "quantised": (quantised, "quantized"),
    "fake-quantised": (fake_quantised, "qat"),
    "compiled": (compiled, "OptimizedModule"),
    "offloaded": (offloaded, "accelerate"),
    "adapter": (LowRank, "LowRank"),
    "adapter of PEFT": (peft_adapter, "peft"),
    "wrapped": (in_a_sequence, "Sequential"),
    "call": (with_call, "call replaced"),
    "compiled in place": (compiled_in_place, "compiled"),
    "class": (of_another_class, "Scaled"),
    "traced": (traced, "GraphModule"),
    "checkpointed": (checkpointed, "CheckpointWrapper"),
    "averaged": (averaged, "AveragedModel"),
    "tensor subclass": (of_a_subclass, "Tagged"),
    "sparse": (sparse, "sparse_csr"),
}


def parametrised(layer):
    parametrize.register_parametrization(layer, "weight", Doubling())
    return layer


def frozen(layer):
    return layer.requires_grad_(False)


def reparametrised_bias(layer):
    parametrize.register_parametrization(layer, "bias", Doubling())
    return layer


PLAIN = {
    "as made": lambda layer: layer,
    "subclass that inherits forward": replaced(Inherits),
    "parametrisation": parametrised,
    "parametrisation of the bias": reparametrised_bias,
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "frozen": frozen,
    "hook that was removed": lambda layer: (layer.register_forward_hook(lambda *_: None).remove(), layer)[1],
    "pruning that was removed": lambda layer: (prune.random_unstructured(layer, "weight", 0.5), prune.remove(layer, "weight"), layer)[2],
}


def criterion_of(change=lambda layer: layer, **options) -> LinearLargeMarginCrossEntropyLoss:
    torch.manual_seed(0)
    criterion = LinearLargeMarginCrossEntropyLoss(D, C, weight=torch.rand(C) + 0.5, lam=0.5, **options)
    criterion.linear = change(criterion.linear)
    return criterion


def batch(rng, shape=(4, 2)):
    return torch.randn(*shape, D, generator=rng), torch.randint(C, shape, generator=rng)


def expected_of(criterion, features, target) -> torch.Tensor:
    """By the logits that the layer predicts."""
    logits = criterion.linear(features).flatten(0, -2)
    loss = large_margin_cross_entropy(logits, target.flatten(), criterion.weight, lam=0.5, reduction=criterion.reduction)
    return loss.view(target.shape) if criterion.reduction == "none" else loss


def gradients(loss, criterion, features):
    leaves = [features, *(p for p in criterion.parameters() if p.requires_grad)]
    return torch.autograd.grad(loss.sum(), leaves, allow_unused=True)


@pytest.fixture
def fused(monkeypatch) -> list:
    """What the fused loss was called with."""
    calls: list[tuple] = []
    original = large_margin.linear_large_margin_cross_entropy

    def recorded(*args, **options):
        calls.append(args)
        return original(*args, **options)

    monkeypatch.setattr(large_margin, "linear_large_margin_cross_entropy", recorded)
    return calls


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@every("reduction", ["mean", "none"])
@pytest.mark.parametrize("what", OTHER)
def test_the_loss_is_that_of_the_logits_of_a_layer_that_does_more(what, reduction, rng, fused):
    change, word = OTHER[what]
    criterion = criterion_of(change, reduction=reduction).eval()  # spectral_norm moves on in training
    features, target = batch(rng)
    features.requires_grad_()
    with pytest.warns(UserWarning, match=f"(?i)linear .*({word})") as said:
        loss = criterion(features, target)
        torch.testing.assert_close(criterion(features, target), loss)
    assert len(said) == 1 and said[0].filename == __file__ and not fused
    expected = expected_of(criterion, features, target)
    torch.testing.assert_close(loss, expected)
    if what in ("quantised",):  # which has no gradient
        return
    for got, right in zip(gradients(loss, criterion, features), gradients(expected, criterion, features), strict=True):
        torch.testing.assert_close(got, right)


@pytest.mark.parametrize("what", PLAIN)
def test_a_plain_layer_is_fused(what, rng, fused):
    criterion = criterion_of(PLAIN[what])
    features, target = batch(rng)
    features.requires_grad_()
    loss = criterion(features, target)
    assert len(fused) == 1
    expected = expected_of(criterion, features, target)
    torch.testing.assert_close(loss, expected)
    for got, right in zip(gradients(loss, criterion, features), gradients(expected, criterion, features), strict=True):
        torch.testing.assert_close(got, right)


def test_a_parametrisation_is_evaluated_as_often_as_by_the_layer(rng):
    # a spectral norm in training goes on with each evaluation
    criterion = criterion_of(parametrizations.spectral_norm)
    called = copy.deepcopy(criterion)
    features, target = batch(rng)
    for _ in range(3):
        torch.testing.assert_close(criterion(features, target), expected_of(called, features, target))


GLOBAL_HOOKS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "forward": (nn.modules.module.register_module_forward_hook, lambda module, args, output: 3 * output),
    "forward pre": (nn.modules.module.register_module_forward_pre_hook, lambda module, args: None),
    "full backward": (nn.modules.module.register_module_full_backward_hook, lambda module, grads, upstream: None),
    "full backward pre": (nn.modules.module.register_module_full_backward_pre_hook, lambda module, upstream: None),
}


@pytest.mark.parametrize("kind", GLOBAL_HOOKS)
def test_global_hooks_see_the_layer(kind, rng):
    register, hook = GLOBAL_HOOKS[kind]
    seen, criterion = [], criterion_of()
    features, target = batch(rng)

    def counting(module, *args):
        if module is criterion.linear:
            seen.append(module)
            return hook(module, *args)

    handle = register(counting)
    try:
        with pytest.warns(UserWarning, match="global"):
            loss = criterion(features.requires_grad_(), target)
        loss.backward()
        expected = expected_of(criterion, features, target)
    finally:
        handle.remove()
    assert seen
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_the_layer_run(register, rng):
    criterion, seen = criterion_of(), []
    getattr(criterion.linear, register)(lambda *args: seen.append(args))
    with pytest.warns(UserWarning, match="backward"):
        criterion(batch(rng)[0].requires_grad_(), batch(rng)[1]).backward()
    assert seen


@pytest.mark.parametrize("patch", ["nn.Linear.forward", "F.linear"])
def test_a_patch_of_torch_itself_is_seen(patch, rng, monkeypatch):
    criterion = criterion_of()
    originals: dict[str, Callable[..., torch.Tensor]] = {"nn.Linear.forward": nn.Linear.forward, "F.linear": F.linear}
    original = originals[patch]
    monkeypatch.setattr(*((nn.Linear, "forward") if patch == "nn.Linear.forward" else (F, "linear")), lambda *args: 3 * original(*args))
    features, target = batch(rng)
    with pytest.warns(UserWarning, match=r"forward of its own|F\.linear"):
        loss = criterion(features, target)
    torch.testing.assert_close(loss, expected_of(criterion, features, target))


class Tripling(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return 3 * result if function is F.linear else result


def test_a_mode_that_changes_products_is_seen(rng, fused):
    criterion = criterion_of()
    features, target = batch(rng)
    with Tripling(), pytest.warns(UserWarning, match="under a Tripling"):
        loss = criterion(features, target)
    with Tripling():
        expected = expected_of(criterion, features, target)
    torch.testing.assert_close(loss, expected)
    with torch.device("cpu"):  # the mode by which torch chooses a device
        criterion(features, target)
    assert len(fused) == 1


def test_each_cause_is_named_once(rng):
    criterion = criterion_of()
    features, target = batch(rng)
    criterion(features, target)
    handle = criterion.linear.register_forward_hook(lambda *_: None)
    for expected in (["forward hook"], []):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            criterion(features, target)
        assert len(said) == len(expected) and all(word in str(warning.message) for word, warning in zip(expected, said, strict=True))
    handle.remove()
    criterion(features, target)
    criterion.linear = Scaled(D, C)
    with pytest.warns(UserWarning, match="Scaled"):
        criterion(features, target)
    with pytest.warns(UserWarning, match="Scaled"):  # another criterion says it again
        criterion_of(replaced(Scaled))(features, target)


@compiles
@pytest.mark.parametrize("change", [lambda layer: layer, replaced(Scaled)])
def test_compiled_code_takes_the_layer_as_it_is(change, rng):
    torch._dynamo.reset()
    criterion = criterion_of(change)
    features, target = batch(rng)
    expected = expected_of(criterion, features, target)
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(features, target), expected)


def test_a_layer_whose_shape_is_not_known_yet(rng):
    criterion = criterion_of(lambda _: nn.LazyLinear(C))
    features, target = batch(rng)
    with pytest.warns(UserWarning, match="LazyLinear|_infer_parameters"):
        loss = criterion(features, target)
    torch.testing.assert_close(loss, criterion(features, target))  # a plain nn.Linear from now on
    torch.testing.assert_close(loss, expected_of(criterion, features, target))


@pytest.mark.parametrize("change", [lambda layer: layer, replaced(Scaled)])
def test_targets_that_do_not_fit_are_refused_alike(change, rng):
    criterion = criterion_of(change)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for target in (torch.zeros(3).long(), torch.rand(4, 2), torch.rand(4, C + 1)):
            with pytest.raises(ValueError, match="class indices of shape"):
                criterion(torch.randn(4, D, generator=rng), target)


def test_a_layer_that_gives_no_tensor_is_refused(rng):
    class Pair(nn.Linear):
        def forward(self, features):
            return super().forward(features), features

    with pytest.warns(UserWarning, match="Pair"), pytest.raises(TypeError, match=r"logits must be a torch\.Tensor"):
        criterion_of(replaced(Pair))(*batch(rng))


def test_a_layer_is_plain_while_it_is_traced():
    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(D, C)

        def forward(self, features):
            found.append(plain_layer.weight_and_bias(self.linear))
            return self.linear(features)

    found: list[object] = []
    torch.fx.symbolic_trace(Asking())
    assert not isinstance(found[0], str)


@pytest.mark.parametrize(
    "change", [lambda layer: layer, replaced(Scaled), hooked("register_forward_hook", lambda layer, args, output: 3 * output)]
)
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_takes_the_layer_as_it_is(change, strict, rng):
    criterion = criterion_of(change)
    features, target = batch(rng)
    expected = expected_of(criterion, features, target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(criterion, (features, target), strict=strict)
    torch.testing.assert_close(program.module()(features, target), expected)


def test_every_linear_layer_of_peft_trains(rng):
    peft = pytest.importorskip("peft")

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.criterion = nn.Linear(D, D), LinearLargeMarginCrossEntropyLoss(D, C)

        def forward(self, features, target):
            return self.criterion(self.body(features).relu(), target)

    torch.manual_seed(0)
    model = peft.get_peft_model(Classifier(), peft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))
    features, target = batch(rng)
    with pytest.warns(UserWarning, match="peft"):
        loss = model(features, target)
    inner = model.get_base_model()
    logits = inner.criterion.linear(inner.body(features).relu()).flatten(0, 1)
    torch.testing.assert_close(loss, large_margin_cross_entropy(logits, target.flatten()))
    loss.backward()
    adapters = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(adapters) == 4 and all(gradient is not None and gradient.norm() > 0 for gradient in adapters.values())


def test_an_adapter_trains(rng):
    criterion = criterion_of(LowRank)
    with pytest.warns(UserWarning, match="LowRank"):
        criterion(*batch(rng)).backward()
    assert all(criterion.linear.get_parameter(f"{name}.weight").grad.norm() > 0 for name in ("up", "down"))


def test_a_layer_under_fake_tensors_is_plain():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        layer = nn.Linear(D, C)
        found = plain_layer.weight_and_bias(layer)
    assert not isinstance(found, str), found
    assert found[0] is layer.weight and found[1] is layer.bias


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("kind", ["fully_shard", "FullyShardedDataParallel", "tensor parallel"])
def test_a_layer_that_is_sharded_is_called(ranks, kind):
    ranks.assert_on(2, plain_on_ranks.sharded_linear, kind)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("kind", ["fully_shard", "FullyShardedDataParallel", "DistributedDataParallel"])
def test_a_criterion_that_is_sharded_as_a_whole_is_fused(ranks, kind):
    ranks.assert_on(2, plain_on_ranks.criterion_in_a_unit, kind)


@pytest.mark.xdist_group("ranks")
def test_a_layer_whose_columns_are_over_ranks_gives_dtensors_or_is_refused(ranks):
    ranks.assert_on(2, plain_on_ranks.columns_over_ranks)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(("shape", "reduction"), [((8,), "mean"), ((4, 2), "none")])
@pytest.mark.parametrize("kind", ["hook", "pre-hook", "forward", "pruned", "subclass"])
def test_classes_over_ranks_are_those_that_the_module_predicts(ranks, kind, shape, reduction):
    first, *others = ranks.assert_on(3, plain_on_ranks.changed_head, kind, shape, reduction)
    assert all(torch.equal(first, other) for other in others)
