"""Serving: requests of mixed lengths through the product's own loop, all at once or as they arrive."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..engine import SamplingParams, Speculation
from ..errors import RequestError
from ..generation import Generation
from ..runtime.contract import LoadedModel
from .requests import Planned
from .watch import Notes, Watched

if TYPE_CHECKING:
    from ..deltas import Job
    from ..tokenizer import Tokenizer

_LONGEST_SLEEP = 0.05
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, slots=True)
class Moment:
    """After a step: seconds from the start, requests that have blocks or wait for them, share of KV blocks in use,
    tokens sampled in the step."""

    at: float
    requests: int
    kv: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Served:
    """What came of a run. Lists of seconds are unsorted.

    ``first``: from a request's arrival to its first token. ``gaps``: between two tokens of one request, of all
    requests. ``whole``: from arrival to the last token. ``cached_tokens`` of the prompts were found in the KV cache;
    ``drafted_tokens`` were guessed, and ``accepted_tokens`` of these right.
    ``waited``: no request was there. ``host`` is the loop's own work in each step, without handing over and waiting.
    """

    requests: int
    rate: float | None
    seconds: float
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    preemptions: int
    waited: float
    first: tuple[float, ...]
    gaps: tuple[float, ...]
    whole: tuple[float, ...]
    host: tuple[float, ...]
    moments: tuple[Moment, ...]
    notes: Notes = field(compare=False)

    @property
    def output_rate(self) -> float:
        """Generated tokens per second, from the first arrival to the last token."""
        return self.output_tokens / self.seconds

    @property
    def total_rate(self) -> float:
        """Tokens taken in and generated per second."""
        return (self.input_tokens + self.output_tokens) / self.seconds

    @property
    def idle(self) -> tuple[float, float]:
        """Between which shares of the time with requests the device had nothing to do between steps.

        The lower is what the host knows for certain, the upper the most that its observations allow.
        """
        busy = max(self.seconds - self.waited, 1e-9)
        return min(1.0, self.notes.empty / busy), min(1.0, self.notes.perhaps / busy)

    @property
    def kv_mean(self) -> float:
        """Share of KV blocks in use, a mean over time."""
        total = sum(after.at - before.at for before, after in zip(self.moments, self.moments[1:], strict=False))
        area = sum(b.kv * (a.at - b.at) for b, a in zip(self.moments, self.moments[1:], strict=False))
        return area / total if total else max((moment.kv for moment in self.moments), default=0.0)

    @property
    def kv_max(self) -> float:
        """The largest share of KV blocks in use after a step."""
        return max((moment.kv for moment in self.moments), default=0.0)


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """p50, p95 and p99, interpolated; None where there is no value."""
    if not values:
        return {f"p{q}": None for q in PERCENTILES}
    found = np.percentile(np.array(values), PERCENTILES).tolist()
    return {f"p{q}": value for q, value in zip(PERCENTILES, found, strict=True)}


def serve(
    model: LoadedModel,
    tokenizer: Tokenizer | None,
    planned: Sequence[Planned],
    *,
    rate: float | None = None,
    prefix_cache: bool = True,
    speculation: Speculation | None = None,
    max_batch: int | None = None,
    tick: Callable[[int, int, str], None] = lambda done, total, remark: None,
) -> Served:
    """Runs all requests, greedily and past any end token, each no sooner than it arrives.

    ``rate`` is only noted; ``max_batch`` sequences run at once, or as many as the model was loaded for. Raises
    RequestError for one that the model was not loaded for; what ends a request otherwise is raised, as such a run would
    measure nothing.
    """
    longest = max(len(each.prompt) + each.output for each in planned)
    if longest > model.plan.context:
        raise RequestError(
            f"the longest request has {longest:,} tokens; this model was loaded with a context of "
            f"{model.plan.context:,}"
        )
    watched = Watched(model, max_batch=max_batch)
    generation = Generation(watched, tokenizer, prefix_cache=prefix_cache, speculation=speculation)
    return _Serving(watched, generation, planned, rate, tick).run()


class _Serving:
    def __init__(
        self,
        watched: Watched,
        generation: Generation,
        planned: Sequence[Planned],
        rate: float | None,
        tick: Callable[[int, int, str], None],
    ) -> None:
        self.watched, self.generation = watched, generation
        self.planned, self.rate, self.tick = planned, rate, tick
        self.coming = deque(planned)
        self.jobs: dict[str, tuple[Job, float]] = {}  # with the time of arrival
        self.last: dict[str, float] = {}
        self.first: list[float] = []
        self.gaps: list[float] = []
        self.whole: list[float] = []
        self.host: list[float] = []
        self.moments: list[Moment] = []
        self.output_tokens = self.cached_tokens = self.preemptions = 0
        self.drafted_tokens = self.accepted_tokens = 0
        self.waited = 0.0
        self.start = 0.0

    def run(self) -> Served:
        notes = self.watched.notes
        blocks = self.watched.plan.num_blocks
        try:
            self.start = time.perf_counter()
            self.watched.resume()
            while self.coming or self.jobs:
                self._admit()
                if not self.jobs:
                    self._wait()
                    continue
                counts = len(notes.submits), len(notes.waits)
                begun = time.perf_counter()
                changed = self.generation.step()
                ended = time.perf_counter()
                device = sum(notes.submits[counts[0] :]) + sum(notes.waits[counts[1] :])
                self.host.append(ended - begun - device)
                tokens = sum(self._take(job, ended) for job in changed)
                used = 1 - self.generation.free_blocks / blocks
                self.moments.append(Moment(ended - self.start, len(self.jobs), used, tokens))
            seconds = time.perf_counter() - self.start
        finally:
            for job_id in self.jobs:
                self.generation.abort(job_id)
        return Served(
            requests=len(self.planned),
            rate=self.rate,
            seconds=seconds,
            input_tokens=sum(len(each.prompt) for each in self.planned),
            output_tokens=self.output_tokens,
            cached_tokens=self.cached_tokens,
            drafted_tokens=self.drafted_tokens,
            accepted_tokens=self.accepted_tokens,
            preemptions=self.preemptions,
            waited=self.waited,
            first=tuple(self.first),
            gaps=tuple(self.gaps),
            whole=tuple(self.whole),
            host=tuple(self.host),
            moments=tuple(self.moments),
            notes=notes,
        )

    def _admit(self) -> None:
        """Queues what has arrived."""
        now = time.perf_counter() - self.start
        while self.coming and self.coming[0].arrival <= now:
            each = self.coming.popleft()
            params = SamplingParams(temperature=0.0, max_tokens=each.output, ignore_eos=True, seed=1)
            job = self.generation.prepare(each.prompt, params)
            self.generation.queue(job)
            self.jobs[job.id] = job, self.start + each.arrival

    def _wait(self) -> None:
        """Sleeps until the next arrival: no request is there."""
        self.watched.pause()
        before = time.perf_counter()
        until = self.start + self.coming[0].arrival
        while (now := time.perf_counter()) < until:
            time.sleep(min(until - now, _LONGEST_SLEEP))
        self.waited += time.perf_counter() - before
        self.watched.resume()

    def _take(self, job: Job, now: float) -> int:
        """Takes a job's new tokens, which all came now; how many."""
        tokens = 0
        arrival = self.jobs[job.id][1]
        while (delta := self.generation.take(job.id)) is not None:
            tokens += len(delta.token_ids)
            before = self.last.get(job.id)
            if before is None:
                self.first.append(now - arrival)
            else:
                self.gaps.append(now - before)
            self.last[job.id] = now
            if delta.finish_reason is not None:
                self.whole.append(now - arrival)
                self.cached_tokens += job.cached_tokens
                self.preemptions += sum(request.num_preemptions for request in job.requests)
                self.drafted_tokens += sum(request.num_drafted for request in job.requests)
                self.accepted_tokens += sum(request.num_accepted for request in job.requests)
                del self.jobs[job.id]
                self.tick(len(self.whole), len(self.planned), "requests")
                break
        self.output_tokens += tokens
        return tokens
