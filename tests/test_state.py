"""State of a loss: written in place, the same in compiled code, and moved once where a forward pass is recomputed."""

import copy
import functools
import io
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition, nop
from torch import Tensor, nn
from torch._decomp import core_aten_decompositions
from torch._dynamo import compiled_autograd
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config as functorch_config
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, set_checkpoint_early_stop

from combinations import every
from largemargin import LargeMarginCrossEntropyLoss, _state
from largemargin.heads import CenterLoss, GaussianMixtureHead, LSoftmaxLinear
from largemargin.schedules import AnnealedLambda, GradualWeight, Schedule, SteppedAlpha
from measure import compiles

# torch's own: its partitioner imports torch.jit, and a reentrant checkpoint in another sees no gradient at first
partitions = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method. is deprecated:DeprecationWarning")
nests = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")


Stateful = Schedule | CenterLoss | LSoftmaxLinear | GaussianMixtureHead


class Loss(nn.Module):
    """A loss of features and target that has state: a head with its loss, a schedule as the weight of a penalty, or a loss itself."""

    stateful: Stateful

    def __init__(self, stateful: Stateful) -> None:
        super().__init__()
        self.stateful, self.criterion = stateful, LargeMarginCrossEntropyLoss(backend="reference")

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        if isinstance(self.stateful, Schedule):
            return self.stateful().to(features.dtype) * features.sin().square().sum()
        if isinstance(self.stateful, CenterLoss):
            return self.stateful(features.sin(), target)
        return self.criterion(self.stateful(features.sin(), target), target)


MAKERS: dict[str, Callable[[], Stateful]] = {
    "center": lambda: CenterLoss(8, 5),
    "lsoftmax": lambda: LSoftmaxLinear(8, 5, schedule=AnnealedLambda(2, 0.3, 1)),
    "gaussian_mixture": lambda: GaussianMixtureHead(8, 5, alpha=SteppedAlpha(every=1)),
    "gaussian_mixture_diagonal": lambda: GaussianMixtureHead(8, 5, covariance="diagonal", alpha=GradualWeight(7)),
    "annealed": lambda: AnnealedLambda(2, 0.3, 1),
    "stepped": lambda: SteppedAlpha(every=1),
    "gradual": lambda: GradualWeight(7, 1.0, 3.0),
}
REFUSED = "this is, or may be, a recomputation of another pass"
OTHER_MODE = "do not change the mode of a module"
REFUSED_WRITE = "writes the buffers of its module in place, which torch refuses here"
each_loss = pytest.mark.parametrize("name", MAKERS)
some_slow = pytest.mark.parametrize(
    "name", [name if name in ("center", "gradual") else pytest.param(name, marks=pytest.mark.slow) for name in MAKERS]
)
both_ways = every("use_reentrant", [True, False])


def made(name: str) -> Loss:
    torch.manual_seed(3)
    return Loss(MAKERS[name]())


def batches(num: int = 3) -> list[tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(0)
    return [(torch.randn(6, 8, generator=rng), torch.arange(6) % 5) for _ in range(num)]


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_state(module: nn.Module, expected: dict[str, Tensor], atol: float = 0.0) -> None:
    torch.testing.assert_close(module.state_dict(), expected, rtol=0.0, atol=atol)


def gradient(loss: nn.Module, features: Tensor, target: Tensor) -> Tensor:
    leaf = features.clone().requires_grad_()
    loss(leaf, target).backward()  # not autograd.grad, which reentrant checkpoints refuse
    assert leaf.grad is not None
    return leaf.grad


def assert_untouched(loss: Loss) -> None:
    """The module can be saved and still computes."""
    torch.save(loss, io.BytesIO())
    assert all(type(buffer) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(buffer) for buffer in loss.buffers())
    assert gradient(loss, *batches(1)[0]).isfinite().all()


def test_the_table_has_every_schedule():
    assert {type(module) for loss in map(made, MAKERS) for module in loss.modules()} >= set(Schedule.__subclasses__())


# written in place


@each_loss
def test_a_module_keeps_its_buffers_and_moves_them(name):
    loss = made(name)
    before, tensors = state(loss), {key: (buffer, buffer.data_ptr()) for key, buffer in loss.named_buffers()}
    for features, target in batches():
        loss(features, target).isfinite()
    for key, buffer in loss.named_buffers():
        assert (buffer, buffer.data_ptr()) == (tensors[key][0], tensors[key][1]) and buffer is tensors[key][0]
    assert any(not torch.equal(value, before[key]) for key, value in loss.state_dict().items())


def test_checkpoints_have_the_names_they_always_had():
    assert list(MAKERS["center"]().state_dict()) == ["centers"]
    assert list(MAKERS["gradual"]().state_dict()) == ["step"]
    assert list(MAKERS["lsoftmax"]().state_dict()) == ["weight", "schedule.step"]
    assert list(MAKERS["gaussian_mixture"]().state_dict()) == ["means", "alpha.step"]


@each_loss
def test_reset_writes_in_place(name):
    loss = made(name)
    pointers = [buffer.data_ptr() for buffer in loss.buffers()]
    loss(*batches(1)[0])
    (loss.stateful.reset if isinstance(loss.stateful, Schedule) else loss.stateful.reset_parameters)()
    assert [buffer.data_ptr() for buffer in loss.buffers()] == pointers
    assert all(not buffer for key, buffer in loss.named_buffers() if key.endswith("step"))


@each_loss
def test_a_module_without_data_takes_a_checkpoint_by_assignment(name):
    with torch.device("meta"):
        loss = made(name)
    expected = made(name)
    loss.load_state_dict(state(expected), assign=True)
    torch.testing.assert_close(gradient(loss, *batches(1)[0]), gradient(expected, *batches(1)[0]), rtol=0, atol=0)
    assert_same_state(loss, state(expected))


def test_center_loss_takes_centers_of_another_dtype_by_assignment():
    center, expected = CenterLoss(8, 5), CenterLoss(8, 5).bfloat16()
    center.load_state_dict(state(expected), assign=True)
    torch.testing.assert_close(gradient(center, *batches(1)[0]), gradient(expected, *batches(1)[0]), rtol=0, atol=0)
    assert_same_state(center, state(expected))


def test_center_loss_takes_centers_assigned_by_hand_and_states_of_older_versions():
    center, expected = CenterLoss(8, 5), CenterLoss(8, 5).bfloat16()
    del center._seen
    center = pickle.loads(pickle.dumps(center))
    for same in (center, CenterLoss(8, 5)):
        same.centers = expected.centers.clone()
        duplicate = copy.deepcopy(expected)
        torch.testing.assert_close(gradient(same, *batches(1)[0]), gradient(duplicate, *batches(1)[0]), rtol=0, atol=0)
        assert_same_state(same, state(duplicate))
    center.centers = torch.zeros(4, 8)
    with pytest.raises(ValueError, match=r"centers must have shape .*\(5, 8\), got float32 of shape \(4, 8\)"):
        center(*batches(1)[0])


def test_what_torch_func_is_no_cause_of_is_torchs_error():
    center = CenterLoss(8, 5)
    center.centers = center.centers.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"^a leaf Variable that requires grad"):
        center(*batches(1)[0])


@each_loss
def test_after_a_forward_pass_in_inference_mode_a_checkpoint_loads_and_training_goes_on(name):
    loss, expected = made(name), made(name)
    saved = state(loss)
    with torch.inference_mode():
        loss(*batches(1)[0])
    loss.load_state_dict(saved)
    torch.testing.assert_close(gradient(loss, *batches(1)[0]), gradient(expected, *batches(1)[0]), rtol=0, atol=0)
    assert_same_state(loss, state(expected))


@each_loss
def test_a_module_made_in_inference_mode_refuses_to_train_outside_at_once(name):
    with torch.inference_mode():
        loss = made(name)
    before = state(loss)
    with torch.no_grad(), pytest.raises(RuntimeError, match=REFUSED_WRITE):
        loss(*batches(1)[0])
    assert_same_state(loss, before)


def samples(name: str) -> tuple[Loss, Tensor, Tensor]:
    loss, (features, target) = made(name), batches(1)[0]
    return loss, features.unsqueeze(1), target.unsqueeze(1)


@each_loss
@every("transform", [lambda f: vmap(grad(f)), lambda f: vmap(f, randomness="different"), grad])
def test_transforms_of_a_training_module_are_right_or_refused_at_once(name, transform):
    loss, features, target = samples(name)
    before = state(loss)
    try:
        transform(loss)(*(features, target) if transform is not grad else (features[0], target[0]))
    except RuntimeError as error:
        assert REFUSED_WRITE in str(error)
        assert_same_state(loss, before)
    assert_untouched(loss)


@each_loss
def test_per_sample_gradients_in_eval_mode(name):
    loss, features, target = samples(name)
    loss.eval()
    result = vmap(grad(loss))(features, target)
    for i in range(len(features)):
        torch.testing.assert_close(result[i], gradient(loss, features[i], target[i]), rtol=1e-5, atol=1e-6)


@each_loss
def test_a_transform_that_gets_all_buffers_moves_those(name):
    loss, expected = made(name), made(name)
    (features, target) = batches(1)[0]
    buffers = {key: buffer.clone() for key, buffer in loss.named_buffers()}
    before = state(loss)
    result = grad(lambda features, buffers: functional_call(loss, buffers, (features, target)))(features, buffers)
    torch.testing.assert_close(result, gradient(expected, features, target), rtol=1e-5, atol=1e-6)
    assert_same_state(loss, before)
    for key, value in expected.state_dict().items():
        assert key not in buffers or torch.equal(buffers[key], value)


@each_loss
def test_fake_tensors_do_not_stay_in_a_real_module(name):
    loss, (features, target) = made(name), batches(1)[0]
    before = state(loss)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        result = loss(mode.from_tensor(features), mode.from_tensor(target))
    assert isinstance(result, FakeTensor) and not any(isinstance(buffer, FakeTensor) for buffer in loss.buffers())
    assert_same_state(loss, before)
    assert_untouched(loss)


@each_loss
def test_copies_have_state_of_their_own(name):
    loss = made(name)
    loss(*batches(1)[0])
    before, duplicate = state(loss), copy.deepcopy(loss)
    gradient(duplicate, *batches(1)[0])
    assert_same_state(loss, before)


# compiled

# inductor's way with a joint graph, without its code: buffers are written within the forward graph, cheap values recomputed
partitioner = aot_autograd(
    fw_compiler=nop,
    partition_fn=min_cut_rematerialization_partition,
    decompositions=core_aten_decompositions,
    keep_inference_input_mutations=True,
)


def assert_compiled_is_eager(name: str, backend: Callable | str) -> None:
    torch._dynamo.reset()
    loss, expected = made(name), made(name)
    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    pointers = [buffer.data_ptr() for buffer in loss.buffers()]
    for features, target in batches(3):
        truth = gradient(expected, features, target)
        torch.testing.assert_close(gradient(compiled, features, target), truth, rtol=0.0, atol=1e-6 * max(1.0, truth.abs().max().item()))
        assert_same_state(loss, state(expected), atol=1e-6)
        assert [buffer.data_ptr() for buffer in loss.buffers()] == pointers


# the schedules of these are in others, too
PARTS = ("gaussian_mixture", "annealed")


@compiles
@partitions
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in PARTS else []) for name in MAKERS])
def test_three_partitioned_steps_have_the_gradients_of_eager_ones(name):
    assert_compiled_is_eager(name, partitioner)


@compiles
@partitions
@some_slow
@pytest.mark.parametrize("options", [{"activation_memory_budget": 0.0}, {"aggressive_recomputation": True}], ids=str)
def test_a_partitioner_that_recomputes_more_recomputes_no_state(name, options):
    with functorch_config.patch(options):
        assert_compiled_is_eager(name, partitioner)


@compiles
@partitions
@pytest.mark.parametrize("name", ["gradual", *(pytest.param(name, marks=pytest.mark.slow) for name in MAKERS if name != "gradual")])
def test_three_compiled_steps_have_the_gradients_of_eager_ones(name):
    assert_compiled_is_eager(name, "inductor")


@compiles
@partitions
def test_the_partitioner_recomputes_a_plain_buffer_from_what_it_is_then():
    """What the operator is for; where this test fails, torch has mended it."""

    class Plain(nn.Module):
        step: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("step", torch.zeros(()))

        def forward(self, features: Tensor) -> Tensor:
            self.step.add_(1)
            return (features * torch.exp(-self.step)).sin().sum()

    torch._dynamo.reset()
    loss, expected = Plain(), Plain()
    compiled = torch.compile(loss, backend=partitioner, fullgraph=True)
    one, other = ((lambda features, _, loss=loss: loss(features)) for loss in (compiled, expected))
    features, target = batches(1)[0]
    assert (gradient(one, features, target) - gradient(other, features, target)).abs().max() > 0.01


@compiles
@partitions
@some_slow
@pytest.mark.parametrize("is_compiled", [False, True])
def test_several_forward_passes_may_wait_where_nothing_is_recomputed(name, is_compiled):
    torch._dynamo.reset()
    loss, expected = made(name), made(name)
    step = torch.compile(loss, backend=partitioner, fullgraph=True) if is_compiled else loss
    leaves = [features.clone().requires_grad_() for features, _ in batches(3)]
    torch.stack([step(leaf, target) for leaf, (_, target) in zip(leaves, batches(3), strict=True)]).sum().backward()
    for leaf, batch in zip(leaves, batches(3), strict=True):
        torch.testing.assert_close(leaf.grad, gradient(expected, *batch), rtol=0, atol=1e-6)


def test_the_operator_keeps_torchs_rules():
    module = GradualWeight(7, 1.0, 3.0)
    module()
    arguments = module.step, [module.step + 1, torch.ones(3)], [module.step, torch.zeros(3)]
    torch.library.opcheck(torch.ops.largemargin.first_or_again.default, arguments, test_utils=("test_schema", "test_faketensor"))
    first, again = torch.ops.largemargin.first_or_again(*arguments), arguments[2]
    assert first[0] == 2 and first[1].data_ptr() != arguments[1][1].data_ptr() and again[0] == 1
    assert torch.Tag.cudagraph_unsafe in torch.ops.largemargin.first_or_again.default.tags


@each_loss
def test_exported_programs_hold_no_operator_of_ours_can_be_saved_and_move_their_state(name):
    loss, expected = made(name), made(name)
    (features, target), *_ = batches()
    program = torch.export.export(loss, (features, target))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in names if "first_or_again" in name]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    module = torch.export.load(file).module()
    for features, target in batches():
        torch.testing.assert_close(module(features, target), expected(features, target), rtol=1e-6, atol=1e-6)


# recomputed


def checkpointed(loss: nn.Module, use_reentrant: bool):
    return lambda features, target: checkpoint(loss, features, target, use_reentrant=use_reentrant)


def test_the_gradient_of_a_checkpointed_center_loss_is_of_the_centers_before():
    for use_reentrant in (True, False):
        torch.manual_seed(0)
        features, target, center = torch.randn(6, 8), torch.arange(6) % 5, CenterLoss(8, 5)
        truth = (features - center.centers[target]) / 6
        torch.testing.assert_close(gradient(checkpointed(center, use_reentrant), features, target), truth, rtol=0, atol=1e-7)


def assert_steps_equal(loss: nn.Module, expected: nn.Module, of_step, **tolerance) -> None:
    for features, target in batches(4):
        torch.testing.assert_close(of_step(features, target), gradient(expected, features, target), **tolerance or {"rtol": 0, "atol": 0})
        assert_same_state(loss, state(expected), tolerance.get("atol", 0.0))


@each_loss
@both_ways
def test_a_checkpointed_loss_has_the_gradients_and_the_state_of_a_plain_one(name, use_reentrant):
    loss, expected = made(name), made(name)
    assert_steps_equal(loss, expected, lambda *batch: gradient(checkpointed(loss, use_reentrant), *batch))


@each_loss
@every("implementation", CheckpointImpl)
def test_a_wrapped_loss_has_the_gradients_and_the_state_of_a_plain_one(name, implementation):
    loss, expected = made(name), made(name)
    wrapped = checkpoint_wrapper(loss, checkpoint_impl=implementation)
    assert_steps_equal(loss, expected, lambda *batch: gradient(wrapped, *batch))


@nests
@each_loss
@every("inner", [True, False])
@both_ways
def test_nested_checkpoints(name, use_reentrant, inner):
    loss, expected = made(name), made(name)

    def outer(features: Tensor, target: Tensor) -> Tensor:
        return checkpoint(lambda *batch: checkpointed(loss, inner)(batch[0] * 1, batch[1]), features, target, use_reentrant=use_reentrant)

    assert_steps_equal(loss, expected, lambda *batch: gradient(outer, *batch))


@each_loss
@both_ways
def test_plain_and_checkpointed_steps_and_evaluation_in_turn(name, use_reentrant):
    loss, expected = made(name), made(name)
    for index, batch in enumerate(batches(6)):
        if index % 3 == 1:  # a pass without a backward pass counts, as ever
            with torch.no_grad():
                assert torch.equal(loss(*batch), expected(*batch))
        if index % 3 == 2:
            assert torch.equal(loss.eval()(*batch), expected.eval()(*batch))
            loss.train(), expected.train()
        of = checkpointed(loss, use_reentrant) if index % 2 else loss
        torch.testing.assert_close(gradient(of, *batch), gradient(expected, *batch), rtol=0, atol=0)
        assert_same_state(loss, state(expected))


@each_loss
@both_ways
def test_a_graph_that_is_kept_is_recomputed_again(name, use_reentrant):
    loss, expected = made(name), made(name)
    features, target = batches(1)[0]
    leaf = features.clone().requires_grad_()
    result = checkpointed(loss, use_reentrant)(leaf, target)
    truth = gradient(expected, features, target)
    for _ in range(2):
        leaf.grad = None
        result.backward(retain_graph=True)
        torch.testing.assert_close(leaf.grad, truth, rtol=0, atol=0)
    assert_same_state(loss, state(expected))


@each_loss
@both_ways
@every("order", [(0, 1), (1, 0), (0,)])
def test_of_several_passes_that_wait_only_the_last_is_recomputed(name, use_reentrant, order):
    """The last is right, an earlier one refused: never a wrong gradient."""
    loss, expected = made(name), made(name)
    leaves, results, truths = [], [], []
    for features, target in batches(2):
        leaves.append(features.clone().requires_grad_())
        results.append(checkpointed(loss, use_reentrant)(leaves[-1], target))
        truths.append(gradient(expected, features, target))
    for index in order:
        if index == 1:
            results[index].backward()
            torch.testing.assert_close(leaves[index].grad, truths[index], rtol=0, atol=0)
        else:
            with pytest.raises(RuntimeError, match=REFUSED):
                results[index].backward()
    assert_same_state(loss, state(expected))


@each_loss
@both_ways
@every("between", ["no_grad", "inference_mode", "grad"])
def test_a_pass_without_backward_in_between_is_noticed(name, use_reentrant, between):
    loss, (features, target) = made(name), batches(1)[0]
    result = checkpointed(loss, use_reentrant)(features.clone().requires_grad_(), target)
    with {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "grad": torch.enable_grad}[between]():
        loss(features, target)
    with pytest.raises(RuntimeError, match=REFUSED):
        result.backward()


@both_ways
@pytest.mark.parametrize("name", ["center", "gradual"])
def test_a_recomputation_in_evaluation_mode_is_right_or_refused(name, use_reentrant):
    loss, ((one, target), (other, _)) = made(name), batches(2)
    trained = checkpointed(loss, use_reentrant)(one.clone().requires_grad_(), target)
    with pytest.raises(RuntimeError, match=OTHER_MODE):
        loss.eval(), trained.backward()
    with torch.no_grad():
        loss(one, target)
    leaves = [features.clone().requires_grad_() for features in (one, other)]
    evaluated = [checkpointed(loss, use_reentrant)(leaf, target) for leaf in leaves]
    with pytest.raises(RuntimeError, match=OTHER_MODE):
        trained.backward()
    with pytest.raises(RuntimeError, match=OTHER_MODE):
        loss.train(), evaluated[0].backward()
    loss.eval()
    truths = [gradient(loss, leaf.detach(), target) for leaf in leaves]
    leaves[0].grad = None
    evaluated[0].backward()
    torch.testing.assert_close(leaves[0].grad, truths[0], rtol=0, atol=0)
    loss.train()(one, target)
    with pytest.raises(RuntimeError, match=OTHER_MODE):
        loss.eval(), evaluated[1].backward()


@each_loss
@both_ways
def test_two_checkpointed_calls_in_one_graph_are_refused(name, use_reentrant):
    loss, ((one, target), (other, _)) = made(name), batches(2)
    leaf = one.clone().requires_grad_()
    part = checkpointed(loss, use_reentrant)
    with pytest.raises(RuntimeError, match=REFUSED):
        (part(leaf, target) + part(leaf + other, target)).backward()


@each_loss
@both_ways
def test_two_calls_in_one_checkpoint_are_refused(name, use_reentrant):
    loss, (features, target) = made(name), batches(1)[0]
    part = checkpointed(lambda features, target: loss(features, target) + loss(2 * features, target), use_reentrant)
    with pytest.raises(RuntimeError, match="the checkpointed part calls the module twice"):
        part(features.clone().requires_grad_(), target).backward()


@each_loss
@both_ways
@every("which", ["forward", "backward"])
def test_passes_in_a_thread_of_their_own(name, use_reentrant, which):
    loss, expected, (features, target) = made(name), made(name), batches(1)[0]
    leaf = features.clone().requires_grad_()
    with ThreadPoolExecutor(1) as thread:
        if which == "forward":
            thread.submit(checkpointed(loss, use_reentrant), leaf, target).result().backward()
        else:
            thread.submit(checkpointed(loss, use_reentrant)(leaf, target).backward).result()
    torch.testing.assert_close(leaf.grad, gradient(expected, features, target), rtol=0, atol=0)


@each_loss
@both_ways
def test_a_pass_in_another_thread_is_noticed(name, use_reentrant):
    loss, (features, target) = made(name), batches(1)[0]
    result = checkpointed(loss, use_reentrant)(features.clone().requires_grad_(), target)
    with ThreadPoolExecutor(1) as thread:  # its nodes have low numbers
        thread.submit(loss, features.clone().requires_grad_(), target).result()
    with pytest.raises(RuntimeError, match=REFUSED):
        result.backward()


@each_loss
def test_a_first_forward_pass_within_a_backward_pass_is_refused(name):
    loss, (features, target) = made(name), batches(1)[0]
    leaf = features.clone().requires_grad_()
    leaf.register_hook(lambda _: loss(features, target))
    with pytest.raises(RuntimeError, match="no forward pass with these buffers came before it"):
        leaf.sum().backward()


def test_compiled_autograd_refuses_what_it_cannot_tell_apart():
    torch._dynamo.reset()
    with compiled_autograd._enable(torch.compile(backend="eager")), pytest.raises(RuntimeError, match="compiled autograd does not say"):
        gradient(checkpointed(made("gradual"), False), *batches(1)[0])


@each_loss
@every("early_stop", [True, False])
def test_options_of_checkpoints(name, early_stop):
    loss, expected = made(name), made(name)

    def of_step(features: Tensor, target: Tensor) -> Tensor:
        with set_checkpoint_early_stop(early_stop):
            context_fn = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
            options = {} if early_stop else {"context_fn": context_fn}
            return checkpoint(loss, features, target, use_reentrant=False, preserve_rng_state=False, **options)

    assert_steps_equal(loss, expected, lambda *batch: gradient(of_step, *batch))


@both_ways
def test_accumulated_gradients_with_a_backward_pass_each(use_reentrant):
    loss, expected = made("center"), made("center")
    total = torch.zeros(6, 8)
    for features, target in batches(4):
        total += gradient(checkpointed(loss, use_reentrant), features, target)
    torch.testing.assert_close(total, sum(gradient(expected, *batch) for batch in batches(4)), rtol=0, atol=1e-7)


@each_loss
@both_ways
def test_a_whole_network_is_checkpointed_with_its_loss(name, use_reentrant):
    networks = [nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 8)) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    losses = made(name), made(name)
    for seed, (features, target) in enumerate(batches(3)):
        for network, loss, reentrant in zip(networks, losses, (use_reentrant, None), strict=True):
            torch.manual_seed(seed)
            leaf = features.clone().requires_grad_()
            if reentrant is None:
                result = loss(network(leaf), target)
            else:
                result = checkpoint(lambda x, y, network=network, loss=loss: loss(network(x), y), leaf, target, use_reentrant=reentrant)
            network.zero_grad()
            result.backward()
        for one, other in zip(*(network.parameters() for network in networks), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0)
    assert_same_state(losses[0], state(losses[1]))


@compiles
@partitions
@some_slow
@both_ways
def test_compiled_code_that_is_checkpointed(name, use_reentrant):
    torch._dynamo.reset()
    loss, expected = made(name), made(name)
    compiled = torch.compile(loss, backend=partitioner, fullgraph=True)
    assert_steps_equal(loss, expected, lambda *batch: gradient(checkpointed(compiled, use_reentrant), *batch), rtol=0.0, atol=1e-6)
    leaf, target = batches(1)[0][0].clone().requires_grad_(), batches(1)[0][1]
    waits = [checkpointed(compiled, use_reentrant)(leaf, target) for _ in range(2)]
    with pytest.raises(RuntimeError, match=REFUSED):
        waits[0].backward()


@compiles
@partitions
@some_slow
def test_checkpoints_within_compiled_code(name):
    torch._dynamo.reset()
    loss, expected = made(name), made(name)
    compiled = torch.compile(checkpointed(loss, False), backend=partitioner)
    assert_steps_equal(loss, expected, lambda *batch: gradient(compiled, *batch), rtol=0.0, atol=1e-6)


def test_nothing_is_remembered_of_a_module_that_is_gone():
    loss = made("gradual")
    loss(*batches(1)[0])
    gone = weakref.ref(loss.stateful.step)
    size = len(_state._last)
    del loss
    assert gone() is None and len(_state._last) == size - 1


@every("use_reentrant", [False, True])
@every(
    "head",
    [
        LSoftmaxLinear(4, 3, schedule=AnnealedLambda(10.0, 0.1, 1.0)),
        GaussianMixtureHead(4, 3, alpha=SteppedAlpha()),
    ],
)
def test_a_scheduled_head_is_not_recomputed_in_another_mode(head, use_reentrant):
    features, target = torch.randn(5, 4, requires_grad=True), torch.tensor([0, 1, 2, 0, 1])
    head.train()
    loss = checkpoint(lambda x: head(x, target).square().sum(), features, use_reentrant=use_reentrant)
    head.eval()
    with pytest.raises(RuntimeError, match="in another mode"):
        loss.backward()


@every(
    "renew",
    [Schedule.reset, lambda schedule: schedule.load_state_dict(AnnealedLambda(10.0, 1.0, 1.0).state_dict())],
)
def test_a_schedule_with_another_state_cannot_recompute_what_it_said_before(renew):
    schedule, x = AnnealedLambda(10.0, 1.0, 1.0), torch.ones((), requires_grad=True)
    loss = checkpoint(lambda z: schedule() * z * z, x, use_reentrant=False)
    renew(schedule)
    with pytest.raises(RuntimeError, match="no forward pass with these buffers came before it"):
        loss.backward()


@each_loss
def test_a_trained_module_takes_a_checkpoint_by_swapping_tensors(name):
    loss, expected = made(name), made(name)
    gradient(loss, *batches(1)[0])
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        loss.load_state_dict(state(expected))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    torch.testing.assert_close(gradient(loss, *batches(1)[0]), gradient(expected, *batches(1)[0]), rtol=0, atol=0)


def test_a_schedule_says_nothing_in_plain_code(caplog):
    AnnealedLambda(10.0, 1.0, 1.0)()
    assert not caplog.records
