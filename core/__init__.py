"""polyhead runs GGUF language models on NVIDIA GPUs from pure Python, with architectures as plugins.

The names below load on first use, so that ``import polyhead`` stays light and touches no device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if __name__ == "core":
    raise ImportError("the folder core/ is the package polyhead: install it (pip install -e .) and import polyhead")

if TYPE_CHECKING:
    from .architecture import API_VERSION, Architecture
    from .async_llm import AsyncLLM
    from .engine.sampling import SamplingParams
    from .errors import PolyheadError
    from .generation import Delta, TokenLogprob
    from .hookspecs import hookimpl
    from .llm import LLM, Completion
    from .runtime.modules import CpuModule, ModuleKind

__version__ = "0.1.0"

_HOMES = {
    "API_VERSION": "architecture",
    "Architecture": "architecture",
    "AsyncLLM": "async_llm",
    "Completion": "llm",
    "CpuModule": "runtime.modules",
    "Delta": "generation",
    "LLM": "llm",
    "ModuleKind": "runtime.modules",
    "PolyheadError": "errors",
    "SamplingParams": "engine.sampling",
    "TokenLogprob": "generation",
    "hookimpl": "hookspecs",
}

__all__ = [
    "API_VERSION",
    "LLM",
    "Architecture",
    "AsyncLLM",
    "Completion",
    "CpuModule",
    "Delta",
    "ModuleKind",
    "PolyheadError",
    "SamplingParams",
    "TokenLogprob",
    "__version__",
    "hookimpl",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'polyhead' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{home}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
