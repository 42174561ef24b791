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
from small_llm import GREEDY, IDS, assert_idle, seeded
from tasks import LONG, slowly


def queued(own: OwnJobs, *lengths: int) -> list:
    with own.turn() as generation:
        jobs = [generation.prepare([i, 5], seeded(i, max_tokens=length)) for i, length in enumerate(lengths)]
        for job in jobs:
            own.queue(generation, job)
    return jobs


def test_after_another_s_turn_a_step_returns_what_its_steps_brought_too(llm):
    one, two = OwnJobs(llm), OwnJobs(llm)
    mine, theirs = queued(one, 8, 8), queued(two, 8)
    with one.turn() as generation:
        assert one.step(generation) == mine
    with two.turn() as generation:
        while generation.has_work:
            two.step(generation)
    assert all(job.done for job in (*mine, *theirs))
    with one.turn() as generation:
        assert one.step(generation) == mine
        one.abort(generation, [job.id for job in mine])
    assert not one
    assert two
    with two.turn() as generation:
        two.abort(generation, [theirs[0].id, "unknown"])


def test_without_another_s_turn_a_step_returns_only_what_it_moved(llm):
    own = OwnJobs(llm)
    short, long, other = queued(own, 1, 8, 8)
    with own.turn() as generation:
        assert own.step(generation) == [short, long, other]
    with own.turn() as generation:
        own.abort(generation, [other.id])
    with own.turn() as generation:
        assert own.step(generation) == [long], "what the short one holds is no news"
        own.abort(generation, [short.id, long.id])


def test_nobody_ends_another_s_jobs(llm):
    one, two = OwnJobs(llm), OwnJobs(llm)
    (job,) = queued(one, 8)
    with two.turn() as generation:
        two.abort(generation, [job.id])
    with one.turn() as generation:
        while not job.done:
            assert one.step(generation) == [job]
        one.abort(generation, [job.id])


def test_whoever_comes_waits_for_the_step_under_way_and_no_other(llm, monkeypatch):
    steps = slowly(llm, monkeypatch, 0.01)
    stop = threading.Event()

    def all_the_time() -> None:
        while not stop.is_set():
            llm.generate([[i] for i in range(3)], LONG)

    thread = threading.Thread(target=all_the_time)
    thread.start()
    waited = []
    try:
        for i in range(100):
            time.sleep(0.001 + 0.0001 * i)
            before = len(steps)
            with llm._engine():
                waited.append(len(steps) - before)
    finally:
        stop.set()
        thread.join()
    assert sorted(waited)[-5] <= 1, "now and then a thread that passed the door is overtaken once more"


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
    thread.join(60)
    assert not thread.is_alive()
    for thread in others:
        thread.join(60)


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
