"""polyhead batch: answers in OpenAI's form, bad lines, how many are in flight, and what is refused."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
from batch_lines import EXACT, chat, completion, read, texts, workload
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st
from polyhead import LLM, SamplingParams
from polyhead.errors import DeviceError, RequestError
from polyhead.offline import Input, OfflineRun, Output
from polyhead.own_jobs import OwnJobs

Invoke = Callable[..., Result]


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


def test_a_prompt_of_rows_that_only_pad_the_embedding_is_answered(batch, monkeypatch):
    _pad(monkeypatch, 90)
    lines = [completion("padded", [5, 94, 6], echo=True, logprobs=1), completion("plain", [5, 6])]
    result, answers = batch(lines)
    assert result.exit_code == 0, result.stderr
    (padded,) = (each["response"]["body"]["choices"][0] for each in answers if each["custom_id"] == "padded")
    assert padded["text"].startswith("&'")
    assert padded["logprobs"]["tokens"][:3] == ["&", "", "'"]


def test_an_answer_that_cannot_be_written_down_is_its_line_s_trouble_alone(batch, monkeypatch):
    from polyhead.offline import run

    written = run.answer

    def failing(asked, *rest, **more):
        if asked.echo:
            raise ValueError("no such text")
        return written(asked, *rest, **more)

    monkeypatch.setattr(run, "answer", failing)
    result, answers = batch([completion("bad", echo=True), completion("good")])
    assert result.exit_code == 1
    found = {each["custom_id"]: each["response"] for each in answers}
    assert found["good"]["status_code"] == 200
    assert found["bad"]["status_code"] == 500
    assert "no such text" in found["bad"]["body"]["error"]["message"]


def _pad(monkeypatch: pytest.MonkeyPatch, known: int) -> None:
    """Models are opened with a tokenizer that knows only the first tokens; the others only pad the embedding."""
    opened = LLM.__init__

    def init(self, *args, **more):
        opened(self, *args, **more)
        self.tokenizer.vocab_size = known

    monkeypatch.setattr(LLM, "__init__", init)


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


def test_every_token_counts_of_several_samples_and_of_steps_that_others_made(llm, tmp_path):
    source = tmp_path / "in.jsonl"
    lines = [completion(f"request-{i}", max_tokens=9, ignore_eos=True, n=1 + i % 3) for i in range(9)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    counts = []

    def stop() -> bool:
        llm.generate([[5, 6]], SamplingParams(max_tokens=3))
        return False

    with closing(Input(source)) as found, Output(tmp_path / "out.jsonl") as output:
        run = OfflineRun(llm, iter(found), output, fingerprint="fp")
        tally = run.run(stop, tick=lambda tally: counts.append(tally.steps_tokens))
    assert counts == sorted(counts)
    assert tally.steps_tokens == tally.generated_tokens == 9 * (1 + 2 + 3) * 3


def test_an_interrupt_as_soon_as_a_line_is_queued_leaves_none_of_it_behind(llm, tmp_path, monkeypatch):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in workload(9)))
    queue = OwnJobs.queue
    interrupts = [False, False, True]

    @contextmanager
    def turn(own: OwnJobs) -> Iterator[Any]:
        with real(own) as generation:
            yield generation
        if queued:
            queued.clear()
            if interrupts and interrupts.pop(0):
                raise KeyboardInterrupt

    queued: list[Any] = []
    real = OwnJobs.turn
    monkeypatch.setattr(OwnJobs, "queue", lambda *args: (queue(*args), queued.append(args))[0])
    monkeypatch.setattr(OwnJobs, "turn", turn)
    with closing(Input(source)) as found, Output(tmp_path / "out.jsonl") as output, pytest.raises(KeyboardInterrupt):
        OfflineRun(llm, iter(found), output, fingerprint="fp").run()
    assert not llm._generation.has_work
    assert not llm._generation._jobs


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
