"""Device memory, copies and their errors, on a GPU."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from polyhead.errors import CapacityError, DeviceError
from polyhead.runtime.cuda.blas import Blas
from polyhead.runtime.cuda.context import Context
from polyhead.runtime.cuda.device import CudaDevice, float_to_bf16
from polyhead.runtime.cuda.memory import DTYPES, HostBuffer, Pool

pytestmark = pytest.mark.gpu

NUMPY = {"f32": "f4", "f16": "f2", "i32": "i4", "u32": "u4", "i64": "i8", "u64": "u8", "u8": "u1", "i8": "i1"}


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 0, 4), (129, 65), (3, 1000, 701)])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_what_is_uploaded_comes_back_bit_for_bit(ctx, pool, dtype, shape) -> None:
    bits = np.random.default_rng(1).integers(0, 256, (*shape, DTYPES[dtype]), np.uint8)
    array = pool.array(shape, dtype)
    if dtype == "bf16":
        values = bits.view(np.uint16)[..., 0]
        ctx.device.upload(array, values)
        expected = (values.astype(np.uint32) << 16).view(np.float32)
    else:
        expected = bits.view(NUMPY[dtype])[..., 0]
        ctx.device.upload(array, expected)
    got = ctx.device.download(array)
    assert got.shape == shape
    assert got.tobytes() == expected.tobytes()


def test_floats_are_rounded_to_the_arrays_type(put, get) -> None:
    values = np.random.default_rng(2).standard_normal(1000).astype(np.float32)
    assert np.array_equal(get(put(values, "f16")), values.astype(np.float16))
    rounded = (float_to_bf16(values).astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(get(put(values, "bf16")), rounded)


def test_arrays_are_aligned_and_do_not_overlap(ctx, pool) -> None:
    arrays = [pool.array(size, "u8") for size in [1, 255, 256, 257, 1 << 10, 600 << 10, 3 << 20, 5, 100 << 10] * 5]
    assert all(array.ptr % 256 == 0 for array in arrays)
    for number, array in enumerate(arrays):
        ctx.device.fill(array, number)
    for number, array in enumerate(arrays):
        assert (ctx.device.download(array) == number).all()
    assert pool.nbytes >= sum(array.nbytes for array in arrays)


def test_small_arrays_share_memory(ctx) -> None:
    with Pool(ctx.device, "norms") as pool:
        for _ in range(500):
            pool.array(576, "f32")
        assert pool.nbytes == 2 << 20


def test_reserved_memory_is_used_before_more_is_taken(ctx) -> None:
    with Pool(ctx.device, "workspace") as pool:
        pool.reserve(10 << 20)
        before = pool.nbytes
        arrays = [pool.array(1 << 20, "u8") for _ in range(10)]
        assert pool.nbytes == before == 10 << 20
        assert arrays[-1].ptr - arrays[0].ptr == 9 << 20


def test_zeroed_arrays_are_zero(ctx, pool) -> None:
    assert not ctx.device.download(pool.array((1000, 333), "f32", zero=True)).any()


def test_slices_and_views_are_of_the_same_memory(ctx, put, get) -> None:
    values = np.arange(60, dtype=np.int32).reshape(5, 4, 3)
    array = put(values)
    assert np.array_equal(get(array.slice_rows(1, 3)), values[1:3])
    assert np.array_equal(get(array.reshape(20, 3)), values.reshape(20, 3))
    assert np.array_equal(get(array.view("u8", 7)), values.view(np.uint8).reshape(-1)[:7])
    assert np.array_equal(get(array.at(8, "i32", 4)), values.reshape(-1)[2:6])
    ctx.device.fill(array.slice_rows(4, 5), 0)
    values[4] = 0
    assert np.array_equal(get(array), values)


def test_copies_between_arrays(ctx, put, poisoned, get) -> None:
    values = np.arange(1000, dtype=np.float32)
    target = poisoned(1000, "f32")
    ctx.device.copy(put(values), target)
    assert np.array_equal(get(target), values)
    with pytest.raises(DeviceError, match=r"f32\[1000\] \(4,000 bytes\) cannot be copied to f16\[1000\]"):
        ctx.device.copy(target, poisoned(1000, "f16"))


def test_page_locked_memory_copies_both_ways(ctx, poisoned) -> None:
    with HostBuffer(ctx.device, 4096) as host:
        numbers = host.array(np.int32, 2, 100, offset=64)
        numbers[:] = np.arange(200).reshape(2, 100)
        array = poisoned((2, 100), "i32")
        ctx.device.copy_in(array, numbers)
        back = host.array(np.int32, 2, 100, offset=1024)
        ctx.device.copy_out(array, back)
        ctx.device.synchronize()
        assert np.array_equal(back, numbers)
        with pytest.raises(DeviceError, match="bytes 4000:4400 are not in a page-locked buffer of 4,096"):
            host.array(np.float32, 100, offset=4000)
    with pytest.raises(DeviceError, match="closed"):
        host.array(np.float32, 1)


def test_too_much_memory_is_an_error_that_names_pool_size_and_what_is_free(ctx) -> None:
    with Pool(ctx.device, "KV cache") as pool:
        with pytest.raises(CapacityError, match=r"room for 931,322.57 GiB more in the pool 'KV cache'.* GiB are free"):
            pool.array((10**9, 10**6), "u8")
        ctx.device.download(pool.array(10, "f32", zero=True))  # The device can still be used.


@pytest.mark.parametrize(
    ("values", "dtype", "message"),
    [
        (np.zeros((2, 3), np.float32), "i32", r"float32 values cannot be uploaded to i32\[2, 3\]"),
        (np.zeros((3, 2), np.float32), "f32", r"shape \[3, 2\] cannot be uploaded to f32\[2, 3\]"),
        (np.full((2, 3), 300), "u8", r"300..300 do not fit u8"),
        (np.zeros((2, 3), np.int32), "f16", "int32 values"),
    ],
)
def test_values_that_do_not_fit_are_refused(ctx, pool, values, dtype, message) -> None:
    with pytest.raises(DeviceError, match=message):
        ctx.device.upload(pool.array((2, 3), dtype), values)


def test_a_closed_pool_gives_nothing(ctx) -> None:
    pool = Pool(ctx.device, "weights")
    pool.array(1, "f32")
    pool.close()
    pool.close()
    assert pool.nbytes == 0
    with pytest.raises(DeviceError, match=r"pool 'weights' of cuda:0 .* is closed"):
        pool.array(1, "f32")


def _load_cycle() -> None:
    with Context.open(0) as context:
        pool = Pool(context.device, "weights")
        pool.array(64 << 20, "u8", zero=True)
        for _ in range(100):
            pool.array(1000, "f32", zero=True)
        HostBuffer(context.device, 1 << 20)
        blas = Blas(context)
        x = pool.array((8, 64), "f16", zero=True)
        blas.matmul(x, pool.array((32, 64), "f16", zero=True), pool.array((8, 32), "f16"))
        context.device.synchronize()


def test_three_load_cycles_return_to_the_baseline(ctx) -> None:
    _load_cycle()  # cuBLAS and the driver keep what they load once.
    baseline = ctx.device.free()
    for _ in range(3):
        _load_cycle()
    assert ctx.device.free() >= baseline - (1 << 20)


def test_a_closed_device_is_an_error_and_closes_its_pools(ctx) -> None:
    device = CudaDevice.open(0)
    pool = Pool(device, "weights")
    array = pool.array(4, "f32")
    device.close()
    device.close()
    assert pool.closed
    with pytest.raises(DeviceError, match="closed"):
        device.download(array)
    with pytest.raises(DeviceError, match="closed"):
        Pool(device, "weights")


def test_an_index_out_of_range_names_both_numbers(ctx) -> None:
    with pytest.raises(DeviceError, match=r"no device cuda:99; the driver lists [0-9]+: cuda:0"):
        CudaDevice.open(99)


def test_the_device_knows_itself(ctx) -> None:
    device = ctx.device
    assert device.cc >= (7, 5)
    assert device.sm.startswith(f"sm_{device.cc[0]}{device.cc[1]}")
    assert 0 < device.free() <= device.total
    assert device.sms > 0
    assert device.shared_limit >= 48 << 10


def test_a_fault_is_reported_with_the_launch_before_it(ctx) -> None:
    # In a process of its own: a fault ends the use of the device in the process that caused it.
    script = """
from polyhead.errors import DeviceError
from polyhead.runtime.cuda.context import Context
ctx = Context.open(0)
ctx.compiler.add_source("fault.cu", 'extern "C" __global__ void write_nowhere(long long at) { *(int*)at = 1; }')
import numpy as np
ctx.launch("fault.cu", "write_nowhere", 1, 32, np.int64(16))
try:
    ctx.device.synchronize()
except DeviceError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "launched last: fault.cu:write_nowhere" in done.stdout, done.stdout + done.stderr
    assert "CUDA_ERROR_" in done.stdout
