"""Logits to tokens on the device: launches kernels/sample*.cu, which do what cpu/sampler.py says.

Knows nothing of SamplingRow: rows come packed as ``ROW`` records (see ..sampler), lists as flat arrays. Nothing here
allocates or waits, and grids depend on shapes only, so a captured graph may be replayed with other rows.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from ....errors import DeviceError
from ...masks import mask_words
from ..context import Context
from ..memory import Array
from ..variants import Variant

#: One row's parameters; the kernels' Params. Field by field:
#: cooling: 1 / temperature, 0 for greedy. counts_recent: 1 if recent[row] counts as one more token of the output.
#: mask_start: where its mask begins in ``masks``, in words; -1: none. top_k 0: off. logprobs -1: none. The lists are
#: ranges of the arrays that all rows share.
ROW = np.dtype(
    [
        ("cooling", "f8"),
        ("top_p", "f8"),
        ("min_p", "f8"),
        ("repetition", "f8"),
        ("presence", "f8"),
        ("frequency", "f8"),
        ("seed", "u8"),
        ("mask_start", "i8"),
        ("position", "i4"),
        ("counts_recent", "i4"),
        ("top_k", "i4"),
        ("logprobs", "i4"),
        ("seen_start", "i4"),
        ("seen_count", "i4"),
        ("bias_start", "i4"),
        ("bias_count", "i4"),
    ]
)

#: Fills a ROW field by field, which is far faster than NumPy's way from tuples.
PACK_ROW = struct.Struct(
    "=" + "".join({"f8": "d", "u8": "Q", "i8": "q", "i4": "i"}[ROW[name].str[1:]] for name in ROW.names or ())
)
assert PACK_ROW.size == ROW.itemsize

#: The most log-probabilities of a row.
TOP = 20
#: int32 words of a row of ``tops``.
TOPS = 4 + 2 * TOP
#: What a row's status says. The kernels give a row with a problem the token 0.
OK, NAN, INFINITE, EMPTY, BANNED = range(5)

_BLOCK = 512
_BINS = 1024
_CAPACITY = 2048
_FEW, _MANY = 4, 8  # values per thread
_ROW_BYTES = 72 + 12 * _BINS + 12 * _CAPACITY
_CHUNK_BYTES = 40 + 8 * TOP
#: A row has as many chunks as a block has threads, at most.
MAX_VOCAB = _BLOCK * _BLOCK * _FEW

_MACROS = {
    items: MappingProxyType(
        {
            "PH_BLOCK": _BLOCK,
            "PH_ITEMS": items,
            "PH_BINS": _BINS,
            "PH_CAPACITY": _CAPACITY,
            "PH_TOP": TOP,
            "PH_PARAMS_BYTES": ROW.itemsize,
            "PH_ROW_BYTES": _ROW_BYTES,
            "PH_CHUNK_BYTES": _CHUNK_BYTES,
        }
    )
    for items in (_FEW, _MANY)
}
_FILES = {
    "sample.cu": ("sample_max", "sample_weigh"),
    "sample_cut.cu": ("sample_cut",),
    "sample_logprobs.cu": ("sample_logprobs",),
}

VARIANTS = tuple(
    Variant(file, kernels, macros, hot=True) for macros in _MACROS.values() for file, kernels in _FILES.items()
)


@dataclass(frozen=True, slots=True)
class SampleArrays:
    """What the kernels read and write, for up to R rows.

    Read: ``rows`` u8 [R, ROW.itemsize]; ``seen_ids`` and ``seen_counts`` i32, distinct token ids of a generation and
    how often each is in its output; ``bias_ids`` i32 and ``bias_values`` i64 (the bits of float64); ``masks`` u32
    [R, mask_words(vocab)], bit t % 32 of a mask's word t // 32 set where token t may be chosen; ``recent`` i32 [R], see
    ROW; it may be ``tokens`` itself. Written: ``tokens`` i32 [R]; ``results`` i32 [R, 2], token and status;
    ``tops`` i32 [R, TOPS], see sample_logprobs.cu. ``scratch`` u8 [scratch_bytes(R, vocab)], zero before its first use.
    """

    rows: Array
    seen_ids: Array
    seen_counts: Array
    bias_ids: Array
    bias_values: Array
    masks: Array
    recent: Array
    tokens: Array
    results: Array
    tops: Array
    scratch: Array


def scratch_bytes(max_rows: int, vocab: int) -> int:
    """Bytes of scratch memory for up to ``max_rows`` rows of a vocabulary."""
    return max_rows * _stride(vocab)


def sample(
    ctx: Context, logits: Array, arrays: SampleArrays, *, draws: bool = True, filters: int = 2, logprobs: bool = True
) -> None:
    """A token for each row of ``logits``, f32 [M, vocab], which stay as they are.

    What no row needs may be left out: ``draws``: some row has a temperature; ``filters``: how many of top-k and top-p
    the row with the most of them has; ``logprobs``: some row wants them. One kernel, and one more for each of these.
    Raises DeviceError naming shapes that do not go together.
    """
    _check(logits, arrays, filters)
    rows, vocab = logits.shape
    few = rows * -(-vocab // (_BLOCK * _MANY)) < ctx.device.sms  # rather more blocks than more work for each
    items = _FEW if few or vocab <= _BLOCK * _FEW else _MANY
    grid = (-(-vocab // (_BLOCK * items)), rows, 1)
    kernels = ["sample_max"]
    if draws:
        kernels += ["sample_weigh"] + ["sample_cut"] * filters
    if logprobs:
        kernels.append("sample_logprobs")
    arguments = (
        logits,
        vocab,
        arrays.rows,
        arrays.seen_ids,
        arrays.seen_counts,
        arrays.bias_ids,
        arrays.bias_values,
        arrays.masks,
        arrays.recent,
        arrays.scratch,
        np.int64(_stride(vocab)),
        arrays.tokens,
        arrays.results,
        arrays.tops,
    )
    for kernel in kernels:
        file = next(file for file, names in _FILES.items() if kernel in names)
        ctx.launch(file, kernel, grid, _BLOCK, *arguments, macros=_MACROS[items])


def _stride(vocab: int) -> int:
    return _ROW_BYTES + _CHUNK_BYTES * -(-vocab // (_BLOCK * _FEW))


def _check(logits: Array, arrays: SampleArrays, filters: int) -> None:
    if len(logits.shape) != 2 or logits.dtype != "f32" or not all(logits.shape):
        raise DeviceError(f"sample wants logits f32[rows, vocab], got {logits}")
    rows, vocab = logits.shape
    if vocab > MAX_VOCAB:
        raise DeviceError(f"sample knows vocabularies of up to {MAX_VOCAB:,} tokens, not {vocab:,}")
    if filters not in (0, 1, 2):
        raise DeviceError(f"sample has two filters, top-k and top-p, not {filters}")
    wanted = {
        "rows": ("u8", (ROW.itemsize,)),
        "masks": ("u32", (mask_words(vocab),)),
        "recent": ("i32", ()),
        "tokens": ("i32", ()),
        "results": ("i32", (2,)),
        "tops": ("i32", (TOPS,)),
    }
    for name, (dtype, tail) in wanted.items():
        array: Array = getattr(arrays, name)
        if array.dtype != dtype or array.shape[1:] != tail or not array.shape or array.shape[0] < rows:
            raise DeviceError(f"sample wants {name} {dtype}{[rows, *tail]} for {logits}, got {array}")
    for ids, values, dtype in (("seen_ids", "seen_counts", "i32"), ("bias_ids", "bias_values", "i64")):
        first: Array = getattr(arrays, ids)
        second: Array = getattr(arrays, values)
        if first.dtype != "i32" or second.dtype != dtype or first.shape != second.shape:
            raise DeviceError(f"sample wants {ids} i32[n] and {values} {dtype}[n], got {first} and {second}")
    if arrays.scratch.nbytes < scratch_bytes(rows, vocab):
        raise DeviceError(
            f"sample needs {scratch_bytes(rows, vocab):,} bytes of scratch for {logits}, got {arrays.scratch}"
        )
