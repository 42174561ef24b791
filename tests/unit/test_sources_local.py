"""Models on this machine: files, folders, checksums, and the cache folder's place."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from polyhead.errors import MissingShardError, ModelNotFoundError, SourceError
from polyhead.sources import cache_folder, resolve_model
from polyhead.sources.progress import Lines, Silent, choose


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


def model(path: Path, content: bytes = b"GGUF") -> Path:
    path.write_bytes(content)
    return path


def test_paths_are_found_from_the_home_a_base_or_the_current_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = model(folder / "m.gguf")
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve_model("~/models/m.gguf") == file
    assert resolve_model("m.gguf", base=folder) == file
    assert resolve_model(str(file), base=Path("/nowhere")) == file
    monkeypatch.chdir(folder.parent)
    assert resolve_model("models/../models/m.gguf") == file


def test_a_link_is_kept_so_that_split_parts_are_found_beside_it(folder: Path) -> None:
    model(folder / "blob")
    link = folder / "m.gguf"
    link.symlink_to(folder / "blob")
    assert resolve_model(str(link)) == link
    (folder / "blob").unlink()
    with pytest.raises(ModelNotFoundError, match=r"a link to .*blob, which does not exist"):
        resolve_model(str(link))


def test_a_missing_file_suggests_its_neighbours(folder: Path) -> None:
    model(folder / "SmolLM2-Q4_1.gguf")
    with pytest.raises(ModelNotFoundError, match=r"models/smollm2-q4_0.gguf: .*did you mean 'SmolLM2-Q4_1.gguf'"):
        resolve_model("smollm2-q4_0.gguf", base=folder)
    with pytest.raises(ModelNotFoundError, match=r"that folder holds SmolLM2-Q4_1.gguf"):
        resolve_model("zzz", base=folder)
    with pytest.raises(ModelNotFoundError, match=r"nor is there a folder .*/no"):
        resolve_model("no/m.gguf", base=folder)
    os.mkfifo(folder / "pipe")
    with pytest.raises(ModelNotFoundError, match="neither a file nor a folder"):
        resolve_model("pipe", base=folder)


def test_a_folder_stands_for_its_only_model(folder: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"holds no \.gguf file"):
        resolve_model(str(folder))
    file = model(folder / "m.gguf")
    model(folder / "readme.txt")
    assert resolve_model(str(folder)) == file
    model(folder / "n.gguf")
    with pytest.raises(SourceError, match=r"several models, name one: m\.gguf, n\.gguf"):
        resolve_model(str(folder))


def test_a_folder_stands_for_its_only_split_model_if_complete(folder: Path) -> None:
    for i in (1, 3):
        model(folder / f"m-{i:05d}-of-00003.gguf")
    with pytest.raises(MissingShardError, match=r"lacks m-00002-of-00003\.gguf"):
        resolve_model(str(folder))
    model(folder / "m-00002-of-00003.gguf")
    assert resolve_model(str(folder)).name == "m-00001-of-00003.gguf"
    model(folder / "m-00004-of-00003.gguf")
    with pytest.raises(SourceError, match="part 4 of 3 cannot be"):
        resolve_model(str(folder))


def test_the_checksum_is_checked_and_a_users_file_is_never_removed(folder: Path) -> None:
    file = model(folder / "m.gguf", b"GGUF one")
    right = hashlib.sha256(b"GGUF one").hexdigest()
    cache = folder / "cache"
    assert resolve_model(str(file), sha256=right.upper(), cache=cache) == file
    with pytest.raises(SourceError, match=rf"SHA-256 is {right}, but {'0' * 64} was expected"):
        resolve_model(str(file), sha256="0" * 64, cache=cache)
    assert file.read_bytes() == b"GGUF one"
    with pytest.raises(SourceError, match="64 hexadecimal digits"):
        resolve_model(str(file), sha256="xyz", cache=cache)


def test_a_changed_file_is_hashed_again_even_with_its_old_size_and_time(folder: Path) -> None:
    file = model(folder / "m.gguf", b"GGUF one")
    right = hashlib.sha256(b"GGUF one").hexdigest()
    cache = folder / "cache"
    resolve_model(str(file), sha256=right, cache=cache)
    stat = file.stat()
    file.write_bytes(b"GGUF two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(SourceError, match="SHA-256 is"):
        resolve_model(str(file), sha256=right, cache=cache)


def test_an_unchanged_file_is_hashed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = model(folder / "m.gguf", b"GGUF one")
    right = hashlib.sha256(b"GGUF one").hexdigest()
    resolve_model(str(file), sha256=right, cache=folder / "cache")
    opened: list[Path] = []
    real_open = Path.open

    def counting(self: Path, *args: object, **kwargs: object) -> object:
        opened.append(self)
        return real_open(self, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", counting)
    resolve_model(str(file), sha256=right, cache=folder / "cache")
    assert file not in opened


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc").is_dir(), reason="needs a folder that cannot be written")
def test_a_cache_that_cannot_be_written_does_not_matter_for_a_local_file(folder: Path) -> None:
    file = model(folder / "m.gguf", b"GGUF one")
    right = hashlib.sha256(b"GGUF one").hexdigest()
    assert resolve_model(str(file), sha256=right, cache=Path("/proc/polyhead")) == file


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder({}) == Path("/home/me/.cache/polyhead")
    assert cache_folder({"XDG_CACHE_HOME": "/x"}) == Path("/x/polyhead")
    assert cache_folder({"XDG_CACHE_HOME": "relative"}) == Path("/home/me/.cache/polyhead")
    assert cache_folder({"XDG_CACHE_HOME": "/x", "POLYHEAD_CACHE": "~/big"}) == Path("/home/me/big")


def test_without_a_home_folder_only_what_needs_the_cache_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = model(folder / "m.gguf")
    for name in ("POLYHEAD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # What it does for a user whom no list knows.
    assert resolve_model(str(file)) == file
    with pytest.raises(SourceError, match="set POLYHEAD_CACHE"):
        cache_folder()


def test_in_a_folder_that_is_gone_only_absolute_paths_are_found(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = model(folder / "m.gguf")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert resolve_model(str(file)) == file
    with pytest.raises(ModelNotFoundError, match=r"m\.gguf: the current folder no longer exists"):
        resolve_model("m.gguf")


def test_progress_is_a_line_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(choose(False), Silent)
    reporter = choose(None)
    assert isinstance(reporter, Lines)
    with reporter.task("fetching x", 2_500_000) as tick:
        tick(1)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "fetching x (2.5 MB)\n"
    mine = Silent()
    assert choose(mine) is mine


def on_terminal(**environ: str) -> bytes:
    """What a task writes to stderr when that is a terminal."""
    code = (
        "from polyhead.sources.progress import choose\n"
        "with choose(None).task('fetching [x]', 1000000) as tick:\n"
        "    tick(500000)\n"
    )
    ours, theirs = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=theirs, env={**os.environ, **environ}
    ) as process:
        os.close(theirs)
        seen = b""
        try:
            while chunk := os.read(ours, 4096):
                seen += chunk
        except OSError:
            pass  # The terminal is closed.
        assert process.stdout is not None
        assert process.stdout.read() == b""
    os.close(ours)
    assert process.returncode == 0
    return seen


def test_progress_is_a_bar_on_a_terminal_without_colour_if_so_wished() -> None:
    colour = {"TERM": "xterm-256color", "COLUMNS": "100"}
    assert b"\x1b[38;5;" in on_terminal(**colour)
    plain = on_terminal(NO_COLOR="1", **colour)
    assert b"fetching [x]" in plain
    assert b"\x1b[3" not in plain
    assert on_terminal(TERM="dumb").strip() == b"fetching [x] (1.0 MB)"
