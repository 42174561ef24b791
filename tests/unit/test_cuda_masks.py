"""What the device's sampler does with masks on the host: what is uploaded and where, errors, memory. Needs no GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polyhead.errors import RequestError
from polyhead.runtime.contract import SamplingRow
from polyhead.runtime.cuda import sampler as sampler_module
from polyhead.runtime.cuda.memory import Array
from polyhead.runtime.cuda.ops.sample import BANNED, NAN, OK, ROW
from polyhead.runtime.cuda.plan import sampler_bytes
from polyhead.runtime.cuda.sampler import Sampler
from polyhead.runtime.cuda.sampling_masks import NONE, MaskLists
from polyhead.runtime.masks import as_flags, ask, mask_words
from sampling_rows import mask

PLAIN = SamplingRow(seed=1, position=3)


class Device:
    """Notes what is copied to it."""

    def __init__(self) -> None:
        self.copies: list[tuple[Array, np.ndarray]] = []

    def copy_in(self, array: Array, host: np.ndarray) -> None:
        assert array.nbytes == host.nbytes
        self.copies.append((array, host.copy()))


def lists(vocab: int, rows: int = 8) -> tuple[Device, MaskLists]:
    device = Device()
    words = Array(1 << 20, (rows, mask_words(vocab)), "u32")
    return device, MaskLists(device, lambda kind, *shape: np.full(shape, 0x55, kind), words, vocab)


def giving(words: np.ndarray) -> SamplingRow:
    return replace(PLAIN, allowed=lambda: words)


@given(st.integers(1, 200), st.data())
def test_masks_lie_one_after_another_and_each_row_knows_its_own(vocab: int, data: st.DataObject) -> None:
    device, masks = lists(vocab)
    sets = st.none() | st.sets(st.integers(0, vocab - 1))
    for _ in range(2):  # the second step finds what the first one left
        wanted = data.draw(st.lists(sets, max_size=8))
        device.copies.clear()
        starts = masks.update([PLAIN if ids is None else giving(mask(vocab, ids)) for ids in wanted])
        given_ids = [ids for ids in wanted if ids is not None]
        assert len(device.copies) == (1 if given_ids else 0)
        for start, ids in zip(starts, wanted, strict=True):
            if ids is None:
                assert start == NONE < 0
                continue
            array, host = device.copies[0]
            assert array.ptr == 1 << 20
            assert array.shape == (len(given_ids), mask_words(vocab))
            words = host.reshape(-1)[start : start + mask_words(vocab)]
            assert set(np.flatnonzero(as_flags(words, vocab)).tolist()) == ids
        assert masks.errors == {}


def test_what_a_mask_raises_is_kept_for_its_row_and_the_others_have_theirs() -> None:
    def failing() -> np.ndarray:
        raise RequestError("too much work")

    device, masks = lists(40)
    rows = [giving(mask(40, [1])), replace(PLAIN, allowed=failing), PLAIN, giving(mask(40, [39]))]
    assert masks.update(rows) == [0, NONE, NONE, 2]
    assert {index: (str(error), error.row) for index, error in masks.errors.items()} == {1: ("too much work", 1)}
    assert device.copies[0][1].tolist() == [[2, 0], [0, 128]]
    assert masks.update([PLAIN]) == [NONE]
    assert masks.errors == {}
    assert len(device.copies) == 1


@pytest.mark.parametrize("words", [mask(32, [0]), mask(65, [0]), mask(33, [0]).astype(np.int64)])
def test_a_mask_of_another_type_or_shape_is_refused(words: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"a mask of .* does not go with 33 logits"):
        ask(lambda: words, 0, 33)
    device, masks = lists(33)
    with pytest.raises(ValueError, match="33 logits"):
        masks.update([giving(words)])
    assert device.copies == []


class Buffer:
    """Host memory that is not page-locked, for want of a driver."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self.nbytes = nbytes

    def array(self, dtype: np.dtype, *shape: int) -> np.ndarray:
        assert self.nbytes == math.prod(shape) * dtype.itemsize
        return np.zeros(shape, dtype)

    def close(self) -> None: ...


class FakePool:
    """Hands out addresses and counts bytes."""

    def __init__(self) -> None:
        self.nbytes = 0

    def array(self, shape: tuple[int, ...] | int, dtype: str, *, zero: bool = False) -> Array:
        array = Array((1 << 20) + self.nbytes, (shape,) if isinstance(shape, int) else shape, dtype)
        self.nbytes += array.nbytes
        return array


class FakeContext:
    def __init__(self) -> None:
        self.device = Device()


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    monkeypatch.setattr(sampler_module, "HostBuffer", Buffer)

    def build(rows: int, vocab: int, seen: int) -> tuple[Sampler, FakePool]:
        pool = FakePool()
        return Sampler(FakeContext(), pool, rows, vocab, seen), pool

    return build


@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (3, 31), (64, 33), (7, 50_257), (64, 128_256)])
def test_the_plan_counts_what_a_sampler_allocates(make, rows, vocab) -> None:
    _, pool = make(rows, vocab, 100)
    assert pool.nbytes == sampler_bytes(rows, vocab) + 8 * 100


def test_the_records_say_where_masks_begin(make) -> None:
    sampler, _ = make(4, 100, 50)
    sampler.prepare([PLAIN, giving(mask(100, [5])), PLAIN, giving(mask(100, [99]))])
    copies = {array.ptr: host for array, host in sampler._ctx.device.copies}
    records = copies[sampler._arrays.rows.ptr].view(ROW).reshape(-1)
    assert records["mask_start"].tolist() == [-1, 0, -1, 4]
    assert (records["seed"].tolist(), records["position"].tolist()) == ([1] * 4, [3] * 4)
    assert copies[sampler._arrays.masks.ptr].tolist() == [[32, 0, 0, 0], [0, 0, 0, 8]]
    sampler._ctx.device.copies.clear()
    sampler.prepare([PLAIN] * 4)
    assert [array.ptr for array, _ in sampler._ctx.device.copies] == [sampler._arrays.rows.ptr]


def test_errors_come_in_the_order_of_the_cpu_s_sampler(make) -> None:
    def failing() -> np.ndarray:
        raise RequestError("too much work")

    sampler, _ = make(4, 100, 50)
    rows = [PLAIN, replace(PLAIN, allowed=failing), giving(mask(100, [])), PLAIN]
    for statuses, row, text in (
        ([OK, OK, BANNED, OK], 1, "too much work"),
        ([BANNED, OK, BANNED, OK], 0, "no token is left"),
        ([OK, OK, BANNED, NAN], 3, "NaN logits in row 3"),
    ):
        sampler.prepare(rows)
        sampler._results[:] = [[0, status] for status in statuses]
        with pytest.raises(Exception, match=text) as error:
            sampler.collect(rows, waited=True)
        assert error.value.row == row
    sampler.prepare([PLAIN] * 4)
    sampler._results[:] = [[7, OK]] * 4
    assert [token.id for token in sampler.collect([PLAIN] * 4, waited=True)] == [7] * 4
