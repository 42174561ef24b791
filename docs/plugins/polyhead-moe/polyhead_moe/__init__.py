"""Mixtures of experts for polyhead: Mixtral, Qwen2-MoE and Qwen3-MoE, on the CPU and on NVIDIA GPUs."""

from __future__ import annotations

from polyhead import Architecture, ModuleKind, hookimpl

from .architectures import MixtralMoe, Qwen2Moe, Qwen3Moe
from .cpu import load_on_cpu
from .cuda import load_on_cuda
from .layer import Experts


@hookimpl
def polyhead_register_architectures() -> list[Architecture]:
    return [MixtralMoe(), Qwen2Moe(), Qwen3Moe()]


@hookimpl
def polyhead_register_modules() -> list[ModuleKind]:
    return [ModuleKind(Experts, cpu=load_on_cpu, cuda=load_on_cuda)]
