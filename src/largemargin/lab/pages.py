"""Reports are templates."""

from importlib.resources import files
from typing import Any

import jinja2

TEMPLATES = files("largemargin.lab") / "templates"


def page(template: str, **content: Any) -> str:
    """A template of this package with its content; a name that it uses and is not given is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (TEMPLATES / name).read_text(encoding="utf-8")),
        autoescape=template.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["md"] = lambda text: str(text).replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*")
    return environment.get_template(template).render(**content)
