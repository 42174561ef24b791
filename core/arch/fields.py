"""check_fields: each field of the tree holds what its annotation says, or the error names the field.

A string where a leaf belongs is the plugin's mistake, whatever the file: so it is a PluginError, and raised where the
plugin wrote it. Values that are of the right type and make no sense are the constructors' own business.
"""

from __future__ import annotations

import types
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import PluginError


def check_fields(node: object) -> None:
    """Raises PluginError unless every field of the dataclass holds a value of its annotated type."""
    kind: Any = type(node)
    for name, hint in _hints(kind).items():
        value = getattr(node, name)
        if not _fits(value, hint):
            raise PluginError(f"{kind.__name__}: {name} is {_short(value)}, expected {_described(hint)}")


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _fits(value: object, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, each) for each in get_args(hint))
    if origin is tuple:
        each, *more = get_args(hint)
        assert more == [...], hint
        return isinstance(value, tuple) and all(_fits(item, each) for item in value)
    if origin is Literal or hint is int:
        return True  # the constructors say which words and which sizes they take
    if hint is float:  # also NumPy's, which are no float
        return isinstance(value, Real) and not isinstance(value, bool)
    return isinstance(value, hint)


def _described(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        *first, last = map(_described, get_args(hint))
        return f"{', '.join(first)} or {last}"
    if get_origin(hint) is tuple:
        return f"a tuple of {_described(get_args(hint)[0]).removeprefix('a ')}s"
    return {str: "a string", float: "a number", int: "an integer", type(None): "None"}.get(hint) or hint.__name__


def is_integer(value: object) -> bool:
    """Whether it is an integer, NumPy's included, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
