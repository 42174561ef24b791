"""Prompts as users write them: text, token ids, or a list of these, and what goes with each.

Knows nothing of tokenizers or models.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence, Set
from typing import Any

from .engine import SamplingParams
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


def is_one(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Whether what :func:`as_prompts` takes is a single prompt rather than a list of them."""
    return isinstance(prompts, str) or all(map(_is_id, prompts))


def with_params(
    prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams], priority: int | Sequence[int]
) -> list[tuple[Prompt, SamplingParams, int]]:
    """Each prompt with its parameters and priority, of which there are one for all or one for each.

    Raises RequestError if there are too few or too many, or if parameters are something else.
    """
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    if not isinstance(each, Sequence) or not all(isinstance(one, SamplingParams) for one in each):
        raise RequestError(f"params must be SamplingParams or a sequence of them, got {type(params).__name__}")
    if len(each) != len(prompts):
        raise RequestError(f"{len(prompts)} prompts, but {len(each)} sampling parameters")
    ranks = [priority] * len(prompts) if isinstance(priority, int) else list(priority)
    if len(ranks) != len(prompts):
        raise RequestError(f"{len(prompts)} prompts, but {len(ranks)} priorities")
    return list(zip(prompts, each, ranks, strict=True))


def _is_id(item: object) -> bool:
    try:  # not hasattr(): every NumPy array has __index__, whatever its shape
        operator.index(item)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True
