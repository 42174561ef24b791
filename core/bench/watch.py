"""Watched: a loaded model that notes when steps are handed over and when their tokens come back.

It shows what the loop above does to the device: the host's own work in a step, and for how long the device had nothing
to do. Answers to the runtime's contract, so the product's own loop runs on it unchanged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.contract import Batch, LoadedModel, Pending, SampledToken, SamplingRow


@dataclass(slots=True)
class Notes:
    """Seconds, by ``time.perf_counter``.

    ``submits`` and ``waits`` have an entry for each step: handing it over, and waiting for its tokens. ``empty``: no
    step was under way as the host sees it, so the device surely had nothing to do. ``perhaps`` adds, for steps that
    were handed over when the one before was done already, the longest that the device can have waited for them: the
    upper bound. Pauses, in which there was no request, are in neither. ``late`` counts such steps and those handed
    over with nothing under way.
    """

    submits: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    empty: float = 0.0
    perhaps: float = 0.0
    late: int = 0


class Watched:
    """Passes everything on to ``model``; its plan allows ``max_batch`` sequences at once, if that is fewer.

    :meth:`pause` says that there is no request; the next step ends the pause.
    """

    def __init__(
        self, model: LoadedModel, clock: Callable[[], float] = time.perf_counter, max_batch: int | None = None
    ) -> None:
        self.decoder, self.plan, self.runs_ahead = model.decoder, model.plan, model.runs_ahead
        if max_batch is not None and max_batch < self.plan.max_batch:
            self.plan = replace(self.plan, max_batch=max_batch)
        self.notes = Notes()
        self._model, self._clock = model, clock
        self._under_way: list[_Watched] = []
        self._free_since: float | None = None  # nothing is under way, and there are requests
        self._busy_at = 0.0  # the last time at which the device was known to be busy

    def pause(self) -> None:
        """Time counts for nothing from now on to :meth:`resume`."""
        if self._free_since is not None:
            self._count(self._clock(), self._free_since)
            self._free_since = None

    def resume(self) -> None:
        """Ends a pause: from now on the device could be busy."""
        self._free_since = self._busy_at = self._clock()

    def logits(self, batch: Batch) -> NDArray[np.float32]:
        return self._model.logits(batch)

    def step(self, batch: Batch, rows: Sequence[SamplingRow], *more: Any, **named: Any) -> list[SampledToken]:
        return self.submit(batch, rows, None, *more, **named).result()

    def submit(
        self, batch: Batch, rows: Sequence[SamplingRow], after: Pending | None = None, *more: Any, **named: Any
    ) -> Pending:
        begun = self._clock()
        last = self._under_way[-1] if self._under_way else None
        late = last is None or _is_done(last.inner) is True
        inner = self._model.submit(batch, rows, after.inner if isinstance(after, _Watched) else after, *more, **named)
        handed = self._clock()
        self.notes.submits.append(handed - begun)
        if late:
            self.notes.late += 1
            if last is None and self._free_since is not None:
                self._count(begun, self._free_since)
            elif last is not None:
                self.notes.perhaps += max(0.0, begun - self._busy_at)
        self._free_since = None
        self._busy_at = handed
        pending = _Watched(self, inner)
        self._under_way.append(pending)
        return pending

    def close(self) -> None:
        self._model.close()

    def _result(self, pending: _Watched) -> list[SampledToken]:
        begun = self._clock()
        was_done = _is_done(pending.inner)
        tokens = pending.inner.result()
        ended = self._clock()
        if pending in self._under_way:
            self._under_way.remove(pending)
            self.notes.waits.append(ended - begun)
        if was_done is not True:  # it was busy until the tokens came
            self._busy_at = max(self._busy_at, ended)
        if not self._under_way:
            self._free_since = ended
        return tokens

    def _count(self, until: float, free_since: float) -> None:
        self.notes.empty += max(0.0, until - free_since)
        self.notes.perhaps += max(0.0, until - min(free_since, self._busy_at))


class _Watched:
    """A step under way."""

    def __init__(self, watch: Watched, inner: Pending) -> None:
        self._watch, self.inner = watch, inner

    def result(self) -> list[SampledToken]:
        return self._watch._result(self)


def _is_done(pending: Pending) -> bool | None:
    """Whether the device has finished a step, where the runtime keeps an event that can be asked; else None."""
    done: bool | None = getattr(getattr(pending, "done", None), "is_done", None)
    return done
