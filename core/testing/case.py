"""Case: one tiny model of an architecture, as its author describes it to the conformance kit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..tokenizer.tiny import tiny_vocabulary

EMBEDDING = "token_embd.weight"
VOCAB = 128
IDS = (5, 17, 2, 80, 33, 33, 9, 61, 4, 12, 71, 8)
OPTIONAL = (
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.sliding_window",
    "rope.*",
    "vocab_size",
)
"""Keys that GGUF itself lets a file leave out, so that a default is no fault (glob patterns)."""


@dataclass(frozen=True)
class Case:
    """A tiny model: its ``general.architecture`` and metadata.

    ``metadata``: keys as ``Metadata.get`` takes them, ``embedding_length`` for ``{architecture}.embedding_length``;
    keys of other kinds (``general.…``, ``tokenizer.…``) in full. Take sizes of which no two are equal, few heads and
    two layers, and matrices with rows of a multiple of 32 if quantised files shall be tried too; on a GPU, matrices
    that are stacked also want a multiple of 16 rows.

    ``tensors``: what a file says of tensors before the tree exists, a shape (NumPy order) or None for "not in the
    file". Seldom needed: a token embedding has 128 rows unless the metadata has ``vocab_size``, and tensors that the
    plugin asks for with ``has_tensor`` or ``optional`` are tried both present and absent. ``rope_freqs.weight`` is
    absent unless a shape is given. A tensor named here with a shape is in the file whether the tree reads it or not.

    ``ids`` are the tokens of the test's prompt, ``tolerance`` bounds ‖logits − reference‖ / ‖reference‖ on the CPU:
    tiny models that are right are around 5e-7 off a reference in float64, the wrong form of GELU from 1e-4 on.
    ``optional`` names keys (glob patterns) that files of this architecture may lack, ``seed`` that of the weights.
    """

    architecture: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, ...] | None] = field(default_factory=dict)
    ids: Sequence[int] = ()
    tolerance: float = 1e-5
    optional: Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for key, value in self.metadata.items():
            values = value if isinstance(value, list | tuple) else [value]
            if not values or not all(isinstance(item, str | bool | int | float) for item in values):
                raise ConfigError(
                    f"Case: metadata {key!r} is {value!r}, expected a string, bool, int, float or a list of them"
                )
        for name, shape in self.tensors.items():
            if shape is None:
                continue
            if not isinstance(shape, tuple) or not all(isinstance(size, int) and size > 0 for size in shape):
                raise ConfigError(f"Case: tensors {name!r} is {shape!r}, expected a tuple of sizes above 0, or None")
        if isinstance(self.optional, str):
            raise ConfigError(f"Case: optional is {self.optional!r}, expected a tuple of keys")
        if not 0 < self.tolerance < 1:
            raise ConfigError(f"Case: tolerance is {self.tolerance!r}, expected a number between 0 and 1")
        if self.vocab < 8:
            raise ConfigError(f"Case: the vocabulary has {self.vocab} rows, expected at least 8")
        if any(not 0 <= token < self.vocab for token in self.ids):
            raise ConfigError(f"Case: ids holds a token outside the vocabulary (0 to {self.vocab - 1})")

    @property
    def vocab(self) -> int:
        """Rows of the token embedding that the file will have."""
        shape = self.tensors.get(EMBEDDING)
        if shape is not None:
            return shape[0]
        size = self.metadata.get("vocab_size", VOCAB)
        return size if isinstance(size, int) else VOCAB

    @property
    def prompt(self) -> list[int]:
        """The tokens of the test's prompt."""
        return list(self.ids) or [token % self.vocab for token in IDS]

    def full(self, key: str) -> str:
        """The key as the file has it."""
        whole = key.startswith(("general.", "tokenizer.", f"{self.architecture}."))
        return key if whole else f"{self.architecture}.{key}"

    def values(self) -> dict[str, Any]:
        """All metadata of the file, numbers as it will store them, with a vocabulary of its own."""
        made = {
            "general.architecture": self.architecture,
            "general.type": "model",
            "general.name": "conformance test",
            "general.file_type": 0,
            "general.quantization_version": 2,
        }
        own = {self.full(key): _stored(value) for key, value in self.metadata.items()}
        return {**made, **tiny_vocabulary(self.vocab), **own}

    def may_lack(self, full: str) -> bool:
        """Whether files of this architecture may lack the key."""
        return any(fnmatchcase(full, self.full(pattern)) for pattern in (*OPTIONAL, *self.optional))


def _stored(value: Any) -> Any:
    if isinstance(value, float):
        return float(np.float32(value))
    return [_stored(item) for item in value] if isinstance(value, list | tuple) else value
