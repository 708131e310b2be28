"""HTML pages that stand alone: style and script lie in the page, which loads nothing and runs no other script."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from gadcore.text import visible

_HEAD = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'sha256-{{ digest }}'; base-uri 'none'; form-action 'none'">
<title>{{ title }}</title>
<style>{{ css }}</style>
</head>
"""


def render(template: str, **variables: object) -> Markup:
    """A Jinja template, in which every variable that is not Markup is made visible and escaped; none may be missing."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_shown
    )
    return Markup(environment.from_string(template).render(variables))


def _shown(value: object) -> object:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def standalone(package: str, name: str, title: str, **variables: object) -> str:
    """The page of <name>.html, .css and .js in the folder of `package`.

    The template begins behind the head and ends with the script: it is given `js` beside the variables.
    """
    template, css, js = (
        (files(package) / f"{name}.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    digest = base64.b64encode(hashlib.sha256(js.encode()).digest()).decode()
    head = render(_HEAD, title=title, css=Markup(css), digest=Markup(digest))
    return f"{head}\n{render(template, title=title, js=Markup(js), **variables)}"
