"""docs/plugins/tutorial.md is followed to the letter: commands typed, changes made, outputs seen.

An ``sh`` block is typed line by line; a line that says so may fail, and must. Each line of a ``text`` block is in the
output of the commands before it. A ``diff`` block changes the file that the line above it names.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from types import ModuleType

import pytest
from polyhead.arch import Metadata

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "plugins" / "tutorial.md"
BLOCK = re.compile(r"(?:In `(?P<file>[^`]+)`:\n\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)
FAILS = "# ends with an error"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of an activated environment that sees this one's packages and may be installed into."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    inside = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", vars=inside))
    mine = [path for path in sys.path if path.endswith("site-packages")]
    (site / "outer.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in mine))
    command = folder / "bin" / "polyhead"
    command.write_text(f"#!{folder}/bin/python\nimport sys\nfrom polyhead.cli import main\nsys.exit(main())\n")
    command.chmod(0o755)
    # What pip would fetch is here already.
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **offline, "PATH": path, "VIRTUAL_ENV": str(folder), "COLUMNS": "200", "NO_COLOR": "1"}


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    """The folder in which someone followed the page."""
    home = tmp_path_factory.mktemp("tutorial")
    checkout = home / "polyhead"
    checkout.mkdir()
    (checkout / "docs").symlink_to(ROOT / "docs")
    reader = Reader(checkout, environment)
    for match in BLOCK.finditer(PAGE.read_text(encoding="utf-8")):
        step = getattr(reader, match["language"])
        step(match["text"], match["file"])
    return home


class Reader:
    """Someone at a shell, in a folder, who sees what the last commands printed."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment, self.seen = folder, environment, ""

    def sh(self, text: str, file: str | None) -> None:
        self.seen = ""
        for line in text.splitlines():
            script = f"{line}\ncode=$?; pwd >&3; exit $code"
            with open(self.folder / ".pwd", "w+") as place:
                done = subprocess.run(
                    ["bash", "-c", script.replace(">&3", f">&{place.fileno()}")],
                    cwd=self.folder,
                    env=self.environment,
                    pass_fds=[place.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    timeout=180,
                )
                place.seek(0)
                self.folder = Path(place.read().strip())
            self.seen += done.stdout
            assert (done.returncode != 0) == (FAILS in line), f"{line}\n{done.stdout}"
            assert "Traceback" not in done.stdout, f"{line}\n{done.stdout}"

    def text(self, text: str, file: str | None) -> None:
        for line in text.splitlines():
            assert line in self.seen, f"{line!r} is not in\n{self.seen}"

    def diff(self, text: str, file: str | None) -> None:
        assert file is not None, f"no line says which file this changes:\n{text}"
        before = "".join(line[1:] + "\n" for line in text.splitlines() if line[0] in " -")
        after = "".join(line[1:] + "\n" for line in text.splitlines() if line[0] in " +")
        source = (self.folder / file).read_text(encoding="utf-8")
        assert source.count(before) == 1, f"{file} does not hold once:\n{before}"
        (self.folder / file).write_text(source.replace(before, after), encoding="utf-8")

    def python(self, text: str, file: str | None) -> None:
        (self.folder / "block.py").write_text(text, encoding="utf-8")
        self.sh("python block.py", None)


def test_following_the_page_ends_with_a_passing_conformance_run_and_a_model_that_runs(followed):
    assert (followed / "polyhead-qwen3" / "polyhead_qwen3.py").is_file()
    assert [path.name for path in sorted(followed.iterdir())] == ["polyhead", "polyhead-qwen3", "tiny-qwen3.gguf"]


def test_it_arrives_at_the_package_that_the_page_is_built_around(followed):
    package = ROOT / "docs" / "plugins" / "polyhead-qwen3"
    values = {"rope.freq_base": 1e6, "block_count": 2, "context_length": 9, "embedding_length": 8}
    values |= {"attention.key_length": 4, "attention.head_count": 4, "attention.head_count_kv": 2}
    values |= {"attention.layer_norm_rms_epsilon": 1e-5, "feed_forward_length": 24}
    for tensors in ({"token_embd.weight": (5, 8)}, {"token_embd.weight": (5, 8), "output.weight": (5, 8)}):
        meta = [
            Metadata({f"qwen3.{key}": value for key, value in values.items()}, {**tensors, "norm": (8,)}, "qwen3")
            for _ in range(2)
        ]
        mine, theirs = (
            load(folder / "polyhead_qwen3.py").polyhead_register_architectures()[0].decoder(each)
            for folder, each in zip((followed / "polyhead-qwen3", package), meta, strict=True)
        )
        assert mine == theirs


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{path.stem}_{path.parent.parent.name.replace('-', '_')}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_names_every_test_of_the_kit():
    from polyhead.testing import ConformanceTests

    tests = {name.removeprefix("test_") for name in dir(ConformanceTests) if name.startswith("test_")}
    named = set(re.findall(r"`(\w+)`", PAGE.read_text(encoding="utf-8")))
    assert {name for name in tests if not name.startswith("cuda_")} <= named


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "plugins").rglob("*.md")), ids=lambda page: page.parent.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), f"{page.relative_to(ROOT)}: {link}"
