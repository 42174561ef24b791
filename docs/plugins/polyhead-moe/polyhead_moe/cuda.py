"""Experts on a GPU: what to launch. The arithmetic is in route.cu and experts.cu.

Only the matrices of experts that some row was sent to are read, each once for every 8 or 16 rows that share it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import TYPE_CHECKING

from .layer import Experts

if TYPE_CHECKING:
    from polyhead.runtime.modules import CudaModule, CudaSetup, DeviceArray, DeviceMatrix, Gpu

_WARPS = 8
_UNIT = 256  # columns of a quantised matrix that a warp does at a time
_CHUNK = 128  # of a dense one
_COLUMNS = 8  # tokens that the tensor core takes at a time


def load_on_cuda(spec: Experts, setup: CudaSetup) -> CudaModule:
    """Called once when a model is loaded. Kernels that decoding needs are compiled here."""
    folder = resources.files(__package__)
    sources = {name: (folder / name).read_text(encoding="utf-8") for name in ("route.cu", "experts.cu")}
    return _CudaExperts(spec, setup, *(setup.source(name, text) for name, text in sources.items()))


def kernel_macros(matrix: DeviceMatrix, columns: int, mode: str = "") -> dict[str, object]:
    """What experts.cu is compiled with for a matrix and ``columns`` times 8 tokens; ``mode`` is a macro of its own."""
    macros: dict[str, object] = {**matrix.macros, "PH_TOKEN_TILES": columns}
    if mode:
        macros[mode] = True
    if not matrix.macros and matrix.cols % 8:
        macros["PH_SCALAR"] = True
    # Registers for two blocks on a multiprocessor suffice for 8 tokens, but for the modes that are seldom used.
    narrow = columns == 1 and mode in ("", "PH_PAIR") and macros.get("PH_LOW_BITS") != 8
    macros["PH_CTAS"] = 2 if narrow else 1  # blocks that registers must leave room for
    return macros


def columns_for(pairs: int, experts: int) -> int:
    """Tokens of a tile in eights: two where an expert has more than eight on average. Results do not depend on it."""
    return 2 if pairs > _COLUMNS * experts else 1


def most_tiles(pairs: int, experts: int, size: int) -> int:
    """Tiles that so many pairs can make at most, whichever experts they go to: each may leave one unfilled."""
    return (pairs + (size - 1) * min(pairs, experts)) // size


class _CudaExperts:
    def __init__(self, spec: Experts, setup: CudaSetup, route: str, project: str) -> None:
        import numpy as np

        self._spec, self._route, self._project = spec, route, project
        self._act, self._null, self._long = setup.act, np.uint64(0), np.int64
        self._router = setup.matrix(spec.router)
        self._gate, self._up, self._down = (setup.matrix(name) for name in (spec.gate, spec.up, spec.down))
        self._switch: DeviceArray | None = None  # the shared expert's, as a vector, or as a matrix of one row
        self._switch_row: DeviceMatrix | None = None
        if (shared := spec.shared) is not None:
            if shared.flat:
                self._switch = setup.vector(shared.gate_input)
            else:
                self._switch_row = setup.matrix(shared.gate_input)
            self._shared = tuple(setup.matrix(name) for name in (shared.gate, shared.up, shared.down))
        for kernel in ("ph_moe_choose", "ph_moe_group", "ph_moe_sum", "ph_moe_gate"):
            setup.compile(route, kernel)
        pair = self._gate.kind == self._up.kind
        # Matrices, how their result becomes the next input, and whether rows are read by pair.
        self._inward: tuple[tuple[DeviceMatrix, str], ...] = (
            ((self._gate, "PH_PAIR"),) if pair else ((self._gate, "PH_GATHER"), (self._up, "PH_TIMES"))
        )
        for matrix, mode in (*self._inward, (self._down, "")):
            setup.compile(project, "ph_moe_project", kernel_macros(matrix, 1, mode))

    def __call__(self, x: DeviceArray, out: DeviceArray, scratch: Mapping[str, DeviceArray], gpu: Gpu) -> None:
        spec = self._spec
        rows, hidden = x.shape
        pairs = rows * spec.used
        columns = columns_for(pairs, spec.count)
        size = _COLUMNS * columns
        tiles = pairs if rows == 1 else most_tiles(pairs, spec.count, size)
        scores, order, list_of_tiles = (scratch[name] for name in ("scores", "order", "tiles"))
        shares = scratch["shares"].view("f32", rows, spec.used + (spec.shared is not None))

        gpu.linear(x, self._router, scores)
        if self._switch_row is not None:
            gpu.linear(x, self._switch_row, shares, spec.used)
        switch = self._null if self._switch is None else self._switch
        sizes = (spec.count, spec.used, hidden, spec.normalise, spec.shared is not None, float(spec.scale))
        places = (scratch["chosen"], shares, order, list_of_tiles)
        gpu.launch(self._route, "ph_moe_choose", rows, 32, scores, x, switch, *places, *sizes)
        if rows > 1:
            counts = (pairs, spec.count, size, tiles)
            grouped = (scratch["chosen"], order, list_of_tiles)
            gpu.launch(self._route, "ph_moe_group", spec.count, 256, *grouped, *counts)

        inner = scratch["inner"]
        for matrix, mode in self._inward:
            self._multiply(gpu, matrix, mode, columns, tiles, x, inner, order, list_of_tiles)
        results = scratch["results"]
        self._multiply(gpu, self._down, "", columns, tiles, inner, results, order, list_of_tiles)

        if spec.shared is not None:
            self._run_shared(x, out, scratch, gpu)
        grid = (rows, -(-hidden // 256), 1)
        more = (spec.used, hidden, spec.shared is not None)
        gpu.launch(self._route, "ph_moe_sum", grid, 256, results, shares, out, *more)

    def _multiply(
        self,
        gpu: Gpu,
        matrix: DeviceMatrix,
        mode: str,
        columns: int,
        tiles: int,
        x: DeviceArray,
        out: DeviceArray,
        order: DeviceArray,
        list_of_tiles: DeviceArray,
    ) -> None:
        parts = -(-matrix.cols // (_UNIT if matrix.macros else _CHUNK))
        # As many warps whatever the number of tokens: the order of a sum must not depend on it.
        warps = 2 * min(_WARPS // 2, parts) if mode == "PH_PAIR" else min(_WARPS, parts)
        second = self._up.data if mode == "PH_PAIR" else self._null
        places = (matrix.data, second, x, out, order, list_of_tiles)
        strides = (self._long(matrix.item_bytes), self._long(matrix.tile_bytes))
        sizes = (self._spec.used, matrix.rows, matrix.cols, *strides)
        grid = (tiles, -(-matrix.rows // 16), 1)
        macros = kernel_macros(matrix, columns, mode)
        gpu.launch(self._project, "ph_moe_project", grid, 32 * warps, *places, *sizes, macros=macros)

    def _run_shared(self, x: DeviceArray, out: DeviceArray, scratch: Mapping[str, DeviceArray], gpu: Gpu) -> None:
        assert self._spec.shared is not None
        rows, size = x.shape[0], self._spec.shared.size
        gate, up, down = self._shared
        both = scratch["shared_both"].view(self._act, rows, 2 * size)
        inner = scratch["shared_inner"].view(self._act, rows, size)
        gpu.linear(x, gate, both)
        gpu.linear(x, up, both, size)
        gpu.launch(self._route, "ph_moe_gate", (rows, -(-size // 256), 1), 256, both, inner, size)
        gpu.linear(inner, down, out)
