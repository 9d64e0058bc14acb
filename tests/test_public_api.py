"""What is public: listed, typed, documented, and loaded only when asked for."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.nn.functional as F

import largemargin
from combinations import every

TREE = ast.parse(Path(largemargin.__file__).with_suffix(".pyi").read_text())
FUNCTIONS = [name for name in largemargin.__all__ if inspect.isfunction(getattr(largemargin, name))]
CLASSES = [name for name in largemargin.__all__ if inspect.isclass(getattr(largemargin, name))]


def names_under_type_checking() -> dict[str, str]:
    """The names a type checker sees, and the module it finds each in."""
    return {alias.name: node.module for node in TREE.body if isinstance(node, ast.ImportFrom) and node.module for alias in node.names}


def test_listed_names_are_the_typed_names():
    assert len(set(largemargin.__all__)) == len(largemargin.__all__)
    assert set(largemargin.__all__) == set(names_under_type_checking())


@every("name", largemargin.__all__)
def test_listed_names_exist_where_the_type_checker_finds_them(name):
    value = getattr(largemargin, name)
    home = sys.modules[f"largemargin.{names_under_type_checking()[name]}"]
    assert getattr(home, name) is value
    assert name in dir(largemargin)


def test_every_listed_name_is_a_function_or_a_class():
    assert sorted(FUNCTIONS + CLASSES) == sorted(largemargin.__all__)


def test_unknown_names_raise():
    with pytest.raises(AttributeError, match=r"largemargin.*no_such_name"):
        _ = largemargin.no_such_name  # type: ignore[attr-defined]


@every("name", largemargin.__all__)
def test_public_names_have_a_docstring(name):
    value = getattr(largemargin, name)
    assert value.__doc__ and value.__doc__.strip()
    inherited = [base.__doc__ for base in value.__mro__[1:]] if inspect.isclass(value) else []
    assert value.__doc__ not in inherited


@every("name", FUNCTIONS)
def test_docstrings_of_functions_have_every_section(name):
    doc = inspect.getdoc(getattr(largemargin, name))
    positions = [doc.find(f"\n{section}:") for section in ("Args", "Returns", "Raises", "Example", "Source")]
    assert -1 not in positions and positions == sorted(positions)
    arguments = doc[positions[0] : positions[1]]
    for parameter in inspect.signature(getattr(largemargin, name)).parameters:
        assert re.search(rf"^    ([\w, ]*, )?{parameter}(, [\w, ]*)?:", arguments, re.MULTILINE), f"{parameter} is not described"


@every("name", FUNCTIONS)
def test_signatures_of_functions_are_typed(name):
    signature = inspect.signature(getattr(largemargin, name))
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in signature.parameters.values())


def test_signature_is_a_superset_of_torchs():
    ours = inspect.signature(largemargin.large_margin_cross_entropy).parameters
    for name, parameter in inspect.signature(F.cross_entropy).parameters.items():
        if name in ("size_average", "reduce"):
            assert name not in ours
        else:
            assert ours[name].default == parameter.default
    assert list(ours)[:3] == list(inspect.signature(F.cross_entropy).parameters)[:3]


def in_a_fresh_interpreter(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_import_does_not_load_torch():
    # the command line starts in a fraction of the second or two that torch takes
    assert in_a_fresh_interpreter("import sys, largemargin; print('torch' in sys.modules, 'numpy' in sys.modules)") == "False False"


def test_import_of_a_name_loads_nothing_heavy_but_torch():
    heavy = ["torchvision", "matplotlib", "sklearn", "scipy", "PIL", "jsonargparse", "rich", "jinja2", "mpmath"]
    code = f"import sys; from largemargin import *; print([name for name in {heavy} if name in sys.modules], 'torch' in sys.modules)"
    assert in_a_fresh_interpreter(code) == "[] True"


def test_the_package_says_that_it_is_typed():
    assert (Path(largemargin.__file__).parent / "py.typed").exists()


def test_version_is_the_installed_one():
    from importlib.metadata import version

    assert largemargin.__version__ == version("largemargin")


def test_the_changelog_begins_with_this_version():
    newest = re.search(r"^## (.*)$", (Path(__file__).parents[1] / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    if ".dev" in largemargin.__version__:
        assert newest == "Unreleased"
    else:
        assert re.fullmatch(rf"{re.escape(largemargin.__version__)} - \d{{4}}-\d\d-\d\d", newest)
