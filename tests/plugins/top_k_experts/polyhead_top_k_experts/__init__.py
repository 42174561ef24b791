"""A mixture of experts for polyhead: an architecture, and a layer of its own that polyhead's vocabulary lacks."""

from __future__ import annotations

from polyhead import Architecture, ModuleKind, hookimpl

from .architecture import TopKExpertsArchitecture
from .layer import TopKExperts, load_on_cpu


@hookimpl
def polyhead_register_architectures() -> list[Architecture]:
    return [TopKExpertsArchitecture()]


@hookimpl
def polyhead_register_modules() -> list[ModuleKind]:
    return [ModuleKind(TopKExperts, load_on_cpu)]
