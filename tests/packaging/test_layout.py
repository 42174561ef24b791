"""What pyproject.toml promises about folders and dependencies, and who may import whom."""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAPPED = {name: ROOT / folder for name, folder in PROJECT["tool"]["setuptools"]["package-dir"].items()}
CODE = (".py", ".cu", ".cuh")
HEAVY = {"torch", "triton", "transformers", "tensorflow", "jax"}
# Folders and files of core/ that stand by themselves: data, formats and policy know no device and no command.
ALONE = ("arch", "engine", "gguf", "sources", "tokenizer", "chat")
ABOVE_RUNTIME = {"engine", "generation", "llm", "cli", "server", "bench", "config", "plugins", "model", "tokenizer"}
ABOVE_RUNTIME |= {"structured"}


def packages() -> dict[str, Path]:
    """Import name and folder of every folder that holds code."""
    found = {}
    for name, top in MAPPED.items():
        for folder in sorted({path.parent for path in top.rglob("*") if path.suffix in CODE}):
            found[".".join([name, *folder.relative_to(top).parts])] = folder
    return found


def imports(path: Path, package: str) -> Iterator[str]:
    """Absolute names of what a file imports, at any depth and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


@functools.cache
def core_imports() -> tuple[tuple[str, str, Path], ...]:
    """(top folder or file of core that imports, the one that is imported, the file) for imports within core."""
    found = []
    for package, folder in packages().items():
        if package.split(".")[0] == "polyhead":
            for path in folder.glob("*.py"):
                inside = path.relative_to(MAPPED["polyhead"]).with_suffix("").parts
                for name in imports(path, package):
                    parts = name.split(".")
                    if parts[0] == "polyhead" and len(parts) > 1 and parts[1] != inside[0]:
                        found.append((inside[0], parts[1], path))
    return tuple(found)


def test_every_folder_with_code_is_a_package_that_is_shipped():
    assert sorted(packages()) == sorted(PROJECT["tool"]["setuptools"]["packages"])
    # setuptools puts a folder without __init__.py into a wheel, but mypy and readers take it for data, as kernels are.
    assert all((folder / "__init__.py").is_file() for folder in packages().values() if [*folder.glob("*.py")])


def test_the_hidden_folder_for_type_checkers_mirrors_the_mapping():
    links = {path.name: path.resolve() for path in (ROOT / ".dev").iterdir() if path.is_symlink()}
    assert links == {name: folder.resolve() for name, folder in MAPPED.items()}


def test_every_package_says_that_it_is_typed():
    assert all((folder / "py.typed").is_file() for folder in MAPPED.values())


def test_the_version_is_said_once():
    from polyhead import __version__

    assert __version__ == PROJECT["project"]["version"] == metadata.version("polyhead")


def test_core_refuses_to_be_imported_as_core():
    result = subprocess.run([sys.executable, "-c", "import core"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "ImportError: the folder core/ is the package polyhead: install it (pip install -e .) and import polyhead"
    )


@pytest.mark.parametrize("folder", ALONE)
def test_data_formats_and_policy_import_nothing_of_core_but_errors(folder):
    found = {(path.name, name) for part, name, path in core_imports() if part == folder and name != "errors"}
    assert not found
    assert any(part == folder for part, _, _ in core_imports())


def test_the_runtime_imports_nothing_that_stands_above_it():
    found = {(path.name, name) for part, name, path in core_imports() if part == "runtime" and name in ABOVE_RUNTIME}
    assert not found


def test_nothing_imports_the_command_line_and_only_it_the_benchmarks():
    assert not {str(path) for part, name, path in core_imports() if name == "cli"}
    assert {part for part, name, _ in core_imports() if name == "bench"} <= {"cli"}


def test_plugins_import_only_polyhead_and_the_standard_library():
    for package, folder in packages().items():
        if package.split(".")[0] != "polyhead":
            for path in folder.glob("*.py"):
                for name in imports(path, package):
                    top = name.split(".")[0]
                    assert top in {"polyhead", package} or top in sys.stdlib_module_names, f"{path}: {name}"


def test_no_code_imports_a_deep_learning_framework():
    for package, folder in packages().items():
        for path in folder.glob("*.py"):
            assert not HEAVY & {name.split(".")[0] for name in imports(path, package)}, path


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower() for requirement in requirements}


def test_the_base_installation_needs_nothing_of_cuda_and_no_extra_a_framework():
    project = PROJECT["project"]
    assert not [name for name in names(project["dependencies"]) if re.search("cuda|nvidia|nvmath|cupy", name)]
    for requirements in [project["dependencies"], *project["optional-dependencies"].values()]:
        assert not HEAVY & names(requirements)


def test_nothing_that_the_base_installation_pulls_in_needs_a_framework():
    todo, seen = ["polyhead"], set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # for another platform or Python
            continue
        todo += names([line for line in requirements if "extra ==" not in line])
    assert {"numpy", "gguf", "pluggy"} <= seen
    assert not HEAVY & seen


IMPORT = """
import sys, time
start = time.perf_counter()
import polyhead
took = time.perf_counter() - start
heavy = {"numpy", "pydantic", "jinja2", "tokenizers", "rich", "gguf", "click", "pluggy", "yaml", "torch", "cuda"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert took < 0.5, took
assert set(polyhead.__all__) <= set(dir(polyhead))
for name in polyhead.__all__:
    assert getattr(polyhead, name) is not None, name
"""


def test_importing_polyhead_is_light_and_quick():
    subprocess.run([sys.executable, "-c", IMPORT], check=True, timeout=60)


GENERATE = """
import sys
from importlib.abc import MetaPathFinder

class Watch(MetaPathFinder):
    asked = []
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "tensorflow", "jax", "transformers"}:
            self.asked.append(name)

sys.meta_path.insert(0, Watch())
from polyhead import LLM, SamplingParams
with LLM(sys.argv[1], overrides=["device=cpu"]) as llm:
    assert len(llm.generate(["the sand", [1, 2]], SamplingParams(max_tokens=4, ignore_eos=True))[0].token_ids) == 4
    assert "".join(delta.text for delta in llm.stream("the", SamplingParams(max_tokens=4, ignore_eos=True)))
    assert llm.logits([1, 2]).shape == (2, llm.model.decoder.vocab)
assert not Watch.asked, Watch.asked
"""


def test_no_framework_is_even_asked_for_in_a_whole_generation(tiny_model):
    subprocess.run(
        [sys.executable, "-c", GENERATE, str(tiny_model("llama-gqa"))], check=True, timeout=60, env=os.environ
    )
