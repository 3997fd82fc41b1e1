"""Methods by name: the expressions that command lines take."""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from kvjax.cache import Chain
from kvjax.compress.actqkv import actqkv
from kvjax.compress.adakv import adakv
from kvjax.compress.chelsea import chelsea
from kvjax.compress.compress_kv_heads import compress_kv_heads
from kvjax.compress.cskv import cskv
from kvjax.compress.d2o import d2o
from kvjax.compress.dense import dense
from kvjax.compress.double_sparsity import double_sparsity
from kvjax.compress.ems import ems
from kvjax.compress.expected_attention import expected_attention
from kvjax.compress.gear import gear
from kvjax.compress.h2o import h2o
from kvjax.compress.hydragen import hydragen
from kvjax.compress.keydiff import keydiff
from kvjax.compress.kivi import kivi
from kvjax.compress.knorm import knorm
from kvjax.compress.kvquant import kvquant
from kvjax.compress.kvzip import kvzip
from kvjax.compress.mikv import mikv
from kvjax.compress.mustafar import mustafar
from kvjax.compress.mustdrop import mustdrop
from kvjax.compress.prefixkv import prefixkv
from kvjax.compress.pyramidkv import pyramidkv
from kvjax.compress.random_eviction import random_eviction
from kvjax.compress.rotatekv import rotatekv
from kvjax.compress.rtn import rtn
from kvjax.compress.sentencekv import sentencekv
from kvjax.compress.snapkv import snapkv
from kvjax.compress.streaming_llm import streaming_llm
from kvjax.compress.tova import tova
from kvjax.compress.turboquant import turboquant
from kvjax.compress.video_xl_2 import video_xl_2
from kvjax.compress.vidkv import vidkv
from kvjax.compress.xkv import xkv
from kvjax.compress.zipvl import zipvl

METHODS: dict[str, Callable[..., Chain]] = {
    f.__name__: f
    for f in (
        dense, rtn, random_eviction, streaming_llm, h2o, tova, snapkv, pyramidkv, adakv,
        expected_attention, keydiff, knorm, kivi, gear, mikv, turboquant, rotatekv, kvquant,
        vidkv, mustafar, kvzip, xkv, compress_kv_heads, cskv,
        d2o, ems, chelsea, prefixkv, hydragen, double_sparsity, sentencekv, actqkv,
        zipvl, mustdrop, video_xl_2,
    )
}  # fmt: skip


def parse(
    text: str, known: Mapping[str, Callable[..., Any]] = METHODS, name: str = "methods"
) -> list[tuple[str, Any]]:
    """Methods written as in Python, separated by semicolons: [(label, chain), ...].

    Method names (with or without parentheses), keyword arguments, literals, and further methods as
    arguments; nothing is evaluated. The label is the expression in normal form.

    Args:
      known: functions by name; other vocabularies than methods are read alike.
      name: what error messages call the text.

    Raises:
      ValueError: syntax (with its place), unknown methods (with the nearest names), unknown
        arguments (with those allowed), and whatever the method itself refuses.

    >>> [label for label, _ in parse("dense; snapkv( keep=.5,storage=kivi(bits=4) )")]
    ['dense', 'snapkv(keep=0.5, storage=kivi(bits=4))']
    """
    found = []
    start = 0
    for piece in text.split(";"):
        if piece.strip():
            found.append(_one(_Place(text, start, known, name), piece))
        start += len(piece) + 1
    if not found:
        raise ValueError(f"{name}={text!r}: expected at least one of {', '.join(known)}")
    return found


def _one(where: _Place, piece: str) -> tuple[str, Any]:
    where.start += len(piece) - len(piece.lstrip())
    try:
        node = ast.parse(piece.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
        at = where.start + (getattr(error, "offset", None) or 1)
        reason = getattr(error, "msg", None) or error
        raise ValueError(f"{where.name}={where.text!r}: {reason}, at character {at}") from None
    return ast.unparse(node), where.method(node)


class _Place:
    """Builds what a parsed expression says, and knows where in the text it stands."""

    def __init__(self, text: str, start: int, known: Mapping[str, Callable], name: str):
        self.text, self.start, self.known, self.name = text, start, known, name

    def method(self, node: ast.expr) -> Any:
        call = node if isinstance(node, ast.Call) else None
        name = call.func if call else node
        if not isinstance(name, ast.Name):
            self.fail(node, "expected a method, such as snapkv(keep=0.25)")
        if name.id not in self.known:
            near = difflib.get_close_matches(name.id, self.known, 3, 0.4)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            self.fail(name, f"unknown method {name.id!r}; {hint}Known: {', '.join(self.known)}")
        function = self.known[name.id]
        allowed = list(inspect.signature(function).parameters)
        given: dict[str, Any] = {}
        for argument in call.args if call else ():
            self.fail(
                argument, f"{name.id} takes arguments by name: {', '.join(allowed) or 'none'}"
            )
        for argument in call.keywords if call else ():
            if argument.arg not in allowed:
                self.fail(
                    argument,
                    f"{name.id} has no argument {argument.arg or '**'!r}; "
                    f"allowed: {', '.join(allowed) or 'none'}",
                )
            if argument.arg in given:
                self.fail(argument, f"{name.id} is given {argument.arg!r} twice")
            given[argument.arg] = self.value(argument.value)
        try:
            return function(**given)
        except TypeError as error:  # a literal of a type that the method cannot compare
            raise ValueError(f"{self.name}={self.text!r}: {name.id}: {error}") from error

    def value(self, node: ast.expr) -> Any:
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError):
            return self.method(node)

    def fail(self, node: Any, message: str) -> None:
        at = self.start + node.col_offset + 1
        raise ValueError(f"{self.name}={self.text!r}: {message}, at character {at}")
