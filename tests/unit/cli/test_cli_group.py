"""The command itself: help, imports, exit codes, plugins' commands, closed pipes and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import polyhead
import pytest
from polyhead.cli import COMMANDS, cli

HEAVY = ("numpy", "pydantic", "yaml", "jinja2", "tokenizers", "rich", "gguf", "pluggy", "huggingface_hub", "cuda")

GREETER = """
import click
from polyhead import hookimpl

@hookimpl
def polyhead_register_commands(cli):
    @cli.command("greet")
    @click.argument("name")
    def greet(name):
        "Greet."
        click.echo(f"hello {name}, {1 / len(name[1:])}")
"""
THIEF = """
import click
from polyhead import hookimpl

@hookimpl
def polyhead_register_commands(cli):
    @cli.command("run")
    def run():
        "Not the real one."
"""


def loaded_after(*lines: str) -> list[str]:
    code = "\n".join((*lines, f"import sys; print([name for name in {HEAVY!r} if name in sys.modules])"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return list(json.loads(done.stdout.splitlines()[-1].replace("'", '"')))


def test_importing_polyhead_and_its_cli_imports_nothing_heavy() -> None:
    assert loaded_after("import polyhead") == []
    assert loaded_after("import polyhead, polyhead.cli") == []


@pytest.mark.parametrize("args", [["--help"], ["run", "--help"], ["chat", "-h"], ["inspect", "-h"], ["bench", "-h"]])
def test_help_imports_nothing_heavy_and_asks_no_plugin(args: list[str]) -> None:
    lines = ("from polyhead.cli import cli", f"cli.main({args!r}, standalone_mode=False)")
    assert loaded_after(*lines) == []


def test_the_list_of_heavy_modules_notices_one() -> None:
    assert loaded_after("from polyhead import LLM") != []


def test_help_names_every_command_and_its_own_help_agrees(invoke: Callable[..., object]) -> None:
    out = invoke("--help").stdout
    for command in COMMANDS:
        assert f"  {command.name} " in out
        loaded = command.load()
        assert loaded.name == command.name
        assert invoke(command.name, "--help").exit_code == 0


def test_version(invoke: Callable[..., object]) -> None:
    assert invoke("--version").stdout == f"polyhead, version {polyhead.__version__}\n"


def test_unknown_command_suggests_the_nearest(invoke: Callable[..., object]) -> None:
    result = invoke("inspct")
    assert result.exit_code == 2
    assert "'inspct'" in result.stderr
    assert "'inspect'" in result.stderr


def test_a_plugin_adds_a_command_without_being_loaded_for_help(
    spawn: Callable[..., subprocess.CompletedProcess[str]], write_plugin: Callable[[str, str], Path]
) -> None:
    site = write_plugin("greeter", GREETER)
    assert spawn("greet", "you", path=(site,)).stdout == "hello you, 0.5\n"
    assert "greet" not in spawn("--help", path=(site,)).stdout
    listed = json.loads(spawn("plugins", "--json", path=(site,)).stdout)
    assert listed["commands"] == ["greet"]
    assert {"greeter", "gpt_mha", "llama_gqa"} <= {plugin["name"] for plugin in listed["plugins"]}


def test_an_internal_error_is_one_line_and_exit_1_and_v_adds_the_traceback(
    spawn: Callable[..., subprocess.CompletedProcess[str]], write_plugin: Callable[[str, str], Path]
) -> None:
    site = write_plugin("greeter", GREETER)
    short = spawn("greet", "x", path=(site,))
    assert short.returncode == 1
    assert short.stderr.startswith("polyhead: internal error: ZeroDivisionError: ")
    assert len(short.stderr.splitlines()) == 1
    assert "-v" in short.stderr
    verbose = spawn("-v", "greet", "x", path=(site,))
    assert verbose.returncode == 1
    assert "Traceback" in verbose.stderr
    assert "line 11, in greet" in verbose.stderr


def test_a_plugin_cannot_replace_a_built_in_command(
    spawn: Callable[..., subprocess.CompletedProcess[str]], write_plugin: Callable[[str, str], Path]
) -> None:
    result = spawn("plugins", path=(write_plugin("thief", THIEF),))
    assert result.returncode == 0
    assert "polyhead: warning: plugin thief (thief 2.5): its commands are left out: redefines the command run" in (
        result.stderr
    )


def test_a_broken_plugin_is_listed_with_its_reason_and_disabled_on_request(
    spawn: Callable[..., subprocess.CompletedProcess[str]], write_plugin: Callable[[str, str], Path]
) -> None:
    site = write_plugin("wreck", "raise RuntimeError('half installed')\n")
    result = spawn("plugins", path=(site,))
    lines = result.stdout.splitlines()
    assert any("wreck 2.5" in line and "FAILED: RuntimeError: half installed" in line for line in lines)
    assert any("llama_gqa for llama" in line and line.endswith("ok") for line in lines)
    assert result.stderr == ""  # the table has it; once is enough
    lines = spawn("plugins", "--disable", "wreck", path=(site,)).stdout.splitlines()
    assert any("wreck" in line and line.endswith("disabled") for line in lines)
    wrong = spawn("plugins", "--disable", "nobody", path=(site,))
    assert wrong.returncode == 2
    assert "'nobody'" in wrong.stderr


def test_a_closed_pipe_ends_quietly(llama: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as out:
        done = subprocess.run(
            [sys.executable, "-m", "polyhead.cli", "inspect", llama, "--tensors"],
            stdout=out, stderr=subprocess.PIPE, text=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == ""


@pytest.mark.skipif(sys.platform == "win32", reason="streams are closed by a POSIX shell")
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_the_shell_closed_are_as_if_empty(llama: str, closed: str) -> None:
    line = f'"$0" -m polyhead.cli run "$1" --set chat=false -p the -n 1 {closed}'
    done = subprocess.run(["sh", "-c", line, sys.executable, llama], capture_output=True, text=True, timeout=60)
    assert (done.returncode, "error" in done.stderr) == (0, False)
    assert bool(done.stdout) == (">&-" not in closed.replace("2>&-", ""))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a file that is always full")
@pytest.mark.parametrize("args", [("--help",), ("run", "--help"), ("plugins",), ("config", "schema")])
def test_a_full_disk_under_standard_output_is_told_in_one_line(args: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "polyhead.cli", *args], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert done.returncode == 2
    assert done.stderr == "polyhead: error: standard output cannot be written: No space left on device\n"


def test_ctrl_c_in_a_run_is_exit_130_without_a_traceback(
    long_llama: str, in_process: Callable[..., subprocess.Popen[str]]
) -> None:
    args = ("-p", "the", "--set", "chat=false", "--set", "sampling.ignore_eos=true", "-n", "19000")
    process = in_process("run", long_llama, *args)
    assert process.stdout is not None
    os.read(process.stdout.fileno(), 1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err


def test_every_option_has_help() -> None:
    for command in COMMANDS:
        loaded = command.load()
        for inner in [loaded, *getattr(loaded, "commands", {}).values()]:
            for option in inner.params:
                assert getattr(option, "help", None) or option.param_type_name == "argument", (inner.name, option.name)


def test_the_group_is_named_as_the_console_script_says() -> None:
    assert list(cli.commands)[: len(COMMANDS)] == [command.name for command in COMMANDS]
