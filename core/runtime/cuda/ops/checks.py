"""What ops check before they launch. Knows nothing of kernels."""

from __future__ import annotations

from collections.abc import Callable

from ....arch import Activation
from ....errors import DeviceError
from ..formats import QuantMatrix
from ..memory import Array

#: What activations and the KV cache may be stored as.
HALVES = ("f16", "bf16")
#: What else the KV cache may be: e4m3 bytes, with scales.
BYTES = "u8"
#: The scales of K and of V, f32 [blocks, kv_heads, block_size] each, where the cache holds bytes.
Scales = tuple[Array, Array]
#: What kernels that read or write either side of a projection take.
FLOATS = ("f32", "f16", "bf16")


def expect(op: str, true: bool, problem: str | Callable[[], str]) -> None:
    """Raises DeviceError naming the op and the problem unless ``true``.

    A problem that names arrays is best given as a function: spelling them out would cost more than the launch.
    """
    if not true:
        raise DeviceError(f"{op}: {problem if isinstance(problem, str) else problem()}")


def expect_array(op: str, name: str, array: Array, dtypes: tuple[str, ...], shape: tuple[int | None, ...]) -> None:
    """Raises DeviceError unless the array has one of the dtypes and the shape; None in a shape is any size."""
    fits = len(array.shape) == len(shape) and all(b is None or a == b for a, b in zip(array.shape, shape, strict=True))
    if array.dtype not in dtypes or not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise DeviceError(f"{op}: {name} is {array}, expected {' or '.join(dtypes)} [{wanted}]")


def expect_product(
    op: str,
    x: Array,
    w: QuantMatrix,
    out: Array,
    column: int,
    bias: Array | None,
    accumulate: bool,
    scale: float,
    activation: Activation | None,
    gated: bool,
) -> int:
    """The columns that a product of float16 rows with packed weights writes, those of a gate being half of its own.

    Raises DeviceError where its arrays do not go together, or it asks for what no kernel does.
    """
    own = w.rows // 2 if gated else w.rows
    expect_array(op, "x", x, ("f16",), (None, w.cols))
    expect_array(op, "out", out, FLOATS, (x.shape[0], None))
    there = 0 <= column <= out.shape[1] - own
    expect(op, there, lambda: f"{own} columns from {column} on are not in {out}")
    expect(op, out.dtype in ("f32", "f16"), lambda: f"out is {out}, but x {x}")
    expect(op, x.ptr % 16 == 0, lambda: f"x {x} is not aligned to 16 bytes")
    expect(op, activation is None or not (accumulate or scale != 1.0), "an activation is neither scaled nor added")
    expect(op, activation is not None or not gated, "a gate needs an activation")
    if bias is not None:
        expect_array(op, "bias", bias, ("f32",), (w.rows,))
    return own


def activation_macros(activation: Activation | None, gated: bool) -> dict[str, object]:
    """What a kernel that stores as kernels/linear.cuh does is compiled with; nothing without an activation."""
    if activation is None:
        return {}
    return {"PH_ACTIVATED": True, f"PH_{activation.upper()}": True, "PH_GATED": gated}


def expect_cache(op: str, k: Array, v: Array, scales: Scales | None, kv_heads: int, head_dim: int) -> None:
    """Raises DeviceError unless K and V [blocks, kv_heads, block_size, head_dim] and their scales go together."""
    expect_array(op, "k_cache", k, (*HALVES, BYTES), (None, kv_heads, None, head_dim))
    expect_array(op, "v_cache", v, (k.dtype,), k.shape)
    expect(
        op,
        (scales is None) == (k.dtype != BYTES),
        lambda: f"the cache is {k}: scales go with {BYTES}, and only with it",
    )
    for name, array in zip(("k_scales", "v_scales"), scales or (), strict=False):
        expect_array(op, name, array, ("f32",), k.shape[:3])
