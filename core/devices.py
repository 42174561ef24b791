"""Which runtime a device name means, and loading a model there. Runtimes are imported when first used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from .errors import ConfigError, DeviceError

if TYPE_CHECKING:
    from .arch import Decoder, Module
    from .config import RunConfig
    from .runtime.contract import LoadedModel, RuntimeOptions, WeightSource
    from .runtime.memory import MemoryPlan
    from .runtime.modules import ModuleKind


def resolve_device(name: str) -> tuple[str, str]:
    """The device that ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` stands for, and a remark for the user.

    Raises DeviceError where a GPU is asked for and cannot be used: asking for one never falls back to the CPU.
    """
    if name.startswith("cuda"):
        raise DeviceError(f"device {name}: this version of polyhead has no CUDA runtime; set device: cpu")
    if name == "auto":
        return "cpu", "cpu (device: auto; this version of polyhead has no CUDA runtime)"
    return "cpu", "cpu"


def runtime_options(config: RunConfig) -> RuntimeOptions:
    """The runtime's part of a configuration."""
    from .runtime.contract import RuntimeOptions

    runtime = config.runtime
    return RuntimeOptions(
        context=runtime.context,
        kv_dtype=runtime.kv_dtype,
        activation_dtype=runtime.activation_dtype,
        max_batch=runtime.max_batch,
        max_tokens=runtime.max_tokens_per_step,
        block_size=runtime.block_size,
        memory_fraction=runtime.memory_fraction,
        deterministic=runtime.deterministic,
        threads=runtime.threads,
    )


def check_context(decoder: Decoder, options: RuntimeOptions) -> None:
    """Raises ConfigError for a context beyond the positions a model was made for."""
    if options.context is not None and options.context > decoder.context:
        raise ConfigError(
            f"runtime.context is {options.context:,}, but the model was made for {decoder.context:,} positions"
        )


def plan(device: str, decoder: Decoder, options: RuntimeOptions) -> MemoryPlan:
    """The memory plan of a decoder on a resolved device, before anything is allocated. Raises CapacityError."""
    from .runtime.cpu.plan import plan as plan_cpu

    check_context(decoder, options)
    return plan_cpu(decoder, options)


def load(
    device: str,
    decoder: Decoder,
    source: WeightSource,
    options: RuntimeOptions,
    kinds: Mapping[type[Module], ModuleKind],
    progress: Callable[[int, int], None] | None = None,
) -> LoadedModel:
    """Puts a model on a resolved device. ``progress`` is told (bytes done, bytes in all)."""
    from .runtime.cpu.model import CpuModel

    check_context(decoder, options)
    return CpuModel(decoder, source, options, kinds, progress)
