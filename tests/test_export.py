"""The losses in programs: traced, exported, saved, and loaded where nothing but the package has been imported."""

import copy
import inspect
import json
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import largemargin
from combinations import every
from largemargin import (
    CrammerSingerHingeLoss,
    HardMarginSoftplusLoss,
    LargeMarginCrossEntropyLoss,
    LargeMarginInSoftmaxLoss,
    LinearLargeMarginCrossEntropyLoss,
    MulticlassHingeLoss,
    crammer_singer_hinge,
    hard_margin_softplus,
    heads,
    large_margin_cross_entropy,
    linear_large_margin_cross_entropy,
    metrics,
    multiclass_hinge,
    row_stats,
)
from largemargin.schedules import GradualWeight
from registry import HEADS
from row_losses import OTHERS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # of shapes that are compared, which is meant
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # torch's own exporter
]
WIDTH, CLASSES = 8, 5
WEIGHT = torch.linspace(0.5, 1.5, CLASSES)


class OfFunction(nn.Module):
    """A function of logits and targets as a criterion."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return self.function(input, target)


def statistics(input: Tensor, target: Tensor) -> Tensor:
    stats = row_stats(input, target)
    return (stats.log_odds * stats.rho + stats.neg_entropy.sin() - stats.mean_log_q + stats.spread).sum()


def of_features(input: Tensor, target: Tensor) -> Tensor:
    classifier = torch.linspace(-1, 1, CLASSES * CLASSES).reshape(CLASSES, CLASSES)
    return linear_large_margin_cross_entropy(input, classifier, target)


FUNCTIONS = [value for value in (getattr(largemargin, name) for name in largemargin.__all__) if inspect.isfunction(value)]
METRICS = [
    value
    for name, value in vars(metrics).items()
    if inspect.isfunction(value) and value.__module__ == metrics.__name__ and name != "as_torchmetric" and not name.startswith("_")
]
CRITERIA: dict[str, nn.Module] = {
    "large_margin": LargeMarginCrossEntropyLoss(),
    "weighted": LargeMarginCrossEntropyLoss(WEIGHT, divergence="kl_uq", hard_bias=1.0, label_smoothing=0.1),
    "sum": LargeMarginCrossEntropyLoss(reduction="sum", divergence="kl_qu", label_smoothing=0.1),
    "author": LargeMarginInSoftmaxLoss(0.3, True),
    "hinge": MulticlassHingeLoss(WEIGHT),
    "crammer_singer": CrammerSingerHingeLoss(),
    "hard_margin": HardMarginSoftplusLoss(),
    "linear": LinearLargeMarginCrossEntropyLoss(CLASSES, CLASSES),
    "function": OfFunction(large_margin_cross_entropy),
    "function_hinge": OfFunction(multiclass_hinge),
    "function_crammer_singer": OfFunction(crammer_singer_hinge),
    "function_hard_margin": OfFunction(hard_margin_softplus),
    "function_linear": OfFunction(of_features),
    "row_stats": OfFunction(statistics),
}
each_criterion = pytest.mark.parametrize("name", CRITERIA)


def slow_but(*quick: str) -> list[Any]:
    """All criteria; ``make test`` has those without which a way through the tracer would be left out."""
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in CRITERIA]


class Model(nn.Module):
    """A network that computes its own loss."""

    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.network = nn.Linear(WIDTH, CLASSES)
        self.criterion = criterion

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        return self.criterion(self.network(features), target)


def batch(rows: int, probabilities: bool = False) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(rows)
    features = torch.randn(rows, WIDTH, generator=rng)
    if probabilities:
        return features, torch.rand(rows, CLASSES, generator=rng).softmax(-1)
    target = torch.arange(rows) % CLASSES
    target[1] = -100
    return features, target


def model(name: str) -> Model:
    torch.manual_seed(0)
    return Model(CRITERIA[name])


def assert_same(program: Callable[..., Tensor], model: Model, rows: int, probabilities: bool = False) -> None:
    """The program has the value and the gradients of the model."""
    inputs = batch(rows, probabilities)
    torch.testing.assert_close(program(*inputs), model(*inputs), rtol=1e-5, atol=1e-6)
    found = []
    for function in (program, model):
        features = inputs[0].clone().requires_grad_()
        found.append(torch.autograd.grad(function(features, inputs[1]), features)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def operators(graph: torch.fx.Graph) -> set[str]:
    return {str(node.target).split(".")[0] for node in graph.nodes if node.op == "call_function"}


# torch.fx


@each_criterion
def test_symbolic_trace_keeps_the_loss_as_one_node(name):
    traced = torch.fx.symbolic_trace(model(name))
    assert_same(traced, model(name), 6)
    ours = [node for node in traced.graph.nodes if node.op == "call_function" and node.target.__module__.startswith("largemargin")]
    assert len(ours) == 1


class Measures(nn.Module):
    """A loss with a schedule and a penalty, and what is measured beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.schedule = nn.Linear(WIDTH, CLASSES), GradualWeight(4, 1.0, 3.0)

    def forward(self, features: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        logits, weight = self.network(features), self.network.weight
        measured = [measure(logits, target) for measure in (metrics.margin, metrics.topk_error, metrics.ece)]
        return self.schedule() * heads.super_symmetry_penalty(weight), metrics.super_symmetry(weight), *measured


def test_symbolic_trace_keeps_schedules_penalties_and_metrics_as_calls():
    model = Measures()
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    for _ in range(2):
        torch.testing.assert_close(traced(*batch(6)), model(*batch(6)), rtol=0, atol=0)
    assert traced.state_dict()["schedule.step"] == 2


def test_a_traced_model_can_be_transformed_and_pickled(tmp_path):
    traced = torch.fx.symbolic_trace(model("weighted"))
    torch.fx.Transformer(traced).transform()
    torch.save(traced, tmp_path / "traced.pt")
    assert_same(torch.load(tmp_path / "traced.pt", weights_only=False), model("weighted"), 6)


# torch.jit


@each_criterion
def test_a_saved_trace_computes_for_other_batches(name, tmp_path):
    traced = torch.jit.trace(model(name), batch(6))
    torch.jit.save(traced, tmp_path / "traced.pt")
    loaded = torch.jit.load(tmp_path / "traced.pt")
    for rows in (6, 4):
        assert_same(loaded, model(name), rows)


def test_a_trace_of_probabilities_computes_for_other_batches(tmp_path):
    traced = torch.jit.trace(model("weighted"), batch(6, probabilities=True))
    torch.jit.save(traced, tmp_path / "traced.pt")
    for rows in (6, 4):
        assert_same(torch.jit.load(tmp_path / "traced.pt"), model("weighted"), rows, probabilities=True)


@every("name", [name for name, criterion in CRITERIA.items() if not isinstance(criterion, OfFunction)])
def test_script_of_a_criterion_is_refused_and_told_of_export(name):
    for scripted in (CRITERIA[name], model(name)):
        with pytest.raises(NotImplementedError, match=r"torch\.jit\.script.*torch\.export"):
            torch.jit.script(scripted)


@every("function", [*FUNCTIONS, *METRICS, heads.super_symmetry_penalty])
def test_script_of_a_function_is_refused_and_told_of_export(function):
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.script.*torch\.export"):
        torch.jit.script(function)


# torch.export


def test_every_other_row_loss_is_exported_with_its_gradient():
    for case in OTHERS:
        counts = {name: value.float() for name, value in case.of_classes(CLASSES).items()}
        torch.manual_seed(0)
        whole = Model(case.module(**counts, **case.options, lam=0.3))
        rows = torch.export.Dim("rows", min=3, max=64)
        program = torch.export.export(whole, batch(6), dynamic_shapes=({0: rows}, {0: rows}))
        assert operators(program.graph) <= {"aten", "<built-in function getitem>"}
        for num_rows in (6, 4):
            assert_same(program.module(), whole, num_rows)


def exported(name: str, strict: bool) -> torch.export.ExportedProgram:
    rows = torch.export.Dim("rows", min=3, max=64)
    return torch.export.export(model(name), batch(6), dynamic_shapes=({0: rows}, {0: rows}), strict=strict)


def assert_of_aten_only(name: str, strict: bool, path: Path) -> None:
    """As the program of a loss that was exported, saved and loaded."""
    program = exported(name, strict)
    assert operators(program.graph) <= {"aten", "<built-in function getitem>"}
    torch.export.save(program, path)
    loaded = torch.export.load(path)
    for num_rows in (6, 4):
        assert_same(loaded.module(), model(name), num_rows)


@pytest.mark.parametrize("name", slow_but(*(name for name in CRITERIA if name == "function_linear" or not name.startswith("function"))))
def test_exported_programs_hold_operations_of_aten_only(name, tmp_path):
    assert_of_aten_only(name, False, tmp_path / "program.pt2")


@pytest.mark.parametrize("name", slow_but("large_margin", "hinge", "linear", "function_linear", "row_stats"))
def test_programs_of_strict_export_hold_operations_of_aten_only(name, tmp_path):
    assert_of_aten_only(name, True, tmp_path / "program.pt2")


@pytest.mark.parametrize("name", slow_but("weighted", "crammer_singer", "row_stats"))
def test_decompositions_of_exported_programs_hold_operations_of_aten_only(name):
    assert operators(exported(name, False).run_decompositions().graph) <= {"aten"}


@pytest.mark.parametrize("name", ["large_margin", "weighted"])
def test_exported_programs_take_probabilities(name):
    program = torch.export.export(model(name), batch(6, probabilities=True))
    assert operators(program.graph) <= {"aten"}
    assert_same(program.module(), model(name), 6, probabilities=True)


def in_a_new_process(code: str, *arguments: object) -> str:
    result = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


AFTER_IMPORTS = """
import json, sys
{imports}
told = {{"operator": str(torch.ops.largemargin.row_stats.default), "imported": [m for m in ("sympy", "torch._dynamo") if m in sys.modules]}}
inputs = torch.load(sys.argv[1])
told["losses"] = [torch.export.load(path).module()(*inputs).item() for path in sys.argv[2:]]
print(json.dumps(told))
"""
ORDERS = ["import largemargin\nimport torch", "import torch\nimport largemargin", "from largemargin import row_stats\nimport torch"]


class WithOperator(nn.Module):
    """What exported programs held before: the operator of the kernels."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return torch.ops.largemargin.row_stats(input, target)[0].sum()


INPUTS = torch.linspace(-2, 3, 6 * CLASSES).sin().reshape(6, CLASSES), torch.arange(6) % CLASSES
PROGRAMS = (LargeMarginCrossEntropyLoss(), WithOperator())


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> list[Path]:
    """Inputs, and programs of aten and of the operator."""
    folder = tmp_path_factory.mktemp("saved")
    paths = [folder / name for name in ("inputs.pt", "aten.pt2", "operator.pt2")]
    torch.save(INPUTS, paths[0])
    for module, path in zip(PROGRAMS, paths[1:], strict=True):
        program = torch.export.export(module, INPUTS)
        assert ("largemargin" in operators(program.graph)) == isinstance(module, WithOperator)
        torch.export.save(program, path)
    return paths


@pytest.fixture(scope="module")
def told(request, saved) -> dict[str, Any]:
    """What a new process tells after these imports, and the losses of the programs if it loads them, which takes longer."""
    imports, loads = request.param
    found: dict[str, Any] = json.loads(in_a_new_process(AFTER_IMPORTS.format(imports=imports), *(saved if loads else saved[:1])))
    return found


FIRST, *LATER = ORDERS


@pytest.mark.xdist_group("orders of imports")
@pytest.mark.parametrize("told", [(FIRST, True), *(pytest.param((order, True), marks=pytest.mark.slow) for order in LATER)], indirect=True)
def test_saved_programs_load_after_the_import_of_the_package_alone(told):
    assert told["losses"] == [pytest.approx(module(*INPUTS).item(), rel=1e-6) for module in PROGRAMS]


@pytest.mark.xdist_group("orders of imports")
@pytest.mark.parametrize("told", [(FIRST, True), *((order, False) for order in LATER)], indirect=True)
def test_the_operators_are_registered_without_sympy_and_the_compiler(told):
    assert (told["operator"], told["imported"]) == ("largemargin.row_stats.default", [])


MODULES = sorted(
    module.name for module in pkgutil.iter_modules(largemargin.__path__) if module.name not in ("lab", "integrations", "__main__")
)


EACH = [*MODULES, "backends.cpu", "backends.ladder", "backends.compiled", "heads.center"]
QUICK = ("rowstats", "losses", "backends.cpu")  # each is a process that imports torch


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in EACH])
def test_every_module_can_be_the_first_to_import_torch(name):
    code = f"import largemargin.{name}, sys, torch\nprint(torch.ops.largemargin.row_stats.default)"
    assert in_a_new_process(code) == "largemargin.row_stats.default"


def test_a_machine_without_torch_can_still_import_the_package():
    code = "import sys, largemargin\nsys.modules['torch'] = None\nprint(largemargin.__version__)"
    assert in_a_new_process(code)


# ONNX


@pytest.mark.parametrize("name", slow_but("weighted", "hinge", "crammer_singer", "row_stats"))
def test_onnx_programs_compute_the_same(name, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    exported = torch.onnx.export(model(name).eval(), batch(6), dynamo=True, verbose=False)
    path = tmp_path / "program.onnx"
    exported.save(path)
    session = runtime.InferenceSession(Path(path).read_bytes())
    names = [given.name for given in session.get_inputs()]
    (found,) = session.run(None, dict(zip(names, (tensor.numpy() for tensor in batch(6)), strict=True)))
    torch.testing.assert_close(torch.from_numpy(found), model(name)(*batch(6)).detach(), rtol=1e-4, atol=1e-5)


# heads

each_head = pytest.mark.parametrize("name", HEADS)


class WithHead(nn.Module):
    """A network whose last layer is a head."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.network = nn.Linear(WIDTH, WIDTH)
        self.head = head

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        return self.head(self.network(features), target=target).sin().sum()


def with_head(name: str) -> WithHead:
    torch.manual_seed(0)
    return WithHead(HEADS[name](WIDTH, CLASSES))


@each_head
def test_programs_hold_heads_too(name, tmp_path):
    model = with_head(name)
    assert_same(torch.fx.symbolic_trace(model), model, 6)
    traced = torch.jit.trace(model, batch(6))
    torch.jit.save(traced, tmp_path / "traced.pt")
    assert_same(torch.jit.load(tmp_path / "traced.pt"), model, 4)
    program = torch.export.export(model, batch(6))
    assert operators(program.graph) <= {"aten"}
    assert_same(program.module(), model, 6)


@each_head
def test_script_of_a_head_is_refused_and_told_of_export(name):
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.script.*torch\.export"):
        torch.jit.script(with_head(name))


def test_script_of_a_schedule_is_refused_and_told_of_export():
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.script.*torch\.export"):
        torch.jit.script(GradualWeight(3))


def test_a_head_alone_is_no_model_to_trace():
    with pytest.raises(TypeError, match="trace a module that calls it"):
        torch.fx.symbolic_trace(HEADS["lsoftmax"](WIDTH, CLASSES))


def test_fx_records_the_fused_loss_of_a_layer_that_does_more():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.criterion = LinearLargeMarginCrossEntropyLoss(4, 3)
            self.criterion.linear = torch.nn.Sequential(self.criterion.linear)  # type: ignore[assignment]

        def forward(self, x, y):
            return self.criterion(x, y)

    model, x, y = Model(), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    with pytest.warns(UserWarning, match="cannot be fused"):
        traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(x, y), model(x, y))
