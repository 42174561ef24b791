"""Plugins as the command line meets them: broken ones beside a model that runs, and a stranger's own model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BROKEN = {
    "raises": ("raise RuntimeError('no luck')", "RuntimeError: no luck"),
    "exits": ("import sys; sys.exit(7)", "called sys.exit(7) while it was loaded"),
    "misspells": (
        "@hookimpl\ndef polyhead_register_model(): return []",
        "polyhead_register_model, which is not a hook",
    ),
    "garbled": ("def broken(:", "SyntaxError"),
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, install_into) -> Path:
    """A folder with four broken plugins and a dist-info without metadata."""
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
    table = polyhead(site, "plugins").stdout
    assert all(any(name in line and "FAILED" in line for line in table.splitlines()) for name in BROKEN)


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
    assert "FAILED: plugin raises (dist-raises 1.2): RuntimeError: no luck" in result.stderr
    assert "docs/plugins.md" in result.stderr
