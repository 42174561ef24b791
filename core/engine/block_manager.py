"""BlockManager: which blocks of the KV cache are free, how many sequences use each, and which hold known tokens.

Knows nothing of requests or of how a key is made; a sequence is its block table, a list of block numbers.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from ..errors import ConfigError


class BlockManager:
    """Hands out ``num_blocks`` blocks of ``block_size`` tokens each. Blocks are counted by reference.

    A full block whose contents are known may be published under a key that stands for these contents and all before
    them. It can then be found and used by other sequences, and keeps its contents after the last one has given it up,
    until it is needed: of the published blocks that nobody uses, the one given up longest ago is taken first.
    Misuse (a block freed twice) is a fault of the program and raises ``RuntimeError``.
    """

    __slots__ = ("_block_of", "_free", "_idle", "_key_of", "_references", "block_size", "num_blocks")

    def __init__(self, num_blocks: int, block_size: int) -> None:
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: block 0 goes first, the last freed is reused first
        self._idle: OrderedDict[int, None] = OrderedDict()  # published and unused, the longest unused first
        self._key_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}

    @property
    def free_blocks(self) -> int:
        """Blocks that no sequence uses, with or without contents that may be found again."""
        return len(self._free) + len(self._idle)

    @property
    def cached_blocks(self) -> int:
        """Blocks whose contents may be found, used or not."""
        return len(self._block_of)

    @property
    def capacity(self) -> int:
        """Tokens that all blocks hold together."""
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks so many tokens take."""
        return -(-num_tokens // self.block_size)

    def can_allocate(
        self, num_tokens: int, spare: int = 0, reuse: Sequence[int] = (), given_up: Iterable[Sequence[int]] = ()
    ) -> bool:
        """Whether a new sequence of so many tokens fits and leaves ``spare`` blocks free.

        ``reuse`` are published blocks it would begin with, ``given_up`` tables of sequences that would end before.
        """
        counts = Counter(block for table in given_up for block in table)
        references = self._references
        free = self.free_blocks + sum(references[block] == count for block, count in counts.items())
        free -= sum(references[block] == counts[block] for block in reuse)
        return self.blocks_for(num_tokens) - len(reuse) + spare <= free

    def extend(self, table: list[int], num_tokens: int) -> bool:
        """Appends free blocks until ``table`` holds ``num_tokens``; if they do not suffice, changes nothing: False."""
        missing = -(-num_tokens // self.block_size) - len(table)
        if missing > len(self._free) and missing > self.free_blocks:
            return False
        for _ in range(missing):
            block = self._free.pop() if self._free else self._evict()
            self._references[block] = 1
            table.append(block)
        return True

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks published under the first of these keys, as far as there is one for each."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def reuse(self, table: list[int], blocks: Sequence[int]) -> None:
        """Appends published blocks, as ``find`` returned them, to a sequence's table."""
        for block in blocks:
            if self._key_of[block] is None:
                raise RuntimeError(f"block {block} is not published and cannot be shared")
            self._references[block] += 1
            self._idle.pop(block, None)
            table.append(block)

    def publish(self, block: int, key: bytes) -> None:
        """Lets a used, full block be found under ``key``. Where the key has a block already, that one stays."""
        if self._references[block] < 1:
            raise RuntimeError(f"block {block} is free and cannot be published")
        if self._block_of.setdefault(key, block) == block:
            self._key_of[block] = key

    def free(self, table: Sequence[int]) -> None:
        """Gives up a sequence's blocks; those that no other sequence uses become free. The list itself is left alone.

        The last block goes first, so that of a published sequence the end is forgotten before its beginning.
        """
        for block in reversed(table):
            if self._references[block] < 1:
                raise RuntimeError(f"block {block} is freed but no sequence uses it")
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._key_of[block] is None:
                    self._free.append(block)
                else:
                    self._idle[block] = None

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Recounts. Raises ``RuntimeError`` unless ``tables`` and the free list account for every block exactly, and
        every published block is known under its key, and only under that.
        """
        counts = [0] * self.num_blocks
        for table in tables:
            if len(set(table)) != len(table):
                raise RuntimeError(f"a block table names a block twice: {list(table)}")
            for block in table:
                counts[block] += 1
        free = set(self._free)
        if len(free) != len(self._free):
            raise RuntimeError("the free list names a block twice")
        for block, count in enumerate(counts):
            if count != self._references[block]:
                raise RuntimeError(f"block {block} counts {self._references[block]} references, {count} tables name it")
            published = self._key_of[block] is not None
            if (block in free) != (count == 0 and not published):
                raise RuntimeError(f"block {block} has {count} references and is {'' if block in free else 'not '}free")
            if (block in self._idle) != (count == 0 and published):
                raise RuntimeError(f"block {block} has {count} references and is wrongly kept or not kept for later")
        known = {key: block for block, key in enumerate(self._key_of) if key is not None}
        if known != self._block_of:
            raise RuntimeError("published blocks and their keys do not agree")

    def _evict(self) -> int:
        """Takes the block that has been published and unused for the longest time, and forgets its contents."""
        block, _ = self._idle.popitem(last=False)
        key = self._key_of[block]
        self._key_of[block] = None
        if key is not None:
            del self._block_of[key]
        return block
