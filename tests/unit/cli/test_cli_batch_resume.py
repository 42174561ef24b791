"""polyhead batch cut off and continued: kills, interrupts, torn lines, full disks, and outputs of something else."""

from __future__ import annotations

import fcntl
import json
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
from batch_lines import EXACT, completion, read, texts, workload
from polyhead.errors import PolyheadError
from polyhead.offline import Output

# 10,000 of them are this file's longest claim: POLYHEAD_TEST_BATCH_LINES=10000 pytest -k kill
LINES = int(os.environ.get("POLYHEAD_TEST_BATCH_LINES", "300"))


def test_killed_again_and_again_nothing_is_lost_or_doubled(in_process, batch, llama, tmp_path):
    lines = workload(LINES)
    _, answers = batch(lines)
    expected = texts(answers)
    source, target = tmp_path / "in.jsonl", tmp_path / "killed.jsonl"
    rng = random.Random(3)
    lost = kills = 0
    for part in (0.1, 0.4, 0.45, 0.8):
        process = in_process("batch", llama, str(source), "-o", str(target), *EXACT)
        while process.poll() is None and not (target.exists() and target.read_bytes().count(b"\n") >= part * LINES):
            time.sleep(0.002)
        process.kill()
        assert process.wait() in (-signal.SIGKILL, 0)
        kills += process.returncode != 0
        if rng.random() < 0.7:  # such a kill may also cut the last line short
            cut = rng.randint(1, 80)
            os.truncate(target, target.stat().st_size - cut)
            lost += 1
    assert kills >= 3
    assert lost
    assert 0.3 * LINES < len(target.read_bytes().splitlines()) <= LINES
    process = in_process("batch", llama, str(source), "-o", str(target), *EXACT)
    process.communicate(timeout=600)
    assert process.returncode == 0
    assert texts(read(target)) == expected


def test_ctrl_c_ends_with_130_and_all_that_was_finished_on_disk(in_process, batch, llama, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in workload(400)))
    process = in_process("batch", llama, str(source), "-o", str(target), *EXACT)
    while not (target.exists() and target.stat().st_size > 5_000):
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "are left: run this again" in errors
    assert "Traceback" not in errors
    done = target.read_bytes()
    assert done.endswith(b"\n")
    assert 0 < len(read(target)) < 400
    result, answers = batch(workload(400))
    assert result.exit_code == 0
    assert target.read_bytes().startswith(done)
    assert len(texts(answers)) == 400


@pytest.fixture
def finished(batch, tmp_path: Path) -> bytes:
    """out.jsonl of three lines."""
    result, _ = batch(workload(3))
    assert result.exit_code == 0
    return (tmp_path / "out.jsonl").read_bytes()


def test_a_last_line_cut_anywhere_is_made_again(finished, tmp_path):
    path = tmp_path / "cut.jsonl"
    whole = finished.splitlines(keepends=True)
    size = len(b"".join(whole[:2]))
    for end in range(size, len(finished)):
        path.write_bytes(finished[:end] + (b"\0" * 7 if end % 2 else b""))  # zeros: what a power cut may leave
        with Output(path) as output:
            assert len(output.ids) == 2
            assert path.stat().st_size >= end  # looking changes nothing
            output.append("0" * 24, "c", response={"status_code": 400}, error=None)
            assert len(read(path)) == 3  # nothing of the cut line is left, should a kill come now
        lines = path.read_bytes().splitlines(keepends=True)
        assert lines[:2] == whole[:2]
        assert len(lines) == 3
        assert json.loads(lines[2])["custom_id"] == "c"


def test_a_finished_batch_loads_no_model(invoke, finished, tmp_path, llama):
    model = tmp_path / Path(llama).name
    model.write_bytes(b"no model")
    result = invoke("batch", str(model), str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), *EXACT)
    assert result.exit_code == 0, result.stderr
    assert "3 of 3 lines are answered" in result.stderr


def test_lines_that_were_added_are_answered_and_the_rest_left_alone(batch, finished, tmp_path):
    result, answers = batch([*workload(3), completion("more")])
    assert result.exit_code == 0
    assert (tmp_path / "out.jsonl").read_bytes().startswith(finished)
    assert len(answers) == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: lines[1:], "does not have"),
        (lambda lines: [completion("request-0", "other"), *lines[1:]], "does not have"),
        (lambda lines: [{**line, "custom_id": line["custom_id"] + "x"} for line in lines], "3 answers"),
    ],
)
def test_an_output_of_another_input_is_refused_unless_overwritten(batch, finished, tmp_path, change, words):
    lines = change(workload(3))
    result, _ = batch(lines)
    assert result.exit_code == 2
    assert words in result.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == finished
    result, answers = batch(lines, "--overwrite")
    assert result.exit_code == 0
    assert {each["custom_id"] for each in answers} == {line["custom_id"] for line in lines}


def test_an_output_of_other_settings_is_refused(batch, finished):
    result, _ = batch(workload(4), "--temperature", "0.5")
    assert result.exit_code == 2
    assert "another model, system message or sampling" in result.stderr


@pytest.mark.parametrize("line", [b"hello\n", b"{}\n", b'{"id": "x", "response": null, "error": null}\n', b"\0\0\n"])
def test_an_output_that_is_none_is_refused_and_left_alone(invoke, finished, tmp_path, llama, line):
    path = tmp_path / "out.jsonl"
    for data, words in ((finished + line, "line 4, is no answer"), (finished + finished, "lines 1 and 4")):
        path.write_bytes(data)
        result = invoke("batch", llama, str(tmp_path / "in.jsonl"), "-o", str(path), *EXACT)
        assert result.exit_code == 2
        assert words in result.stderr
        assert path.read_bytes() == data


def test_custom_ids_that_stand_twice_are_refused_before_anything_runs(batch):
    result, answers = batch([completion("a"), completion("b"), completion("a")])
    assert result.exit_code == 2
    assert "lines 1 and 3" in result.stderr
    assert not answers


def test_two_writers_at_once_are_refused(batch, tmp_path):
    with open(tmp_path / "out.jsonl", "wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        result, _ = batch(workload(1))
        assert result.exit_code == 2
        assert "another process" in result.stderr
    assert batch(workload(1))[0].exit_code == 0


def test_a_full_disk_leaves_whole_lines(tmp_path):
    path = tmp_path / "out.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Output(path) as output:
        output.append("1" * 24, "a", response={"status_code": 400}, error=None)
        whole = path.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(PolyheadError, match="1 answers are whole"):
                output.append("2" * 24, "b" * 300_000, response={"status_code": 400}, error=None)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == whole
