"""``install`` and ``install_into``: put a plugin package where pip would, so that real entry points lead to it."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HEAD = """
from polyhead import API_VERSION, Architecture, ModuleKind, hookimpl
from polyhead.arch import *
from polyhead_llama_gqa.llama import LlamaGQA
"""
"""What the sources of the tests' plugins start with; a line more or less does not matter to any of them."""


def _install_into(
    site: Path,
    source: str,
    *,
    name: str = "strange",
    distribution: str = "stranger",
    version: str = "1.2",
    value: str | None = None,
) -> None:
    """A distribution with one module ``{name}_module`` and one entry point ``name = value`` (its module)."""
    site.mkdir(exist_ok=True)
    (site / f"{name}_module.py").write_text(HEAD + textwrap.dedent(source))
    info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[polyhead]\n{name} = {value or f'{name}_module'}\n")


@pytest.fixture(scope="session")
def install_into() -> Callable[..., None]:
    """``install_into(folder, source, name=…, distribution=…)``: for a process that gets the folder on its path."""
    return _install_into


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """``install(source, name=…, distribution=…, version=…, value=…)``, gone again after the test."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def make(source: str, **options: str) -> None:
        _install_into(site, source, **options)

    yield make
    for module in [module for module in sys.modules if module.endswith("_module")]:
        del sys.modules[module]
