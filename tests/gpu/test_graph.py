"""Capture and replay."""

from __future__ import annotations

import numpy as np
import pytest
from polyhead.errors import DeviceError
from polyhead.runtime.cuda.context import Context
from polyhead.runtime.cuda.graph import Graph
from polyhead.runtime.cuda.graphs import Graphs
from polyhead.runtime.cuda.memory import HostBuffer

pytestmark = pytest.mark.gpu

SOURCE = """
extern "C" __global__ void step(float* x, const int* count, float factor, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i] = x[i] * factor + *count;
}
"""


@pytest.fixture(scope="module", autouse=True)
def _source(ctx: Context) -> None:
    ctx.compiler.add_source("test_graph.cu", SOURCE)


def _steps(ctx, x, count, times: int) -> None:
    n = x.shape[0]
    for number in range(times):
        ctx.launch("test_graph.cu", "step", -(-n // 128), 128, x, count, 0.5 + number, n)


def test_replays_equal_eager_runs_and_read_what_changed_in_between(ctx, put, get) -> None:
    values = np.random.default_rng(0).standard_normal(1001).astype(np.float32)
    eager, replayed = put(values), put(values)
    count = put(np.zeros(1, np.int32))
    _steps(ctx, eager, count, 5)
    with Graph(ctx, lambda: _steps(ctx, replayed, count, 5)) as graph:
        assert np.array_equal(get(replayed), values), "capturing must not run anything"
        graph.launch()
        assert np.array_equal(get(replayed), get(eager))
        ctx.device.upload(count, np.array([3], np.int32))
        _steps(ctx, eager, count, 5)
        graph.launch()
        assert np.array_equal(get(replayed), get(eager))


def test_copies_fills_and_page_locked_memory_are_captured(ctx, poisoned) -> None:
    with HostBuffer(ctx.device, 1024) as host:
        source, target = host.array(np.float32, 10), host.array(np.float32, 10, offset=512)
        a, b = poisoned(10, "f32"), poisoned(10, "f32")

        def work() -> None:
            ctx.device.fill(b, 0)
            ctx.device.copy_in(a, source)
            ctx.device.copy(a.slice_rows(0, 5), b.slice_rows(5, 10))
            ctx.device.copy_out(b, target)

        with Graph(ctx, work) as graph:
            for start in (1, 100):
                source[:] = np.arange(start, start + 10)
                graph.launch()
                ctx.device.synchronize()
                assert target.tolist() == [0] * 5 + list(range(start, start + 5))


def test_an_error_while_capturing_passes_and_leaves_the_stream_usable(ctx, put, get) -> None:
    x, count = put(np.ones(4, np.float32)), put(np.zeros(1, np.int32))

    def fail() -> None:
        _steps(ctx, x, count, 1)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        Graph(ctx, fail)
    with pytest.raises(DeviceError, match=r"launching test_graph\.cu:step"):
        Graph(ctx, lambda: ctx.launch("test_graph.cu", "step", 0, 32, x, count, 1.0, 4))
    _steps(ctx, x, count, 1)
    assert get(x).tolist() == [0.5] * 4


def test_waiting_while_capturing_is_an_error_that_names_the_graph(ctx, put, get) -> None:
    x, count = put(np.ones(4, np.float32)), put(np.zeros(1, np.int32))
    with pytest.raises(DeviceError, match="cuStreamSynchronize"):
        Graph(ctx, ctx.device.synchronize, "decode graph")
    _steps(ctx, x, count, 1)
    assert get(x).tolist() == [0.5] * 4


def test_a_closed_graph_is_an_error(ctx, put) -> None:
    x, count = put(np.ones(4, np.float32)), put(np.zeros(1, np.int32))
    graph = Graph(ctx, lambda: _steps(ctx, x, count, 1), "decode graph")
    graph.close()
    graph.close()
    with pytest.raises(DeviceError, match="the decode graph is closed"):
        graph.launch()


def test_graphs_keep_those_used_last(ctx, put, get) -> None:
    x, count = put(np.zeros(1, np.float32)), put(np.ones(1, np.int32))
    graphs, launches = Graphs(ctx, 2), []

    def run(key: str) -> None:
        def work() -> None:
            launches.append(key)
            _steps(ctx, x, count, 1)

        graphs.run(key, f"graph {key}", work)

    for key in "aabbaa":  # launched, captured, and the last two replayed
        run(key)
    assert ("".join(launches), len(graphs)) == ("aabb", 2)
    for key in "ccab":  # c takes the place of b, which was used before a
        run(key)
    assert ("".join(launches), len(graphs)) == ("aabbccb", 2)
    expected = 0.0
    for _ in range(10):
        expected = expected * 0.5 + 1
    assert get(x)[0] == np.float32(expected)
    graphs.clear()
