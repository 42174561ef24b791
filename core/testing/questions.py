"""What a plugin asks while it builds a Decoder: answers about tensors that are not there yet, and the keys it read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from ..arch import REQUIRED, Metadata
from ..errors import ConfigError
from .case import EMBEDDING, Case

_MOST_ASKED = 10_000
ABSENT = ("rope_freqs.weight",)
"""``read_rope`` asks for it on behalf of every architecture, and most have no file with it."""


class Answers(Mapping[str, Sequence[int]]):
    """The tensors of a file whose tree is still unknown. ``present`` decides on those the case says nothing of."""

    def __init__(self, case: Case, present: Callable[[str], bool]) -> None:
        self.asked: set[str] = set()
        self._case = case
        self._present = present
        width = case.metadata.get("embedding_length")
        self._embedding = (case.vocab, width if isinstance(width, int) else 1)
        self._embeddings = {EMBEDDING}

    def is_embedding(self, name: str) -> None:
        """The plugin takes this tensor for the token embedding."""
        self._embeddings.add(name)

    def __contains__(self, name: object) -> bool:
        if name in self._embeddings and name not in self._case.tensors:
            return True
        self.asked.add(str(name))
        if len(self.asked) > _MOST_ASKED:
            raise NeedsShape(
                f"the plugin asks whether there is {name}, and before that for {_MOST_ASKED:,} others: if it looks for "
                "the first that is missing, say in the case which that is: Case(tensors={name: None})"
            )
        if name in self._case.tensors:
            return self._case.tensors[str(name)] is not None
        return name not in ABSENT and self._present(str(name))

    def __getitem__(self, name: str) -> Sequence[int]:
        hint = self._case.tensors.get(name)
        if hint is not None:
            return hint
        if name in self._embeddings:
            return self._embedding
        raise NeedsShape(
            f"the plugin reads the shape of {name}, from which the kit cannot make it; give it in the case: "
            f"Case(tensors={{{name!r}: (rows, columns)}})"
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._case.tensors)

    def __len__(self) -> int:
        return 1 << 20  # bounds the number of layers; the true number is not known yet


class NeedsShape(ConfigError):
    """The case must say which shape a tensor has."""


class Recorder(Metadata):
    """Metadata that remembers how each key was read."""

    def __init__(
        self, values: Mapping[str, Any], tensors: Mapping[str, Sequence[int]], architecture: str, plugin: str
    ) -> None:
        super().__init__(values, tensors, architecture, plugin)
        self.needed: set[str] = set()
        self.defaulted: set[str] = set()

    def vocab(self, embedding: str = EMBEDDING) -> int:
        if isinstance(self._tensors, Answers):
            self._tensors.is_embedding(embedding)
        return super().vocab(embedding)

    def layer(self, kind: type[Any], key: str, index: int, default: Any = REQUIRED, **bounds: Any) -> Any:
        self._note(f"{self.architecture}.{key}", default)
        return super().layer(kind, key, index, default, **bounds)

    def ignores(self, full: str) -> bool:
        """Whether the plugin named the key as one that does not matter."""
        return any(fnmatchcase(full, pattern) for pattern in self._ignored)

    def _get(self, kind: type[Any], full: str, default: Any, minimum: float | None, maximum: float | None) -> Any:
        self._note(full, default)
        return super()._get(kind, full, default, minimum, maximum)

    def _note(self, full: str, default: Any) -> None:
        (self.needed if default is REQUIRED else self.defaulted).add(full)
