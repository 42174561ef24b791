"""The layout of quantised weights on the GPU, emulated: packed by its definition, read as a warp's lanes read it.

The tensor core is emulated by the fragment layout of the PTX ISA (mma.m16n8k16), so a product that agrees with the
dequantised weights shows that layout, fragments and scales fit together. tests/gpu holds the kernels against the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from polyhead.errors import DeviceError
from polyhead.gguf.blocks import BLOCK_TYPES
from polyhead.runtime.cuda.formats import (
    FORMATS,
    Format,
    ScaleKind,
    matrix_bytes,
    plane_bytes,
    raw_bytes,
    units,
)
from random_blocks import random_blocks

from gguf import GGMLQuantizationType, quants

LANE = np.arange(32)
G, T = LANE >> 2, LANE & 3
TABLES = {
    1: (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    2: (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12),
}
Ints = NDArray[Any]


@dataclass
class Parts:
    """Blocks taken apart: codes [rows, cols], integer scales and minima [rows, groups], d and dmin [rows, blocks]."""

    codes: Ints
    scales: Ints
    minima: Ints
    d: NDArray[np.float32]
    dmin: NDArray[np.float32]


def half(blocks: NDArray[np.uint8], at: int) -> NDArray[np.uint16]:
    return np.ascontiguousarray(blocks[..., at : at + 2]).view("<u2")[..., 0]


def nibbles(data: Ints, run: int) -> Ints:
    """``run`` bytes hold run weights in their low halves and the next run in their high ones."""
    runs = data.reshape(*data.shape[:-1], -1, 1, run)
    return (np.concatenate([runs, runs >> 4], -2) & 15).reshape(*data.shape[:-1], -1)


def take_apart(form: Format, raw: NDArray[np.uint8]) -> Parts:
    """By the definition of the GGUF types (ggml's structs)."""
    size, rows, at = form.raw.weights, len(raw), form.raw
    b = raw.reshape(rows, -1, at.nbytes)
    low, high = (b[..., begin:].astype(np.int64) for begin in (at.low, at.high))
    groups, zero = size // form.group, np.zeros((rows, b.shape[1], size // form.group), np.int64)
    scales, minima = zero + 1, zero
    shifts = np.arange(8)
    if form.name == "Q8_0":
        codes = low[..., :32] ^ 128
    elif form.low == 2:
        pieces = low[..., :64].reshape(rows, -1, 2, 1, 32) >> (2 * shifts[:4])[:, None]
        codes = (pieces & 3).reshape(rows, -1, 256)
    elif form.name == "Q6_K":
        two = high[..., :64].reshape(rows, -1, 2, 1, 32) >> (2 * shifts[:4])[:, None]
        codes = nibbles(low[..., :128], 64) | (two & 3).reshape(rows, -1, 256) << 4
    else:
        codes = nibbles(low[..., : size // 2], 32 if form.name in ("Q4_K", "Q5_K") else 16)
    if form.high == 1:
        if size == 32:
            bits = (high[..., :4, None] >> shifts).reshape(rows, -1, 32) & 1
        else:
            bits = (high[..., None, :32] >> shifts[:, None]).reshape(rows, -1, 256) & 1
        codes |= bits << form.low
    s = b[..., at.scales :].astype(np.int64)
    if form.scales is ScaleKind.SIX_MIN:
        first, second, third = s[..., :4], s[..., 4:8], s[..., 8:12]
        scales = np.concatenate([first & 63, (third & 15) | (first >> 6) << 4], -1)
        minima = np.concatenate([second & 63, third >> 4 | (second >> 6) << 4], -1)
    elif form.scales is ScaleKind.INT8:
        scales = s[..., :16] ^ 128
    elif form.scales is ScaleKind.SIX_16:
        top = (s[..., None, 8:12] >> (2 * shifts[:4])[:, None]).reshape(rows, -1, 16) & 3
        scales = nibbles(s[..., :8], 8) | top << 4
    elif form.scales is ScaleKind.FOUR_MIN:
        scales, minima = s[..., :16] & 15, s[..., :16] >> 4
    elif form.scales is ScaleKind.SIX:
        scales = nibbles(s[..., 2:6], 1) | (half(b, at.scales).astype(np.int64)[..., None] >> 2 * shifts & 3) << 4
    elif form.scales is ScaleKind.E8M0:
        scales = b[..., :1].astype(np.int64)
    elif form.scales is ScaleKind.F16_MIN:
        minima = zero + 1
    d = half(b, at.d).view(np.float16).astype(np.float32)
    dmin = half(b, at.minimum).view(np.float16).astype(np.float32)
    if form.scales is ScaleKind.F16_MIN:
        dmin = -dmin
    return Parts(
        codes.reshape(rows, -1),
        scales.reshape(rows, -1, groups).reshape(rows, -1),
        minima.reshape(rows, -1, groups).reshape(rows, -1),
        d,
        dmin,
    )


def column_in_group(form: Format, s: int, t: Ints, i: int) -> Ints:
    return 16 * s + 4 * t + i if form.group == 16 else 8 * t + 4 * s + i


def low_place(form: Format, step: int, r: int, p: int) -> tuple[int, int]:
    """Word and first bit of the low bits of fragment register r, half p."""
    if form.low == 8:
        return 2 * step + (r >> 1), 16 * (r & 1) + 8 * p
    if form.table:
        return step, 8 * r + 4 * p
    steps = 2 if form.low == 2 else 1
    return step // steps, 4 * (r & 1) + 16 * p + form.low * (step % steps) + 8 * (r >> 1)


def high_place(form: Format, step: int, r: int, p: int) -> tuple[int, int]:
    steps = 2 if form.high == 2 else 4
    turn = 2 * (step % steps) if form.high == 2 else step % steps - (2 if form.low == 2 else 0)
    return step // steps, (form.low + 4 * (r & 1) + 16 * p + turn + 8 * (r >> 1)) % 32


def pack(form: Format, codes: Ints) -> dict[str, NDArray[np.uint32]]:
    """A unit's codes [16, 256] as planes of words, [vector, lane, 4]."""
    planes = {}
    for name, bits, place, shift in (("low", form.low, low_place, 0), ("high", form.high, high_place, form.low)):
        words = np.zeros((4 * bits, 32), np.uint64)
        taken = np.zeros(4 * bits, np.uint64)
        for step in range(16 if bits else 0):
            for r in range(4):
                for p in range(2):
                    word, bit = place(form, step, r, p)
                    column = 32 * (step // 2) + column_in_group(form, step & 1, T, 2 * (r >> 1) + p)
                    code = codes[G + 8 * (r & 1), column].astype(np.uint64) >> np.uint64(shift)
                    words[word] |= (code & np.uint64(2**bits - 1)) << np.uint64(bit)
                    assert not taken[word] >> np.uint64(bit) & np.uint64(2**bits - 1), "two codes share a bit"
                    taken[word] |= np.uint64(2**bits - 1) << np.uint64(bit)
        assert (taken == 2**32 - 1).all(), "a bit is not used, or a code leaves its word"
        planes[name] = words.reshape(bits, 4, 32).transpose(0, 2, 1).astype(np.uint32)
    return planes


def turn_right(w: Ints, bits: int) -> Ints:
    w, bits = w.astype(np.uint64), bits % 32
    return ((w >> np.uint64(bits)) | (w << np.uint64(32 - bits))) & np.uint64(0xFFFFFFFF)


def fragment(form: Format, planes: dict[str, NDArray[np.uint32]], step: int) -> NDArray[np.float64]:
    """The lanes' a registers [32, 4, 2] as numbers, with the kernel's masks and rotations: float16 subnormals."""
    low, high = (planes[name].transpose(0, 2, 1).reshape(-1, 32) for name in ("low", "high"))
    a = np.zeros((32, 4), np.uint64)
    if form.table or form.low == 8:
        for r in range(4):
            for p in range(2):
                word, bit = low_place(form, step, r, p)
                byte = low[word].astype(np.uint64) >> np.uint64(bit) & np.uint64(255 if form.low == 8 else 15)
                if form.table:
                    byte = (np.array(TABLES[form.table]) + 128)[byte.astype(int)].astype(np.uint64)
                a[:, r] |= byte << np.uint64(16 * p)
    else:
        steps = 2 if form.low == 2 else 1
        for r in range(4):
            up, turn = 4 * (r & 1), 8 * (r >> 1)
            mask = np.uint64(((1 << form.low) - 1) * 0x00010001 << up)
            a[:, r] = turn_right(low[step // steps], form.low * (step % steps) + turn) & mask
            if form.high:
                steps_high = 2 if form.high == 2 else 4
                i = step % steps_high
                amount = (2 * i if form.high == 2 else i - (2 if form.low == 2 else 0)) + turn
                mask = np.uint64(((1 << form.high) - 1) * 0x00010001 << (form.low + up))
                a[:, r] |= turn_right(high[step // steps_high], amount) & mask
    return a.astype(np.uint32).view(np.float16).reshape(32, 4, 2).astype(np.float64)


def mma(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """The product [16, 8] of fragments a [32, 4, 2] and b [32, 2, 2] (PTX ISA, m16n8k16)."""
    left, right = np.zeros((16, 16)), np.zeros((16, 8))
    for r in range(4):
        for p in range(2):
            left[G + 8 * (r & 1), 2 * T + p + 8 * (r >> 1)] = a[:, r, p]
    for r in range(2):
        for p in range(2):
            right[2 * T + p + 8 * r, G] = b[:, r, p]
    return left @ right


def weight_scales(form: Format, parts: Parts, row: Ints, group: Ints) -> tuple[Any, Any]:
    """Scale and minimum of (row, group) in float64."""
    block = group * form.group // form.raw.weights
    scale = parts.scales[row, group].astype(np.float64)
    if form.scales is ScaleKind.E8M0:
        return np.ldexp(1.0, (scale - 128).astype(int)), 0.0
    shift = {ScaleKind.INT8: 128, ScaleKind.SIX_16: 32, ScaleKind.SIX: 32}.get(form.scales, 0)
    has_minimum = form.scales in (ScaleKind.F16_MIN, ScaleKind.SIX_MIN, ScaleKind.FOUR_MIN)
    minimum = parts.minima[row, group] * parts.dmin[row, block].astype(np.float64) if has_minimum else 0.0
    return (scale - shift) * parts.d[row, block], minimum


def blocks_of(kind: str, rows: int, cols: int) -> NDArray[np.uint8]:
    return random_blocks(np.random.PCG64(rows + cols), (rows, cols), kind, 0.02)


@pytest.mark.parametrize("kind", FORMATS)
def test_blocks_taken_apart_are_the_reference_decoder_s_values(kind: str) -> None:
    form, raw = FORMATS[kind], blocks_of(kind, 5, 768)
    parts = take_apart(form, raw)
    row, group = np.meshgrid(np.arange(5), np.arange(768 // form.group), indexing="ij")
    spread = [np.repeat(np.broadcast_to(x, row.shape), form.group, 1) for x in weight_scales(form, parts, row, group)]
    value = np.array(TABLES[form.table])[parts.codes] if form.table else parts.codes - form.zero
    expected = quants.dequantize(raw, GGMLQuantizationType[kind])
    assert np.array_equal((spread[0] * value - spread[1]).astype(np.float32), expected)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_warp_s_products_are_those_of_the_dequantised_weights(kind: str) -> None:
    form = FORMATS[kind]
    raw = blocks_of(kind, 16, 256)
    parts, weights = take_apart(form, raw), quants.dequantize(raw, GGMLQuantizationType[kind]).astype(np.float64)
    planes = pack(form, parts.codes)
    x = np.random.default_rng(0).standard_normal((8, 256)).astype(np.float16).astype(np.float64)
    unit = np.full(16, 2.0**-24)
    if not (form.table or form.low == 8):
        unit[8:] *= 16
    rows = np.arange(16)
    many, one = np.zeros((16, 8)), np.zeros(16)
    for j in range(8):
        for part in range(32 // form.group):
            steps = [part] if form.group == 16 else [0, 1]
            group = (32 * j + 16 * part) // form.group
            scale, minimum = weight_scales(form, parts, rows, np.full(16, group))
            for tokens in (True, False):
                sums, products = np.zeros(8), np.zeros((16, 8))
                for s in steps:
                    # Column n is token n; or, for one token, group n's activations, of which column j is kept.
                    i = np.array([[0, 1], [2, 3]])
                    inner = np.stack([[column_in_group(form, s, T, int(n)) for n in pair] for pair in i])
                    column = inner.transpose(2, 0, 1) + (32 * j if tokens else 32 * G[:, None, None])
                    b = x[G[:, None, None] if tokens else 0, column]
                    products += mma(fragment(form, planes, 2 * j + s), b)
                    sums += mma(np.ones((32, 4, 2)), b)[0]
                found = (scale / unit)[:, None] * (products - (form.zero * unit)[:, None] * sums)
                found -= (minimum * np.ones(16))[:, None] * sums
                if tokens:
                    many += found
                else:
                    one += found[:, j]
    expected = weights @ x.T
    assert np.allclose(many, expected, rtol=0, atol=1e-9 * np.abs(expected).max() + 1e-7)
    assert np.allclose(one, expected[:, 0], rtol=0, atol=1e-9 * np.abs(expected).max() + 1e-7)


@pytest.mark.parametrize("kind", FORMATS)
def test_whole_tiles_take_the_file_s_bytes_and_padding_little_more(kind: str) -> None:
    form = FORMATS[kind]
    assert (form.raw.weights, form.raw.nbytes) == BLOCK_TYPES[kind]
    assert form.unit_bytes == raw_bytes(kind, 16, 256)
    assert matrix_bytes(kind, 4096, 14336) == raw_bytes(kind, 4096, 14336)
    assert form.unit_bytes % 16 == 0
    assert form.macros()["PH_LOW_AT"] % 16 == 0  # type: ignore[operator]
    for cols in range(form.raw.weights, 1025, form.raw.weights):
        assert sum(plane_bytes(kind, 37, cols).values()) == matrix_bytes(kind, 37, cols) == 3 * form.tile_bytes(cols)
        assert form.tile_bytes(cols) % 16 == 0
        assert raw_bytes(kind, 16, cols) <= form.tile_bytes(cols) <= units(cols) * form.unit_bytes


@pytest.mark.parametrize(("kind", "rows", "cols"), [("Q4_K", 16, 128), ("Q8_0", 0, 32), ("Q4_0", 1, 48)])
def test_shapes_that_cannot_be_are_refused(kind: str, rows: int, cols: int) -> None:
    with pytest.raises(DeviceError, match=f"{kind} weights cannot have the shape"):
        plane_bytes(kind, rows, cols)


def test_a_type_without_kernels_is_named() -> None:
    with pytest.raises(DeviceError, match=r"no CUDA kernels for IQ2_XS weights; there are for Q8_0, Q4_0"):
        matrix_bytes("IQ2_XS", 16, 256)
