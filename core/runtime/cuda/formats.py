"""How weights lie in device memory: quantised matrices as tiles for the tensor cores, others row by row.

The table of formats is the one place that knows the sizes; kernels are given them as macros. Knows nothing of
launching.

A quantised matrix [rows, cols] is cut into tiles of 16 rows (the last one padded with zeros), a tile into units of 256
columns, and a unit is one record: scales, super-scales, high bits, low bits of its 16 x 256 codes, each as the 32 lanes
of a warp want them (``kernels/formats.cuh`` says how). A record takes exactly the bytes of the GGUF blocks it replaces,
so a matrix grows only by padding: up to 15 rows, and where cols is not a multiple of 256 (formats with 32 weights to a
block) the end of the last unit of a tile. Values do not change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType

from ...errors import DeviceError
from ..memory import size_text
from .memory import Array

TILE_ROWS = 16
UNIT_COLS = 256
_VECTOR = 512
"""Bytes that a warp loads at once: 16 for each of 32 lanes."""


class ScaleKind(IntEnum):
    """How a unit's scales are stored: for each (row, group), and super-scales for each row."""

    F16 = 0  # f16 d
    F16_MIN = 1  # f16 d and m
    SIX_MIN = 2  # 6-bit scale and minimum; f16 d and dmin a row
    INT8 = 3  # signed byte; f16 d a row
    SIX_16 = 4  # 6 bits less 32; f16 d a row
    FOUR_MIN = 5  # 4-bit scale and minimum; f16 d and dmin a row
    SIX = 6  # 6 bits less 32; f16 d a row
    E8M0 = 7  # power of two


# Bytes of a unit's scales and super-scales.
_SCALE_BYTES = {
    ScaleKind.F16: (256, 0),
    ScaleKind.F16_MIN: (512, 0),
    ScaleKind.SIX_MIN: (192, 64),
    ScaleKind.INT8: (256, 32),
    ScaleKind.SIX_16: (192, 32),
    ScaleKind.FOUR_MIN: (256, 64),
    ScaleKind.SIX: (96, 32),
    ScaleKind.E8M0: (128, 0),
}

_NO_TABLE, _IQ4_TABLE, _MXFP4_TABLE = 0, 1, 2


@dataclass(frozen=True, slots=True)
class RawBlock:
    """A GGUF block: its weights, its bytes, and the byte where each part begins (0 where there is none)."""

    weights: int
    nbytes: int
    low: int
    d: int = 0
    minimum: int = 0
    scales: int = 0
    high: int = 0


@dataclass(frozen=True, slots=True)
class Format:
    """A quantised format. A weight is scale * (code - zero) - minimum, or scale * table[code] - minimum.

    A code has ``low`` bits in one plane and ``high`` in another; ``group`` weights of a row share a scale.
    """

    name: str
    raw: RawBlock
    low: int
    high: int
    zero: int
    group: int
    scales: ScaleKind
    table: int = _NO_TABLE

    @property
    def planes(self) -> dict[str, int]:
        """The parts of a whole unit in their order, in bytes."""
        scales, supers = _SCALE_BYTES[self.scales]
        return {"scales": scales, "supers": supers, "high": 512 * self.high, "low": 512 * self.low}

    @property
    def unit_bytes(self) -> int:
        """Bytes of a whole unit: 16 rows of 256 columns."""
        return sum(self.planes.values())

    @property
    def vector_cols(self) -> int:
        """Columns in one vector load of low bits."""
        return UNIT_COLS // self.low

    def tail_vectors(self, cols: int) -> int:
        """Vectors of low bits in a tile's last unit."""
        left = cols - UNIT_COLS * (units(cols) - 1)
        return -(-left // self.vector_cols)

    def tile_bytes(self, cols: int) -> int:
        """Bytes of 16 rows."""
        head = self.unit_bytes - self.planes["low"]
        return (units(cols) - 1) * self.unit_bytes + head + self.tail_vectors(cols) * _VECTOR

    def macros(self) -> dict[str, object]:
        """What the kernels that read tiles are compiled with."""
        planes = self.planes
        return {
            "PH_LOW_BITS": self.low,
            "PH_HIGH_BITS": self.high,
            "PH_ZERO": self.zero,
            "PH_GROUP": self.group,
            "PH_SCALES": int(self.scales),
            "PH_TABLE": self.table,
            "PH_BLOCK": self.raw.weights,
            "PH_SUPERS_AT": planes["scales"],
            "PH_HIGH_AT": planes["scales"] + planes["supers"],
            "PH_LOW_AT": self.unit_bytes - planes["low"],
            "PH_UNIT_BYTES": self.unit_bytes,
        }

    def raw_macros(self) -> dict[str, object]:
        """What the kernel that reads GGUF blocks needs beside ``macros``."""
        raw = self.raw
        return {
            "PH_RAW_BYTES": raw.nbytes,
            "PH_RAW_LOW": raw.low,
            "PH_RAW_HIGH": raw.high,
            "PH_RAW_SCALES": raw.scales,
            "PH_RAW_D": raw.d,
            "PH_RAW_MIN": raw.minimum,
        }


_TABLE = (
    Format("Q8_0", RawBlock(32, 34, low=2), 8, 0, 128, 32, ScaleKind.F16),
    Format("Q4_0", RawBlock(32, 18, low=2), 4, 0, 8, 32, ScaleKind.F16),
    Format("Q4_1", RawBlock(32, 20, low=4, minimum=2), 4, 0, 0, 32, ScaleKind.F16_MIN),
    Format("Q5_0", RawBlock(32, 22, low=6, high=2), 4, 1, 16, 32, ScaleKind.F16),
    Format("Q5_1", RawBlock(32, 24, low=8, high=4, minimum=2), 4, 1, 0, 32, ScaleKind.F16_MIN),
    Format("Q2_K", RawBlock(256, 84, low=16, d=80, minimum=82), 2, 0, 0, 16, ScaleKind.FOUR_MIN),
    Format("Q3_K", RawBlock(256, 110, low=32, high=0, scales=96, d=108), 2, 1, 4, 16, ScaleKind.SIX_16),
    Format("Q4_K", RawBlock(256, 144, low=16, scales=4, minimum=2), 4, 0, 0, 32, ScaleKind.SIX_MIN),
    Format("Q5_K", RawBlock(256, 176, low=48, high=16, scales=4, minimum=2), 4, 1, 0, 32, ScaleKind.SIX_MIN),
    Format("Q6_K", RawBlock(256, 210, low=0, high=128, scales=192, d=208), 4, 2, 32, 16, ScaleKind.INT8),
    Format("IQ4_NL", RawBlock(32, 18, low=2), 4, 0, 128, 32, ScaleKind.F16, _IQ4_TABLE),
    Format("IQ4_XS", RawBlock(256, 136, low=8, scales=2), 4, 0, 128, 32, ScaleKind.SIX, _IQ4_TABLE),
    Format("MXFP4", RawBlock(32, 17, low=1), 4, 0, 128, 32, ScaleKind.E8M0, _MXFP4_TABLE),
)

FORMATS: Mapping[str, Format] = MappingProxyType({item.name: item for item in _TABLE})
"""The quantised formats that have kernels, by GGML name."""

DENSE_TYPES = frozenset({"F32", "F16", "BF16"})
"""Types that become a DenseMatrix in the activations' dtype."""


def format_of(kind: str) -> Format:
    """The format of a GGML type. Raises DeviceError for one that has no kernels."""
    found = FORMATS.get(kind)
    if found is None:
        raise DeviceError(f"there are no CUDA kernels for {kind} weights; there are for {', '.join(FORMATS)}")
    return found


def units(cols: int) -> int:
    """Units in a tile."""
    return -(-cols // UNIT_COLS)


def tiles(rows: int) -> int:
    """Tiles in a matrix."""
    return -(-rows // TILE_ROWS)


def plane_bytes(kind: str, rows: int, cols: int) -> dict[str, int]:
    """Bytes of each part of a quantised matrix, padding included. Raises DeviceError for sizes that cannot be."""
    form = _checked(kind, rows, cols)
    parts = {name: tiles(rows) * units(cols) * size for name, size in form.planes.items()}
    parts["low"] = tiles(rows) * form.tile_bytes(cols) - sum(parts[name] for name in ("scales", "supers", "high"))
    return parts


def matrix_bytes(kind: str, rows: int, cols: int) -> int:
    """Device bytes of a matrix of GGML type ``kind``, quantised or dense. Raises DeviceError as plane_bytes does."""
    if kind in DENSE_TYPES:
        return 2 * rows * cols
    return tiles(rows) * _checked(kind, rows, cols).tile_bytes(cols)


def flat_shape(kind: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """A stack of matrices [..., rows, cols] as one [all rows, cols].

    Raises DeviceError for a quantised stack whose matrices do not all begin a tile.
    """
    *outer, rows, cols = shape
    if math.prod(outer) > 1 and rows % TILE_ROWS and kind not in DENSE_TYPES:
        raise DeviceError(
            f"a stack of {kind} matrices [{rows}, {cols}] cannot be laid out in tiles of {TILE_ROWS} rows; "
            "set device: cpu"
        )
    return math.prod(outer) * rows, cols


def raw_bytes(kind: str, rows: int, cols: int) -> int:
    """Bytes of the GGUF blocks of a quantised matrix. Raises DeviceError as plane_bytes does."""
    raw = _checked(kind, rows, cols).raw
    return rows * (cols // raw.weights) * raw.nbytes


def _checked(kind: str, rows: int, cols: int) -> Format:
    form = format_of(kind)
    if rows < 1 or cols < 1 or cols % form.raw.weights:
        raise DeviceError(
            f"{kind} weights cannot have the shape [{rows}, {cols}]: {form.raw.weights} columns to a block"
        )
    return form


@dataclass(frozen=True, slots=True)
class QuantMatrix:
    """A quantised matrix [rows, cols] as tiles: ``data`` is u8 [tiles, bytes of a tile]. Owns nothing."""

    kind: str
    rows: int
    cols: int
    data: Array

    def __post_init__(self) -> None:
        expected = (tiles(self.rows), _checked(self.kind, self.rows, self.cols).tile_bytes(self.cols))
        if self.data.shape != expected or self.data.dtype != "u8" or self.data.ptr % 16:
            raise DeviceError(
                f"{self} wants u8{list(expected)} ({size_text(expected[0] * expected[1])}), aligned to 16 bytes, "
                f"and was given {self.data} at {self.data.ptr:#x}"
            )

    @classmethod
    def shape_of(cls, kind: str, rows: int, cols: int) -> tuple[int, int]:
        """The shape of ``data``. Raises DeviceError as plane_bytes does."""
        return tiles(rows), _checked(kind, rows, cols).tile_bytes(cols)

    @property
    def format(self) -> Format:
        """Its row of the table."""
        return FORMATS[self.kind]

    def slice_rows(self, start: int, stop: int) -> QuantMatrix:
        """Rows ``start:stop``; ``start`` begins a tile. Raises DeviceError where they are not there."""
        if start % TILE_ROWS or not 0 <= start < stop <= self.rows:
            raise DeviceError(f"rows {start}:{stop} are not in {self}, or do not begin a tile of {TILE_ROWS}")
        part = self.data.slice_rows(start // TILE_ROWS, tiles(stop))
        return QuantMatrix(self.kind, stop - start, self.cols, part)

    def __str__(self) -> str:
        return f"{self.kind}[{self.rows}, {self.cols}]"


@dataclass(frozen=True, slots=True)
class DenseMatrix:
    """A matrix row by row in the activations' dtype: ``data`` is f16 or bf16 [rows, cols]. Owns nothing."""

    data: Array

    def __post_init__(self) -> None:
        if len(self.data.shape) != 2 or self.data.dtype not in ("f16", "bf16") or 0 in self.data.shape:
            raise DeviceError(f"a dense matrix is f16 or bf16 [rows, cols], not {self.data}")

    @property
    def rows(self) -> int:
        """Output features."""
        return self.data.shape[0]

    @property
    def cols(self) -> int:
        """Input features."""
        return self.data.shape[1]

    def slice_rows(self, start: int, stop: int) -> DenseMatrix:
        """Rows ``start:stop``. Raises DeviceError where they are not there."""
        return DenseMatrix(self.data.slice_rows(start, stop))

    def __str__(self) -> str:
        return str(self.data)


Matrix = QuantMatrix | DenseMatrix
