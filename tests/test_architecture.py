"""How the library is built: what docs/architecture.md says of it, and what a change must not undo."""

import ast
import ctypes
import inspect
import math
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import pytest
import torch

import largemargin
from largemargin._backend_names import BACKENDS
from largemargin.backends import cpu, ladder, reference
from largemargin.backends.protocol import Backend
from largemargin.loss import LossOptions, Options
from measure import assert_within

if TYPE_CHECKING:
    from largemargin.backends import triton

    CHECKED: tuple[Backend, ...] = (cpu, reference, triton)  # mypy checks each against the protocol

ROOT = Path(largemargin.__file__).parent
SOURCES = [path for path in sorted(ROOT.rglob("*.py")) if "lab" not in path.relative_to(ROOT).parts]
FUNCTIONS = ["linear_large_margin_cross_entropy", "sharded_large_margin_cross_entropy", "sharded_linear_large_margin_cross_entropy"]
MODULES = ["LargeMarginCrossEntropyLoss", "OpaqueLargeMarginLoss", "LinearLargeMarginCrossEntropyLoss"]


def test_mypy_checks_every_backend_against_the_protocol():
    (checked,) = re.findall(r"CHECKED: .* = \((.*)\)  # mypy", Path(__file__).read_text())
    assert set(checked.split(", ")) == set(BACKENDS) - {None}


# the options of the loss: names, defaults and types, wherever they stand


def written_out() -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(largemargin.large_margin_cross_entropy).parameters
    return {name: parameter for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY and name != "donate"}


def test_the_options_are_those_of_the_main_loss():
    assert list(written_out()) == list(LossOptions._fields)
    assert set(written_out()) == set(Options.__annotations__)
    assert {name: parameter.default for name, parameter in written_out().items()} == LossOptions._field_defaults


def test_the_options_have_one_type_each():
    types = get_type_hints(largemargin.large_margin_cross_entropy)
    assert {name: types[name] for name in written_out()} == get_type_hints(Options) == get_type_hints(LossOptions)


@pytest.mark.parametrize("name", FUNCTIONS + MODULES)
def test_signature_and_docstring_show_every_option(name):
    shown = inspect.signature(getattr(largemargin, name)).parameters
    for option, parameter in written_out().items():
        if option == "ignore_index" and name.lower().startswith("linear"):  # which may be None there, as in torch
            parameter = parameter.replace(annotation=int | None)
        assert shown[option] == parameter
        if name in FUNCTIONS:
            assert f"        {option}: " in getattr(largemargin, name).__doc__


@pytest.mark.parametrize("name", MODULES)
def test_an_option_of_a_module_is_an_attribute_that_can_be_changed(name):
    sizes = {"in_features": 3, "num_classes": 4} if name.startswith("Linear") else {}
    others = {"lam": 2.0, "divergence": "kl_qu", "hard_bias": 1.0, "label_smoothing": 0.2, "ignore_index": 3, "reduction": "sum"}
    module, made = getattr(largemargin, name)(**sizes), getattr(largemargin, name)(**sizes, **others)
    for option, value in others.items():
        assert getattr(module, option) == LossOptions._field_defaults[option]
        setattr(module, option, value)
    assert all(getattr(module, option) == getattr(made, option) for option in LossOptions._fields)
    assert repr(module) == repr(made)


@pytest.mark.parametrize("name", FUNCTIONS + MODULES)
def test_an_unknown_option_is_named(name):
    given: dict[str, object] = {"in_features": 3, "num_classes": 4} if name.startswith("Linear") else {}
    if name in FUNCTIONS:
        given = dict.fromkeys(inspect.signature(getattr(largemargin, name)).parameters, torch.zeros(2, 2))
        given = {parameter: value for parameter, value in given.items() if parameter not in LossOptions._fields} | {"group": None}
        given = given if name.startswith("sharded") else {k: v for k, v in given.items() if k != "group"}
    with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument 'lambda_'"):
        getattr(largemargin, name)(**given, lambda_=1.0)


# private names of torch stand in one file

PRIVATE = re.compile(r"\btorch(?:\.\w+)*\._(?!_)\w+|\bforward_ad\._\w+|\.(?:_version|_base|_is_view|_is_zerotensor|_sequence_nr)\b")


OVERRIDDEN = {"_load_from_state_dict", "_apply"}  # by modules, as by those of torch
OF_MODULES = {name for name in [*dir(torch.nn.Module()), *vars(torch.nn.modules.module)] if re.match("_[a-z]", name)} - OVERRIDDEN


def private_names(path: Path) -> list[str]:
    """The private names of torch that a file uses."""
    tree = ast.parse(path.read_text())
    used = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    imported = [
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch")
        for alias in node.names
    ]
    of_modules = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    of_modules += [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return sorted({match[0] for text in used + imported if (match := PRIVATE.search(text))} | OF_MODULES.intersection(of_modules))


def test_private_names_of_torch_stand_in_one_file():
    found = {str(path.relative_to(ROOT)): private_names(path) for path in SOURCES}
    assert [file for file, names in found.items() if names] == ["_torch.py"], found


# a backend


@pytest.mark.parametrize("module", [cpu, reference], ids=lambda module: module.__name__)
def test_a_backend_has_every_name_of_the_protocol(module):
    assert [name for name in vars(Backend) if not name.startswith("_") and not hasattr(module, name)] == []


def test_both_sides_lay_out_a_job_of_the_cpu_kernel_alike():
    if isinstance(ladder.load("cpu"), str):
        pytest.skip(cpu.why_not())
    library, _ = cpu._library()  # type: ignore[str-unpack]
    assert isinstance(library, ctypes.CDLL)
    assert {name: library.largemargin_offset_of(name.encode()) for name in cpu.FIELDS} == cpu.offsets()
    assert library.largemargin_offset_of(b"no_such_field") == -1


def test_a_kernel_that_lacks_a_kind_of_job_belongs_to_another_version(monkeypatch):
    if cpu.why_not() is not None:
        pytest.skip(cpu.why_not())
    monkeypatch.setattr(cpu, "KINDS", (*cpu.KINDS, "no such kind"))
    assert "belongs to another version" in cpu._library.__wrapped__()


# the page


@pytest.mark.parametrize("house", [ROOT, ROOT / "lab"], ids=["library", "lab"])
def test_the_page_names_every_room_and_every_file_of_rows_and_backends(house):
    page = (ROOT.parents[1] / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"\w+", " ".join(re.findall(r"```.*?```|`[^`]+`", page, re.DOTALL))))
    files = [*house.iterdir(), *(ROOT / "rows").iterdir(), *(ROOT / "backends").iterdir()]
    rooms = {file.stem for file in files if file.suffix == ".py" or (file / "__init__.py").exists()}
    assert rooms - {"__init__", "__main__"} <= named


# what CONTRIBUTING.md shows


def worked_examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT.parents[1] / "CONTRIBUTING.md").read_text(), re.DOTALL)


def test_the_loss_of_the_contributing_page_is_a_loss(rng):
    names: dict[str, Any] = {}
    exec(worked_examples()[0], names)
    function, module = names["huberized_cross_entropy"], names["HuberizedCrossEntropyLoss"]
    assert list(inspect.signature(function).parameters) == ["input", "target", "weight", "tau", "lam", "ignore_index", "reduction"]
    assert "ignore_index: " in function.__doc__ and "lam: " in function.__doc__
    assert repr(module(tau=5.0)) == "HuberizedCrossEntropyLoss(tau=5.0, lam=0.0, ignore_index=-100, reduction='mean')"
    input, target, weight = torch.randn(6, 5, generator=rng), torch.tensor([0, 1, 4, -100, 2, 2]), torch.rand(5, generator=rng)
    kept, p = target >= 0, input.double().softmax(-1)
    p = p[kept, target[kept]]
    assert (p > 1 / 10).any() and (p < 1 / 10).any()
    losses = torch.where(p > 1 / 10, -p.log(), 1 + math.log(10) - 10 * p)
    expected = (losses * weight[target[kept]]).sum() / weight[target[kept]].sum()
    assert_within(module(weight)(input, target), expected, 4.0, 8)
    regularised = function(input, target, lam=0.3, reduction="none") - function(input, target, reduction="none")
    assert_within(regularised, 0.3 * largemargin.divergence(largemargin.row_stats(input.double(), target)), 4.0, 8)
    with pytest.raises(ValueError, match="tau must be finite and at least 1"):
        function(input, target, tau=0.0)
    with pytest.raises(TypeError, match=r"huberized_cross_entropy\(\) got an unexpected keyword argument 'gamma'"):
        function(input, target, gamma=1.0)


def test_the_head_of_the_contributing_page_is_a_head(rng):
    names: dict[str, Any] = {}
    exec(worked_examples()[1], names)
    head, features, target = names["MarginLinear"](3, 4), torch.randn(5, 3, generator=rng), torch.tensor([0, 3, -1, 1, 1])
    lower = torch.zeros(5, 4).index_put((torch.tensor([0, 1, 3, 4]), torch.tensor([0, 3, 1, 1])), torch.tensor(1.0))
    assert torch.equal(head(features, target), head(features) - lower)
    assert torch.equal(head.eval()(features, target), head(features))
    assert repr(head) == "MarginLinear(in_features=3, num_classes=4, margin=1.0)"


# the way of the logits


def layers() -> list[set[str]]:
    """The rooms of the library from the top, as the import rules have them."""
    contracts = tomllib.loads((ROOT.parents[1] / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    return [set(layer.split(" | ")) for layer in contracts[0]["layers"]]


def calls(function: Callable[[], object]) -> list[tuple[str, str]]:
    """Every call from one file of the package to another."""
    found = []

    def note(frame, event, _):
        # a function that a decorator has put around another is named call
        if event == "call" and frame.f_back is not None and frame.f_back.f_code.co_name != "call":
            caller, callee = (Path(f.f_code.co_filename) for f in (frame.f_back, frame))
            if caller != callee and caller.is_relative_to(ROOT) and callee.is_relative_to(ROOT):
                found.append((str(caller.relative_to(ROOT)), str(callee.relative_to(ROOT))))

    function()  # names of the package load on first use
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return found


LOGITS, TARGET = torch.tensor([[0.5, -1.0, 2.0], [0.0, 1.0, 0.0]]), torch.tensor([0, 2])
WAYS = {
    "indices": lambda: largemargin.large_margin_cross_entropy(LOGITS.clone().requires_grad_(), TARGET),
    "pixels": lambda: largemargin.large_margin_cross_entropy(LOGITS.reshape(1, 3, 2).requires_grad_(), TARGET.reshape(1, 2)),
    "by the reference": lambda: largemargin.large_margin_cross_entropy(LOGITS.clone().requires_grad_(), TARGET, backend="reference"),
    "smoothed by class": lambda: largemargin.large_margin_cross_entropy(
        LOGITS.clone().requires_grad_(), TARGET, torch.ones(3), label_smoothing=0.1, backend="reference"
    ),
    "probabilities": lambda: largemargin.large_margin_cross_entropy(LOGITS.clone().requires_grad_(), LOGITS.softmax(-1)),
    "features": lambda: largemargin.linear_large_margin_cross_entropy(LOGITS, torch.ones(4, 3, requires_grad=True), TARGET),
    "features and probabilities": lambda: largemargin.linear_large_margin_cross_entropy(
        LOGITS, torch.ones(4, 3, requires_grad=True), torch.ones(2, 4)
    ),
    "features and a teacher": lambda: largemargin.linear_large_margin_cross_entropy(
        LOGITS, torch.ones(4, 3, requires_grad=True), teacher_input=LOGITS, teacher_linear_weight=torch.ones(4, 3)
    ),
    "features and positions": lambda: largemargin.linear_large_margin_cross_entropy(
        LOGITS, torch.ones(4, 2, 3, requires_grad=True), torch.zeros(2, 2).long()
    ),
    "statistics": lambda: largemargin.row_stats(LOGITS.clone().requires_grad_(), TARGET),
    "a hinge": lambda: largemargin.hard_margin_softplus(LOGITS.clone().requires_grad_(), TARGET),
}


def files_that_take(tensor: torch.Tensor, function: Callable[[], object]) -> set[str]:
    """The files of the package with a function that takes the memory of a tensor."""
    found = set()

    def holds(value: object) -> bool:
        if isinstance(value, tuple):
            return any(map(holds, value))
        return isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()

    def note(frame, event, _):
        code, path = frame.f_code, Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(ROOT) and code.co_name != "call":
            given = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            if any(holds(frame.f_locals.get(name)) for name in given):
                found.add(str(path.relative_to(ROOT)))

    function()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return found


ROUTES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "indices": lambda logits: largemargin.large_margin_cross_entropy(logits, TARGET),
    "by the reference": lambda logits: largemargin.large_margin_cross_entropy(logits, TARGET, backend="reference"),
    "smoothed by class": lambda logits: largemargin.large_margin_cross_entropy(
        logits, TARGET, torch.ones(3), label_smoothing=0.1, backend="reference"
    ),
    "statistics": lambda logits: largemargin.row_stats(logits, TARGET).rho,
    "features": lambda features: largemargin.linear_large_margin_cross_entropy(features, torch.ones(4, 3), TARGET),
}


@pytest.mark.parametrize("name", ROUTES)
def test_logits_and_features_pass_through_six_files(name):
    logits = LOGITS.clone().requires_grad_()
    files = files_that_take(logits, lambda: ROUTES[name](logits).sum().backward())
    assert "functional.py" in files
    assert len(files) <= 6, files


@pytest.mark.parametrize("way", WAYS)
def test_calls_go_down(way):
    """No function is handed down to be called back."""
    floors = {room: floor for floor, rooms in enumerate(layers()) for room in rooms}
    for caller, callee in calls(WAYS[way]):
        above, below = (Path(file).with_suffix("").parts[0] for file in (caller, callee))
        if callee != "tracing.py":
            assert floors[above] <= floors[below], f"{caller} calls {callee}, which is above it"
