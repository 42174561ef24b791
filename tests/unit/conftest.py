"""Fixtures of the Python API's tests: a tiny model, which every test must leave idle."""

from __future__ import annotations

import pytest
from polyhead import LLM
from small_llm import RUNTIME, assert_idle


@pytest.fixture(scope="module")
def settings_of(tiny_model):
    def build(**changes: object) -> dict[str, object]:
        return {"model": str(tiny_model("llama-gqa")), "device": "cpu", "runtime": RUNTIME, **changes}

    return build


@pytest.fixture(scope="module")
def shared(settings_of):
    with LLM(settings_of()) as llm:
        yield llm


@pytest.fixture
def llm(shared):
    """A model that every test must leave as it found it."""
    yield shared
    assert_idle(shared)
