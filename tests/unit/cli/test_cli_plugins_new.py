"""``polyhead plugins new``: names, files, refusals. That a new package passes its own tests is tests/docs' to show."""

from __future__ import annotations

import dataclasses
import importlib
import keyword
import re
import string
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import polyhead.arch
import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from polyhead.cli.plugins_new import Names, write
from polyhead.errors import ConfigError
from polyhead.plugins import discover

Invoke = Callable[..., Result]
FILES = {"pyproject.toml", "README.md", "polyhead_new_arch.py", "tests/test_new_arch.py"}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2, (result.stdout, result.stderr)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr
    assert not list(Path().rglob(".polyhead-*"))


@pytest.mark.parametrize("name", ["new-arch", "polyhead-new-arch"])
def test_a_package_is_written_and_its_folder_printed(invoke: Invoke, name: str) -> None:
    result = invoke("plugins", "new", name)
    assert result.exit_code == 0
    assert result.stdout == "polyhead-new-arch\n"
    assert files(Path("polyhead-new-arch")) == FILES
    assert [path.name for path in Path().iterdir()] == ["polyhead-new-arch"]
    for step in ("cd polyhead-new-arch", "pip install -e '.[test]'", "pytest", "polyhead_new_arch.py", "tutorial.md"):
        assert step in result.stderr


def test_quiet_prints_the_folder_alone(invoke: Invoke) -> None:
    for args in (("-q", "plugins", "new", "one"), ("plugins", "-q", "new", "two"), ("plugins", "new", "three", "-q")):
        result = invoke(*args)
        assert (result.exit_code, result.stderr) == (0, "")
        assert Path(result.stdout.strip()).is_dir()


def test_the_directory_is_made_and_its_name_quoted_for_a_shell(invoke: Invoke) -> None:
    result = invoke("plugins", "new", "new-arch", "--directory", "some where/else")
    assert result.stdout == "some where/else/polyhead-new-arch\n"
    assert "cd 'some where/else/polyhead-new-arch'" in result.stderr
    assert files(Path("some where/else/polyhead-new-arch")) == FILES


def test_names_agree_and_no_placeholder_is_left(invoke: Invoke) -> None:
    invoke("plugins", "new", "new-arch")
    folder = Path("polyhead-new-arch")
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    assert project["project"]["name"] == folder.name
    assert project["project"]["entry-points"]["polyhead"] == {"new_arch": "polyhead_new_arch"}
    assert project["tool"]["setuptools"]["py-modules"] == ["polyhead_new_arch"]
    for file in FILES:
        assert not re.search(r"\$[a-z_{]", (folder / file).read_text())


@pytest.mark.parametrize("name", ["new-arch", "none", "class", "linear", "hookimpl", "np", "command-r.plus"])
def test_the_plugin_loads_whatever_it_is_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names.of(name)
    folder = write(names, Path())
    compile((folder / "tests" / f"test_{names.name}.py").read_text(), "test", "exec")
    monkeypatch.syspath_prepend(str(folder.resolve()))
    entry = EntryPoint(names.name, names.module, "polyhead")
    registry = discover(entry_points=[*entry_points(group="polyhead"), entry])
    assert not registry.failures
    plugin, architecture = registry.find(name)
    assert (plugin.name, architecture.name, architecture.gguf_names) == (names.name, names.name, (name,))


def test_the_reader_is_told_that_polyhead_comes_first(invoke: Invoke) -> None:
    result = invoke("plugins", "new", "new-arch")
    assert "in an environment that has polyhead, as this one has:" in result.stderr
    readme = (Path("polyhead-new-arch") / "README.md").read_text()
    assert readme.index("Install polyhead first, from its checkout") < readme.index("pip install -e '.[test]'")


def test_its_tests_say_why_some_are_skipped_and_still_list_failures(invoke: Invoke) -> None:
    invoke("plugins", "new", "new-arch")
    project = tomllib.loads((Path("polyhead-new-arch") / "pyproject.toml").read_text())
    assert set("sfE") < set(project["tool"]["pytest"]["ini_options"]["addopts"])


def test_keys_that_the_format_lets_a_file_leave_out_may_be_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """From plugin and reference alike: the usual head size, a K/V head for each head, RoPE's usual base."""
    folder = write(Names.of("new-arch"), Path()).resolve()
    for path in (folder, folder / "tests"):
        monkeypatch.syspath_prepend(str(path))
    suite = importlib.import_module("test_new_arch").TestNewArch
    dropped = ("attention.key_length", "attention.value_length", "attention.head_count_kv", "rope.freq_base")
    metadata = {key: value for key, value in suite.case.metadata.items() if key not in dropped}
    metadata["attention.head_count"] = 4
    monkeypatch.setattr(suite, "case", dataclasses.replace(suite.case, metadata=metadata))
    for test in ("logits_equal_the_reference", "every_metadata_value_matters", "strange_metadata_is_refused_or_works"):
        getattr(suite(), f"test_{test}")()
    for module in ("test_new_arch", "polyhead_new_arch"):
        del sys.modules[module]


_WORD = st.text(string.ascii_lowercase + string.digits, min_size=1, max_size=8)


@given(st.sampled_from(string.ascii_lowercase), st.lists(st.tuples(st.sampled_from("-_."), _WORD), max_size=4))
def test_every_name_taken_gives_identifiers_and_a_distribution(first: str, rest: list[tuple[str, str]]) -> None:
    names = Names.of(first + "".join(map("".join, rest)))
    assert names.module.isidentifier()
    assert f"test_{names.name}".isidentifier()
    assert f"{names.camel}Model".isidentifier()
    assert not keyword.iskeyword(f"{names.camel}Model")
    assert not hasattr(polyhead.arch, f"{names.camel}Model")
    assert re.fullmatch(r"polyhead(-[a-z0-9]+)+", names.distribution)


BAD = (
    "",
    "New",
    "3b",
    "a b",
    "a--b",
    "a-",
    "_a",
    "../up",
    "a/b",
    "a$b",
    "é",
    "polyhead-",
    "a" * 61,
    "a" * 60 + "!",
    "a\n",
)


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_name_a_package_is_refused(invoke: Invoke, name: str) -> None:
    refused(invoke("plugins", "new", "--", name), "polyhead: error: ", "cannot name a plugin", "general.architecture")
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("name", "owner"),
    [("llama", "llama_gqa"), ("qwen2", "llama_gqa"), ("llama-gqa", "llama_gqa"), ("polyhead-gpt.mha", "gpt_mha")],
)
def test_a_name_of_an_installed_plugin_is_refused(invoke: Invoke, name: str, owner: str) -> None:
    refused(invoke("plugins", "new", name), f"plugin {owner} (polyhead ", "another")
    assert not list(Path().iterdir())


def test_a_name_of_a_plugin_that_failed_is_refused_too(
    invoke: Invoke, write_plugin: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(write_plugin("wreck", "raise RuntimeError('no luck')")))
    refused(invoke("plugins", "new", "wreck"), "plugin wreck (wreck 2.5) is installed")


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_nothing_is_overwritten(invoke: Invoke, kind: str) -> None:
    target = Path("polyhead-new-arch")
    if kind == "folder":
        target.mkdir()
        (target / "mine.txt").write_text("mine")
    elif kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to("nowhere")
    refused(invoke("plugins", "new", "new-arch"), "polyhead-new-arch exists already", "--directory")
    if kind == "folder":
        assert files(target) == {"mine.txt"}
    elif kind == "file":
        assert target.read_text() == "mine"
    assert not Path("nowhere").exists()


def test_a_place_that_cannot_be_written_is_named(invoke: Invoke) -> None:
    Path("file").write_text("")
    refused(invoke("plugins", "new", "new-arch", "--directory", "file"), "'file' is a file")
    refused(invoke("plugins", "new", "new-arch", "--directory", "file/below"), "file/below/polyhead-new-arch cannot be")
    refused(invoke("plugins", "new", "new-arch", "--directory", "x" * 300), "new-arch cannot be written: File name too")
    assert [path.name for path in Path().iterdir()] == ["file"]


def test_a_write_that_fails_half_way_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *args: object, **kwargs: object) -> int:
        if self.name.startswith("test_"):
            raise OSError(28, "No space left on device")
        return original(self, *args, **kwargs)

    original = Path.write_text
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ConfigError, match="polyhead-new-arch cannot be written: No space left on device"):
        write(Names.of("new-arch"), Path())
    assert not list(Path().iterdir())


def test_options_of_the_list_do_not_go_with_a_new_package(invoke: Invoke) -> None:
    refused(invoke("plugins", "--json", "new", "new-arch"), "--disable and --json")
    assert not list(Path().iterdir())


def test_an_unknown_subcommand_and_a_missing_name_are_usage_errors(invoke: Invoke) -> None:
    refused(invoke("plugins", "knew", "x"), "No such command 'knew'")
    refused(invoke("plugins", "new"), "NAME")
