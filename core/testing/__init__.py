"""The conformance kit for plugin authors: subclass ConformanceTests in a test file and run pytest.

Works on a tiny random model made from the plugin's own Decoder. pytest is needed for ConformanceTests alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .case import Case
from .files import make_model
from .memory import MemorySource, random_weights

if TYPE_CHECKING:
    from .conformance import ConformanceTests

__all__ = ["Case", "ConformanceTests", "MemorySource", "make_model", "random_weights"]


def __getattr__(name: str) -> object:
    if name != "ConformanceTests":
        raise AttributeError(f"module 'polyhead.testing' has no attribute {name!r}")
    try:
        import pytest  # noqa: F401
    except ImportError as error:
        raise ImportError("polyhead.testing.ConformanceTests needs pytest: pip install pytest") from error
    from .conformance import ConformanceTests

    return ConformanceTests
