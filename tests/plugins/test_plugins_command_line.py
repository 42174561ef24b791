"""Plugins as the command line meets them: broken ones beside a model that runs, and a stranger's own model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BROKEN = {
    "raises": ("raise RuntimeError('no luck')", "RuntimeError: no luck"),
    "exits": ("import sys; sys.exit(7)", "called sys.exit(7) while it was loaded"),
    "skips": ("import pytest; pytest.skip('no', allow_module_level=True)", "Skipped: no"),
    "prints": ("print('noise')", "implements no hook"),
    "misspells": (
        "@hookimpl\ndef polyhead_register_model(): return []",
        "polyhead_register_model, which is not a hook",
    ),
    "garbled": ("def broken(:", "SyntaxError"),
    "dated": (
        "class Old(LlamaGQA):\n    name, gguf_names, api_version = 'old', ('newfangled',), 0\n"
        "@hookimpl\ndef polyhead_register_architectures(): return [Old()]",
        "architecture old was written for plugin API version 0; this polyhead supports 1. Upgrade",
    ),
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, install_into) -> Path:
    """A folder with broken plugins and a dist-info without metadata."""
    folder = tmp_path_factory.mktemp("broken") / "site"
    for name, (source, _) in BROKEN.items():
        install_into(folder, source, name=name, distribution=f"dist-{name}")
    (folder / "husk-1.0.dist-info").mkdir()
    return folder


def polyhead(site: Path | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [*([str(site)] if site else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, "-m", "polyhead.cli", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_broken_plugins_change_nothing_for_a_model_that_needs_none(site, tiny_model):
    arguments = ("run", str(tiny_model("llama-gqa")), "-p", "the sand", "-n", "6", "--temperature", "0", "--set")
    alone, beside = polyhead(None, *arguments, "chat=false"), polyhead(site, *arguments, "chat=false")
    assert alone.returncode == beside.returncode == 0, beside.stderr
    assert alone.stdout == beside.stdout != ""
    for name, (_, reason) in BROKEN.items():
        lines = [line for line in beside.stderr.splitlines() if f"dist-{name} 1.2" in line]
        assert len(lines) == 1, beside.stderr
        assert reason in lines[0]
        assert f"dist-{name}" not in alone.stderr
    assert "Traceback" not in beside.stderr


def test_the_list_of_plugins_says_why_each_failed(site):
    result = polyhead(site, "plugins", "--json")
    assert result.returncode == 0, result.stderr
    found = {plugin["name"]: plugin for plugin in json.loads(result.stdout)["plugins"]}
    for name, (_, reason) in BROKEN.items():
        assert found[name]["state"] == "FAILED"
        assert reason in found[name]["reason"]
        assert found[name]["package"] == f"dist-{name}"
    assert found["llama_gqa"]["state"] == found["gpt_mha"]["state"] == "ok"
    listed = polyhead(site, "plugins")
    assert all(any(name in line and "FAILED" in line for line in listed.stdout.splitlines()) for name in BROKEN)
    assert "left out" not in result.stderr + listed.stderr, "the table gives the reasons; once is enough"


def test_the_error_of_a_model_without_a_plugin_shows_what_failed(site, tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "new.gguf", "newfangled")
    writer.add_uint32("newfangled.block_count", 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    result = polyhead(site, "inspect", str(tmp_path / "new.gguf"))
    assert result.returncode == 2
    assert "no plugin answers to general.architecture 'newfangled'" in result.stderr
    for name, (_, reason) in BROKEN.items():
        assert re.search(rf"FAILED: plugin {name} \(dist-{name} 1\.2\): .*{re.escape(reason)}", result.stderr)
    assert re.search(r"  llama, qwen2: llama_gqa, plugin llama_gqa \(polyhead [0-9.]+\)", result.stderr)
    assert "docs/plugins/tutorial.md shows how, and `polyhead plugins new NAME`" in result.stderr
    assert (ROOT / "docs" / "plugins" / "tutorial.md").is_file()


def test_of_two_plugins_that_claim_a_name_the_user_chooses(install_into, tmp_path, tiny_model):
    source = (
        "class Rival(LlamaGQA):\n    name, gguf_names = 'rival', ('llama',)\n"
        "@hookimpl\ndef polyhead_register_architectures(): return [Rival()]"
    )
    install_into(tmp_path / "site", source, name="rival", distribution="dist-rival")
    arguments = ("run", str(tiny_model("llama-gqa")), "-p", "the", "-n", "2", "--set", "chat=false")
    undecided = polyhead(tmp_path / "site", *arguments)
    assert undecided.returncode == 2
    assert undecided.stdout == ""
    for word in ("plugin llama_gqa (polyhead ", "plugin rival (dist-rival 1.2)", "architecture: llama_gqa or rival"):
        assert word in undecided.stderr
    for choice in ("architecture=rival", "plugins.disable=[rival]"):
        assert polyhead(tmp_path / "site", *arguments, "--set", choice).returncode == 0
