"""Graphs: work that is launched the same way again and again is captured the second time, and replayed from then on.

Knows nothing of what is launched; the caller's key says what is the same.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

from ...errors import DeviceError
from .context import Context
from .graph import Graph


class Graphs:
    """The graphs of one kind of step, the ones used last. Closed with the device at the latest."""

    def __init__(self, ctx: Context, most: int) -> None:
        """``most`` graphs are kept, and as many keys that were seen once."""
        self._ctx = ctx
        self._most = most
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._graphs: OrderedDict[Hashable, Graph] = OrderedDict()
        self._never: set[Hashable] = set()

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, key: Hashable, name: str, work: Callable[[], None], *, optional: bool = False) -> None:
        """Puts ``work`` on the device's stream, by its own launches or by the graph of an earlier one of this key.

        ``name`` is for errors. Raises DeviceError as Graph does, and what ``work`` raises; where a graph is
        ``optional``, what cannot become one is launched for ever.
        """
        if key in self._never:
            work()
            return
        graph = self._graphs.get(key)
        if graph is None:
            if key not in self._seen:
                work()  # loads kernels and plans products, which a capture cannot
                self._seen[key] = None
                if len(self._seen) > self._most:
                    self._seen.popitem(last=False)
                return
            del self._seen[key]
            try:
                graph = Graph(self._ctx, work, name)
            except DeviceError:
                if not optional:
                    raise
                self._never.add(key)
                work()  # an error of its own shows here
                return
            self._graphs[key] = graph
            if len(self._graphs) > self._most:
                self._graphs.popitem(last=False)[1].close()
        else:
            self._graphs.move_to_end(key)
        graph.launch()

    def clear(self) -> None:
        """Forgets all of them; the device closes them."""
        self._seen.clear()
        self._graphs.clear()
