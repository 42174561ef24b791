"""Says what a file that is not GGUF looks like, from its first bytes. Knows nothing of GGUF's contents."""

from __future__ import annotations

_LFS = b"version https://git-lfs"

# Older ggml files store their magic as a little-endian number, so the letters stand reversed.
_MAGICS: tuple[tuple[bytes, str], ...] = (
    (b"lmgg", "a legacy GGML file; convert the original model to GGUF again"),
    (b"fmgg", "a legacy GGMF file; convert the original model to GGUF again"),
    (b"tjgg", "a legacy GGJT file; convert the original model to GGUF again"),
    (b"algg", "a legacy GGLA adapter; convert the original adapter to GGUF again"),
    (b"FUGG", "a GGUF file with its bytes swapped; download it again"),
    (b"PK\x03\x04", "a zip archive (PyTorch checkpoints are such archives); polyhead reads only GGUF"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstandard archive; unpack it first"),
    (b"\xfd7zXZ\x00", "an xz archive; unpack it first"),
    (b"BZh", "a bzip2 archive; unpack it first"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file; polyhead reads only GGUF"),
    (_LFS, "a git-LFS pointer, not the model; run `git lfs pull` or download the file itself"),
)


def looks_like(head: bytes) -> str:
    """What a file that starts with ``head`` (some 512 bytes) seems to be, and what to do; '' when unknown."""
    for magic, answer in _MAGICS:
        if head.startswith(magic):
            return answer
    if not head.strip(b"\0"):
        return "zeros, as of a download that did not finish; download it again"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page, such as a login or error page; check the address and download it again"
    if len(head) > 9 and head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") < 1 << 32:
        return "a safetensors file; convert the model to GGUF"
    if len(head) > 1 and head[0] == 0x80 and head[1] in (2, 3, 4, 5):
        return "a Python pickle (an old PyTorch checkpoint); polyhead never loads pickles, convert the model to GGUF"
    if text.startswith(b"{"):
        return "JSON text, such as an error message of a server; check the address and download it again"
    return ""
