"""What a user gets wrong: exit 2, one message that names the thing and the number, no traceback, nothing on stdout."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from polyhead.gguf import open_gguf

Invoke = Callable[..., Result]
PLAIN = ("--set", "chat=false", "-n", "2")


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2, (result.stdout, result.stderr)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("polyhead: error: ")]
    assert len(lines) == 1
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize("command", ["run", "chat", "inspect", "bench", "pull"])
def test_missing_model(invoke: Invoke, command: str, tmp_path: Path) -> None:
    prompt = ("-p", "x") if command == "run" else ()
    refused(invoke(command, str(tmp_path / "nowhere.gguf"), *prompt), "nowhere.gguf", "no such file")


@pytest.mark.parametrize("command", ["run", "inspect", "bench", "pull"])
def test_missing_config(invoke: Invoke, command: str, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text("model: x.gguf\n")
    refused(invoke(command, str(tmp_path / "smal.yaml")), "smal.yaml", "small.yaml")


def test_directory(invoke: Invoke, tmp_path: Path) -> None:
    refused(invoke("run", str(tmp_path), "-p", "x"), str(tmp_path), "folder")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "LFS"),
        (b"PK\x03\x04 not a model", "GGUF"),
        (b"", "empty"),
    ],
)
@pytest.mark.parametrize("command", ["run", "inspect"])
def test_not_gguf(invoke: Invoke, command: str, tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    prompt = ("-p", "x") if command == "run" else ()
    refused(invoke(command, str(path), *prompt), str(path), word)


def test_truncated_file(invoke: Invoke, llama: str, tmp_path: Path) -> None:
    data = Path(llama).read_bytes()
    path = tmp_path / "half.gguf"
    path.write_bytes(data[:-1000])
    refused(invoke("run", str(path), "-p", "x"), str(len(data) - 1000))


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(invoke: Invoke, llama: str, tmp_path: Path) -> None:
    path = tmp_path / "secret.gguf"
    path.write_bytes(Path(llama).read_bytes())
    path.chmod(0)
    refused(invoke("run", str(path), "-p", "x"), str(path), "ermission")


def with_architecture(llama: str, path: Path, name: bytes) -> str:
    data = Path(llama).read_bytes()
    assert len(name) == len(b"llama")
    path.write_bytes(data.replace(b"llama", name))
    return str(path)


def test_unknown_architecture_names_it_and_those_known(invoke: Invoke, llama: str, tmp_path: Path) -> None:
    path = with_architecture(llama, tmp_path / "strange.gguf", b"zebra")
    refused(invoke("run", path, "-p", "x"), "'zebra'", "llama_gqa", "gpt_mha")


def test_a_plugin_that_fails_on_the_file_is_named_and_v_shows_where(
    spawn: Callable[..., subprocess.CompletedProcess[str]],
    write_plugin: Callable[[str, str], Path],
    llama: str,
    tmp_path: Path,
) -> None:
    source = """
from polyhead import hookimpl

class Zebra:
    name = "zebra"
    gguf_names = ("zebra",)
    api_version = 1
    def decoder(self, meta):
        return {}["stripes"]
    def block(self, meta, index):
        raise NotImplementedError

@hookimpl
def polyhead_register_architectures():
    return [Zebra()]
"""
    site = write_plugin("zebras", source)
    path = with_architecture(llama, tmp_path / "zebra.gguf", b"zebra")
    result = spawn("run", path, "-p", "x", path=(site,))
    assert result.returncode == 2
    assert result.stderr.startswith("polyhead: error: plugin zebras (zebras 2.5) failed on this file: KeyError")
    assert "Traceback" not in result.stderr
    assert "in decoder" in spawn("run", path, "-p", "x", "-v", path=(site,)).stderr


def test_a_broken_plugin_that_is_needed_is_named_with_its_reason(
    spawn: Callable[..., subprocess.CompletedProcess[str]],
    write_plugin: Callable[[str, str], Path],
    llama: str,
    tmp_path: Path,
) -> None:
    site = write_plugin("zebras", "import a_module_that_nobody_has\n")
    path = with_architecture(llama, tmp_path / "zebra.gguf", b"zebra")
    result = spawn("run", path, "-p", "x", path=(site,))
    assert result.returncode == 2
    assert "'zebra'" in result.stderr
    assert "FAILED: plugin zebras (zebras 2.5): ModuleNotFoundError: No module named 'a_module_that_nobody_has'" in (
        result.stderr
    )
    # Where it is not needed, it is in nobody's way.
    assert spawn("run", llama, *PLAIN, "-p", "the", path=(site,)).returncode == 0


def test_unknown_yaml_key(invoke: Invoke, llama: str, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {llama}\nruntime:\n  contxt: 5\n")
    refused(invoke("run", str(config), "-p", "x"), f"{config}:3:3", "contxt", "did you mean 'context'")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("runtime.context=0", ("runtime.context", "0", "1")),
        ("runtime.context=65", ("65", "64")),
        ("sampling.top_p=1.5", ("sampling.top_p", "1.5")),
        ("sampling.temperature=nan", ("sampling.temperature", "nan")),
        ("sampling.temperature=.nan", ("sampling.temperature", ".nan")),
        ("sampling.stop_token_ids=[97]", ("97",)),
        ("runtime.contex=5", ("runtime.contex", "did you mean 'context'")),
        ("runtime.context", ("'runtime.context'", "KEY=VALUE")),
        ("=5", ("KEY=VALUE",)),
        ("device=tpu", ("tpu",)),
        ("architecture=gpt_mha", ("gpt_mha", "'llama'")),
        ("plugins.disable=[llama_gqa]", ("llama", "disabled")),
        ("plugins.disable=[nobody]", ("nobody",)),
        ("sampling.temperature=0\x00", ("sampling.temperature",)),
    ],
)
def test_impossible_settings(invoke: Invoke, llama: str, setting: str, words: tuple[str, ...]) -> None:
    refused(invoke("run", llama, "--set", "chat=false", "-p", "x", "--set", setting), *words)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--temperature", "nan"), ("sampling.temperature", "nan")),
        (("--temperature", "-1"), ("sampling.temperature", "-1")),
        (("-n", "0"), ("sampling.max_tokens", "0")),
        (("-n", "many"), ("sampling.max_tokens", "many")),
        (("--seed", "-3"), ("sampling.seed", "-3")),
        (("--top-p", "0"), ("sampling.top_p", "0")),
        (("--device", "gpu"), ("gpu", "did you mean 'cuda'")),
    ],
)
def test_impossible_shorthands(invoke: Invoke, llama: str, args: tuple[str, ...], words: tuple[str, ...]) -> None:
    refused(invoke("run", llama, "-p", "x", *args), *words)


def test_prompt_over_the_context_names_both_numbers(invoke: Invoke, llama: str) -> None:
    result = invoke("run", llama, *PLAIN, "-p", "x" * 200)
    refused(result, "200 tokens", "context of 64")


def test_text_far_over_the_context_is_refused_before_it_is_tokenised(invoke: Invoke, llama: str) -> None:
    result = invoke("run", llama, *PLAIN, stdin="x" * 20_000)
    refused(result, "20,000 characters", "64 tokens")


@pytest.mark.parametrize("prompts", [("-p", ""), ("-p", "x", "-p", "")])
def test_empty_prompt_is_refused_before_the_model_is_opened(
    invoke: Invoke, prompts: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF, no more")
    refused(invoke("run", str(tmp_path / "damaged.gguf"), *prompts), "prompt", "is empty")


@pytest.mark.parametrize("args", [("run", "nowhere.gguf"), ("perplexity", "nowhere.gguf", "-")])
def test_a_model_that_is_not_there_is_told_before_standard_input_is_read(invoke: Invoke, args: tuple[str, ...]) -> None:
    refused(invoke(*args, stdin=b"\xff"), "nowhere.gguf", "no such file")


@pytest.mark.parametrize("command", [("run", "-p", "x"), ("inspect",), ("bench",), ("pull",)])
def test_an_empty_name_is_not_the_current_folder(invoke: Invoke, command: tuple[str, ...]) -> None:
    refused(invoke(command[0], "", *command[1:]), "CONFIG|MODEL is empty")


def test_perplexity_of_a_model_with_weights_that_are_not_finite_is_no_number(
    invoke: Invoke, llama: str, tmp_path: Path
) -> None:
    data = bytearray(Path(llama).read_bytes())
    with open_gguf(llama) as file:
        at = file.tensors["output_norm.weight"].offset
    data[at : at + 4] = b"\x00\x00\xc0\x7f"  # NaN
    (tmp_path / "damaged.gguf").write_bytes(data)
    refused(invoke("perplexity", str(tmp_path / "damaged.gguf"), "-", stdin="the sing and"), "not finite", "damaged")


def test_no_prompt_at_all(invoke: Invoke, llama: str) -> None:
    refused(invoke("run", llama, stdin=""), "prompt is empty")


@pytest.mark.parametrize("data", [b"caf\xe9", b"fine\nan\xff", b"\xed\xa0\x80"])
def test_stdin_that_is_not_utf8(invoke: Invoke, llama: str, data: bytes) -> None:
    refused(invoke("run", llama, *PLAIN, stdin=data), "standard input", "UTF-8", "offset")


def test_argument_that_is_not_utf8(llama: str, spawn: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    result = spawn("run", llama, *PLAIN, "-p", os.fsdecode(b"an\xffd"))
    assert result.returncode == 2
    assert "surrogate" in result.stderr
    assert "Traceback" not in result.stderr


def test_prompt_file_that_cannot_be_read(invoke: Invoke, llama: str, tmp_path: Path) -> None:
    refused(invoke("run", llama, "--prompt-file", str(tmp_path / "no.txt")), "no.txt", "No such file")
    refused(invoke("run", llama, "--prompt-file", str(tmp_path)), str(tmp_path), "directory")


def test_not_enough_memory_is_the_plan_as_a_table(invoke: Invoke, llama: str) -> None:
    for command in (("run", "-p", "x"), ("inspect", "--memory")):
        result = invoke(command[0], llama, *command[1:], "--set", "runtime.memory_fraction=1e-9")
        refused(result, "not enough memory", "weights", "KV cache", "would fit")


def test_control_characters_of_a_file_do_not_reach_the_terminal(invoke: Invoke, llama: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    name = b"llama-gqa"
    data = Path(llama).read_bytes()
    assert name in data
    path.write_bytes(data.replace(name, b"\x1b]0;hi!\x07\xff"))
    for command in (("inspect",), ("inspect", "--metadata"), ("inspect", "--json"), ("run", "-p", "the", *PLAIN)):
        result = invoke(command[0], str(path), *command[1:])
        assert result.exit_code == 0
        assert "\x1b" not in result.stdout + result.stderr
        assert "hi" in result.stdout + result.stderr
