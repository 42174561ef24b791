"""Block keys: a name for the contents of a full KV block, made of its tokens and all before them.

The keys and values of a token depend on every token before it, so a block's key is the hash of the key of the block
before and of its own tokens. Equal keys are taken for equal contents without a second look: the hash is BLAKE2b with
128 bits, keyed with bytes drawn when the process starts, so nobody can prepare two beginnings with one key.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from struct import Struct

_PROCESS = secrets.token_bytes(16)
_SIZE = 16


def root_key(salt: bytes) -> bytes:
    """What the first block's key is made from. Sequences with different salts never share a block."""
    return blake2b(salt, digest_size=_SIZE, key=_PROCESS).digest()


def block_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full block of ``tokens`` (64-bit integers) that follows the block ``parent``, or a root key."""
    return blake2b(parent + _packing(len(tokens)).pack(*tokens), digest_size=_SIZE).digest()


@lru_cache(maxsize=64)
def _packing(count: int) -> Struct:
    """So many 64-bit integers, little end first."""
    return Struct(f"<{count}q")
