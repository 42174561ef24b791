"""CUDA graphs: what a function launches is captured once and replayed with one call.

Knows nothing of what is launched. A graph holds the addresses it was captured with: arrays must outlive it, and what
changes between replays must change in device memory. Scalars and grids are frozen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from ...errors import DeviceError
from .context import Context
from .device import CudaDevice
from .driver import translated


class Graph:
    """A captured sequence of launches and copies on one device. Closed with the device at the latest."""

    def __init__(self, ctx: Context, work: Callable[[], None], name: str = "graph") -> None:
        """Captures what ``work`` puts on the device's stream; nothing of it runs yet.

        ``work`` must not synchronise or allocate. Run it once before, so that kernels are loaded and errors show where
        they happen. Raises DeviceError, naming the graph, where something cannot be captured; what ``work`` raises
        passes through, and the stream can be used again in both cases.
        """
        self.name = name
        self.closed = False
        self.device: CudaDevice = ctx.device
        device = ctx.device
        device.activate()
        doing = f"capturing the {name} on {device}"
        with translated(doing):
            builder = device.stream.create_graph_builder()
        try:
            with translated(doing):
                if int(builder.stream.handle) != int(device.stream.handle):
                    raise DeviceError(f"{doing}: this version of cuda-core captures another stream; install 1.x")
                builder.begin_building()
            work()
            with translated(doing):
                builder.end_building()
                self._graph = builder.complete()
        except BaseException:
            # The capture must end whatever happened, or the stream stays unusable; it may have ended with the error.
            for end in (builder.end_building, builder.close):
                with contextlib.suppress(Exception):
                    end()
            raise
        builder.close()
        device.adopt(self)
        with translated(doing):
            self._graph.upload(device.stream)

    def launch(self) -> None:
        """Runs the captured work in stream order, without waiting. Raises DeviceError once closed."""
        if self.closed:
            raise DeviceError(f"the {self.name} is closed")
        with translated(f"launching the {self.name} on {self.device}"):
            self._graph.launch(self.device.stream)
        self.device.last_launch = self.name

    def __enter__(self) -> Graph:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the graph, after replays under way have finished. Closing twice is harmless."""
        if self.closed:
            return
        self.closed = True
        self.device.release(self)
        self.device.activate()
        try:
            self.device.synchronize()
        finally:
            self._graph.close()
