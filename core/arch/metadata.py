"""Metadata: an architecture's typed view of a model file. Knows no file format, only names and values."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

from ..errors import ConfigError, MissingKeyError, TensorError
from .tensors import MOST_POSITIONS

T = TypeVar("T")


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Final[Any] = _Required()


class Metadata:
    """Typed reads of ``{architecture}.key``.

    It remembers which keys were read: one that nobody asked for might change what the model computes, so core refuses
    a file with such a key unless the plugin lists it with :meth:`ignore`.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        tensors: Mapping[str, Sequence[int]],
        architecture: str,
        plugin: str = "",
    ) -> None:
        self.architecture = architecture
        self.plugin = plugin or architecture
        self._values = values
        self._tensors = tensors
        self._read: set[str] = set()
        self._ignored: list[str] = []

    def has(self, key: str) -> bool:
        """Whether the file has ``{architecture}.key``."""
        return f"{self.architecture}.{key}" in self._values

    def get(
        self,
        kind: type[T],
        key: str,
        default: Any = REQUIRED,
        *,
        minimum: float | None = None,
        maximum: float | None = None,
    ) -> T:
        """The value of ``{architecture}.key`` as ``kind``: int, float, bool, str or list.

        Raises MissingKeyError when it is absent and no default was given, ConfigError when it is of another kind, not
        finite or out of bounds. A default is returned as it is.
        """
        return self._get(kind, f"{self.architecture}.{key}", default, minimum, maximum)

    def file(self, kind: type[T], key: str, default: Any = REQUIRED) -> T:
        """As :meth:`get` for a full key such as ``general.file_type``."""
        return self._get(kind, key, default, None, None)

    def layer(
        self,
        kind: type[T],
        key: str,
        index: int,
        default: Any = REQUIRED,
        *,
        minimum: float | None = None,
        maximum: float | None = None,
    ) -> T:
        """The value for layer ``index``, where the file gives one for all layers or a list with one per layer."""
        full = f"{self.architecture}.{key}"
        value = self._values.get(full)
        if value is None or isinstance(value, str) or not isinstance(value, Sequence):
            return self._get(kind, full, default, minimum, maximum)
        self._read.add(full)
        if len(value) != self.layers():
            raise ConfigError(f"{full} has {len(value)} entries for {self.layers()} layers (plugin {self.plugin})")
        return self._typed(kind, f"{full}[{index}]", _plain(value[index]), minimum, maximum)

    def layers(self) -> int:
        """``{architecture}.block_count``, which must be between 1 and the number of tensors in the file."""
        return self.get(int, "block_count", minimum=1, maximum=max(1, len(self._tensors)))

    def context(self) -> int:
        """``{architecture}.context_length``."""
        return self.get(int, "context_length", minimum=1, maximum=MOST_POSITIONS)

    def require(self, **expected: Any) -> None:
        """Refuses a file in which a key is present and differs; write ``attention__causal`` for ``attention.causal``.

        Raises ConfigError naming key, value, what is supported, and the plugin.
        """
        for name, wanted in expected.items():
            key = name.replace("__", ".")
            full = f"{self.architecture}.{key}"
            self._read.add(full)
            if full in self._values and self._values[full] != wanted:
                raise ConfigError(
                    f"{full} is {_short(self._values[full])}; plugin {self.plugin} supports only {wanted!r}. "
                    "Running the model anyway would give wrong results"
                )

    def ignore(self, *keys: str) -> None:
        """Names keys (glob patterns, without the architecture) that do not change what the model computes."""
        self._ignored += [f"{self.architecture}.{key}" for key in keys]

    def unread(self) -> list[str]:
        """Keys of this architecture that were neither read nor ignored."""
        prefix = f"{self.architecture}."
        return [
            key
            for key in self._values
            if key.startswith(prefix)
            and key not in self._read
            and not any(fnmatch.fnmatchcase(key, pattern) for pattern in self._ignored)
        ]

    def has_tensor(self, name: str) -> bool:
        """Whether the file has a tensor of this name."""
        return name in self._tensors

    def optional(self, name: str) -> str | None:
        """The name if the file has such a tensor, else None: for biases that some files of a family lack."""
        return name if name in self._tensors else None

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor in NumPy order (rows first). Raises TensorError if there is none of this name."""
        if name not in self._tensors:
            raise TensorError(f"the file has no tensor {name}, which plugin {self.plugin} needs")
        return tuple(self._tensors[name])

    def vocab(self, embedding: str = "token_embd.weight") -> int:
        """Rows of the token embedding: the vocabulary, padding included.

        Raises ConfigError where ``{architecture}.vocab_size`` says more rows, or is no count at all.
        """
        shape = self.tensor_shape(embedding)
        if len(shape) != 2:
            raise TensorError(f"{embedding} has shape {list(shape)}, expected two dimensions")
        self.get(int, "vocab_size", shape[0], minimum=1, maximum=shape[0])  # fewer: the rest is padding
        return shape[0]

    def _get(self, kind: type[T], full: str, default: Any, minimum: float | None, maximum: float | None) -> T:
        self._read.add(full)
        if full not in self._values:
            if default is REQUIRED:
                raise MissingKeyError(
                    f"the file has no metadata key {full} ({kind.__name__}), which plugin {self.plugin} needs"
                )
            return default  # type: ignore[no-any-return]
        return self._typed(kind, full, self._values[full], minimum, maximum)

    def _typed(self, kind: type[T], full: str, value: Any, minimum: float | None, maximum: float | None) -> T:
        if kind is list:
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise self._wrong(full, value, "a list")
            return [_plain(item) for item in value]  # type: ignore[return-value]
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self._wrong(full, value, {"int": "an integer", "float": "a number"}.get(kind.__name__, kind.__name__))
        if isinstance(value, float) and not math.isfinite(value):
            raise self._wrong(full, value, "a finite number")
        if isinstance(value, int | float):
            if minimum is not None and value < minimum:
                raise self._wrong(full, value, f"at least {minimum}")
            if maximum is not None and value > maximum:
                raise self._wrong(full, value, f"at most {maximum}")
        return value

    def _wrong(self, full: str, value: Any, expected: str) -> ConfigError:
        return ConfigError(f"{full} is {_short(value)}, expected {expected} (plugin {self.plugin})")


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _short(value: Any) -> str:
    if not isinstance(value, str) and isinstance(value, Sequence):
        return f"a list of {len(value)} entries"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
