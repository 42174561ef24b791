"""What a model takes of this machine's memory on the CPU runtime, before anything is allocated."""

from __future__ import annotations

from pathlib import Path

from ...arch import Decoder, Rope
from ...errors import ConfigError
from ..contract import RuntimeOptions
from ..memory import MemoryPlan, plan_memory
from ..program import Program, lower
from .attention import scratch_bytes
from .kv_cache import storage_dtype
from .weights import resident_bytes

# Pages of the cache are committed when first written, yet a plan should not promise memory nobody will use.
KV_TOKENS_CAP = 16384


def plan(decoder: Decoder, options: RuntimeOptions) -> MemoryPlan:
    """The memory plan of a decoder on this machine. Raises CapacityError when it does not fit."""
    return plan_program(lower(decoder), options)


def plan_program(program: Program, options: RuntimeOptions) -> MemoryPlan:
    """As :func:`plan`, for a decoder that is lowered already."""
    decoder = program.decoder
    if options.activation_dtype not in ("auto", "f32"):
        raise ConfigError(f"runtime.activation_dtype is {options.activation_dtype!r}; the CPU runtime computes in f32")
    total, free = _system_memory()
    rows = max(options.max_batch, 1)
    rope_bytes = sum(8 * (rope.dim // 2) for rope in ropes(decoder))
    attentions = [block.attn for block in decoder.blocks]
    product = 4 * options.max_tokens * decoder.hidden  # before it is added to the residual stream
    return plan_memory(
        device="cpu",
        total=total,
        free=free,
        memory_fraction=options.memory_fraction,
        weights=resident_bytes(program),
        workspace=program.workspace(options.max_tokens, rows).size + product,
        kv_bytes_per_token=decoder.kv_values_per_token() * storage_dtype(options.kv_dtype).itemsize,
        kv_dtype=storage_dtype(options.kv_dtype).name.replace("float", "f"),
        block_size=options.block_size,
        context=options.context,
        model_context=decoder.context,
        max_batch=options.max_batch,
        max_tokens=options.max_tokens,
        max_logit_rows=rows,
        kv_tokens_cap=KV_TOKENS_CAP,
        context_bytes=lambda context: context * rope_bytes + max(scratch_bytes(spec, context) for spec in attentions),
    )


def ropes(decoder: Decoder) -> list[Rope]:
    """The different rotary embeddings of a model's layers."""
    return list(dict.fromkeys(block.attn.rope for block in decoder.blocks if block.attn.rope is not None))


def _system_memory() -> tuple[int, int]:
    """Bytes of this machine: all, and available without swapping; a container's limit counts as the machine."""
    values = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
    total, available = (int(values[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            limit, used = Path(limit_file).read_text().strip(), int(Path(used_file).read_text())
        except (OSError, ValueError):
            continue
        if limit.isdigit() and int(limit) < total:
            total, available = int(limit), max(0, min(available, int(limit) - used))
    return total, available
