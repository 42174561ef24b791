"""Words for errors: what a field allows, how a value looks, what a misspelt name may have meant.

Knows nothing of where values came from.
"""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, MaxLen, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .schema import RunConfig
from .structured import TextKeys

_SHOWN = 80


def fields(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key that holds a value (not a section), dotted, in the schema's order."""
    for name, info in model.model_fields.items():
        section = section_of(info)
        if section is None:
            yield prefix + name, info
        else:
            yield from fields(section, f"{prefix}{name}.")


def section_of(info: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds, or None for a value."""
    kind = info.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def section_in(info: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds, or may hold beside null."""
    kinds = get_args(info.annotation) if get_origin(info.annotation) in (Union, types.UnionType) else (info.annotation,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def field_at(path: Sequence[object]) -> FieldInfo | None:
    """The field of a dotted key's parts; of what lies inside a value, the field of that value."""
    model: type[BaseModel] | None = RunConfig
    info: FieldInfo | None = None
    for part in path:
        if model is None:
            return info
        info = model.model_fields.get(str(part))
        if info is None:
            return None
        model = section_in(info)
    return info


def shown(value: Any) -> str:
    """A value as YAML would have it, on one line and not too long."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        text = {"inf": ".inf", "-inf": "-.inf"}.get(str(value), ".nan")
    elif isinstance(value, list | tuple) and len(value) > 20:
        text = f"a list of {len(value)} values"
    else:
        try:
            text = json.dumps(value, ensure_ascii=False, default=lambda other: f"<{type(other).__name__}>")
        except (TypeError, ValueError):
            text = f"<{type(value).__name__}>"
    text = text.encode("utf-8", "backslashreplace").decode()  # A lone surrogate cannot be printed.
    return text if len(text) <= _SHOWN else text[: _SHOWN - 2] + " …"


def allowed(info: FieldInfo, inside: bool = False) -> str:
    """What a field takes, in words: ``a whole number from 1 to 1024``; ``inside``: what an item of its value may be."""
    section = section_of(info)
    if section is not None:
        return _type_words(section, [])
    args = get_args(info.annotation)
    if inside and get_origin(info.annotation) in (tuple, dict):
        return _type_words(args[0] if get_origin(info.annotation) is tuple else args[1], [])
    return _type_words(info.annotation, info.metadata)


def _type_words(kind: Any, metadata: Iterable[Any]) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        inner = [m for arg in args[1:] for m in (arg.metadata if isinstance(arg, FieldInfo) else [arg])]
        return _type_words(args[0], [*metadata, *inner])
    if origin in (Union, types.UnionType):
        return ", or ".join(_type_words(arg, metadata) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(str(arg) for arg in args)
    if origin is tuple:
        most = next((f" of at most {m.max_length} items" for m in metadata if isinstance(m, MaxLen)), "")
        return f"a list{most}, each item {_type_words(args[0], [])}"
    if origin is dict:
        return f"a mapping from {_type_words(args[0], [])} to {_type_words(args[1], [])}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "a mapping with some of the keys " + ", ".join(kind.model_fields)
    if kind is str:
        return "text that is not empty" if any(isinstance(m, MinLen) for m in metadata) else "text"
    if kind is bool:
        return "true or false"
    if kind is type(None):
        return "null"
    noun = {int: "a whole number", float: "a number"}.get(kind, str(getattr(kind, "__name__", kind)))
    return noun + _range_words(list(metadata))


def _range_words(limits: Sequence[Any]) -> str:
    least = next((m.ge for m in limits if isinstance(m, Ge)), None)
    most = next((m.le for m in limits if isinstance(m, Le)), None)
    above = next((m.gt for m in limits if isinstance(m, Gt)), None)
    if above is not None:
        return f" above {above}" + (f", at most {most}" if most is not None else "")
    if least is not None and most is not None:
        return f" from {least} to {most}"
    return f", at least {least}" if least is not None else f", at most {most}" if most is not None else ""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)``, or nothing where no known name is near."""
    by_lower = {item.lower(): item for item in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f" (did you mean {by_lower[near[0]]!r}?)" if near else ""


def unknown_key(path: Sequence[str]) -> str:
    """What to say of a key that the schema lacks: the nearest key beside it, or one of that name elsewhere."""
    parent, name = path[:-1], path[-1]
    section: type[BaseModel] | None = RunConfig
    if parent:
        info = field_at(parent)
        section = section_in(info) if info else None
    here = list(section.model_fields) if section else []
    elsewhere = [key for key, _ in fields() if key.rpartition(".")[2] == name]
    hint = f" (did you mean {elsewhere[0]!r}?)" if elsewhere else did_you_mean(name, here)
    if not hint:
        leaves = {key.rpartition(".")[2]: key for key, _ in fields()}
        near = difflib.get_close_matches(name.lower(), leaves, n=1, cutoff=0.75)
        hint = f" (did you mean {leaves[near[0]]!r}?)" if near else f"; known here: {', '.join(here)}" if here else ""
    return f"unknown key{hint}"


def takes_text(info: FieldInfo, key: str = "") -> bool:
    """Whether a field takes any text, alone or as a shorthand (a choice of words is not any text), or the value of
    this key in it does.
    """
    if any(isinstance(item, TextKeys) and key in item.names for item in info.metadata):
        return True
    inputs = (getattr(item, "json_schema_input_type", None) for item in info.metadata)
    return _has(info.annotation, str) or any(_has(kind, str) for kind in inputs)


def takes_list(info: FieldInfo) -> bool:
    """Whether a field takes a list."""
    return _has(info.annotation, tuple)


def takes_null(info: FieldInfo) -> bool:
    """Whether a field takes null."""
    return _has(info.annotation, type(None))


def _has(kind: Any, wanted: type) -> bool:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType, Annotated):
        args = get_args(kind)
        return any(_has(arg, wanted) for arg in (args[:1] if origin is Annotated else args))
    return kind is wanted or origin is wanted
