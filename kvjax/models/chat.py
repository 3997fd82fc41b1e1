"""Chat templates: a model's own Jinja template, run where it can reach nothing."""

from __future__ import annotations

import datetime
import functools
import json

import jinja2
import jinja2.ext
import jinja2.sandbox

MAX_REPEAT = 100_000


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Refuses attributes that lead out of the template, changes to its data, and huge products.

    It cannot bound how long a template runs.
    """

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context, operator, left, right):
        numbers = [x for x in (left, right) if isinstance(x, int)]
        if operator == "**" or (len(numbers) < 2 and any(n > MAX_REPEAT for n in numbers)):
            raise jinja2.sandbox.SecurityError(f"chat template uses {operator!r} on large values")
        return super().call_binop(context, operator, left, right)


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks the assistant's text for training only."""

    tags = frozenset(["generation"])

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, indent=None, **_: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def render(template: str, **variables: object) -> str:
    """The text of a chat template, rendered in a sandbox.

    Raises:
      ValueError: the template is malformed, refuses the conversation, or asks for something a
        template has no business with.
    """
    try:
        return _compiled(template).render(**variables)
    except (jinja2.TemplateError, TypeError, ArithmeticError, LookupError) as error:
        raise ValueError(f"chat template failed: {error}") from None
