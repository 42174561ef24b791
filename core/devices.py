"""Which runtime a device name means, and loading a model there. Runtimes are imported when first used."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from .errors import ConfigError

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
    if name == "cpu":
        return "cpu", "cpu"
    from .runtime.cuda.probe import MINIMUM_CC, probe, require_device

    if name.startswith("cuda"):
        index = int(name.partition(":")[2] or 0)
        return f"cuda:{index}", f"cuda:{index} ({require_device(index).name})"
    found = probe()
    usable = next((info for info in found.devices if info.cc >= MINIMUM_CC), None)
    if usable is None:
        return "cpu", f"cpu (device: auto; {found.problem or 'the GPUs here are too old'})"
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.core") is None:
        return "cpu", f"cpu (device: auto; to use the {usable.name}: pip install 'polyhead[cu13]')"
    return f"cuda:{usable.index}", f"cuda:{usable.index} ({usable.name})"


def runtime_options(config: RunConfig) -> RuntimeOptions:
    """The runtime's part of a configuration."""
    from .runtime.contract import MAX_TOKENS, RuntimeOptions

    runtime = config.runtime
    return RuntimeOptions(
        context=runtime.context,
        kv_dtype=runtime.kv_dtype,
        activation_dtype=runtime.activation_dtype,
        max_batch=runtime.max_batch,
        max_tokens=runtime.max_tokens_per_step or MAX_TOKENS,
        grow_steps=runtime.max_tokens_per_step is None,
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


def plan(device: str, decoder: Decoder, source: WeightSource, options: RuntimeOptions) -> MemoryPlan:
    """The memory plan on a resolved device, before anything is allocated; of ``source`` only types are looked at.

    Raises CapacityError when it does not fit.
    """
    check_context(decoder, options)
    if device == "cpu":
        from .runtime.cpu.plan import plan as plan_cpu

        return plan_cpu(decoder, options)
    from .runtime.cuda.plan import plan as plan_cuda

    return plan_cuda(decoder, source, options, _index(device))


def load(
    device: str,
    decoder: Decoder,
    source: WeightSource,
    options: RuntimeOptions,
    kinds: Mapping[type[Module], ModuleKind],
    progress: Callable[[int, int], None] | None = None,
) -> LoadedModel:
    """Puts a model on a resolved device. ``progress`` is told (bytes done, bytes in all)."""
    check_context(decoder, options)
    if device == "cpu":
        from .runtime.cpu.model import CpuModel

        return CpuModel(decoder, source, options, kinds, progress)
    from .runtime.cuda.model import CudaModel

    return CudaModel(decoder, source, options, progress, index=_index(device), kinds=kinds)


def _index(device: str) -> int:
    return int(device.partition(":")[2])
