"""The filters, tests, string methods and functions that chat templates may use, each bounded in what it makes.

Those of Jinja that make no more than they are given are taken as they are; the others are written here. ``tojson`` and
``strftime_now`` are those that templates for Hugging Face transformers expect, not Jinja's.
"""

from __future__ import annotations

import functools
import json
import re
import string
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from itertools import chain
from typing import Any

from jinja2.exceptions import TemplateRuntimeError
from jinja2.filters import FILTERS as JINJA_FILTERS
from jinja2.filters import make_attrgetter
from jinja2.tests import TESTS as JINJA_TESTS
from jinja2.utils import Namespace, pass_environment
from markupsafe import escape

from .meter import Limit, meter

_MAX_RANGE = 100_000
_MAX_WIDTH = 1000
_MAX_CHARS = 64
_MAX_INDENT = 16


def names(text: str) -> tuple[str, ...]:
    """The words of the text."""
    return tuple(text.split())


def counted(items: Iterable[Any]) -> Iterator[Any]:
    """The items, each step metered."""
    now = meter()
    for item in items:
        now.step(32)
        yield item


def _metered(function: Callable[..., Any]) -> Callable[..., Any]:
    """Meters a function of Jinja's: values are walked through first, iterators while they are used."""
    skip = 1 if hasattr(function, "jinja_pass_arg") else 0

    def checked(value: Any) -> Any:
        if isinstance(value, list | tuple | dict):
            meter().measure(value)
        elif hasattr(value, "__next__"):
            return counted(value)
        return value

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        meter().step()
        rest = [checked(arg) for arg in args[skip:]]
        return meter().made(function(*args[:skip], *rest, **{k: checked(v) for k, v in kwargs.items()}))

    return wrapper


def _small(value: Any, limit: int, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > limit:
        raise Limit(f"{what} must be a whole number up to {limit}, not {str(value)[:40]}")
    return value


def _size(*values: Any) -> int:
    """Bytes of text in the values at most, with room for escapes."""
    return sum(6 * size + 8 * count for count, size, _ in map(meter().measure, values))


def percent_format(pattern: str, values: Any) -> str:
    """``pattern % values`` without widths that make much from little."""
    if re.search(r"%(\([^)]*\))?[-#0 +]*(\*|\d{4}|\d*\.(\*|\d{4}))", pattern):
        raise Limit(f"a format asks for a width of {_MAX_WIDTH} or more")
    meter().expect(_size(pattern) + pattern.count("%") * (_MAX_WIDTH + _size(values)))
    result: str = pattern % values
    return result


def _brace_format(pattern: str, *args: Any, **kwargs: Any) -> str:
    """``pattern.format(...)`` with plain fields only: no attributes, no widths."""
    fields = [field for field in string.Formatter().parse(pattern) if field[1] is not None]
    for _, name, spec, conversion in fields:
        if spec or conversion or not re.fullmatch(r"\w*", name or ""):
            raise Limit("str.format is offered to chat templates with plain fields only")
    meter().expect(_size(pattern) + len(fields) * _size(*args, *kwargs.values()))
    return pattern.format(*args, **kwargs)


def _replace(text: Any, old: str, new: str, count: int | None = None) -> str:
    whole, old, new = meter().text(text), meter().text(old), meter().text(new)
    meter().expect(_size(whole) + (whole.count(old) + 1) * len(new) * 4)
    return whole.replace(old, new, -1 if count is None else count)


def _join(values: Any, separator: Any = "") -> str:
    now = meter()
    texts = [now.text(value) for value in counted(values)]
    between = now.text(separator)
    now.expect(len(texts) * len(between) * 4)
    return between.join(texts)


@pass_environment
def _join_filter(environment: Any, value: Any, d: Any = "", attribute: Any = None) -> str:
    return _join(value if attribute is None else map(make_attrgetter(environment, attribute), value), d)


def _strip(method: Callable[..., str]) -> Callable[..., str]:
    def strip(text: Any, chars: str | None = None) -> str:
        if chars is not None and len(chars) > _MAX_CHARS:
            raise Limit(f"strip takes up to {_MAX_CHARS} characters, not {len(chars)}")
        return method(meter().text(text), chars)

    return strip


def _split(method: Callable[..., list[str]]) -> Callable[..., list[str]]:
    def split(text: str, *args: Any, **kwargs: Any) -> list[str]:
        separator = args[0] if args else kwargs.get("sep")
        parts = text.count(separator) if isinstance(separator, str) and separator else len(text) // 2
        meter().expect(_size(text) + 80 * parts)
        result = method(text, *args, **kwargs)
        meter().step(80 * len(result))
        return result

    return split


def _padded(method: Callable[..., str]) -> Callable[..., str]:
    return lambda text, width, *fill: method(text, _small(width, _MAX_WIDTH, "a width"), *fill)


def _indent(s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text = meter().text(s)
    lead = width if isinstance(width, str) else " " * _small(width, _MAX_CHARS, "an indentation")
    if len(lead) > _MAX_CHARS:
        raise Limit(f"an indentation has up to {_MAX_CHARS} characters, not {len(lead)}")
    meter().expect(_size(text) + (text.count("\n") + 1) * len(lead) * 4)
    result: str = JINJA_FILTERS["indent"](text, lead, first, blank)
    return result


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers makes it: no HTML escapes, and non-ASCII characters as they are."""
    indent = None if indent is None else _small(indent, _MAX_INDENT, "tojson's indent")
    count, size, depth = meter().measure(x)
    extra = 4 if separators is None else _size(list(separators))
    meter().expect(6 * size + count * (8 + extra + (indent or 0) * depth))
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@pass_environment
def _sum(environment: Any, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
    values = iterable if attribute is None else map(make_attrgetter(environment, attribute), iterable)
    total: int | float = 0
    for value in chain((start,), counted(values)):
        if not isinstance(value, int | float):
            raise TypeError(f"sum adds numbers, not {type(value).__name__}")
        total += value
    return total


def _round(value: float, precision: int = 0, method: str = "common") -> Any:
    return JINJA_FILTERS["round"](value, _small(precision, 20, "round's precision"), method)


def _range(*args: Any) -> range:
    steps = range(*args)
    if len(steps) > _MAX_RANGE:
        raise Limit(f"range has {len(steps)} steps, more than {_MAX_RANGE}")
    return steps


def _raise_exception(message: Any = "") -> None:
    raise TemplateRuntimeError(meter().text(message))


def _strftime_now(pattern: str) -> str:
    if not isinstance(pattern, str) or len(pattern) > 100 or re.search(r"%(?!-?[A-Za-z%])", pattern):
        raise Limit("strftime_now takes a short pattern of plain fields such as %d %B %Y")
    return datetime.now().strftime(pattern)


def _dict(*args: Any, **kwargs: Any) -> dict[str, Any]:
    if len(args) > 1 or not all(isinstance(arg, dict) for arg in args):
        raise Limit("dict takes keywords and at most one dict")
    return {**(args[0] if args else {}), **kwargs}


def make_globals() -> dict[str, Any]:
    """The functions that a template can call by name."""
    return {
        "range": _range,
        "namespace": Namespace,
        "dict": _dict,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }


def _bounded(name: str) -> Callable[..., Any]:
    """A method of str that makes no more than it is given, and takes short arguments."""
    method = getattr(str, name)

    def call(text: str, *args: Any, **kwargs: Any) -> Any:
        return method(text, *args, **kwargs)

    return call


_PLAIN_METHODS = names(
    "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric "
    "isspace istitle isupper lower partition removeprefix removesuffix rfind rindex rpartition startswith swapcase "
    "title upper"
)
STR_METHODS: dict[str, Callable[..., Any]] = {name: _bounded(name) for name in _PLAIN_METHODS}
STR_METHODS |= {name: _strip(getattr(str, name)) for name in ("strip", "lstrip", "rstrip")}
STR_METHODS |= {name: _split(getattr(str, name)) for name in ("split", "rsplit", "splitlines")}
STR_METHODS |= {name: _padded(getattr(str, name)) for name in ("center", "ljust", "rjust", "zfill")}
STR_METHODS |= {"replace": _replace, "format": _brace_format, "join": lambda text, values: _join(values, text)}

_PLAIN_FILTERS = names(
    "abs capitalize count d default dictsort first float int items last length lower map max min reject rejectattr "
    "reverse select selectattr sort title unique upper"
)
FILTERS: dict[str, Callable[..., Any]] = {name: _metered(JINJA_FILTERS[name]) for name in _PLAIN_FILTERS}
_OWN_FILTERS: dict[str, Callable[..., Any]] = {
    "e": lambda value: str(escape(meter().text(value))),
    "escape": lambda value: str(escape(meter().text(value))),
    "format": lambda pattern, *args, **kwargs: percent_format(meter().text(pattern), kwargs or args),
    "indent": _indent,
    "list": lambda value: list(counted(value)),
    "replace": _replace,
    "round": _round,
    "safe": lambda value: meter().text(value),
    "string": lambda value: meter().text(value),
    "tojson": _tojson,
    "trim": _strip(str.strip),
}


def _own(function: Callable[..., Any]) -> Callable[..., Any]:
    return functools.wraps(function)(lambda *args, **kwargs: meter().made(function(*args, **kwargs)))


FILTERS |= {name: _own(function) for name, function in _OWN_FILTERS.items()}
FILTERS |= {"join": _own(_join_filter), "sum": _own(_sum)}


def _jinja_test(name: str) -> Callable[..., Any]:
    test: Any = JINJA_TESTS[name]
    return test  # type: ignore[no-any-return]


_NO_TESTS = {"callable", "escaped", "filter", "test"}
_TESTS = sorted(JINJA_TESTS.keys() - _NO_TESTS)
TESTS: dict[str, Callable[..., Any]] = {name: _metered(_jinja_test(name)) for name in _TESTS}
