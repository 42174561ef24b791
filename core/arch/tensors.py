"""TensorSpec: what a leaf of the tree asks of the file. Knows nothing of files, values or devices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from ..errors import ConfigError, PluginError
from .fields import is_integer

MOST_POSITIONS = 2**31 - 1
"""Positions are int32 on every device."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor that a model reads.

    ``shape`` is in NumPy order (rows first; a GGUF file writes it reversed). ``owner`` is the path of the leaf in the
    tree, such as ``blocks[3].attn.qkv.q``: errors and ``polyhead inspect --layers`` show it. A tensor is claimed by one
    leaf; only where each of them says ``shared`` may several read it (RoPE factors, the same for all layers).
    """

    name: str
    shape: tuple[int, ...]
    owner: str = ""
    shared: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or any("\ud800" <= each <= "\udfff" for each in self.name):
            raise PluginError(f"TensorSpec: name is {self.name!r}, expected a tensor's name, in UTF-8")
        if not isinstance(self.owner, str):
            raise PluginError(f"TensorSpec({self.name}): owner is {self.owner!r}, expected a string")
        if not isinstance(self.shape, tuple) or not self.shape or not all(map(is_integer, self.shape)):
            raise PluginError(f"TensorSpec({self.name}): shape is {self.shape!r}, expected a tuple of integers")
        check(min(self.shape) > 0, f"TensorSpec({self.name}): shape is {list(self.shape)}, expected sizes above 0")


def within(prefix: str, specs: Iterable[TensorSpec]) -> Iterator[TensorSpec]:
    """The same specs with ``prefix`` put before each owner."""
    for spec in specs:
        owner = prefix if not spec.owner else f"{prefix}.{spec.owner}"
        yield replace(spec, owner=owner)


def check(condition: bool, message: str) -> None:
    """Raises ConfigError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)


def check_positive(owner: str, **values: int) -> None:
    """Raises ConfigError unless each value is an integer above zero."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{owner}: {name} is {value!r}, expected an integer of at least 1")
