"""A tree of settings in which every value remembers where it was written.

A YAML file, the environment, the command line and a Python mapping all become such trees, are merged, and only then
checked, so that an error can point at the place the bad value came from. Knows nothing of YAML or of the schema.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ConfigError

MAX_NODES = 10_000
"""Most values a configuration may hold, aliases counted as often as they are used."""
MAX_DEPTH = 32
"""Deepest nesting of lists and mappings."""


@dataclass(frozen=True, slots=True)
class Node:
    """A value and where it stands: ``origin`` for the value, ``key_origin`` for its key (both are text for people).

    ``value`` is a ``dict[str, Node]``, a ``list[Node]`` or a scalar. ``size`` counts the values in it and itself;
    ``depth`` the levels below it, 0 for a scalar.
    """

    value: Any
    origin: str
    key_origin: str
    size: int = 1
    depth: int = 0

    def child(self, part: object) -> Node | None:
        """The node under a key or an index; None where there is none."""
        if isinstance(self.value, dict):
            found = self.value.get(str(part))
            return found if isinstance(found, Node) else None
        if isinstance(self.value, list) and isinstance(part, int) and 0 <= part < len(self.value):
            item = self.value[part]
            return item if isinstance(item, Node) else None
        return None

    def plain(self) -> Any:
        """The value as ordinary dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


def mapping(entries: dict[str, Node], origin: str, key_origin: str | None = None) -> Node:
    """A mapping node."""
    return Node(entries, origin, key_origin or origin, *_extent(entries.values()))


def sequence(items: list[Node], origin: str) -> Node:
    """A list node."""
    return Node(items, origin, origin, *_extent(items))


def _extent(children: Collection[Node]) -> tuple[int, int]:
    """Size and depth of a node with these children."""
    return 1 + sum(node.size for node in children), 1 + max((node.depth for node in children), default=0)


def from_python(value: Any, origin: str, depth: int = 0) -> Node:
    """A Python mapping, list or scalar as a tree whose nodes all share one origin. Paths become text.

    Raises ConfigError where it nests deeper than MAX_DEPTH (a structure that contains itself, for instance) or holds
    more than MAX_NODES values.
    """
    if depth > MAX_DEPTH:
        raise ConfigError(f"{origin}: nested deeper than {MAX_DEPTH} levels")
    node = Node(os.fspath(value) if isinstance(value, os.PathLike) else value, origin, origin)
    if isinstance(value, Mapping):
        node = mapping({str(k): from_python(v, origin, depth + 1) for k, v in value.items()}, origin)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray):
        node = sequence([from_python(item, origin, depth + 1) for item in value], origin)
    if node.size > MAX_NODES:
        raise ConfigError(f"{origin}: more than {MAX_NODES} values")
    return node


def merge(low: Node, high: Node) -> Node:
    """Both trees in one: mappings are merged key by key; any other value of ``high`` replaces that of ``low``."""
    if not (isinstance(low.value, dict) and isinstance(high.value, dict)):
        return high
    merged = dict(low.value)
    for key, node in high.value.items():
        merged[key] = merge(merged[key], node) if key in merged else node
    return replace(low, value=merged)


def nest(path: Sequence[str], leaf: Node) -> Node:
    """``leaf`` under the dotted key ``path``."""
    for part in reversed(path):
        leaf = mapping({part: leaf}, leaf.origin)
    return leaf
