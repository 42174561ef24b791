"""What a model takes of a GPU's memory, before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ...arch import Decoder, Rope
from ...errors import CapacityError, ConfigError
from ..contract import RuntimeOptions, WeightSource
from ..masks import mask_words
from ..memory import MemoryPlan, plan_memory
from ..modules import matrix_specs
from ..program import Apply, Attend, Program, Project, lower
from .device import CudaDevice
from .formats import DENSE_TYPES, TILE_ROWS
from .kv_cache import FP8
from .memory import ALIGNMENT
from .ops import attention
from .ops.linear import WIDE_ROWS
from .ops.linear_wide import room_bytes
from .ops.sample import ROW, TOPS
from .ops.sample import scratch_bytes as sampling_scratch
from .weights import STAGING_BYTES, resident_bytes

FEW = 32
"""Rows up to which a projection needs no scratch; beyond, weights may be unpacked, or activations put in order."""
UNPACK = 64 << 20
BLAS_WORKSPACE = 32 << 20
BIASES = 1536
GROWN_STEPS = (2048, 1024)
"""Tokens of a step worth having unasked, best first: beside many decodes, prompts need few such steps."""
GROWN_COST = 1 / 16
"""The part of the KV cache that they may cost, and of a context that is as long as memory allows."""
_ACTIVATIONS = {"auto": "f16", "f16": "f16", "bf16": "bf16"}


def activation_dtype(options: RuntimeOptions) -> str:
    """The dtype of values between layers. Raises ConfigError for one that the GPU runtime does not compute in."""
    if options.activation_dtype not in _ACTIVATIONS:
        raise ConfigError(
            f"runtime.activation_dtype is {options.activation_dtype!r}; the CUDA runtime has {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[options.activation_dtype]


def kv_dtype(options: RuntimeOptions) -> str:
    """The dtype of the KV cache: the activations' unless fp8 is asked for. Raises ConfigError for another."""
    act = activation_dtype(options)
    if options.kv_dtype not in ("auto", act, FP8):
        raise ConfigError(
            f"runtime.kv_dtype is {options.kv_dtype!r}; with {act} activations the CUDA runtime stores auto, {act} "
            f"or {FP8}"
        )
    return act if options.kv_dtype == "auto" else options.kv_dtype


def kv_bytes_per_token(decoder: Decoder, dtype: str) -> int:
    """Bytes that a token takes in the caches of all layers; fp8 has a float32 scale for each K and V of a head."""
    if dtype == FP8:
        return decoder.kv_values_per_token() + sum(2 * 4 * block.attn.kv_heads for block in decoder.blocks)
    return 2 * decoder.kv_values_per_token()


def check(program: Program) -> None:
    """Raises ConfigError for what has no kernels; modules of plugins are not looked at (modules.kinds_of)."""
    for step in program.steps:
        if isinstance(step, Attend) and (
            step.attention.head_dim > attention.MAX_HEAD_DIM or step.attention.head_dim % 2
        ):
            raise ConfigError(
                f"{step.name}: head_dim is {step.attention.head_dim}; the CUDA runtime has kernels for even "
                f"numbers up to {attention.MAX_HEAD_DIM}"
            )


def narrow_bytes(count: int, hidden: int) -> int:
    """Scratch for ``count`` rows of the residual stream in the activations' type, where no norm stands between."""
    return -(-2 * count * hidden // ALIGNMENT) * ALIGNMENT


def unpack_rows(cols: int, rows: int) -> int:
    """Rows of a quantised matrix that are unpacked at a time for cuBLAS."""
    return min(rows, max(TILE_ROWS, UNPACK // (2 * cols) // TILE_ROWS * TILE_ROWS))


def plan(decoder: Decoder, source: WeightSource, options: RuntimeOptions, index: int) -> MemoryPlan:
    """The memory plan of a decoder on GPU ``index``, as it is now. Raises CapacityError when it does not fit."""
    with CudaDevice(index) as device:
        sizes = device.total, device.free(), device.sms
        return plan_program(lower(decoder), lambda name: source.tensors[name].type, options, str(device), *sizes)


def plan_program(
    program: Program, types: Callable[[str], str], options: RuntimeOptions, device: str, total: int, free: int, sms: int
) -> MemoryPlan:
    """The memory plan. ``types`` tells a tensor's stored type. Raises CapacityError when it does not fit.

    Where ``options`` let steps grow they do, unless that costs too much, or is of no use because all sequences together
    are not as long as a step of half the tokens.
    """

    def planned(options: RuntimeOptions) -> MemoryPlan:
        return _plan_as_asked(program, types, options, device, total, free, sms)

    least = planned(options)
    if not options.grow_steps:
        return least
    for tokens in GROWN_STEPS:
        if not options.max_tokens < tokens < 2 * least.max_batch * least.context:
            continue
        try:
            grown = planned(replace(options, max_tokens=tokens))
        except CapacityError:
            continue
        left = min(grown.context / least.context, grown.num_blocks / least.num_blocks)
        if left >= 1 - GROWN_COST:
            return grown
    return least


def _plan_as_asked(
    program: Program, types: Callable[[str], str], options: RuntimeOptions, device: str, total: int, free: int, sms: int
) -> MemoryPlan:
    check(program)
    decoder = program.decoder
    stored = kv_dtype(options)
    token_bytes = kv_bytes_per_token(decoder, stored)
    rows = options.max_batch
    turn_bytes = sum(8 * (rope.dim // 2) for rope in ropes(decoder))
    workspace = program.workspace(options.max_tokens, rows, narrow_bytes=2).size + scratch_bytes(
        program, types, options, sms
    )
    workspace += 2 * sampler_bytes(rows, decoder.vocab)  # one for the step under way, one for the next
    spare_block = options.block_size * token_bytes

    def context_bytes(context: int) -> int:
        tables = 4 * rows * (-(-context // options.block_size) * 2)
        return context * turn_bytes + 2 * 8 * most_seen(rows, decoder.vocab, context) + tables

    return plan_memory(
        device=device,
        total=total,
        free=free,
        memory_fraction=options.memory_fraction,
        weights=resident_bytes(program, types),
        workspace=workspace + spare_block + BLAS_WORKSPACE + STAGING_BYTES,
        kv_bytes_per_token=token_bytes,
        kv_dtype=stored,
        block_size=options.block_size,
        context=options.context,
        model_context=decoder.context,
        max_batch=options.max_batch,
        max_tokens=options.max_tokens,
        max_logit_rows=rows,
        context_bytes=context_bytes,
    )


def packed_scratch(rows: int, cols: int, options: RuntimeOptions) -> int:
    """Scratch of a projection with a quantised matrix: unpacked weights, or activations in another order."""
    if options.max_tokens <= FEW:
        return 0
    return max(2 * cols * unpack_rows(cols, rows), room_bytes(min(options.max_tokens, WIDE_ROWS), cols))


def scratch_bytes(program: Program, types: Callable[[str], str], options: RuntimeOptions, sms: int) -> int:
    """Bytes of scratch that steps share one after the other: unpacked weights, attention's partial results."""
    shapes = {spec.name: spec.shape for spec in program.decoder.tensors()}
    need = 4 * options.max_tokens * program.decoder.hidden
    for step in program.steps:
        if isinstance(step, Project):
            first = narrow_bytes(options.max_tokens, step.src.columns) if step.src.wide else 0
            quantised = [shapes[weight.weight] for weight in step.weights if types(weight.weight) not in DENSE_TYPES]
            need = max(need, first + max((packed_scratch(rows, cols, options) for rows, cols in quantised), default=0))
        elif isinstance(step, Apply):
            hidden = step.src.columns
            first = narrow_bytes(options.max_tokens, hidden) if step.src.wide else 0
            matrices = [spec for spec in matrix_specs(step.module, hidden) if len(spec.shape) == 2]
            packed = [spec.shape for spec in matrices if types(spec.name) not in DENSE_TYPES]
            need = max(need, first + max((packed_scratch(rows, cols, options) for rows, cols in packed), default=0))
        elif isinstance(step, Attend):
            need = max(need, attention.scratch_bytes(step.attention, options.max_batch, sms))
    return need


def sampler_bytes(rows: int, vocab: int) -> int:
    """Bytes of a sampler's arrays, but for the tokens that penalties count, which depend on the context."""
    row = ROW.itemsize + 4 + 8 + 4 * TOPS + 12 * min(BIASES, vocab) + 4 * mask_words(vocab)  # 4 a token, 8 its result
    return rows * row + sampling_scratch(rows, vocab)


def most_seen(rows: int, vocab: int, context: int) -> int:
    """Distinct tokens of all sequences together that penalties may have to know."""
    return rows * min(vocab, context)


def ropes(decoder: Decoder) -> list[Rope]:
    """The different rotary embeddings of a model's layers."""
    return list(dict.fromkeys(block.attn.rope for block in decoder.blocks if block.attn.rope is not None))
