"""OfflineRun: the lines of a batch through one model, as many at a time as keep it busy, answers as they finish."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..completion import Completion
from ..errors import PolyheadError
from ..openai import Asked, BodyError, answer, problem, read_body
from ..openai.problem import is_the_request_s
from ..own_jobs import OwnJobs
from .input import Line
from .output import Output

if TYPE_CHECKING:
    from ..config import RunConfig
    from ..deltas import Job
    from ..llm import LLM

# While the model has enough to do, so many lines are read and tokenised between two steps: not a whole window at once,
# which the device would wait for.
_LINES_PER_STEP = 4
_LINES_AT_ONCE = 256


@dataclass(slots=True)
class Tally:
    """What a run has done. ``steps_tokens`` are generated so far, those of unfinished lines too. For finished lines
    ``drafted_tokens`` were guessed, and ``accepted_tokens`` of these right.
    """

    answered: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    seconds: float = 0.0
    stopped: bool = False

    @property
    def lines(self) -> int:
        return self.answered + self.failed


@dataclass(slots=True, eq=False)
class _Active:
    """A line that is being answered, and its jobs, one for each prompt."""

    line: Line
    asked: Asked
    jobs: list[Job] = field(default_factory=list)


class OfflineRun:
    """Answers ``lines`` in the order in which they finish. Others may use the model at the same time.

    About twice as many sequences as fit a step are in flight, so memory does not grow with the file, and a free place
    in a step is filled at once. A line without a seed gets one of its custom_id and ``sampling.seed``, so its answer
    does not depend on where an earlier run ended. Errors that are a line's own become its answer; those of the device
    end the run.
    """

    def __init__(self, llm: LLM, lines: Iterator[Line], output: Output, *, fingerprint: str) -> None:
        self.tally = Tally()
        self._llm, self._lines, self._output, self._fingerprint = llm, lines, output, fingerprint
        self._window = 2 * min(llm.plan.max_batch, llm.plan.max_logit_rows)
        self._active: dict[str, _Active] = {}  # by job
        self._counted: dict[str, int] = {}  # by job, how many of its deltas are in the tally
        self._own = OwnJobs(llm)
        self._sequences = 0
        self._exhausted = False

    def run(
        self, stop: Callable[[], bool] = lambda: False, tick: Callable[[Tally], None] = lambda tally: None
    ) -> Tally:
        """Runs until every line is answered, or ``stop()`` says so between two steps.

        What was in flight then is dropped, and answered by the next run.
        """
        start = time.perf_counter()
        try:
            while not stop():
                self._fill()
                if self._active:
                    self._step()
                elif self._exhausted:
                    return self.tally
                self.tally.seconds = time.perf_counter() - start
                tick(self.tally)
            self.tally.stopped = True
            return self.tally
        finally:
            self.tally.seconds = time.perf_counter() - start
            self._drop(list(self._active))

    def _fill(self) -> None:
        room = self._window // 2 - self._sequences  # below this the model itself would run short
        taken = 0
        while self._sequences < self._window and taken < (_LINES_AT_ONCE if room > 0 else _LINES_PER_STEP):
            line = next(self._lines, None)
            if line is None:
                self._exhausted = True
                return
            if line.id in self._output.ids:
                continue
            before = self._sequences
            self._start(line)
            room -= self._sequences - before
            taken += 1

    def _start(self, line: Line) -> None:
        try:
            self._queue(line)
        except Exception as error:
            if isinstance(error, PolyheadError) and not is_the_request_s(error):
                raise
            self._refuse(line, error)

    def _queue(self, line: Line) -> None:
        llm = self._llm
        if line.endpoint is None:
            raise BodyError(line.problem or "", code="invalid_line")
        defaults = llm.default_params
        asked = read_body(line.endpoint, line.body, replace(defaults, seed=_seed(defaults.seed, line.custom_id or "")))
        if asked.stream:
            raise BodyError("stream must be false: a batch has whole answers", "stream")
        prompts = self._token_ids(asked)
        most = llm.plan.context - 1
        for ids in prompts:
            if len(ids) > most:
                raise BodyError(
                    f"the prompt has {len(ids):,} tokens; the context of {most + 1:,} takes at most {most:,} and one "
                    "generated token",
                    "messages" if asked.endpoint == "chat" else "prompt",
                    "context_length_exceeded",
                )
        active = _Active(line, asked, llm._prepare(prompts, asked.params, asked.priority))
        # Noted before any is queued: so an interrupt, wherever it comes, leaves none behind.
        self._active |= dict.fromkeys((job.id for job in active.jobs), active)
        self._sequences += sum(len(job.requests) for job in active.jobs)
        try:
            with self._own.turn() as generation:
                for job in active.jobs:
                    self._own.queue(generation, job)
        except BaseException:
            self._drop([job.id for job in active.jobs])
            raise

    def _token_ids(self, asked: Asked) -> list[Sequence[int]]:
        llm = self._llm
        if asked.endpoint == "completions":
            return [llm.encode(prompt) for prompt in asked.prompts]
        messages, system = asked.messages, llm.config.system
        if system is not None and all(message.get("role") not in ("system", "developer") for message in messages):
            messages = [{"role": "system", "content": system}, *messages]
        return [llm.chat_prompt(messages, tools=asked.tools)]

    def _step(self) -> None:
        with self._own.turn() as generation:
            changed = self._own.step(generation)
        for job in changed:
            active = self._active.get(job.id)
            if active is None:  # its line was answered for another of its jobs
                continue
            # Not one a step: it may be several, of samples or right guesses, or of steps that others made.
            self.tally.steps_tokens += len(job.deltas) - self._counted.get(job.id, 0)
            self._counted[job.id] = len(job.deltas)
            error = job.error
            if error is not None:
                if not is_the_request_s(error):
                    raise error
                self._drop([other.id for other in active.jobs])
                self._refuse(active.line, error)
            elif job.done and all(other.done for other in active.jobs):
                self._finish(active)

    def _finish(self, active: _Active) -> None:
        line, asked, jobs = active.line, active.asked, active.jobs
        completions = [Completion.of(job, list(job.deltas)) for job in jobs]
        self._drop([job.id for job in jobs])
        try:
            body = answer(
                asked,
                completions,
                self._llm.tokenizer,
                answer_id=line.id,
                model=self._llm.model.name,
                created=int(time.time()),
                fingerprint=self._fingerprint,
                stop_ids=jobs[0].requests[0].stop_ids,
            )
        except Exception as error:  # it would end every later run as well
            self._refuse(line, error)
            return
        self._write(line, 200, body)
        self.tally.answered += 1
        self.tally.prompt_tokens += body["usage"]["prompt_tokens"]
        self.tally.generated_tokens += body["usage"]["completion_tokens"]
        for sample in (sample for completion in completions for sample in completion.outputs):
            self.tally.drafted_tokens += sample.drafted_tokens
            self.tally.accepted_tokens += sample.accepted_tokens

    def _refuse(self, line: Line, error: Exception) -> None:
        status, body = problem(error)
        if line.custom_id is None:  # there is nothing that a response could be matched with
            found = {"code": body["error"]["code"], "message": body["error"]["message"], "line": line.number}
            self._output.append(line.id, None, response=None, error=found)
        else:
            self._write(line, status, body)
        self.tally.failed += 1

    def _write(self, line: Line, status: int, body: dict[str, Any]) -> None:
        response = {"status_code": status, "request_id": f"req_{line.id}", "body": body}
        self._output.append(line.id, line.custom_id, response=response, error=None)

    def _drop(self, job_ids: Sequence[str]) -> None:
        """Forgets jobs, and ends those that have not ended."""
        with self._own.turn() as generation:
            for job_id in job_ids:
                self._counted.pop(job_id, None)
                active = self._active.pop(job_id, None)
                if active is not None:
                    self._sequences -= next(len(job.requests) for job in active.jobs if job.id == job_id)
            self._own.abort(generation, job_ids)


def settings_fingerprint(config: RunConfig) -> str:
    """What of a configuration decides the answers, as OpenAI's ``system_fingerprint``.

    Of the model the file's name, of the device nothing: a batch may move to another machine.
    """
    sampling = config.sampling.model_dump(mode="json", exclude_unset=True)
    model = config.model.model_dump(mode="json") | {"path": config.model.path.replace("\\", "/").rpartition("/")[2]}
    parts = [model, config.architecture, sampling, config.system]
    return "fp_" + hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _seed(configured: int | None, custom_id: str) -> int:
    data = f"{configured or 0}\0{custom_id}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
