"""The tree of a model's layers, walked generically: any frozen dataclass will do, also those of plugins.

A text that names a tensor of the file is a leaf; numbers and words are a layer's fields. Knows no kind of layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..runtime.contract import WeightInfo


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor: the field that names it, its name in the file, shape and type."""

    field: str
    name: str
    shape: tuple[int, ...]
    type: str


@dataclass(frozen=True, slots=True)
class Layer:
    """A dataclass of the tree: the field it stands in, its class, its plain fields, its tensors and its children."""

    field: str
    kind: str
    fields: tuple[tuple[str, Any], ...]
    leaves: tuple[Leaf, ...]
    children: tuple[Layer, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "field": self.field,
            "kind": self.kind,
            "fields": {
                name: value if isinstance(value, int | float | str) else repr(value) for name, value in self.fields
            },
            "tensors": [dataclasses.asdict(leaf) for leaf in self.leaves],
            "children": [child.as_dict() for child in self.children],
        }

    def form(self) -> tuple[Any, ...]:
        """All but names: two layers of equal form do the same with other weights."""
        leaves = tuple((leaf.field, leaf.shape, leaf.type) for leaf in self.leaves)
        return self.kind, self.fields, leaves, tuple((child.field, child.form()) for child in self.children)


def tree(node: Any, tensors: Mapping[str, WeightInfo], field: str = "") -> Layer:
    """The tree below a dataclass. ``tensors`` are the file's; fields that are None or of default value are left out."""
    plain: list[tuple[str, Any]] = []
    leaves: list[Leaf] = []
    children: list[Layer] = []
    for item in dataclasses.fields(node):
        value = getattr(node, item.name)
        if isinstance(value, str) and value in tensors:
            info = tensors[value]
            leaves.append(Leaf(item.name, value, tuple(info.shape), info.type))
        elif dataclasses.is_dataclass(value):
            children.append(tree(value, tensors, item.name))
        elif isinstance(value, tuple) and value and all(map(dataclasses.is_dataclass, value)):
            children += [tree(one, tensors, f"{item.name}[{index}]") for index, one in enumerate(value)]
        elif value is not None and value != item.default and value != ():
            plain.append((item.name, value))
    return Layer(field, type(node).__name__, tuple(plain), tuple(leaves), tuple(children))


def draw(layer: Layer, *, every: bool = False) -> str:
    """The tree as indented lines; a run of children of equal form is shown once unless ``every``."""
    return "\n".join(_lines(layer, 0, every))


def _lines(layer: Layer, depth: int, every: bool) -> Iterator[str]:
    pad = "  " * depth
    fields = ", ".join(f"{name} {_shown(value)}" for name, value in layer.fields)
    label = f"{layer.field}: {layer.kind}" if layer.field else layer.kind
    yield f"{pad}{label}{'  ' if fields else ''}{fields}"
    for leaf in layer.leaves:
        yield f"{pad}  {leaf.field} = {leaf.name}  {list(leaf.shape)}  {leaf.type}"
    at = 0
    while at < len(layer.children):
        child = layer.children[at]
        yield from _lines(child, depth + 1, every)
        end = at + 1
        if not every:
            while end < len(layer.children) and _alike(layer.children[end], child):
                end += 1
        if end > at + 1:
            last = layer.children[end - 1].field
            which = last if end == at + 2 else f"{layer.children[at + 1].field} to {last}"
            yield f"{pad}  {which}: as {child.field}, with tensors of their own"
        at = end


def _alike(one: Layer, other: Layer) -> bool:
    """Whether both are items of one list and of equal form."""
    same_list = "[" in one.field and one.field.partition("[")[0] == other.field.partition("[")[0]
    return same_list and one.form() == other.form()


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
