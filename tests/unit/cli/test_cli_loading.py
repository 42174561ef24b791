"""What is said of loading a model."""

from __future__ import annotations

import re
from collections.abc import Callable

from click.testing import Result


def test_verbose_tells_how_fast_it_loaded(invoke: Callable[..., Result], llama: str) -> None:
    found = re.compile(r"loaded \d+\.\d\d GB in \d+\.\d\d s \(\d+\.\d GB/s\)")
    args = ("run", llama, "-p", "a", "-n", "1", "--device", "cpu")
    assert found.search(invoke(*args, "-v").stderr)
    assert not found.search(invoke(*args).stderr)
