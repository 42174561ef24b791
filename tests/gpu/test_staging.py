"""Bytes that pass through page-locked memory to the GPU arrive as they are, however often the memory is used again."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from numpy.typing import NDArray
from polyhead.runtime.cuda.context import Context
from polyhead.runtime.cuda.memory import Array, Pool
from polyhead.runtime.cuda.staging import STAGE, Cargo, Piece, upload

pytestmark = pytest.mark.gpu

# A large tensor, many small ones, one of rows that may be cut only in groups, one of a single byte.
SIZES = [(11 * STAGE, 1, 1), *[(4096 + n, 1, 1) for n in range(40)], (5000, 2304, 16), (1, 1, 1), (3, 3 * STAGE, 2)]


def cargoes() -> list[tuple[Cargo, NDArray[np.uint8]]]:
    rng = np.random.default_rng(0)
    made = []
    for number, (rows, row, multiple) in enumerate(SIZES):
        data = rng.integers(0, 256, rows * row, np.uint8)

        def read(start: int, out: NDArray[np.uint8], data: NDArray[np.uint8] = data) -> None:
            np.copyto(out, data[start : start + out.size])

        made.append((Cargo(f"t{number}", rows, row, data.size, read, multiple), data))
    return made


def test_every_byte_arrives(ctx: Context, pool: Pool) -> None:
    sent = cargoes()
    targets = {cargo.name: pool.array(data.size, "u8") for cargo, data in sent}
    told: list[tuple[int, int]] = []

    def place(piece: Piece, block: Array) -> None:
        row = piece.cargo.row_bytes
        ctx.device.copy(block, targets[piece.cargo.name].slice_rows(piece.start * row, piece.stop * row))

    upload(ctx.device, [cargo for cargo, _ in sent], place, lambda done, total: told.append((done, total)))
    for cargo, data in sent:
        assert np.array_equal(ctx.device.download(targets[cargo.name]), data), cargo.name
    total = sum(data.size for _, data in sent)
    assert told == sorted(told)
    assert told[-1] == (total, total)


def test_an_interrupt_leaves_no_thread_and_a_device_that_works(ctx: Context, pool: Pool) -> None:
    sent = cargoes()
    target = pool.array(sent[0][1].size, "u8")
    seen: list[Piece] = []

    def place(piece: Piece, block: Array) -> None:
        seen.append(piece)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upload(ctx.device, [cargo for cargo, _ in sent], place)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("polyhead-read")]

    def copy(piece: Piece, block: Array) -> None:
        ctx.device.copy(block, target.slice_rows(piece.start, piece.stop))

    upload(ctx.device, [sent[0][0]], copy)
    assert np.array_equal(ctx.device.download(target), sent[0][1])
