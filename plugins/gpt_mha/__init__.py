"""GPT-style models with multi-head attention: GPT-2 (``gpt2``) and GPT-NeoX (``gptneox``)."""

from __future__ import annotations

from polyhead import Architecture, hookimpl

from .gpt2 import GPT2
from .gptneox import GPTNeoX


@hookimpl
def polyhead_register_architectures() -> list[Architecture]:
    return [GPT2(), GPTNeoX()]
