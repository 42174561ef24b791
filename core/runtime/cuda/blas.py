"""Matrix products of 16-bit matrices through cuBLASLt, accumulated in float32.

Knows nothing of models. cuBLASLt speaks column-major; a row-major matrix [R, C] is, byte for byte, a column-major C x R
one with leading dimension C. So out = x w^T (row-major [M, N]) is asked for as out^T = w x^T:

    column-major        rows  columns  leading dimension
    A = op_T(w)         K     N        K                    stored; op_T makes it N x K
    B = x               K     M        K
    C = D = out         N     M        width of out's rows

No size needs padding. Rows whose byte length is not a multiple of 16 (K or the width of out not a multiple of 8) and
views that begin in between make cuBLASLt take slower kernels, because the alignment it may count on is told truthfully.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import DeviceError
from .context import Context
from .cublaslt import cublaslt
from .driver import translated
from .memory import Array, Pool

_TYPES = {"f32": 0, "f16": 2, "bf16": 14}  # cudaDataType_t
_COMPUTE_32F = 68  # cublasComputeType_t: float32 products and sums
_TRANSPOSED = 1  # cublasOperation_t

#: Split-K partial sums may only be added in float32, out of place: fixed order, and no rounding to 16 bits between.
_REDUCTION = 2  # CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE


class _Plan:
    """One kind of product: descriptors and the algorithm that cuBLASLt's heuristic prefers."""

    __slots__ = ("a", "algorithm", "b", "c", "operation", "title", "workspace")

    def __init__(self, title: str) -> None:
        self.title = title
        self.operation = self.a = self.b = self.c = 0
        self.algorithm: Any = None
        self.workspace = 0

    def close(self, lt: Any) -> None:
        for layout in (self.a, self.b, self.c):
            if layout:
                lt.matrix_layout_destroy(layout)
        if self.operation:
            lt.matmul_desc_destroy(self.operation)
        self.operation = self.a = self.b = self.c = 0


class Blas:
    """A cuBLASLt handle with its workspace. Products run on the device's stream and can be captured in a graph."""

    def __init__(self, ctx: Context, workspace_bytes: int = 32 << 20) -> None:
        """``workspace_bytes`` of device memory serve all products, one after the other.

        Raises DeviceError where nvmath-python or cuBLAS is missing, CapacityError where memory is.
        """
        self.device = ctx.device
        self.closed = False
        self._lt = cublaslt()
        self.device.activate()
        with translated("starting cuBLASLt (nvidia-cublas)"):
            self._handle = self._lt.create()
        self._pool = Pool(self.device, "cuBLAS workspace")
        self._plans: dict[tuple[object, ...], _Plan] = {}
        self._stream = int(self.device.stream.handle)
        # Read when a call is made, not when it runs.
        self._one, self._zero = np.ones(1, np.float32), np.zeros(1, np.float32)
        self._factors = {1.0: self._one}
        self.device.adopt(self)
        try:
            self._workspace = self._pool.array(workspace_bytes, "u8")
        except Exception:
            self.close()
            raise

    def matmul(
        self, x: Array, w: Array, out: Array, *, accumulate: bool = False, column: int = 0, scale: float = 1.0
    ) -> None:
        """out[:, column:column + N] = scale x w^T, added to what is there if ``accumulate``.

        ``x`` [M, K] and ``w`` [N, K] are both f16 or both bf16; ``out`` [M, >= column + N] is of that type or f32, and
        f32 where it accumulates. Sums are float32. Raises DeviceError naming the shapes.
        """
        self._check(x, w, out, accumulate, column)
        rows, inner = x.shape
        if rows == 0:
            return
        target = out.ptr + column * out.itemsize
        width = out.shape[1]
        aligned = tuple(min(256, pointer & -pointer) for pointer in (w.ptr, x.ptr, target))
        key = (rows, w.shape[0], inner, width, x.dtype, out.dtype, aligned)
        plan = self._plans.get(key)
        if plan is None:
            title = f"cuBLASLt, {out}[:, {column}:{column + w.shape[0]}] = {x} {w}^T"
            with translated(title):
                plan = self._plans[key] = self._plan(title, x, w, out, aligned)
        with translated(plan.title):
            self._lt.matmul(
                self._handle,
                plan.operation,
                self._factor(scale).ctypes.data,
                w.ptr,
                plan.a,
                x.ptr,
                plan.b,
                (self._one if accumulate else self._zero).ctypes.data,
                target,
                plan.c,
                target,
                plan.c,
                plan.algorithm.ptr,
                self._workspace.ptr,
                plan.workspace,
                self._stream,
            )
        self.device.last_launch = plan.title

    def __enter__(self) -> Blas:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees descriptors, handle and workspace. Closing twice is harmless."""
        if self.closed:
            return
        self.closed = True
        self.device.release(self)
        try:
            self._pool.close()  # Waits for products under way.
        finally:
            for plan in self._plans.values():
                plan.close(self._lt)
            self._plans.clear()
            self._lt.destroy(self._handle)

    def _factor(self, scale: float) -> NDArray[np.float32]:
        return self._factors.setdefault(scale, np.full(1, scale, np.float32))

    def _check(self, x: Array, w: Array, out: Array, accumulate: bool, column: int) -> None:
        if self.closed:
            raise DeviceError("this Blas is closed")
        what = f"matmul of x {x} and w {w} into out {out}"
        if len(x.shape) != 2 or len(w.shape) != 2 or len(out.shape) != 2 or x.shape[1] != w.shape[1]:
            raise DeviceError(f"{what}: wanted x [M, K], w [N, K], out [M, N]")
        if out.shape[0] != x.shape[0] or not 0 <= column <= out.shape[1] - w.shape[0]:
            raise DeviceError(f"{what}: columns {column}:{column + w.shape[0]} of {x.shape[0]} rows are not there")
        if 0 in w.shape:
            raise DeviceError(f"{what}: w is empty")
        if x.dtype not in ("f16", "bf16") or w.dtype != x.dtype or out.dtype not in (x.dtype, "f32"):
            raise DeviceError(f"{what}: wanted x and w both f16 or both bf16, and out of that type or f32")
        if accumulate and out.dtype != "f32":
            raise DeviceError(f"{what}: only a float32 out accumulates")

    def _plan(self, title: str, x: Array, w: Array, out: Array, aligned: tuple[int, ...]) -> _Plan:
        lt, plan = self._lt, _Plan(title)
        preference = lt.matmul_preference_create()
        try:
            plan.operation = lt.matmul_desc_create(_COMPUTE_32F, _TYPES["f32"])
            _set(lt.matmul_desc_set_attribute, plan.operation, lt.MatmulDescAttribute.TRANSA, _TRANSPOSED, np.int32)
            plan.a = lt.matrix_layout_create(_TYPES[w.dtype], w.shape[1], w.shape[0], w.shape[1])
            plan.b = lt.matrix_layout_create(_TYPES[x.dtype], x.shape[1], x.shape[0], x.shape[1])
            plan.c = lt.matrix_layout_create(_TYPES[out.dtype], w.shape[0], x.shape[0], out.shape[1])
            attribute = lt.MatmulPreferenceAttribute
            wanted: list[tuple[int, int, type[np.generic]]] = [
                (attribute.MAX_WORKSPACE_BYTES, self._workspace.nbytes, np.uint64),
                (attribute.REDUCTION_SCHEME_MASK, _REDUCTION, np.uint32),
                (attribute.MIN_ALIGNMENT_A_BYTES, aligned[0], np.uint32),
                (attribute.MIN_ALIGNMENT_B_BYTES, aligned[1], np.uint32),
                (attribute.MIN_ALIGNMENT_C_BYTES, aligned[2], np.uint32),
                (attribute.MIN_ALIGNMENT_D_BYTES, aligned[2], np.uint32),
            ]
            for name, value, kind in wanted:
                _set(lt.matmul_preference_set_attribute, preference, name, value, kind)
            plan.algorithm = lt.MatmulHeuristicResult(1)  # Its first member is the algorithm.
            found = np.zeros(1, np.int32)
            lt.matmul_algo_get_heuristic(
                self._handle,
                plan.operation,
                plan.a,
                plan.b,
                plan.c,
                plan.c,
                preference,
                1,
                plan.algorithm.ptr,
                found.ctypes.data,
            )
            if not found[0]:
                raise DeviceError(f"{title}: cuBLASLt has no algorithm for this product")
            plan.workspace = int(plan.algorithm.workspace_size)
        except Exception:
            plan.close(lt)
            raise
        finally:
            lt.matmul_preference_destroy(preference)
        return plan


def _set(setter: Any, owner: int, attribute: int, value: int, kind: type[np.generic]) -> None:
    held = np.array([value], kind)
    setter(owner, int(attribute), held.ctypes.data, held.nbytes)
