"""How decode attention is spread over a GPU: the shape of a block, and into how many pieces a context falls.

Knows nothing of arrays and launches nothing. Grids follow from shapes and bounds; how long a context is, the kernel
sees itself, so a captured launch serves all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from ....arch import Attention

#: The most pieces of a context that are added up: MOST_SPLITS of kernels/attention_combine.cuh.
MAX_SPLITS = 128

_TILE = 16  # keys that a warp takes at a time
_GROUP = 8  # query heads of a KV head that a block serves
_LEAST = 256  # keys that are worth a block, where there are blocks to spare
_SINGLE = 512  # keys up to which adding up costs more than a second block saves
_LONG = 2048  # keys that are worth a block where there are enough without splitting
_SPREAD = 32  # blocks that a long context may have among many others: enough to read most of what memory gives
_COMBINED = 256 << 10  # bytes of partial results per KV head that one block should have to add up
_SHAPES = ((8, 2), (4, 2), (2, 2), (2, 1))  # warps, and tiles in the ring of each; the first that fits
_LARGE = (12, 2)  # where blocks are few, each must read as much as a multiprocessor can
_FEW = 4  # multiprocessors for each block make them few
_LARGE_HEAD = 128  # components for which a large block has registers
_RESIDENT = 4  # blocks on a multiprocessor at most


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """``warps`` of a block, ``stages`` of a warp's ring of tiles.

    A context of up to ``single`` keys is not split, others into at most ``most`` pieces of at least ``least`` keys. So
    a row's result depends on the rows beside it and on the bound on contexts only through the plan.
    """

    warps: int
    stages: int
    single: int
    least: int
    most: int

    def splits(self, spec: Attention, max_context: int) -> int:
        """The most pieces that a context of up to ``max_context`` falls into."""
        span = max_context if spec.window is None else min(max_context, spec.window + _TILE - 1)
        tiles = -(-span // _TILE)
        return 1 if tiles * _TILE <= self.single else min(self.most, -(-tiles // (self.least // _TILE)))


def choose_plan(
    spec: Attention, rows: int, sms: int, shared_limit: int, value_bytes: int, *, fixed: bool = False
) -> DecodePlan:
    """A plan for ``rows`` sequences on a device of so many multiprocessors, with so much shared memory for a block.

    ``value_bytes`` is the size of a component in the cache. ``fixed``: the same plan for any number of rows.
    """
    rows = 1 if fixed else rows
    blocks = counters(spec, rows)
    shapes: tuple[tuple[int, int], ...] = _SHAPES
    if not fixed and _FEW * blocks <= sms and spec.head_dim <= _LARGE_HEAD:
        shapes = (_LARGE, *_SHAPES)
    elif blocks > sms:
        shapes = _SHAPES[1:]  # many small blocks hide each other's latency
    # Room for a block of the next projection (linear_one.py), which begins to fetch its weights while this one runs.
    # Where blocks are few, how fast each can read decides: a large one may have all of it.
    beside = shared_limit // 2 - 2048
    fitting = [(*shape, _room(spec.head_dim, value_bytes, *shape)) for shape in shapes]
    warps, stages, room = next(
        (shape for shape in fitting if shape[2] <= (shared_limit if shape[:2] == _LARGE else beside)),
        next(
            (shape for shape in fitting if shape[2] <= shared_limit), fitting[-1]
        ),  # a launch will say what is missing
    )
    by_registers = (16 if spec.head_dim <= 64 else 12 if spec.head_dim <= 128 else 8) // warps
    resident = max(1, min(_RESIDENT, by_registers, (shared_limit + 1024) // (room + 1024)))
    natural = max(1, min(sms * resident // blocks, _most(spec)))
    if natural >= _spread(spec):
        return DecodePlan(warps, stages, _SINGLE, _LEAST, natural)
    least = max(_LEAST, _LONG // natural)
    return DecodePlan(warps, stages, max(_SINGLE, least), least, _spread(spec))


def scratch_bytes(spec: Attention, max_rows: int, sms: int, *, fixed: bool = False) -> int:
    """Bytes that suffice for the partial results of up to ``max_rows`` rows, whatever the context."""
    slots = _RESIDENT * sms
    if fixed:
        return counters(spec, max_rows) * min(_most(spec), max(1, slots // counters(spec, 1))) * partial_bytes(spec)
    return max(slots, counters(spec, max_rows) * _spread(spec)) * partial_bytes(spec)


def counters(spec: Attention, max_rows: int) -> int:
    """How many counters suffice for up to ``max_rows`` rows: one for each block of a row's queries."""
    return max_rows * spec.kv_heads * parts(spec)[0]


def parts(spec: Attention) -> tuple[int, int]:
    """Blocks that share a KV head's query heads, and the most heads of one."""
    per_kv = spec.heads // spec.kv_heads
    count = -(-per_kv // _GROUP)
    group = -(-per_kv // count)
    return -(-per_kv // group), group


def partial_bytes(spec: Attention) -> int:
    """Of one block's result: accumulator, maximum and sum of each head."""
    return 4 * parts(spec)[1] * (-(-spec.head_dim // 4) * 4 + 4)


def decode_shared_bytes(head_dim: int, value_bytes: int, warps: int, stages: int) -> int:
    """Dynamic shared memory of the decode kernel: DYNAMIC of kernels/attention_decode.cu."""
    chunks = -(-head_dim * value_bytes // 16)
    k_pitch, v_pitch = -(-chunks // 4) * 4, chunks if chunks % 8 == 0 else chunks | 1
    tile = _TILE * (k_pitch + v_pitch) + (8 if value_bytes == 1 else 0)
    step = 64 if value_bytes == 1 else 16
    merge = _GROUP * (-(-head_dim // step) * step + 4) * 4
    return warps * max(16 * stages * tile, merge)


def _room(head_dim: int, value_bytes: int, warps: int, stages: int) -> int:
    """Shared memory of a block, what is not dynamic included."""
    static = 4 * MAX_SPLITS * _GROUP + 64 * warps + 64 + head_dim * (16 + 4 + 4 * warps) + 1024
    return decode_shared_bytes(head_dim, value_bytes, warps, stages) + static


def _spread(spec: Attention) -> int:
    return -(-_SPREAD // counters(spec, 1))


def _most(spec: Attention) -> int:
    return min(MAX_SPLITS, max(_SPREAD, _COMBINED // partial_bytes(spec)))
