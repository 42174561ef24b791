"""Weights from NumPy arrays: those of polyhead.testing, by the name that this project's own tests know them by."""

from __future__ import annotations

from polyhead.testing.memory import Info, MemorySource, random_weights

__all__ = ["Info", "MemorySource", "random_weights"]
