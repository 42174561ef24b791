"""Built-ins are plugins like any other: same entry points, same public names, and core knows none of them by name."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import polyhead
import pytest
from polyhead import LLM
from polyhead.errors import PluginError
from polyhead.plugins import discover

ROOT = Path(__file__).parents[2]
BUILT_IN = {"gpt_mha": "polyhead_gpt_mha", "llama_gqa": "polyhead_llama_gqa"}
FAMILY = re.compile(r"llama(?!\.cpp|-bench)|gpt_?2|gpt_?neox|gpt_mha|qwen|mistral|gemma|smollm|pythia", re.IGNORECASE)


def strangers() -> list:
    return [entry for entry in entry_points(group="polyhead") if entry.dist.name != "polyhead"]


def test_built_ins_are_entry_points_of_the_group_that_strangers_use():
    ours = {entry.name: entry.value for entry in entry_points(group="polyhead") if entry.dist.name == "polyhead"}
    assert ours == BUILT_IN


def test_without_those_entry_points_core_knows_no_architecture(tiny_model):
    registry = discover(entry_points=strangers())
    for name in ("llama", "qwen2", "gpt2", "gptneox"):
        with pytest.raises(PluginError, match=f"no plugin answers to general.architecture '{name}'"):
            registry.find(name)
    with pytest.raises(PluginError, match="no plugin answers"):
        LLM({"model": str(tiny_model("llama-gqa")), "device": "cpu"}, registry=registry)


def test_built_ins_come_first_and_work():
    plugins = discover().plugins[: len(BUILT_IN)]
    assert [(plugin.name, plugin.distribution, plugin.state) for plugin in plugins] == [
        ("gpt_mha", "polyhead", "ok"),
        ("llama_gqa", "polyhead", "ok"),
    ]
    answers = {name for plugin in plugins for arch in plugin.architectures for name in arch.gguf_names}
    assert answers == {"gpt2", "gptneox", "llama", "qwen2"}


def test_discovery_loads_no_array_or_device_library():
    code = (
        "import sys; from polyhead.plugins import discover; assert len(discover().plugins) >= 2; "
        "heavy = {'numpy', 'cuda', 'torch', 'nvmath', 'gguf', 'tokenizers', 'pydantic'} & set(sys.modules); "
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_built_ins_import_only_polyhead_s_public_modules():
    public = {"polyhead", "polyhead.arch", "polyhead.errors"}
    for path in sorted((ROOT / "plugins").rglob("*.py")):
        for module, level in imports(path):
            assert level or module in public or module.split(".")[0] in sys.stdlib_module_names, f"{path}: {module}"


def imports(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level


def code_words(path: Path) -> Iterator[str]:
    """Identifiers and strings of a module, without comments and docstrings."""
    tree = ast.parse(path.read_text())
    prose = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            prose.add(node.value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose:
            yield node.value
        yield from (
            value for field in ("id", "attr", "name", "arg") if isinstance(value := getattr(node, field, 0), str)
        )


def test_core_speaks_of_capabilities_and_never_of_models():
    # A pre-tokenizer is named after the model that had it first, and the benchmark invents files of known models:
    # names that stand in files. Nothing else may ask what a model is called.
    core = Path(polyhead.__file__).resolve().parent
    excused = [*core.glob("tokenizer/*.py"), core / "bench" / "shapes.py"]
    files = [path for path in core.rglob("*.py") if path not in excused]
    assert len(files) > 50
    found = [f"{path}: {word!r}" for path in files for word in code_words(path) if FAMILY.search(word)]
    assert not found, "\n".join(found)
