"""Several users of one loop: each finds what the others' steps brought for its own jobs, and ends only those."""

from __future__ import annotations

import json
import threading
import time
from contextlib import closing

import batch_lines
from polyhead import LLM
from polyhead.offline import Input, OfflineRun, Output
from polyhead.own_jobs import OwnJobs
from small_llm import GREEDY, IDS, assert_idle


def queued(own: OwnJobs, count: int) -> list:
    with own.turn() as generation:
        jobs = [generation.prepare([i, 5], GREEDY) for i in range(count)]
        for job in jobs:
            own.queue(generation, job)
    return jobs


def test_a_step_returns_own_jobs_with_news_and_after_another_s_turn_what_it_brought(llm):
    one, two = OwnJobs(llm), OwnJobs(llm)
    mine, theirs = queued(one, 2), queued(two, 1)
    with one.turn() as generation:
        assert one.step(generation) == mine
    with one.turn() as generation:
        mine[1].deltas.clear()
        theirs[0].deltas.clear()
        assert one.step(generation) == mine
    with two.turn() as generation:
        while generation.has_work:
            two.step(generation)
    assert all(job.done for job in (*mine, *theirs))
    with one.turn() as generation:
        assert one.step(generation) == mine
        one.abort(generation, [job.id for job in (*mine, *theirs)])
        assert not one
        assert two
    with two.turn() as generation:
        two.abort(generation, [theirs[0].id, "unknown"])


def test_turns_of_one_s_own_are_not_another_s(llm):
    own = OwnJobs(llm)
    jobs = queued(own, 5)  # three fit a step
    with own.turn() as generation:
        own.step(generation)
    with own.turn() as generation:
        own.abort(generation, [jobs[0].id])
    with own.turn() as generation:
        found = own.step(generation)
        assert jobs[1] in found
        assert len(found) == 2 or jobs[3] in found, "only those that moved"
        own.abort(generation, [job.id for job in jobs])


def test_a_stream_closed_in_the_middle_of_a_step_while_a_thread_waits_for_its_turn_stops_nobody(llm, monkeypatch):
    stream = llm.stream(IDS, GREEDY)
    submit = llm._generation.model.submit
    others = [threading.Thread(target=llm.generate, args=([[i]], GREEDY), daemon=True) for i in range(2)]

    def collecting(*args):
        if stream._request is not None:
            for thread in others:
                thread.start()
            while llm._door.acquire(blocking=False):
                llm._door.release()
                time.sleep(0.001)
            stream.close()
        return submit(*args)

    monkeypatch.setattr(llm._generation.model, "submit", collecting)
    thread = threading.Thread(target=llm.generate, args=([[9]], GREEDY), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    for thread in others:
        thread.join(10)


def test_a_batch_whose_jobs_another_user_s_steps_bring_to_their_end_ends_too(settings_of, tmp_path):
    lines = batch_lines.workload(30)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with (
        LLM(settings_of()) as llm,
        closing(Input(tmp_path / "in.jsonl")) as batch,
        Output(tmp_path / "out.jsonl") as output,
    ):
        work = OfflineRun(llm, iter(batch), output, fingerprint="fp")
        rounds = iter(range(1000))

        def stop() -> bool:  # between two steps of the batch another user makes many
            llm.generate([IDS], GREEDY)
            return next(rounds) > 500

        tally = work.run(stop)
        assert (tally.answered, tally.failed, tally.stopped) == (30, 0, False)
        assert_idle(llm)
    answers = batch_lines.texts(batch_lines.read(tmp_path / "out.jsonl"))
    assert len(answers) == 30
