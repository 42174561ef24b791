"""The packages of docs/plugins, as strangers would publish them: installed by pip, tested, and each dispensable."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path
from xml.etree import ElementTree

import golden
import numpy as np
import pytest
import tolerance

ROOT = Path(__file__).parents[2]
PROJECTS = sorted(path.parent for path in (ROOT / "docs" / "plugins").glob("*/pyproject.toml"))
NAMES = [folder.name for folder in PROJECTS]
TRACES = shutil.ignore_patterns("build", "*.egg-info", "__pycache__", ".*")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of the projects in source/, all of them installed by pip into site/."""
    folder = tmp_path_factory.mktemp("outside")
    for project in PROJECTS:
        shutil.copytree(project, folder / "source" / project.name, ignore=TRACES)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    command += ["--target", str(folder / "site"), *(str(folder / "source" / name) for name in NAMES)]
    subprocess.run(command, check=True, timeout=180)
    return folder


def environment(site: Path) -> dict[str, str]:
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture(scope="module")
def report(work: Path) -> dict[str, list[tuple[str, str]]]:
    """(test, outcome) by project, from one pytest over the tests of all of them."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml", str(work / "report.xml")]
    command += [f"{name}/tests" for name in NAMES]
    source = work / "source"
    (source / "pytest.ini").write_text("[pytest]\n")  # or the first project's settings would hold for all
    done = subprocess.run(
        command, cwd=source, env=environment(work / "site"), capture_output=True, text=True, timeout=300
    )
    assert (work / "report.xml").exists(), done.stdout + done.stderr
    found: dict[str, list[tuple[str, str]]] = {name: [] for name in NAMES}
    for case in ElementTree.parse(work / "report.xml").iter("testcase"):
        project = (case.attrib["classname"] or case.attrib["name"]).split(".")[0]
        outcome = "passed" if not len(case) else case[0].tag
        text = "" if outcome in ("passed", "skipped") else f": {case[0].get('message')}\n{case[0].text}"
        found.setdefault(project, []).append((case.attrib["name"], outcome + text))
    return found


def test_there_are_projects_and_each_is_made_as_a_stranger_s_would_be():
    assert {"polyhead-phi3", "polyhead-qwen3"} <= set(NAMES)
    for folder in PROJECTS:
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        assert project["name"] == folder.name
        assert "polyhead" in project["dependencies"]
        assert project["entry-points"]["polyhead"]
        assert (folder / project.get("readme", "README.md")).is_file()


@pytest.mark.parametrize("name", NAMES)
def test_the_tests_of_the_project_pass(report, name):
    outcomes = report[name]
    broken = [f"{test} {outcome}" for test, outcome in outcomes if outcome not in ("passed", "skipped")]
    assert not broken, "\n".join(broken)
    assert sum(outcome == "passed" for _, outcome in outcomes) >= 10


def test_qwen3_is_pure_data_in_under_sixty_lines():
    text = (ROOT / "docs" / "plugins" / "polyhead-qwen3" / "polyhead_qwen3.py").read_text()
    assert len(text.splitlines()) < 60


# Runs in the other process: the state of every plugin, and logits of each model or the error in their place.
DRIVER = """
import json, sys
import numpy as np
from polyhead import LLM, PolyheadError
from polyhead.plugins import discover
jobs, out = json.loads(sys.argv[1]), {}
for name, (path, ids) in jobs.items():
    try:
        with LLM({"model": path, "device": "cpu"}) as llm:
            out[name] = llm.logits(ids)
    except PolyheadError as error:
        out[name] = np.array(f"{type(error).__name__}: {error}")
np.savez(sys.argv[2], **out)
print(json.dumps({plugin.distribution: plugin.state for plugin in discover().plugins}))
"""
MODELS = {"llama-gqa": "polyhead", "gpt2-tied": "polyhead", "qwen3": "polyhead-qwen3"}


@pytest.mark.parametrize("gone", [None, *NAMES], ids=["none", *NAMES])
def test_removing_it_leaves_everything_else_working(gone, work, tmp_path, tiny_model):
    site = tmp_path / "site"
    shutil.copytree(work / "site", site)
    for distribution in distributions(path=[str(site)]):
        if distribution.name == gone:
            for file in distribution.files or []:
                Path(str(distribution.locate_file(file))).unlink(missing_ok=True)
    expected = {name: golden.load(name).sequences[0] for name in MODELS}
    jobs = {name: (str(tiny_model(name)), expected[name].ids) for name in MODELS}
    command = [sys.executable, "-c", DRIVER, json.dumps(jobs), str(tmp_path / "out.npz")]
    done = subprocess.run(command, env=environment(site), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    states = json.loads(done.stdout)
    assert {"polyhead", *NAMES} - {gone} <= set(states)
    assert gone not in states
    assert set(states.values()) == {"ok"}
    assert "left out" not in done.stderr
    with np.load(tmp_path / "out.npz") as found:
        for name, owner in MODELS.items():
            if owner == gone:
                assert f"no plugin answers to general.architecture '{name}'" in str(found[name])
            else:
                assert found[name].ndim == 2, str(found[name])
                error = tolerance.error(found[name][expected[name].positions], expected[name].logits)
                assert error < tolerance.CPU_LOGITS
