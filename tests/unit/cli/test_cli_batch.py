"""polyhead batch: answers in OpenAI's form, bad lines, resuming after a kill, and what is refused."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st
from polyhead import LLM
from polyhead.errors import DeviceError, PolyheadError, RequestError
from polyhead.offline import Input, OfflineRun, Output

Invoke = Callable[..., Result]
# 10,000 of them are this file's longest claim: POLYHEAD_TEST_BATCH_LINES=10000 pytest -k kill
LINES = int(os.environ.get("POLYHEAD_TEST_BATCH_LINES", "300"))
EXACT = ("--device", "cpu", "--set", "runtime.deterministic=true", "--set", "runtime.block_size=4")


def completion(custom_id: str, prompt: Any = "the rain", **body: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": 4, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def chat(custom_id: str, *texts: str, **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text} for text in texts]
    body = {"messages": messages, "max_tokens": 4, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


@pytest.fixture
def batch(invoke: Invoke, llama: str, tmp_path: Path) -> Callable[..., tuple[Result, list[dict[str, Any]]]]:
    """Writes lines to in.jsonl, runs ``polyhead batch`` on them, and returns its result and what is in out.jsonl."""

    def run(lines: list[Any] | bytes, *args: str) -> tuple[Result, list[dict[str, Any]]]:
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        data = lines if isinstance(lines, bytes) else "".join(json.dumps(line) + "\n" for line in lines).encode()
        source.write_bytes(data)
        result = invoke("batch", llama, str(source), "-o", str(target), *EXACT, *args)
        assert "internal error" not in result.stderr
        return result, read(target)

    return run


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def texts(answers: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The choices' texts by custom_id, of answers of which each has one."""
    found = {each["custom_id"]: [choice["text"] for choice in each["response"]["body"]["choices"]] for each in answers}
    assert len(found) == len(answers)
    return found


def test_every_line_gets_the_answer_that_the_same_request_gets_alone(batch, llama):
    lines = [
        completion("greedy", "the sea", temperature=0.0, max_tokens=9),
        completion("seeded", "he sings", seed=5, n=3, top_p=0.9, top_k=40),
        completion("several", ["one", [5, 6, 7]], seed=1, stop=["e"], frequency_penalty=0.5),
        completion("echoed", "and it is", echo=True, max_tokens=2, temperature=0),
        {"prompt": "on", "max_tokens": 3, "seed": 2, "custom_id": "plain"},
    ]
    result, answers = batch(lines)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    found = texts(answers)
    from polyhead import SamplingParams

    with LLM({"model": llama, "device": "cpu", "runtime": {"deterministic": True, "block_size": 4}}) as llm:
        alone = llm.generate("the sea", SamplingParams(temperature=0.0, max_tokens=9))[0].text
        three = llm.generate("he sings", SamplingParams(seed=5, n=3, top_p=0.9, top_k=40, max_tokens=4))[0]
        stopped = SamplingParams(seed=1, stop=["e"], frequency_penalty=0.5, max_tokens=4)
        two = [llm.generate([prompt], stopped)[0].text for prompt in ("one", [5, 6, 7])]
        echoed = llm.generate("and it is", SamplingParams(max_tokens=2, temperature=0.0))[0].text
        plain = llm.generate("on", SamplingParams(max_tokens=3, seed=2))[0].text
    assert found == {
        "greedy": [alone],
        "seeded": [sample.text for sample in three.outputs],
        "several": two,
        "echoed": ["and it is" + echoed],
        "plain": [plain],
    }
    for each in answers:
        assert list(each) == ["id", "custom_id", "response", "error"]
        body = each["response"]["body"]
        usage = body["usage"]
        assert (each["error"], each["response"]["status_code"]) == (None, 200)
        assert (body["object"], body["model"]) == ("text_completion", "llama-gqa")
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert [choice["index"] for choice in body["choices"]] == list(range(len(body["choices"])))
        assert {choice["finish_reason"] for choice in body["choices"]} <= {"stop", "length"}
    assert "5 of 5 lines" in result.stderr


def test_usage_counts_a_prompt_once_for_all_its_samples_and_what_was_cached(batch):
    _, (first,) = batch([completion("a", [7] * 11, n=4, max_tokens=3, ignore_eos=True)])
    usage = first["response"]["body"]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (11, 12)
    _, answers = batch(
        [completion(str(i), [7] * 11, max_tokens=1) for i in range(2)], "--overwrite", "--set", "runtime.max_batch=1"
    )
    assert sorted(each["response"]["body"]["usage"]["prompt_tokens_details"]["cached_tokens"] for each in answers) == [
        0,
        8,
    ]


def test_log_probabilities_have_openai_s_two_forms(batch, chat_template):
    _, answers = batch(
        [completion("text", logprobs=2, seed=1), chat("chat", "hi", logprobs=True, top_logprobs=2, seed=1)],
        "--set", chat_template,
    )  # fmt: skip
    found = {each["custom_id"]: each["response"]["body"]["choices"][0] for each in answers}
    text = found["text"]["logprobs"]
    assert "".join(text["tokens"]) == found["text"]["text"]
    assert len(text["token_logprobs"]) == len(text["top_logprobs"]) == len(text["text_offset"]) == 4
    for token, value, top in zip(text["tokens"], text["token_logprobs"], text["top_logprobs"], strict=True):
        assert top[token] == value <= max(top.values()) <= 0
    content = found["chat"]["logprobs"]["content"]
    assert bytes(byte for item in content for byte in item["bytes"]).decode() == found["chat"]["message"]["content"]
    assert all(len(item["top_logprobs"]) == 2 for item in content)


def test_a_chat_goes_through_the_template_with_the_config_s_system_message(batch, llama, chat_template):
    lines = [chat("a", "hi", temperature=0), chat("b", "hi", temperature=0)]
    lines[1]["body"]["messages"].insert(0, {"role": "system", "content": "sea"})
    _, answers = batch(lines, "--set", chat_template, "--set", "system=rain")
    tokens = {each["custom_id"]: each["response"]["body"]["usage"]["prompt_tokens"] for each in answers}
    with LLM({"model": {"path": llama, "chat_template": chat_template.partition("=")[2]}, "device": "cpu"}) as llm:
        user = {"role": "user", "content": "hi"}
        assert tokens == {
            "a": len(llm.chat_prompt([{"role": "system", "content": "rain"}, user])),
            "b": len(llm.chat_prompt([{"role": "system", "content": "sea"}, user])),
        }
    assert all(each["response"]["body"]["choices"][0]["message"]["role"] == "assistant" for each in answers)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (completion("x", max_token=5), "'max_token'; did you mean 'max_tokens'"),
        (completion("x", messages=[]), "'messages'; it belongs to /v1/chat/completions"),
        (completion("x", temperature=-1), "temperature must be"),
        (completion("x", temperature="0.5"), "temperature must be"),
        (completion("x", max_tokens=2.0), "max_tokens must be an integer"),
        (completion("x", stream=True), "stream must be false"),
        (completion("x", ""), "the prompt is empty"),
        (completion("x", []), "at least one"),
        (completion("x", [[]]), "the prompt is empty"),
        (completion("x", [1, "a"]), "prompt[0] must be"),
        (completion("x", [97]), "token id 97"),
        (completion("x", [1] * 64), "takes at most 63"),
        (completion("x", "a\ud800b"), "not a Unicode character"),
        (completion("x", ["a"] * 200, n=100), "over 1,024"),
        (completion("x", logit_bias={"97": 1}), "ids 0 to 96"),
        (completion("x", logit_bias={"x": 1}), "no token id"),
        (completion("x", suffix="y"), "suffix"),
        (completion("x", best_of=2), "best_of"),
        (chat("x", "hi"), "no chat template"),
        (chat("x"), "at least one message"),
        (chat("x", "hi", max_completion_tokens=9), "differ"),
        (chat("x", "hi", functions=[]), "functions is not supported"),
        (chat("x", "hi", response_format={"type": "yaml"}), "'yaml'"),
        ({**completion("x"), "url": "/v1/embeddings"}, "/v1/embeddings"),
        ({**completion("x"), "method": "GET"}, "'POST'"),
        ({**completion("x"), "boby": 1}, "'boby' beside the body; did you mean 'body'"),
        ({**completion("x"), "body": [1]}, "JSON object, got a list"),
        ({"custom_id": "x", "url": "/v1/completions"}, "'body' is missing"),
    ],
)
def test_a_wrong_line_gets_an_error_and_the_others_their_answers(batch, line, words):
    result, answers = batch([completion("before"), line, completion("after")])
    assert result.exit_code == 1, result.stderr
    found = {each["custom_id"]: each["response"] for each in answers}
    assert {name: each["status_code"] for name, each in found.items()} == {"before": 200, "x": 400, "after": 200}
    error = found["x"]["body"]["error"]
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert "1 of them with an error" in result.stderr


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b'{"custom_id": "x"', "not JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[1]", "not a JSON object"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"custom_id": "x", "body": {"seed": NaN}}', "NaN"),
        (b'{"custom_id": "x", "body": {"seed": ' + b"9" * 5000 + b"}}", "not JSON"),
        (json.dumps({**completion("x"), "custom_id": 7}).encode(), "a custom_id that is not"),
        (b'{"method": "POST", "url": "/v1/completions", "body": {}}', "no custom_id"),
        (b'{"custom_id": "x", "a": "' + b"a" * (16 << 20) + b'"}', "more than 16,777,216 bytes"),
    ],
    ids=range(9),
)
def test_a_line_that_cannot_be_read_is_named_by_its_number(batch, raw, words):
    good = json.dumps(completion("good")).encode()
    result, answers = batch(b"\xef\xbb\xbf" + good + b"\r\n\n  \n" + raw + b"\n" + raw)
    assert result.exit_code == 1
    bad = [each for each in answers if each["custom_id"] is None]
    assert [each["error"]["line"] for each in bad] == [4, 5]
    assert all(words in each["error"]["message"] and each["response"] is None for each in bad)
    assert [each["response"]["status_code"] for each in answers if each["custom_id"] == "good"] == [200]
    again, same = batch(b"\xef\xbb\xbf" + good + b"\r\n\n  \n" + raw + b"\n" + raw)
    assert (again.exit_code, same) == (1, answers)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=40), st.text(max_size=40).map(str.encode), st.sampled_from([b"{}", b""]))))
def test_every_line_that_is_not_blank_is_one_line(tmp_path_factory, raws):
    path = tmp_path_factory.mktemp("lines") / "in.jsonl"
    path.write_bytes(b"\n".join(raws))
    with closing(Input(path)) as found:
        lines = list(found)
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    assert [line.number for line in lines] == [at for at, raw in enumerate(content, 1) if raw.strip()]
    assert len({line.id for line in lines}) == len(lines)


def workload(count: int) -> list[dict[str, Any]]:
    words = ["the", "rain", "and", "sea", "are", "one", "thing", "he", "sings", "in", "it", "is", "on"]
    rng = random.Random(7)
    return [
        completion(f"request-{i}", " ".join(rng.choices(words, k=rng.randint(1, 4))), max_tokens=rng.randint(1, 16))
        for i in range(count)
    ]


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


def test_what_is_no_file_is_refused(invoke, llama, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(completion("a")))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "link").symlink_to(source)
    before = source.read_bytes()
    for where, target, words in (
        ("missing", "out", "cannot be read"),
        ("pipe", "out", "no regular file"),
        ("empty", "out", "no lines"),
        ("in.jsonl", "pipe", "no regular file"),
        ("in.jsonl", "none/out", "cannot be written"),
        ("in.jsonl", ".", "cannot be written"),
        ("in.jsonl", "link", "is the input"),
    ):
        result = invoke("batch", llama, str(tmp_path / where), "-o", str(tmp_path / target), "--overwrite", *EXACT)
        assert result.exit_code == 2, (where, target, result.stderr)
        assert words in result.stderr
    assert source.read_bytes() == before


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


@pytest.fixture
def llm(llama: str) -> Iterator[LLM]:
    settings = {"model": llama, "device": "cpu", "runtime": {"max_batch": 4, "deterministic": True}}
    with LLM(settings) as llm:
        yield llm


def test_no_more_lines_are_read_than_keep_the_model_busy(llm, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in workload(60)))
    taken = 0

    def counted(lines: Any) -> Iterator[Any]:
        nonlocal taken
        for line in lines:
            taken += 1
            yield line

    flights = []
    with closing(Input(source)) as found, Output(tmp_path / "out.jsonl") as output:
        run = OfflineRun(llm, counted(found), output, fingerprint="fp")
        tally = run.run(tick=lambda tally: flights.append(taken - tally.lines))
    assert tally.answered == taken == 60
    assert max(flights) <= 2 * 4
    assert max(flights) > 4
    assert llm._generation.free_blocks == llm.plan.num_blocks


def test_an_error_of_the_device_ends_the_run_and_is_nobody_s_answer(llm, tmp_path, monkeypatch):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in workload(20)))
    model = llm._generation.model
    real, left = model.submit, 25

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise DeviceError("the device is lost")
        return real(*args, **kwargs)

    monkeypatch.setattr(model, "submit", failing)
    with closing(Input(source)) as found:
        with Output(tmp_path / "out.jsonl") as output, pytest.raises(DeviceError):
            OfflineRun(llm, iter(found), output, fingerprint="fp").run()
        answers = read(tmp_path / "out.jsonl")
        assert 0 < len(answers) < 20
        assert {each["response"]["status_code"] for each in answers} == {200}
        assert llm._generation.free_blocks == llm.plan.num_blocks
        with Output(tmp_path / "out.jsonl") as output:
            assert OfflineRun(llm, iter(found), output, fingerprint="fp").run().answered == 20 - len(answers)


def test_a_request_that_fails_on_its_way_is_an_error_of_its_line_alone(llm, tmp_path, monkeypatch):
    lines = workload(12)
    lines[2]["body"] |= {"prompt": ["one", "two"], "max_tokens": 30, "temperature": 0.125}
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = llm._generation.model
    real, left = model.submit, 5

    def failing(batch: Any, rows: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal left
        row = next((at for at, row in enumerate(rows) if row.temperature == 0.125), None)
        left -= row is not None
        if row is not None and left == 0:
            error = RequestError("no token is left")
            error.row = row
            raise error
        return real(batch, rows, *args, **kwargs)

    monkeypatch.setattr(model, "submit", failing)
    with closing(Input(source)) as found, Output(tmp_path / "out.jsonl") as output:
        tally = OfflineRun(llm, iter(found), output, fingerprint="fp").run()
    assert (tally.answered, tally.failed) == (11, 1)
    (failed,) = [each for each in read(tmp_path / "out.jsonl") if each["response"]["status_code"] != 200]
    assert failed["custom_id"] == "request-2"
    assert failed["response"]["body"]["error"]["message"] == "no token is left"
    assert llm._generation.free_blocks == llm.plan.num_blocks


def test_an_input_that_changes_while_it_is_read_is_noticed(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in workload(3)))
    with closing(Input(source)) as found:
        lines = iter(found)
        next(lines)
        source.write_text("".join(json.dumps(line) + "\n" for line in workload(4)))
        with pytest.raises(RequestError, match="changed"):
            list(lines)


def test_seeds_come_of_the_custom_id_and_the_configured_seed(batch):
    lines = [completion(name, "the sea", max_tokens=12) for name in "abc"]
    first = texts(batch(lines)[1])
    assert len({text for (text,) in first.values()}) == 3
    assert texts(batch(lines[::-1], "--overwrite")[1]) == first
    other = texts(batch(lines, "--overwrite", "--seed", "1")[1])
    assert all(other[name] != first[name] for name in "abc")


def test_a_bar_is_drawn_on_a_terminal(llama, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in workload(300)))
    args = ("batch", llama, str(source), "-o", str(tmp_path / "out.jsonl"), *EXACT)
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "polyhead.cli", *args],
        stderr=child, stdout=subprocess.DEVNULL, env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )  # fmt: skip
    os.close(child)
    seen = b""
    with contextlib.suppress(OSError):  # the terminal's end
        while data := os.read(parent, 65536):
            seen += data
    os.close(parent)
    assert process.wait() == 0
    for part in (b"/300", b"tok/s", b"left"):
        assert part in seen
