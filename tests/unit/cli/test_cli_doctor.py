"""polyhead doctor on CUDA's compiler: found, missing, and every kernel compiled."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import Result
from polyhead.cli.console import Console
from polyhead.cli.doctor import compile_kernels
from polyhead.errors import DeviceError
from polyhead.runtime.cuda.compile_all import ARCHITECTURES, Toolkit, find_toolkit
from polyhead.runtime.cuda.variants import Variant, variants

Invoke = Callable[..., Result]
Spawn = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def toolkit() -> Toolkit:
    try:
        return find_toolkit()
    except DeviceError as error:
        pytest.skip(f"kernels cannot be compiled here: {error}")


@pytest.fixture
def without_nvidia(tmp_path: Path) -> Path:
    """A folder that hides NVIDIA's packages when it is put before the import path."""
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "__init__.py").write_text("")
    return tmp_path


def small() -> list[Variant]:
    """What compiles quickest."""
    return [variant for variant in variants() if variant.file == "stream.cu"]


def test_arch_without_kernels_is_refused(invoke: Invoke) -> None:
    result = invoke("doctor", "--arch", "sm_90a")
    assert result.exit_code == 2
    assert "--arch goes with --kernels" in result.stderr


def test_without_the_compiler_doctor_says_what_to_install(spawn: Spawn, without_nvidia: Path) -> None:
    plain = spawn("doctor", "--json", path=(without_nvidia,))
    assert plain.returncode == 0
    (check,) = [item for item in json.loads(plain.stdout) if item["name"] == "CUDA compiler"]
    assert check["state"] == "missing"
    assert check["help"].startswith("pip install 'polyhead[cu13]'")
    assert "Run:" not in check["detail"]
    kernels = spawn("doctor", "--kernels", path=(without_nvidia,))
    assert (kernels.returncode, kernels.stdout) == (2, "")
    assert "pip install 'polyhead[cu13]'" in kernels.stderr
    assert "Traceback" not in kernels.stderr


def test_with_the_compiler_doctor_compiles_a_kernel_and_tells_how_long_it_took(
    invoke: Invoke, toolkit: Toolkit
) -> None:
    (check,) = [item for item in json.loads(invoke("doctor", "--json").stdout) if item["name"] == "CUDA compiler"]
    assert check["state"] == "ok"
    for part in ("NVRTC {}.{}".format(*toolkit.version), str(toolkit.headers), "a small kernel for sm_", " s"):
        assert part in check["detail"]


@pytest.mark.usefixtures("toolkit")
@pytest.mark.parametrize("name", ["sm_7", "sm_9999", "90a", "compute_90", "sm_90x"])
def test_an_architecture_that_the_compiler_does_not_know_is_refused(invoke: Invoke, name: str) -> None:
    result = invoke("doctor", "--kernels", "--arch", "sm_80", "--arch", name)
    assert result.exit_code == 2
    message = " ".join(result.stderr.split())
    assert f"does not compile for {name}; it does for sm_" in message


@pytest.mark.usefixtures("toolkit")
def test_kernels_are_listed_with_registers_and_spills(capsys: pytest.CaptureFixture[str]) -> None:
    compile_kernels(Console(), ["sm_90a", "sm_80", "sm_90a"], False, small())
    out, err = capsys.readouterr()
    header, *rows = out.splitlines()
    assert header.split() == ["arch", "kernel", "registers", "shared", "stack", "spilled", "of"]
    assert [row.split()[0] for row in rows] == ["sm_90a", "sm_80"]
    assert all(int(row.split()[2]) > 0 for row in rows)
    assert "2 specialisations of kernels compiled for sm_90a, sm_80 with NVRTC" in err
    assert "none with a problem" in err


@pytest.mark.usefixtures("toolkit")
def test_the_same_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    compile_kernels(Console(), ["sm_120"], True, small())
    (record,) = json.loads(capsys.readouterr().out)
    assert (record["arch"], record["file"], record["problem"]) == ("sm_120", "stream.cu", None)
    (kernel,) = record["kernels"]
    assert kernel["kernel"] in small()[0].kernels
    assert kernel["registers"] > 0
    assert kernel["spilled"] == 0


@pytest.mark.usefixtures("toolkit")
def test_a_problem_is_shown_and_gives_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    wanted = [*small(), Variant("stream.cu", ("absent",))]
    with pytest.raises(click.exceptions.Exit) as caught:
        compile_kernels(Console(), ["sm_80"], False, wanted)
    assert caught.value.exit_code == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "PROBLEM sm_80 stream.cu: there is no kernel absent"
    assert "1 with a problem" in err


def test_the_help_names_what_is_compiled_without_a_gpu(invoke: Invoke) -> None:
    text = " ".join(invoke("doctor", "--help").stdout.split())
    assert all(name in text for name in ARCHITECTURES)
