"""polyhead chat: turns, orders, interruption, and a full context."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
from polyhead import LLM, SamplingParams

Invoke = Callable[..., object]


def answer(model: str, prompt: str, tokens: int) -> str:
    with LLM({"model": model, "device": "cpu"}) as llm:
        return llm.generate(prompt, SamplingParams(max_tokens=tokens, temperature=0.0))[0].text


def test_each_line_is_a_turn_that_sees_those_before(invoke: Invoke, llama: str, chat_template: str) -> None:
    args = ("--temperature", "0", "-n", "3", "--set", chat_template)
    result = invoke("chat", llama, *args, stdin="the\n\nand\n")
    first = answer(llama, "user: the assistant:", 3)
    second = answer(llama, f"user: the assistant: {first} user: and assistant:", 3)
    assert result.exit_code == 0
    assert result.stdout == f"{first}\n{second}\n"
    assert result.stderr.count("max_tokens is 3") == 2


def test_orders_change_the_system_message_forget_and_end(invoke: Invoke, llama: str, chat_template: str) -> None:
    lines = "the\n/clear\n/system sing\nand\n/what\n/exit\nnever asked\n"
    result = invoke("chat", llama, "--temperature", "0", "-n", "3", "--set", chat_template, stdin=lines)
    first = answer(llama, "user: the assistant:", 3)
    second = answer(llama, "system: sing user: and assistant:", 3)
    assert result.stdout == f"{first}\n{second}\n"
    assert "there is no /what" in result.stderr
    assert "forgotten" in result.stderr


def test_a_message_over_the_context_is_refused_with_both_numbers_and_the_conversation_goes_on(
    invoke: Invoke, llama: str, chat_template: str
) -> None:
    lines = f"the\n{'x' * 100}\nand\n"
    result = invoke("chat", llama, "--temperature", "0", "-n", "3", "--set", chat_template, stdin=lines)
    first = answer(llama, "user: the assistant:", 3)
    second = answer(llama, f"user: the assistant: {first} user: and assistant:", 3)
    assert result.stdout == f"{first}\n{second}\n"
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("polyhead: error:")]
    assert "the context of 64 takes at most 63" in line
    assert result.exit_code == 2  # a pipe has no other way to learn of it


def test_without_max_tokens_an_answer_may_fill_the_context(invoke: Invoke, llama: str, chat_template: str) -> None:
    args = ("--temperature", "0", "--set", chat_template, "--set", "sampling.ignore_eos=true")
    result = invoke("chat", llama, *args, stdin="the\n")
    assert "the context of 64 tokens is full" in result.stderr


def test_a_model_without_a_template_is_refused_before_the_first_turn(invoke: Invoke, llama: str) -> None:
    result = invoke("chat", llama, stdin="the\n")
    assert result.exit_code == 2
    assert "no chat template" in result.stderr
    assert "polyhead run" in result.stderr  # and not a setting that would change nothing here
    assert "chat: false" not in result.stderr


def test_bytes_that_are_not_utf8_are_an_error_that_names_the_line(
    invoke: Invoke, llama: str, chat_template: str
) -> None:
    result = invoke("chat", llama, "-n", "1", "--set", chat_template, stdin=b"the\nan\xffd\n")
    assert result.exit_code == 2
    assert "byte 0xff" in result.stderr
    assert "line 2" in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent the POSIX way")
def test_ctrl_c_ends_the_answer_and_not_the_conversation(
    long_llama: str, in_process: Callable[..., subprocess.Popen[str]], chat_template: str
) -> None:
    args = ("--temperature", "0", "--set", chat_template, "--set", "sampling.ignore_eos=true")
    process = in_process("chat", long_llama, *args)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("the\n")
    process.stdin.flush()
    os.read(process.stdout.fileno(), 1)
    process.send_signal(signal.SIGINT)
    # The answer could go on for 19,000 tokens; orders are read only after it.
    out, err = process.communicate("/clear\n/exit\n", timeout=30)
    assert process.returncode == 0
    assert err.splitlines()[1:] == ["polyhead: interrupted", "polyhead: the conversation is forgotten"]
    assert len(out) < 10_000


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_on_a_terminal_there_is_a_prompt_and_ctrl_d_ends(llama: str, chat_template: str) -> None:
    import pty

    main, side = pty.openpty()
    # Exact settings: a drawn token may end the answer, and then it is not cut.
    args = ("--temperature", "0", "-n", "3", "--set", "sampling.ignore_eos=true", "--set", chat_template)
    process = subprocess.Popen(
        [sys.executable, "-m", "polyhead.cli", "chat", llama, *args],
        stdin=side, stdout=side, stderr=side, close_fds=True, env={**os.environ, "TERM": "dumb"},
    )  # fmt: skip
    os.close(side)
    try:
        seen = read_until(main, lambda seen: b"> " in seen)
        os.write(main, b"the\n")
        seen = read_until(main, lambda seen: b"the answer is cut" in seen, seen)
        seen = read_until(main, lambda seen: seen.endswith(b"> "), seen)
        os.write(main, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(main)
    assert b"/exit (or Ctrl-D) ends" in seen
    assert b"\x1b[" not in seen.replace(b"\x1b[?2004", b"")


def read_until(terminal: int, enough: Callable[[bytes], bool], seen: bytes = b"") -> bytes:
    """What a terminal shows, until it is ``enough``; fails with what there was when nothing more comes for a minute."""
    while not enough(seen):
        ready, _, _ = select.select([terminal], [], [], 60)
        assert ready, f"nothing more came after {seen!r}"
        seen += os.read(terminal, 4096)
    return seen
