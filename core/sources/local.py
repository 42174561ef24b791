"""Models that are already on this machine: a file, or a folder that holds exactly one model."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from ..errors import MissingShardError, ModelNotFoundError, SourceError
from .cache import told
from .reference import shard_names

_LISTED = 12


def find_local(text: str, base: Path | None = None) -> Path:
    """The absolute path of the model file that a path means; of a split model, its first part when a folder is given.

    ``~`` is expanded; a relative path counts from ``base`` (default: the current folder). Links are not followed, so
    that the parts of a split model are found beside the link.

    Raises ModelNotFoundError where nothing is there, MissingShardError for a folder with an incomplete split model,
    SourceError for a folder with several models.
    """
    try:
        path = Path(os.path.abspath(os.path.join(base or "", expand(text))))
    except FileNotFoundError:  # Only a relative path asks for the current folder.
        raise ModelNotFoundError(
            f"{text}: the current folder no longer exists; change to another or give an absolute path"
        ) from None
    with told(f"looking at {path}", path.parent):
        if path.is_file():
            return path
        if path.is_dir():
            return _only_model(path)
        if path.is_symlink():
            raise ModelNotFoundError(f"{path}: a link to {os.readlink(path)}, which does not exist")
        if path.exists():
            raise ModelNotFoundError(f"{path}: neither a file nor a folder")
        raise ModelNotFoundError(f"{path}: there is no such file{_near(path)}")


def expand(text: str) -> str:
    """The path with a leading ``~`` replaced; as it is where that names no folder. Never raises."""
    try:
        return os.path.expanduser(text)
    except ValueError:  # A NUL; whoever opens the file says so.
        return text


def _near(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f", nor is there a folder {folder}"
    names = _models(folder)
    near = difflib.get_close_matches(path.name.lower(), [name.lower() for name in names], n=1)
    if near:
        return f" (did you mean {next(name for name in names if name.lower() == near[0])!r}?)"
    return f"; that folder holds {listed(names)}" if names else "; that folder holds no .gguf file"


def _models(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.name.lower().endswith(".gguf"))


def _only_model(folder: Path) -> Path:
    names = _models(folder)
    models = {tuple(shard_names(name)) for name in names}
    if not models:
        raise ModelNotFoundError(f"{folder}: this folder holds no .gguf file")
    if len(models) > 1:
        raise SourceError(f"{folder}: this folder holds several models, name one: {listed(names)}")
    parts = models.pop()
    if missing := [part for part in parts if part not in names]:
        raise MissingShardError(f"{folder}: a split model lacks {listed(missing)}")
    return folder / parts[0]


def listed(names: list[str]) -> str:
    """The names, as many as a person reads."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
