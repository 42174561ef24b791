"""The names of a split model's parts, and finding them beside the first. Knows nothing of what is in them."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import MissingShardError

_NAME = re.compile(r"(?P<prefix>.*)-(?P<index>\d{5,})-of-(?P<count>\d{5,})\.gguf", re.DOTALL)
MAX_SHARDS = 1 << 16


def shard_name(prefix: str, index: int, count: int) -> str:
    """File name of part ``index`` (from 0) of ``count``."""
    return f"{prefix}-{index + 1:05d}-of-{count:05d}.gguf"


def sibling_paths(path: Path, index: int, count: int) -> list[Path]:
    """Paths of all ``count`` parts, given that ``path`` is the first, beside it and relative to it.

    ``index`` and ``count`` are what the file at ``path`` says of itself. Raises MissingShardError when it is not the
    first part, its name does not fit, or parts are absent.
    """
    match = _NAME.fullmatch(path.name)
    fits = match is not None and (int(match["index"]), int(match["count"])) == (index + 1, count)
    if index:
        first = str(path.with_name(shard_name(match["prefix"], 0, count))) if match and fits else "part 1"
        raise MissingShardError(f"{path} is part {index + 1} of {count} of a split model; open the first, {first}.")
    if match is None or not fits:
        raise MissingShardError(
            f"{path} is part 1 of {count} of a split model, so the other parts cannot be found unless its name ends in "
            f"{shard_name('', 0, count)}; give the parts the names they were published with."
        )
    paths = [path, *(path.with_name(shard_name(match["prefix"], i, count)) for i in range(1, count))]
    absent = [part.name for part in paths[1:] if not part.is_file()]
    if absent:
        shown = ", ".join(absent[:3]) + (", ..." if len(absent) > 3 else "")
        raise MissingShardError(
            f"{path} is part 1 of {count} of a split model and {len(absent)} of the other parts are not beside it: "
            f"{shown}. Download them into the same folder."
        )
    return paths
