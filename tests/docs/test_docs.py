"""The documentation is code: every Python, YAML and shell block of README.md and docs/ runs as it stands."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import golden
import pytest
import tolerance
import yaml
from polyhead import LLM
from polyhead.config import load_config
from polyhead.plugins import discover

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def blocks(language: str) -> list[tuple[str, str]]:
    """(page:line, text) of every fenced block of a language."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            line = text[: match.start()].count("\n") + 1
            found.append((f"{page.relative_to(ROOT)}:{line}", match[1]))
    return found


def named(language: str):
    return pytest.mark.parametrize(("where", "text"), blocks(language), ids=[where for where, _ in blocks(language)])


@named("python")
def test_python_blocks_compile(where, text):
    compile(text, where, "exec")


@named("yaml")
def test_yaml_blocks_are_valid_configurations(where, text, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    assert load_config(tmp_path / "run.yaml", environ={}).config.model.path == yaml.safe_load(text)["model"]["path"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path):
    assert load_config(path, environ={}).config.prompt


@pytest.mark.model
def test_the_readme_s_python_examples_run(smollm2_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    blocking, tasks, forms = [
        text for where, text in blocks("python") if "llm.generate" in text and where.startswith("README")
    ]
    exec(compile(blocking, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "Paris" in out
    assert "49152)" in out
    exec(compile(tasks, "README.md", "exec"), {})
    assert "Paris" in capsys.readouterr().out
    pytest.importorskip("llguidance", reason="the README's forms of output need the extra structured")
    exec(compile(forms, "README.md", "exec"), {})
    person, scores = capsys.readouterr().out.rsplit("}", 1)
    assert set(json.loads(person + "}")) == {"name", "age"}
    assert len(scores.split("\n")) >= 5


@pytest.mark.model
def test_the_readme_s_commands_run(smollm2_path, tmp_path):
    lines = [line for where, text in blocks("sh") if where.startswith("README") for line in text.splitlines()]
    commands = [line for line in lines if line.startswith("polyhead ")]
    assert len(commands) >= 4
    for command in commands:
        run = subprocess.run(
            [sys.executable, "-c", "import sys; from polyhead.cli import main; sys.exit(main())", *_words(command)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"NO_COLOR": "1"},
            check=False,
        )
        assert run.returncode == 0, (command, run.stderr)
        assert run.stdout.strip(), command


def _words(command: str) -> list[str]:
    import shlex

    return shlex.split(command)[1:]


def test_the_readme_s_plugin_runs_qwen3(tiny_model, tmp_path, monkeypatch):
    (plugin,) = [text for where, text in blocks("python") if "class Qwen3" in text and where.startswith("README")]
    (tmp_path / "polyhead_readme_qwen3.py").write_text(plugin)
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = importlib.metadata.EntryPoint("qwen3", "polyhead_readme_qwen3", "polyhead")
    registry = discover(entry_points=[*importlib.metadata.entry_points(group="polyhead"), entry])
    expected = golden.load("qwen3").sequences[0]
    with LLM({"model": str(tiny_model("qwen3")), "device": "cpu"}, registry=registry) as llm:
        assert tolerance.error(llm.logits(expected.ids)[expected.positions], expected.logits) < tolerance.CPU_LOGITS


def test_the_guide_s_module_is_accepted(tmp_path, monkeypatch):
    (module,) = [text for where, text in blocks("python") if "ModuleKind(" in text and where.startswith("docs")]
    (tmp_path / "polyhead_guide_module.py").write_text(module)
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = importlib.metadata.EntryPoint("bilinear", "polyhead_guide_module", "polyhead")
    (plugin,) = discover(entry_points=[entry]).plugins
    assert plugin.state == "ok", plugin.reason
    assert [kind.spec.__name__ for kind in plugin.modules] == ["Bilinear"]


def test_every_folder_of_core_has_its_sentence():
    table = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for entry in sorted((ROOT / "core").iterdir()):
        if entry.name.startswith(("_", ".")) or entry.suffix not in ("", ".py"):
            continue
        name = f"{entry.name}/" if entry.is_dir() else entry.name
        assert f"`{name}`" in table, f"docs/architecture.md does not say what core/{name} is"
