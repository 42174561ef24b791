"""What the recorded GPU run was a run of: one digest over the CUDA runtime's Python and CUDA sources."""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "core" / "runtime" / "cuda"
LAST_RUN = ROOT / "tests" / "gpu" / "last_run.json"
HOW = "run on a machine with an NVIDIA GPU: pytest tests/gpu --record tests/gpu/last_run.json"


def source_files() -> list[Path]:
    """All files that are hashed, in the order in which they are."""
    return sorted(path for path in FOLDER.rglob("*") if path.suffix in (".py", ".cu", ".cuh"))


def digest() -> str:
    """SHA-256 over names and contents."""
    state = hashlib.sha256()
    for path in source_files():
        content = path.read_bytes().replace(b"\r\n", b"\n")
        state.update(f"{path.relative_to(FOLDER).as_posix()} {len(content)}\n".encode())
        state.update(content)
    return state.hexdigest()
