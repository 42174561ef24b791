"""Other values for a case's metadata: near the right ones, so that a plugin has no reason to refuse most of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .subject import Subject


def alterations(subject: Subject) -> Iterator[tuple[str, str, list[Any]]]:
    """(key, what is changed, values to try) for the architecture's own keys; of a list each entry by itself."""
    prefix = f"{subject.case.architecture}."
    for full, value in subject.values.items():
        if not full.startswith(prefix):
            continue
        if not isinstance(value, list):
            yield full, full, _near(value)
            continue
        for index, item in enumerate(value):
            changed = [[*value[:index], other, *value[index + 1 :]] for other in _near(item)]
            yield full, f"{full}[{index}]", changed


def _near(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        others = (value + 1, value - 1, 2 * value, value // 2, 1)
        return [other for other in dict.fromkeys(others) if other >= 0 and other != value]
    if isinstance(value, float):
        return [float(np.float32(other)) for other in (2 * value, value / 2, value + 1) if other != value]
    return [f"{value}x"]
