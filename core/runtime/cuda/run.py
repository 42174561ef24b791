"""Run: one step's inputs and its view of the workspace. Submitted: a step whose tokens nobody has read yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..contract import SampledToken, SamplingRow
from ..program import Buffer
from .context import Context
from .driver import translated
from .inputs import View
from .memory import Array
from .sampler import Sampler


@dataclass(frozen=True, slots=True)
class Submitted:
    """A step on the device's stream; ``done`` is the event after it."""

    ctx: Context
    sampler: Sampler
    rows: tuple[SamplingRow, ...]
    done: Any

    def result(self) -> list[SampledToken]:
        with translated(f"waiting for a step on {self.ctx.device}; launched last: {self.ctx.device.last_launch}"):
            self.done.sync()
        return self.sampler.collect(self.rows, waited=True) if self.rows else []


class Run:
    """One step: its inputs, and the workspace seen as buffers of this many rows."""

    def __init__(self, view: View, memory: Array, offsets: Mapping[str, int], act: str) -> None:
        self.view = view
        self._memory, self._offsets, self._act = memory, offsets, act

    def __getitem__(self, buffer: Buffer) -> Array:
        count = self.view.count if buffer.rows == "tokens" else self.view.rows
        return self._memory.at(self._offsets[buffer.name], "f32" if buffer.wide else self._act, count, buffer.columns)
