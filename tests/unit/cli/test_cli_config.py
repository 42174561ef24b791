"""polyhead config, pull and doctor."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from polyhead.cli import checks

Invoke = Callable[..., Result]


@pytest.fixture
def config(tmp_path: Path, llama: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {llama}\nruntime:\n  context: 32\nsampling: {{temperature: 0.5}}\n")
    return path


def test_check_says_ok_without_opening_the_model(invoke: Invoke, config: Path) -> None:
    assert invoke("config", "check", str(config)).stdout == f"{config}: ok\n"
    result = invoke("config", "check", str(config), "--set", "model=nowhere.gguf")
    assert result.exit_code == 0


def test_check_reports_every_mistake_with_its_place(invoke: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("model: x.gguf\ndevice: tpu\nsampling:\n  top_k: -1\n  tmperature: 1\n")
    result = invoke("config", "check", str(path))
    assert result.exit_code == 2
    for part in (f"{path}:2:9", f"{path}:4:10", f"{path}:5:3", "did you mean 'temperature'"):
        assert part in result.stderr, part


def test_show_gives_every_value_with_its_origin(invoke: Invoke, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYHEAD_RUNTIME__MAX_BATCH", "3")
    args = ("config", "show", str(config), "-n", "9", "--device", "cpu", "--set", "sampling.top_k=4")
    rows = {row["key"]: (row["value"], row["origin"]) for row in json.loads(invoke(*args, "--json").stdout)}
    assert rows["sampling.max_tokens"] == (9, "command line")
    assert rows["sampling.top_k"] == (4, "command line")
    assert rows["device"] == ("cpu", "command line")
    assert rows["runtime.max_batch"] == (3, "environment POLYHEAD_RUNTIME__MAX_BATCH")
    assert rows["runtime.context"] == (32, f"{config}:3:3")
    assert rows["runtime.block_size"] == (16, "default")
    text = invoke(*args).stdout.splitlines()
    assert len(text) == len(rows) + 1
    (line,) = [line for line in text if line.startswith("sampling.max_tokens ")]
    assert line.split() == ["sampling.max_tokens", "9", "command", "line"]


def test_schema_is_json_and_forbids_unknown_keys(invoke: Invoke) -> None:
    schema = json.loads(invoke("config", "schema").stdout)
    assert schema["additionalProperties"] is False
    assert {"model", "runtime", "sampling", "prompt"} <= set(schema["properties"])


def test_pull_prints_the_path_and_checks_the_sum(invoke: Invoke, config: Path, llama: str) -> None:
    digest = hashlib.sha256(Path(llama).read_bytes()).hexdigest()
    for source in (llama, str(config)):
        result = invoke("pull", source, "--sha256", digest)
        assert (result.exit_code, result.stdout) == (0, f"{llama}\n")
    wrong = invoke("pull", llama, "--sha256", "0" * 64)
    assert wrong.exit_code == 2
    assert digest[:12] in wrong.stderr
    assert wrong.stdout == ""
    short = invoke("pull", llama, "--sha256", "abc")
    assert short.exit_code == 2
    assert "64 hexadecimal digits" in short.stderr


def test_doctor_covers_what_matters_and_is_content_here(invoke: Invoke) -> None:
    result = invoke("doctor")
    assert result.exit_code == 0
    rows = {line.split("  ")[0].strip() for line in result.stdout.splitlines()}
    assert rows <= {"ok", "warn", "missing"}
    names = [item["name"] for item in json.loads(invoke("doctor", "--json").stdout)]
    wanted = ["polyhead", "Python", "packages", "CPU", "memory", "NumPy", "NVIDIA driver", "device", "model cache"]
    assert [name for name in names if name in wanted] == wanted
    assert {"plugin gpt_mha", "plugin llama_gqa"} <= set(names)
    assert {f"extra {extra}" for extra in checks.EXTRAS} <= set(names)


def test_every_extra_of_the_distribution_but_dev_is_explained() -> None:
    extras = {extra for _, extra in checks.requirements() if extra is not None}
    # server is declared for what is to come; doctor tells only what this version makes use of.
    assert extras - {"dev", "server"} == set(checks.EXTRAS)


def test_a_missing_extra_gives_the_command_that_installs_it() -> None:
    for check in checks.check_extras():
        if check.state == "missing":
            assert check.help == f"pip install 'polyhead[{check.name.removeprefix('extra ')}]'"
            assert "not installed: " in check.detail
        else:
            assert check.state == "ok"


def test_doctor_warns_of_a_strangers_broken_plugin_and_stays_at_exit_0(
    spawn: Callable[..., subprocess.CompletedProcess[str]], write_plugin: Callable[[str, str], Path]
) -> None:
    result = spawn("doctor", path=(write_plugin("wreck", "raise RuntimeError('half installed')\n"),))
    (line,) = [line for line in result.stdout.splitlines() if "wreck" in line]
    assert line.startswith("warn")
    assert "RuntimeError: half installed" in line
    assert "pip install --upgrade wreck" in line
    assert result.returncode == 0


def test_doctor_is_exit_1_where_polyhead_cannot_work(
    spawn: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "numpy.py").write_text("raise ImportError('made unusable')\n")
    result = spawn("doctor", path=(tmp_path,))
    assert result.returncode == 1
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("broken   NumPy")]
    assert "made unusable" in line
    assert "Traceback" not in result.stderr


def test_doctor_measures_the_cache(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a.gguf").write_bytes(b"x" * 2_500_000)
    monkeypatch.setenv("POLYHEAD_CACHE", str(folder))
    found = {item["name"]: item for item in json.loads(invoke("doctor", "--json").stdout)}
    assert f"{folder}, 2.5 MB in 1 files" in found["model cache"]["detail"]
