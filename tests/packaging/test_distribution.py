"""The wheel and the source distribution: they hold all of the code and nothing else, and the wheel runs by itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAPPED = PROJECT["tool"]["setuptools"]["package-dir"]
NAME = f"polyhead-{PROJECT['project']['version']}"
NOT_SOURCE = (".git", ".*_cache", ".hypothesis", "__pycache__", "build", "dist", "*.egg-info", ".venv")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the checkout in tree/, and in dist/ its sdist and the wheel built from that."""
    folder = tmp_path_factory.mktemp("build")
    # A copy, because building leaves traces beside the sources.
    shutil.copytree(ROOT, folder / "tree", symlinks=True, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(folder / "tree")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def code(tree: Path) -> dict[str, str]:
    """Every file under the folders that are packages: its path in a wheel, and in the repository."""
    found = {}
    for name, folder in MAPPED.items():
        for path in (tree / folder).rglob("*"):
            if path.is_file():
                inside = path.relative_to(tree / folder).as_posix()
                found[f"{name}/{inside}"] = f"{folder}/{inside}"
    return found


def test_the_wheel_holds_all_of_the_code_and_nothing_else(built):
    sources = code(built / "tree")
    with zipfile.ZipFile(built / "dist" / f"{NAME}-py3-none-any.whl") as wheel:
        names = set(wheel.namelist())
        for inside, source in sources.items():
            assert inside in names, f"{source} is missing from the wheel: see packages and package-data"
            assert wheel.read(inside) == (built / "tree" / source).read_bytes()
    info = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}
    assert names - set(sources) == {f"{NAME}.dist-info/{name}" for name in info}


def test_the_source_distribution_holds_all_of_the_code_and_what_builds_it(built):
    with tarfile.open(built / "dist" / f"{NAME}.tar.gz") as archive:
        names = {str(PurePosixPath(item.name).relative_to(NAME)) for item in archive if item.isfile()}
    sources = set(code(built / "tree").values())
    assert sources <= names
    extra = {name for name in names - sources if not name.startswith("polyhead.egg-info/")}
    assert extra == {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO", "setup.cfg"}


RUN = """
import sys
import polyhead
assert polyhead.__file__.startswith(sys.argv[1]), polyhead.__file__
from polyhead import LLM, SamplingParams
from polyhead.plugins import discover
states = {plugin.name: plugin.state for plugin in discover().plugins}
assert states["gpt_mha"] == states["llama_gqa"] == "ok", states
for model in sys.argv[2:]:
    with LLM(model, overrides=["device=cpu"]) as llm:
        print(llm.generate("the sand", SamplingParams(max_tokens=3, ignore_eos=True))[0].finish_reason)
"""


def test_the_wheel_runs_from_a_folder_of_its_own(built, tmp_path, tiny_model):
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*install, str(built / "dist" / f"{NAME}-py3-none-any.whl")], check=True, timeout=120)
    environment = {**os.environ, "PYTHONPATH": str(target)}

    def python(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    models = [str(tiny_model(name)) for name in ("llama-gqa", "gpt2-tied")]
    assert python("-c", RUN, str(target), *models) == "length\nlength\n"
    assert python("-m", "polyhead.cli", "--version") == f"polyhead, version {PROJECT['project']['version']}\n"
    assert (target / "bin" / "polyhead").is_file()
