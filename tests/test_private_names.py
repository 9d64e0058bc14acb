"""A canary for each private name of torch that largemargin/_torch.py uses: a torch that has changed one fails here, by its name."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from largemargin import _torch


def seen_inside(ask, run) -> list:
    """What ``ask`` says within the function that ``run`` calls with a tensor."""
    said = []

    def function(x: Tensor) -> Tensor:
        said.append(ask())
        return x * 1.0

    run(function)
    return said


def by_forward_mode(function):
    with forward_ad.dual_level():
        function(torch.ones(2))


def by_fake_tensors(function):
    with FakeTensorMode():
        function(torch.ones(2))


def by_tracing(function):
    torch.jit.trace(function, torch.ones(2), check_trace=False)


RUNS = {
    "is_transformed": lambda function: torch.func.vmap(function)(torch.ones(2)),
    "is_forward_mode": by_forward_mode,
    "is_dispatched": by_fake_tensors,
    "is_traced": by_tracing,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", RUNS)
def test_what_watches_is_seen(name):
    ask = getattr(_torch, name)
    assert not ask() and _torch.is_unwatched()
    assert seen_inside(ask, RUNS[name]) == [True]
    assert seen_inside(_torch.is_unwatched, RUNS[name]) == [False]
    assert not ask()


def test_hooks_on_saved_tensors_are_seen():
    assert not _torch.has_saved_tensor_hooks()
    with torch.autograd.graph.save_on_cpu():
        assert _torch.has_saved_tensor_hooks()
    leaf = torch.ones(2, requires_grad=True)
    assert seen_inside(_torch.has_saved_tensor_hooks, lambda function: checkpoint(function, leaf, use_reentrant=False)) == [True]


def test_a_batch_of_gradients_has_no_memory_of_its_own():
    seen = []

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, upstream):
            seen.append(_torch.is_plain_gradient(upstream))
            return upstream

    x = torch.ones(2, requires_grad=True)
    Identity.apply(x).sum().backward()
    torch.autograd.grad(Identity.apply(x), x, torch.eye(2), is_grads_batched=True)
    torch.autograd.grad(Identity.apply(x).sum(), x, create_graph=True)
    assert seen == [True, False, False]


def test_a_zero_of_forward_mode_has_no_memory():
    assert _torch.is_zero_tensor(torch._efficientzerotensor(2)) and not _torch.is_zero_tensor(torch.zeros(2))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_forward_mode_can_be_switched_on_within_a_jvp():
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(2), torch.ones(2))
        with forward_ad._set_fwd_grad_enabled(False):
            assert forward_ad.unpack_dual(dual * 2).tangent is None
            with _torch.forward_mode_enabled():
                assert forward_ad.unpack_dual(dual * 2).tangent is not None


def test_versions_bases_and_overlaps():
    x = torch.ones(4)
    before = _torch.version(x)
    x.add_(1)
    assert _torch.version(x) == before + 1
    assert _torch.base(x[1:]) is x and _torch.base(x) is None
    assert _torch.overlaps_itself(torch.ones(1).expand(3)) and not _torch.overlaps_itself(x)


def test_a_function_is_applied_directly():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, factor):
            return x * factor

        @staticmethod
        def backward(ctx, upstream):
            return upstream * 2, None

    x = torch.ones(2, requires_grad=True)
    doubled = _torch.direct_apply(Double)(x, 2)
    assert torch.equal(doubled, 2 * x) and torch.equal(torch.autograd.grad(doubled.sum(), x)[0], torch.full((2,), 2.0))


def test_symbolic_tracing_is_seen():
    said = seen_inside(_torch.is_symbolic, torch.fx.symbolic_trace)
    assert said == [True] and not _torch.is_symbolic()


def test_modes_that_see_functions_are_listed():
    assert _torch.function_modes() == []
    with torch.device("cpu") as device:
        assert [type(mode).__name__ for mode in _torch.function_modes()] == ["DeviceContext"], device


def test_a_patch_of_linear_is_another_object(monkeypatch):
    assert torch.nn.functional.linear is _torch.LINEAR
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *given: _torch.LINEAR(*given))
    assert torch.nn.functional.linear is not _torch.LINEAR


HOOKS = {
    "forward pre-hook": ("register_forward_pre_hook", "register_module_forward_pre_hook"),
    "forward hook": ("register_forward_hook", "register_module_forward_hook"),
    "backward pre-hook": ("register_full_backward_pre_hook", "register_module_full_backward_pre_hook"),
    "backward hook": ("register_full_backward_hook", "register_module_full_backward_hook"),
}


def test_hooks_of_modules_are_listed_by_kind():
    layer = torch.nn.Identity()
    assert list(_torch.hooks(layer).values()) == [[]] * 8
    for kind, (own, of_all) in HOOKS.items():
        for name, register in ((kind, getattr(layer, own)), (f"global {kind}", getattr(torch.nn.modules.module, of_all))):

            def hook(*_):
                return None

            handle = register(hook)
            assert {name: hooks for name, hooks in _torch.hooks(layer).items() if hooks} == {name: [hook]}
            handle.remove()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", _torch.CALL)
def test_a_call_goes_through_these_methods(name):
    class Other(torch.nn.Identity):
        pass

    def refuse(*_):
        raise LookupError(name)

    by_tracing(Other())
    setattr(Other, name, refuse)
    with pytest.raises(LookupError, match=name):
        by_tracing(Other())


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_module_that_is_compiled_and_a_buffer_are_known():
    layer = torch.nn.BatchNorm1d(2)
    assert not _torch.is_compiled(layer)
    assert [_torch.has_buffer(layer, name) for name in ("running_mean", "weight")] == [True, False]
    layer.compile()
    assert _torch.is_compiled(layer)


def test_a_backward_pass_and_the_node_that_asks_are_known():
    seen = []

    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append((_torch.backward_pass(), _torch.number_of(ctx)))
            return x.clone()

        @staticmethod
        def backward(ctx, upstream):
            seen.append((_torch.backward_pass() != -1, _torch.number_of(_torch.asking_node())))
            return upstream

    number = _torch.next_number()
    Asks.apply(torch.zeros(3, requires_grad=True)).sum().backward()
    assert seen == [(-1, number), (True, number)] and _torch.next_number() > number
