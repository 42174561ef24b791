"""TensorSpec: what a leaf of the tree asks of the file. Knows nothing of files, values or devices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from ..errors import ConfigError

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
