"""What the site needs and the repository view does not: formulas as MathML, links out of docs/ as text, docstrings as Markdown."""

import functools
import html
import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import griffe
from latex2mathml.converter import convert

DOCS = Path(__file__).parent
FENCED = re.compile(r"^(```.*?^```[^\n]*$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.DOTALL)
FUNCTION = re.compile(r'<mi>(log|cos|sin)</mi>(<mo stretchy="false">&#x00028;</mo>)?')
RAISED = re.compile(r"<msup>(<mi>\w</mi>)<m[io]>(\*|&#x0002A;|&#x02032;)</m[io]></msup>")
LONG = 30  # characters of LaTeX, from which an inline formula may have to scroll on a phone
WIDE = 60  # characters of a cell, from which it is not to be a narrow column
CELL, CODE = re.compile(r"<td([^>]*)>(.*?)</td>", re.DOTALL), re.compile(r"<code>[^<]*</code>")
ROLE = re.compile(r":(\w+):`~?\.?([^`]+)`")
DISPLAYED = re.compile(r"^\.\. math:: (.*(?:\n[ ]+\S.*)*)", re.MULTILINE)
ON_THE_PAGE = re.findall(r"^::: (\S+)", (DOCS / "api.md").read_text(), re.MULTILINE)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A link to a file of the repository that is not on the site becomes its text, as code."""
    folder = (DOCS / page.file.src_uri).parent

    def replace(link: re.Match[str]) -> str:
        text, target = link.groups()
        address = urlsplit(target)
        if address.scheme or not address.path or (folder / address.path).resolve().is_relative_to(DOCS):
            return link[0]
        return text if text.startswith("`") else f"`{text}`"

    return "".join(part if part.startswith("```") else LINK.sub(replace, part) for part in FENCED.split(markdown))


def on_page_content(content: str, **_: Any) -> str:
    """LaTeX becomes MathML, and tables fit a phone: names may be broken at underscores and dots, and long texts get room."""
    content = CELL.sub(_cell, content)
    return FORMULA.sub(lambda found: mathml(html.unescape(found[2]), found[1] == "div"), content)


def _cell(cell: re.Match[str]) -> str:
    attributes, inside = cell.groups()
    wide = ' class="wide"' if len(re.sub(r"<[^>]*>", "", inside)) > WIDE else ""
    inside = CODE.sub(lambda code: re.sub(r"([_.](?=\w))", r"\1<wbr>", code[0]), inside)
    return f"<td{attributes}{wide}>{inside}</td>"


def mathml(latex: str, displayed: bool) -> str:
    """A formula for the browser, which needs no script for it."""
    latex = latex.strip().replace(r"\arg", r"\operatorname{arg}")
    formula = convert(latex, display="block" if displayed else "inline")
    formula = formula.replace("<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>")  # \sim, which is no tilde
    formula = formula.replace("negativethinmathspace", "-0.167em")
    formula = RAISED.sub(r'<mrow>\1<mo lspace="0" rspace="0">\2</mo></mrow>', formula)  # these signs stand high by themselves
    formula = FUNCTION.sub(lambda name: f'<mo lspace="0.167em" rspace="{0 if name[2] else 0.167}em">{name[1]}</mo>{name[2] or ""}', formula)
    if displayed:
        return f'<div class="formula">{formula}</div>'
    return f'<span class="formula">{formula}</span>' if len(latex) > LONG else formula


class MarkdownDocstrings(griffe.Extension):
    """Signatures as Python has them, and the docstrings' few words of reStructuredText, formulas and references, as Markdown."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the signature and the docstring of any object."""
        if isinstance(obj, griffe.Function):
            _show_all(obj)
        elif isinstance(obj, griffe.Class) and "__signature__" in vars(value := _runtime(obj.path) or object):
            obj.set_member("__init__", griffe.Function("__init__", parameters=_parameters(value), parent=obj))
        if obj.docstring is not None:
            text = DISPLAYED.sub(lambda found: f"\n$$\n{' '.join(found[1].split())}\n$$\n", obj.docstring.value)
            text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)  # the title that griffe knows
            obj.docstring.value = ROLE.sub(_reference, text)


def _show_all(function: griffe.Function) -> None:
    """Arguments that several functions share are written once in the source; the page shows all of them."""
    value = _runtime(function.path.removesuffix(".__init__"))
    if hasattr(value, "__signature__") or hasattr(getattr(value, "__init__", None), "__signature__"):
        function.parameters = _parameters(value)
        if function.docstring is not None and inspect.isfunction(value):
            function.docstring.value = inspect.getdoc(value) or ""


def _parameters(value: Any) -> griffe.Parameters:
    return griffe.Parameters(*map(_parameter, inspect.signature(value).parameters.values()))


def _runtime(path: str) -> Any:
    """What a dotted path of the library names; None for a method, and where other packages would be imported."""
    module, _, name = path.rpartition(".")
    while module and module.startswith("largemargin") and not module.startswith(("largemargin.lab", "largemargin.integrations")):
        try:
            return functools.reduce(getattr, name.split("."), import_module(module))
        except (ModuleNotFoundError, AttributeError):  # of a class
            module, _, inner = module.rpartition(".")
            name = f"{inner}.{name}"
    return None


def _parameter(parameter: inspect.Parameter) -> griffe.Parameter:
    shown = inspect.formatannotation(parameter.annotation) if parameter.annotation is not parameter.empty else None
    default = None if parameter.default is parameter.empty else repr(parameter.default)
    kind = griffe.ParameterKind(parameter.kind.description)
    return griffe.Parameter(parameter.name, annotation=shown, kind=kind, default=default)


def _reference(role: re.Match[str]) -> str:
    kind, name = role.groups()
    if kind == "math":
        return f"${name}$"
    home = next((path for path in ON_THE_PAGE if path == name or path == f"largemargin.{name}"), None)
    home = home or next((path for path in ON_THE_PAGE if path.endswith(f".{name}")), None)
    shown = f"`{name.removeprefix('largemargin.')}`"
    return f"[{shown}][{home}]" if home else shown
