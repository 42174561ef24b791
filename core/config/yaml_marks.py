"""YAML text to a tree of nodes, each with its line and column.

Built from the parser's events, not from PyYAML's constructors: no tag can make an object, aliases cost arithmetic
instead of memory, nesting is bounded before anything recurses, and scalars follow rules that surprise less than YAML
1.1's (``1e-3`` is a number, ``010`` is refused, dates stay text). Knows nothing of the schema.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import yaml

from ..errors import ConfigError
from .tree import MAX_DEPTH, MAX_NODES, Node, mapping, sequence

Where = Callable[[int, int], str]
"""(line, column), both from 1, to the text that names the place."""

_NULL = frozenset(("", "~", "null", "Null", "NULL"))
_TRUE = frozenset(("true", "yes", "on"))
_FALSE = frozenset(("false", "no", "off"))
_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")
_BASED = re.compile(r"[-+]?0(x[0-9a-fA-F][0-9a-fA-F_]*|b[01][01_]*|o[0-7][0-7_]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9][0-9_]*|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = {"inf": float("inf"), "+inf": float("inf"), "-inf": float("-inf"), "nan": float("nan")}
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]")
_TEXT_TAGS = (None, "!", "tag:yaml.org,2002:str")
_MAX_DIGITS = 64
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def parse(text: str, where: Where) -> tuple[Node | None, list[tuple[str, str]]]:
    """The document's tree (None where it is empty) and the problems found on the way, as (place, message).

    Raises ConfigError where reading cannot go on: a syntax error, a second document, too many values, too deep.
    """
    if bad := _CONTROL.search(text):
        line = text.count("\n", 0, bad.start()) + 1
        column = bad.start() - text.rfind("\n", 0, bad.start())
        raise ConfigError(
            f"{where(line, column)}: character U+{ord(bad.group()):04X} is not allowed in YAML; "
            'inside "double quotes" write it as an escape'
        )
    builder = _Builder(text, where)
    try:
        return builder.document(), builder.problems
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line, mark.column) if mark else (0, 0)
        raise ConfigError(f"{where(line + 1, column + 1)}: {_explain(error, text, line, column)}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where(1, 1)}: not readable as YAML: {error}") from None


def _explain(error: yaml.MarkedYAMLError, text: str, line: int, column: int) -> str:
    problem = " ".join(part for part in (error.problem, error.context) if part) or "syntax error"
    lines = text.split("\n")
    found = lines[line] if line < len(lines) else ""
    indent = found[: len(found) - len(found.lstrip())]
    if "\t" in indent or found[column : column + 1] == "\t":
        return "a tab is used for indentation; YAML wants spaces"
    if "nesting depth" in problem:  # the scanner runs ahead of the events, and newer ones have a limit of their own
        return f"nested deeper than {MAX_DEPTH} levels"
    hint = ""
    if "mapping values are not allowed" in problem:
        hint = " (text that contains ': ' needs quotes; otherwise look at the indentation)"
    elif "cannot start any token" in problem:
        hint = " (text that begins with this character needs quotes)"
    return f"not valid YAML: {problem}{hint}"


class _Builder:
    def __init__(self, text: str, where: Where) -> None:
        self.where = where
        self.events: Iterator[Any] = iter(yaml.parse(text, Loader=_LOADER))
        self.anchors: dict[str, Node] = {}
        self.problems: list[tuple[str, str]] = []

    def document(self) -> Node | None:
        root: Node | None = None
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                if root is not None:
                    raise ConfigError(f"{self.place(event)}: a second document ('---'); a file holds one")
                root = self.node(next(self.events), 0)
        return None if root is None or root.value is None else root

    def place(self, event: Any) -> str:
        mark = event.start_mark
        return self.where(mark.line + 1, mark.column + 1)

    def node(self, event: Any, depth: int) -> Node:
        place = self.place(event)
        if depth > MAX_DEPTH:
            raise ConfigError(f"{place}: nested deeper than {MAX_DEPTH} levels")
        if isinstance(event, yaml.AliasEvent):
            known = self.anchors.get(str(event.anchor))
            if known is None:
                raise ConfigError(f"{place}: *{event.anchor} has no &{event.anchor} before it (or contains itself)")
            if depth + known.depth > MAX_DEPTH:  # Aliases of aliases: short to write, deep to walk.
                raise ConfigError(f"{place}: *{event.anchor} nests deeper than {MAX_DEPTH} levels here")
            return known
        if isinstance(event, yaml.ScalarEvent):
            node = self.scalar(event, place)
        else:
            wanted = "map" if isinstance(event, yaml.MappingStartEvent) else "seq"
            if event.tag not in (None, "!", f"tag:yaml.org,2002:{wanted}"):
                self.refuse_tag(event, place)
            node = self.mapping(place, depth) if wanted == "map" else self.sequence(place, depth)
        if event.anchor:
            self.anchors[event.anchor] = node
        return node

    def sequence(self, place: str, depth: int) -> Node:
        items: list[Node] = []
        size = 1
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self.node(event, depth + 1))
            size = self.bounded(size + items[-1].size, place)
        return sequence(items, place)

    def mapping(self, place: str, depth: int) -> Node:
        entries: dict[str, Node] = {}
        inherited: dict[str, Node] = {}
        size = 1
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            at = self.place(event)
            if not isinstance(event, yaml.ScalarEvent):
                raise ConfigError(f"{at}: a key must be plain text, not a list, a mapping or an alias")
            key, plain = str(event.value), event.implicit[0]
            node = replace(self.node(next(self.events), depth + 1), key_origin=at)
            size = self.bounded(size + node.size, place)
            if key == "<<" and plain:
                self.inherit(inherited, node)
            elif key in entries:
                self.problems.append((at, f"{key}: the key is there twice, first at {entries[key].key_origin}"))
            else:
                entries[key] = node
        return mapping(inherited | entries, place)

    def inherit(self, into: dict[str, Node], node: Node) -> None:
        """``<<: *name`` or ``<<: [*a, *b]``; of several, the first that has a key gives it."""
        for source in node.value if isinstance(node.value, list) else [node]:
            if not isinstance(source.value, dict):
                self.problems.append((node.key_origin, "'<<' takes a mapping or a list of mappings"))
                return
            for key, value in source.value.items():
                into.setdefault(key, value)

    def bounded(self, size: int, place: str) -> int:
        if size > MAX_NODES:
            raise ConfigError(f"{place}: more than {MAX_NODES} values (aliases are counted where they are used)")
        return size

    def scalar(self, event: Any, place: str) -> Node:
        value: Any = str(event.value)
        if event.tag not in _TEXT_TAGS:
            self.refuse_tag(event, place)
        elif event.tag is None and event.implicit[0]:
            value, problem = resolve(value)
            if problem:
                self.problems.append((place, problem))
        return Node(value, place, place)

    def refuse_tag(self, event: Any, place: str) -> None:
        tag = str(event.tag).replace("tag:yaml.org,2002:", "!!")
        self.problems.append((place, f"the tag {tag} is not allowed; write a plain value"))


def resolve(text: str) -> tuple[Any, str | None]:
    """An unquoted scalar's value, and a problem with it or None."""
    if text in _NULL:
        return None, None
    # YAML 1.1 knows yes/Yes/YES but not yEs.
    if text in (text.lower(), text.upper(), text.capitalize()) and text.lower() in _TRUE | _FALSE:
        return text.lower() in _TRUE, None
    digits = text.replace("_", "")
    if len(digits) > _MAX_DIGITS:
        return text, None  # A number this long is none of ours; int() would be slow on it.
    if _DECIMAL.fullmatch(text):
        return int(digits), None
    if _LEADING_ZERO.fullmatch(text):
        value = int(digits)
        bare = digits.lstrip("+-0") or "0"
        return value, f"{text} is octal to some YAML readers and decimal to others; write {bare}, or quote it for text"
    if _BASED.fullmatch(text):
        return int(digits, 0), None
    if _FLOAT.fullmatch(text):
        return float(digits), None
    if text.lower().lstrip("+-") in (".inf", ".nan"):
        return _SPECIAL.get(text.lower().replace(".", ""), float("nan")), None
    return text, None
