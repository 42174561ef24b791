"""Fixtures for the command line's tests: tiny models, a runner in this process, and one in a process of its own."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import batch_lines
import pytest
from click.testing import CliRunner, Result
from polyhead.cli import cli

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}assistant:"

Invoke = Callable[..., Result]
Spawn = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("POLYHEAD_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("POLYHEAD_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def llama(tiny_model: Callable[[str], Path]) -> str:
    """A llama with grouped-query attention: 6 heads, 2 K/V heads, 3 layers, context 64, vocabulary 97."""
    return str(tiny_model("llama-gqa"))


@pytest.fixture(scope="session")
def long_llama(llama: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with a context of 20,000, for what must go on until it is interrupted."""
    data = bytearray(Path(llama).read_bytes())
    key = b"llama.context_length"
    at = data.index(key) + len(key) + 4  # after the type of the value
    assert data[at : at + 4] == (64).to_bytes(4, "little")
    data[at : at + 4] = (20_000).to_bytes(4, "little")
    path = tmp_path_factory.mktemp("long") / "long.gguf"
    path.write_bytes(data)
    return str(path)


@pytest.fixture
def invoke() -> Invoke:
    """Runs ``polyhead ARGS`` in this process."""
    separate = {"mix_stderr": False} if "mix_stderr" in inspect.signature(CliRunner).parameters else {}
    runner = CliRunner(**separate)

    def run(*args: str, stdin: str | bytes | None = None) -> Result:
        return runner.invoke(cli, list(args), input=stdin, prog_name="polyhead")

    return run


@pytest.fixture
def spawn() -> Spawn:
    """Runs ``polyhead ARGS`` in a process of its own; ``path`` are folders put before its import path."""

    def run(*args: str, path: tuple[Path, ...] = (), stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*args), capture_output=True, text=True, timeout=60, input=stdin, env=environment(path)
        )

    return run


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "polyhead.cli", *args]


def environment(path: tuple[Path, ...] = ()) -> dict[str, str]:
    before = os.environ.get("PYTHONPATH", "")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), *([before] if before else [])])}


@pytest.fixture
def in_process() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts ``polyhead ARGS`` with pipes, for tests that talk with it while it runs; it does not outlive the test."""
    pipe = subprocess.PIPE
    started: list[subprocess.Popen[str]] = []

    def start(*args: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command(*args), stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment(),
            # A job in the background ignores Ctrl-C, and so would what it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def write_plugin(tmp_path: Path) -> Callable[[str, str], Path]:
    """Installs a plugin package of one module into a folder, which it returns."""

    def write(name: str, source: str) -> Path:
        folder = tmp_path / f"site-{name}"
        info = folder / f"{name}-2.5.dist-info"
        info.mkdir(parents=True)
        (folder / f"{name}.py").write_text(source)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.5\n")
        (info / "entry_points.txt").write_text(f"[polyhead]\n{name} = {name}\n")
        return folder

    return write


@pytest.fixture
def chat_template() -> str:
    """The setting that gives a model a chat template."""
    return f"model.chat_template={TEMPLATE}"


@pytest.fixture
def batch(invoke: Invoke, llama: str, tmp_path: Path) -> Callable[..., tuple[Result, list[dict[str, Any]]]]:
    """Writes lines to in.jsonl, runs ``polyhead batch`` on them, and returns its result and what is in out.jsonl."""

    def run(lines: list[Any] | bytes, *args: str) -> tuple[Result, list[dict[str, Any]]]:
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        data = lines if isinstance(lines, bytes) else "".join(json.dumps(line) + "\n" for line in lines).encode()
        source.write_bytes(data)
        result = invoke("batch", llama, str(source), "-o", str(target), *batch_lines.EXACT, *args)
        assert "internal error" not in result.stderr
        return result, batch_lines.read(target)

    return run
