"""Llama-style models with grouped-query attention: Llama, Mistral, SmolLM (``llama``) and Qwen2 (``qwen2``)."""

from __future__ import annotations

from polyhead import Architecture, hookimpl

from .llama import LlamaGQA


@hookimpl
def polyhead_register_architectures() -> list[Architecture]:
    return [LlamaGQA()]
