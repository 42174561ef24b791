"""Makes GGUF files byte by byte, so that the tests can also write what no writer would."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

NUMBERS = {
    "uint8": (0, "B"),
    "int8": (1, "b"),
    "uint16": (2, "H"),
    "int16": (3, "h"),
    "uint32": (4, "I"),
    "int32": (5, "i"),
    "float32": (6, "f"),
    "bool": (7, "B"),
    "uint64": (10, "Q"),
    "int64": (11, "q"),
    "float64": (12, "d"),
}


class Maker:
    """Bytes of GGUF files. A metadata entry is (key, type number, payload); a tensor (name, dims, type, offset, data)
    with dims fastest first and offset None for the next free place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def string(text: str | bytes) -> bytes:
        raw = text.encode() if isinstance(text, str) else text
        return struct.pack("<Q", len(raw)) + raw

    def number(self, key: str, kind: str, value: float) -> tuple[str, int, bytes]:
        kind_id, code = NUMBERS[kind]
        return key, kind_id, struct.pack("<" + code, value)

    def text(self, key: str, value: str | bytes) -> tuple[str, int, bytes]:
        return key, 8, self.string(value)

    def numbers(self, key: str, kind: str, values: Sequence[float]) -> tuple[str, int, bytes]:
        kind_id, code = NUMBERS[kind]
        return key, 9, struct.pack(f"<IQ{len(values)}{code}", kind_id, len(values), *values)

    def texts(self, key: str, values: Sequence[str | bytes]) -> tuple[str, int, bytes]:
        return key, 9, struct.pack("<IQ", 8, len(values)) + b"".join(map(self.string, values))

    def header(self, metadata=(), tensors=(), *, version=3, n_keys=None, n_tensors=None) -> bytes:
        out = [b"GGUF", struct.pack("<I", version)]
        out.append(struct.pack("<Q", len(tensors) if n_tensors is None else n_tensors))
        out.append(struct.pack("<Q", len(metadata) if n_keys is None else n_keys))
        for key, kind, payload in metadata:
            out += [self.string(key), struct.pack("<I", kind), payload]
        for name, dims, kind, offset, _ in tensors:
            out += [
                self.string(name),
                struct.pack(f"<I{len(dims)}Q", len(dims), *dims),
                struct.pack("<IQ", kind, offset),
            ]
        return b"".join(out)

    def file(self, metadata=(), tensors=(), *, alignment=32, **counts) -> bytes:
        placed, data = [], b""
        for name, dims, kind, offset, payload in tensors:
            data += bytes(-len(data) % alignment)
            placed.append((name, dims, kind, len(data) if offset is None else offset, payload))
            data += payload
        header = self.header(metadata, placed, **counts)
        return header + (bytes(-len(header) % alignment) + data if data else b"")

    def f32(self, name: str, values: Sequence[float], offset: int | None = None):
        return name, (len(values),), 0, offset, np.asarray(values, "<f4").tobytes()

    def write(self, content: bytes, name: str = "model.gguf") -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    return Maker(tmp_path)
