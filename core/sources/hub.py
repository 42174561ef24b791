"""Models on the Hugging Face hub, through huggingface_hub, which keeps its own cache and resumes downloads.

The hub is reached through a small protocol, ``HubClient``: what is done with its answers can be tried without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from ..errors import SourceError
from .local import listed
from .progress import Progress, Silent
from .reference import HubModel, shard_names


class HubClient(Protocol):
    """What is needed of the hub. Both methods raise huggingface_hub's own errors."""

    def list_files(self, repo: str, revision: str | None) -> list[str]:
        """Paths of all files of a repository."""
        ...

    def download(self, repo: str, file: str, revision: str | None, *, offline: bool, progress: Progress) -> Path:
        """Fetches a file, or finds it in the hub's cache; the files of one revision lie in one folder."""
        ...


class HuggingFaceClient:
    """The real hub. ``cache`` None: huggingface_hub's own folder, shared with other programs.

    Raises SourceError where huggingface_hub is not installed.
    """

    def __init__(self, cache: Path | None = None, endpoint: str | None = None) -> None:
        try:
            import huggingface_hub
            from huggingface_hub import utils
        except ImportError as error:
            raise SourceError("hf:// needs huggingface_hub: pip install 'polyhead[hub]'") from error
        self._hub = huggingface_hub
        self._utils: Any = utils
        self._cache = cache
        self._endpoint = endpoint

    def list_files(self, repo: str, revision: str | None) -> list[str]:
        """Asks the hub."""
        return list(self._hub.HfApi(endpoint=self._endpoint).list_repo_files(repo, revision=revision))

    def download(self, repo: str, file: str, revision: str | None, *, offline: bool, progress: Progress) -> Path:
        """Fetches with huggingface_hub's own bars, which know of resumed and parallel transfers."""
        quiet = isinstance(progress, Silent) and not self._utils.are_progress_bars_disabled()
        if quiet:
            self._utils.disable_progress_bars()
        try:
            path = self._hub.hf_hub_download(
                repo_id=repo,
                filename=file,
                revision=revision,
                cache_dir=self._cache,
                endpoint=self._endpoint,
                local_files_only=offline,
            )
        finally:
            if quiet:
                self._utils.enable_progress_bars()
        return Path(path)


def find_hub(
    reference: HubModel, *, client: HubClient, progress: Progress, offline: bool, refresh: bool = False
) -> Path:
    """The path of the file (of a split model: of its first part), fetched if it is not in the hub's cache.

    A file in the cache is taken without asking the hub, so that a start needs no network and two starts use the same
    weights; ``refresh`` asks whether the hub has a newer one.

    Raises SourceError: no such repository, revision or file, a gated one, no network, a tag that fits none or several.
    """
    name = f"hf://{reference.repo}" + (f"@{reference.revision}" if reference.revision else "")
    try:
        file = reference.file or _by_quant(reference, name, client, offline)
        parts = shard_names(file)
        if not refresh or offline:
            kept = [path for path in (_cached(client, reference, part) for part in parts) if path is not None]
            if len(kept) == len(parts):
                return kept[0]
        with progress.task(f"fetching {name}/{file}", None):
            pass
        fetched = [
            client.download(reference.repo, part, reference.revision, offline=offline, progress=progress)
            for part in parts
        ]
        return fetched[0]
    except SourceError:
        raise
    except Exception as error:
        raise SourceError(_explain(error, reference, name, client, offline)) from error


def _cached(client: HubClient, reference: HubModel, file: str) -> Path | None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return client.download(reference.repo, file, reference.revision, offline=True, progress=Silent())
    except LocalEntryNotFoundError:
        return None


def _by_quant(reference: HubModel, name: str, client: HubClient, offline: bool) -> str:
    wanted = str(reference.quant).lower()
    if offline:
        raise SourceError(
            f"{name}:{reference.quant}: offline, the hub cannot be asked which file that is; name the file"
        )
    files = _models(client.list_files(reference.repo, reference.revision))
    firsts = dict.fromkeys(shard_names(file)[0] for file in files)
    fitting = [file for file in firsts if _has_tag(file, wanted)]
    if len(fitting) == 1:
        return fitting[0]
    if not files:
        raise SourceError(f"{name}: this repository holds no .gguf file")
    if fitting:
        raise SourceError(f"{name}:{reference.quant} fits several files, name one: {listed(fitting)}")
    raise SourceError(f"{name}:{reference.quant} fits no file; there are {listed(list(firsts))}")


def _models(files: list[str]) -> list[str]:
    # mmproj files hold an image encoder and go by the same tags.
    names = sorted(file for file in files if file.lower().endswith(".gguf"))
    return [file for file in names if not file.rpartition("/")[2].lower().startswith("mmproj")]


def _has_tag(file: str, wanted: str) -> bool:
    """Whether the name ends in the tag, which stands alone or after '-' or '.': K_M is no tag of Q4_K_M."""
    stem = shard_names(file)[0].rpartition("/")[2].lower().removesuffix(".gguf")
    if len(shard_names(file)) > 1:
        stem = stem.rpartition("-of-")[0].rpartition("-")[0]
    return stem == wanted or stem.endswith((f"-{wanted}", f".{wanted}"))


def _explain(error: Exception, reference: HubModel, name: str, client: HubClient, offline: bool) -> str:
    """What an error of huggingface_hub means for the user."""
    from huggingface_hub import errors

    token = "accept its terms on its page and set HF_TOKEN (or run 'hf auth login')"
    if isinstance(error, errors.GatedRepoError):
        return f"{name}: this repository is gated; {token}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{name}: no such repository, or a private one; if it is private, {token}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name}: the repository has no revision {reference.revision!r}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        if offline:
            return f"{name}/{reference.file}: not in the local cache, and offline is set"
        return f"{name}: the hub cannot be reached and the file is not in the local cache ({_short(error)})"
    if isinstance(error, errors.EntryNotFoundError):
        there = ""
        try:
            there = f"; there are {listed(_models(client.list_files(reference.repo, reference.revision)))}"
        except Exception:
            there = ""  # The list was only to help.
        return f"{name}: the repository has no file {reference.file!r}{there}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{name}: HF_HUB_OFFLINE is set and the file is not in the local cache"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"{name}: the hub refuses access (HTTP {status}); {token}"
    if status is not None:
        return f"{name}: the hub answered HTTP {status} ({_short(error)})"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{name}: {error}"
    return f"{name}: could not be fetched: {type(error).__name__}: {_short(error)}"


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
