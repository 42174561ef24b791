"""Prompts as users write them: text, token ids, or a list of these.

Knows nothing of tokenizers or models.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence, Set
from typing import Any

from .errors import RequestError

Prompt = str | Sequence[int]


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts; a single string or list of ids is one. Raises RequestError for what is no prompt."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, bytes | bytearray | Mapping | Set) or not hasattr(prompts, "__len__"):
        raise RequestError(f"prompts must be a string, token ids, or a list of these, got {type(prompts).__name__}")
    try:
        items: list[Any] = list(prompts)
    except TypeError:  # a NumPy array without dimensions
        raise RequestError(f"prompts must be a string, token ids, or a list of these, got {prompts!r}") from None
    for item in items:
        if isinstance(item, bytes | bytearray | Mapping | Set):
            raise RequestError(f"a prompt must be a string or a list of token ids, got {type(item).__name__}")
    if items and all(map(_is_id, items)):
        return [items]
    if not items:
        raise RequestError("the list of prompts is empty; give at least one prompt")
    return items


def _is_id(item: object) -> bool:
    try:  # not hasattr(): every NumPy array has __index__, whatever its shape
        operator.index(item)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True
