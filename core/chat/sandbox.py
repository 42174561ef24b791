"""A Jinja environment for templates that nobody has read: they come with model files, so they are treated as hostile.

Three fences. What a template may name is a list of what chat templates use: no attribute but those below, so there is
no path from a value to Python's internals. The syntax tree is rewritten before it is compiled, so that every loop
step, every piece of output and every new list passes through a meter. And operators, filters and methods that can make
much from little say how much before they make it. Knows nothing of chats and messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import BuiltinMethodType
from typing import Any

from jinja2 import Undefined, nodes
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from .filters import FILTERS, STR_METHODS, TESTS, make_globals, names, percent_format
from .meter import Limit, bytes_in, meter

_LOOP_NAMES = frozenset(
    names("index index0 revindex revindex0 first last length depth depth0 previtem nextitem cycle changed")
)
_DICT_NAMES = frozenset({"get", "items", "keys", "values"})
_MAX_INT_BITS = 4096
_MAX_NODES = 8_000
_OFFERED: tuple[type[nodes.Node], ...] = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Macro, nodes.CallBlock),
    *(nodes.FilterBlock, nodes.With, nodes.AssignBlock, nodes.Assign, nodes.Scope, nodes.Continue, nodes.Break),
    *(nodes.NSRef, nodes.Name, nodes.Const, nodes.Tuple, nodes.List, nodes.Dict, nodes.Pair, nodes.Keyword),
    *(nodes.CondExpr, nodes.Filter, nodes.Test, nodes.Call, nodes.Getitem, nodes.Getattr, nodes.Slice),
    *(nodes.Concat, nodes.Compare, nodes.Operand, nodes.BinExpr, nodes.UnaryExpr),
)


class GenerationTag(Extension):
    """``{% generation %}``: marks what the assistant says, for training. Here its body is just part of the text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Metered(NodeTransformer):
    """Refuses statements that chat templates do not need, and puts the meter's filters where work or text arises."""

    def __init__(self) -> None:
        self._seen = 0

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(node, _OFFERED):
            kind = type(node).__name__.lower()
            raise TemplateSyntaxError(f"'{kind}' is not offered to chat templates", node.lineno)
        self._seen += 1
        if self._seen > _MAX_NODES:
            raise TemplateSyntaxError(f"the template has more than {_MAX_NODES} parts", node.lineno or 1)
        return super().visit(node, *args, **kwargs)

    @staticmethod
    def _through(name: str, node: nodes.Expr) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        if node.name.startswith("_"):
            raise TemplateSyntaxError(f"no filter named {node.name!r}", node.lineno)
        return self.generic_visit(node)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = self._through("_loop", node.iter)  # type: ignore[arg-type]
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        children: list[nodes.Expr] = []
        for child in node.nodes:
            if isinstance(child, nodes.TemplateData):
                child = nodes.Const(child.data, lineno=child.lineno)
            else:
                child = self.visit(child)
            children.append(self._through("_emit", child))
        node.nodes = children
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._through("_concat", nodes.Tuple(node.nodes, "load", lineno=node.lineno))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = self._through("_plain", node.expr)
        return node

    def visit_Operand(self, node: nodes.Operand) -> nodes.Node:
        self.generic_visit(node)
        node.expr = self._through("_plain", node.expr)
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return self._through("_made", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return self._through("_made", node) if node.ctx == "load" else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return self._through("_made", node)

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = self._through("_key", node.key)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return self._through("_made", node) if isinstance(node.arg, nodes.Slice) else node


class _Steps:
    """An iterable whose steps are metered; with a length where it has one, for ``loop.length``."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        now = meter()
        for item in self._items:
            now.step(32)
            yield item


class _SizedSteps(_Steps):
    def __iter__(self) -> Iterator[Any]:
        now = meter()
        for item in self._items:
            now.step()
            yield item

    def __len__(self) -> int:
        return len(self._items)  # type: ignore[arg-type]


@pass_context
def _loop(_context: Any, value: Any) -> _Steps:
    iter(value)  # a value that cannot be iterated fails here, with Python's message
    return _SizedSteps(value) if hasattr(value, "__len__") else _Steps(value)


@pass_context
def _emit(_context: Any, value: Any) -> str:
    return meter().text(value)


@pass_context
def _concat(_context: Any, values: tuple[Any, ...]) -> str:
    now = meter()
    texts = [now.text(value) for value in values]
    text: str = now.made("".join(texts))
    return text


def _plain(value: Any) -> Any:
    """Comparing values walks through them, so what is shared many times over must not be compared."""
    now = meter()
    now.step()
    if isinstance(value, list | tuple | dict):
        now.measure(value)
    return value


def _key(value: Any) -> Any:
    if value is not None and not isinstance(value, str | int | float):
        raise Limit(f"a key must be a string or a number, not {type(value).__name__}")
    return value


def _made(value: Any) -> Any:
    return meter().made(value)


def _second(function: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda _context, value: function(value)


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """The environment. Compile and render inside ``metering``, which holds the limits of one call."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            autoescape=False,
            extensions=[GenerationTag, "jinja2.ext.loopcontrols"],
        )
        # All take the context, which also keeps the compiler from working them out once and for all.
        own: dict[str, Callable[..., Any]] = {"_loop": _loop, "_emit": _emit, "_concat": _concat}
        own |= {"_plain": pass_context(_second(_plain)), "_key": pass_context(_second(_key))}
        own["_made"] = pass_context(_second(_made))
        self.filters = FILTERS | own
        self.tests = dict(TESTS)
        self.globals = make_globals()
        self._functions = frozenset(map(id, self.globals.values()))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Metered().visit(super()._parse(source, name, filename))
        return tree

    def getattr(self, obj: Any, attribute: str) -> Any:
        """``obj.attribute``: a dict's key, a namespace's variable, or one of the names that templates may use."""
        if isinstance(obj, Undefined):
            return obj._fail_with_undefined_error()
        if isinstance(obj, dict):
            if attribute in _DICT_NAMES:
                return getattr(obj, attribute)
            return obj[attribute] if attribute in obj else self._absent(obj, attribute)
        if isinstance(obj, str):
            allowed = attribute in STR_METHODS
        elif isinstance(obj, LoopContext):
            allowed = attribute in _LOOP_NAMES
        elif isinstance(obj, Namespace):
            allowed = not attribute.startswith("_") and hasattr(obj, attribute)
        else:
            allowed = isinstance(obj, Macro) and attribute == "name"
        return getattr(obj, attribute) if allowed else self._absent(obj, attribute)

    def _absent(self, obj: Any, attribute: str) -> Undefined:
        if attribute.startswith("__"):
            raise SecurityError(f"{attribute!r} is not offered to chat templates")
        if hasattr(type(obj), attribute):
            return self.unsafe_undefined(obj, attribute)
        return self.undefined(obj=obj, name=attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """``obj[argument]``; a name that is no key is tried as an attribute, as Jinja does."""
        meter().step()
        if isinstance(obj, Undefined):
            return obj._fail_with_undefined_error()
        if isinstance(argument, Undefined):
            return self.undefined(obj=obj, name="undefined")
        _key(argument)
        if isinstance(obj, dict | list | tuple | str | range):
            try:
                return obj[argument]
            except (LookupError, TypeError):
                pass
        if isinstance(argument, str):
            return self.getattr(obj, argument)
        return self.undefined(obj=obj, name=argument)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls a macro, a global function, or one of the methods that templates may use."""
        now = meter()
        with now.nested():
            if isinstance(__obj, BuiltinMethodType):
                for scope in ("_block_vars", "_loop_vars"):  # the compiler's, for functions that take the context
                    kwargs.pop(scope, None)
                target = __obj.__self__
                if isinstance(target, str) and __obj.__name__ in STR_METHODS:
                    return now.made(STR_METHODS[__obj.__name__](target, *args, **kwargs))
                if isinstance(target, dict) and __obj.__name__ in _DICT_NAMES:
                    return __obj(*map(_key, args))
            elif isinstance(__obj, Undefined):
                return __obj()  # raises, naming what is undefined
            elif isinstance(__obj, Macro | LoopContext) or id(__obj) in __self._functions:
                return now.made(__context.call(__obj, *args, **kwargs))
            elif getattr(__obj, "__func__", None) in (LoopContext.cycle, LoopContext.changed):
                return __obj(*map(_plain, args))
        raise SecurityError(f"{type(__obj).__name__!r} objects cannot be called by chat templates")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """``left operator right``, refused where the result would be too large."""
        now = meter()
        now.step()
        too_big = False
        if operator == "%" and isinstance(left, str):
            return now.made(percent_format(left, right))
        if operator == "+" and isinstance(left, str | list | tuple) and type(left) is type(right):
            now.expect(bytes_in(left) + bytes_in(right))
        elif operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, str | list | tuple) and isinstance(times, int):
                    now.expect(bytes_in(many) * max(times, 0))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            too_big = left.bit_length() * abs(right) > _MAX_INT_BITS
        if too_big:
            raise Limit(f"{operator} makes a number of more than {_MAX_INT_BITS} bits")
        binop: Callable[[Any, Any], Any] = self.binop_table[operator]
        result = binop(left, right)
        if isinstance(result, int) and result.bit_length() > _MAX_INT_BITS:
            raise Limit(f"{operator} makes a number of more than {_MAX_INT_BITS} bits")
        return now.made(result)
