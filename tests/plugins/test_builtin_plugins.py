"""Built-ins are plugins like any other: same entry points, same public names, and core knows none of them by name."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from polyhead import LLM
from polyhead.errors import PluginError
from polyhead.plugins import discover

ROOT = Path(__file__).parents[2]
BUILT_IN = {"gpt_mha": "polyhead_gpt_mha", "llama_gqa": "polyhead_llama_gqa"}


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
