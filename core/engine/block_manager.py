"""BlockManager: which physical blocks of the KV cache are free, and how many sequences use each.

Knows nothing of requests or of what a block holds; a sequence is its block table, a list of block numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..errors import ConfigError


class BlockManager:
    """Hands out ``num_blocks`` blocks of ``block_size`` tokens each. Blocks are counted by reference.

    The methods change the block tables that are passed to them. Misuse (a block freed twice) is a fault of the program
    and raises ``RuntimeError``.
    """

    __slots__ = ("_free", "_references", "block_size", "num_blocks")

    def __init__(self, num_blocks: int, block_size: int) -> None:
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: block 0 goes first, the last freed is reused first

    @property
    def free_blocks(self) -> int:
        """Blocks that no sequence uses."""
        return len(self._free)

    @property
    def capacity(self) -> int:
        """Tokens that all blocks hold together."""
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks so many tokens take."""
        return -(-num_tokens // self.block_size)

    def can_allocate(self, num_tokens: int, spare: int = 0) -> bool:
        """Whether a new sequence of so many tokens fits and leaves ``spare`` blocks free."""
        return self.blocks_for(num_tokens) + spare <= len(self._free)

    def extend(self, table: list[int], num_tokens: int) -> bool:
        """Appends free blocks until ``table`` holds ``num_tokens``; if they do not suffice, changes nothing: False."""
        missing = self.blocks_for(num_tokens) - len(table)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block = self._free.pop()
            self._references[block] = 1
            table.append(block)
        return True

    def share(self, table: Sequence[int], num_tokens: int) -> list[int]:
        """A second sequence's table that begins with the blocks of the first ``num_tokens`` of ``table``.

        Only full blocks are shared, because both sequences would write to a part-filled one: the new table holds
        ``num_tokens // block_size`` blocks.
        """
        shared = list(table[: num_tokens // self.block_size])
        for block in shared:
            if self._references[block] < 1:
                raise RuntimeError(f"block {block} is free and cannot be shared")
            self._references[block] += 1
        return shared

    def free(self, table: list[int]) -> None:
        """Gives up a sequence's blocks and empties its table; those that no other sequence uses become free."""
        for block in reversed(table):
            if self._references[block] < 1:
                raise RuntimeError(f"block {block} is freed but no sequence uses it")
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.append(block)
        table.clear()

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Recounts. Raises ``RuntimeError`` unless ``tables`` and the free list account for every block exactly."""
        counts = [0] * self.num_blocks
        for table in tables:
            if len(set(table)) != len(table):
                raise RuntimeError(f"a block table names a block twice: {list(table)}")
            for block in table:
                counts[block] += 1
        if len(set(self._free)) != len(self._free):
            raise RuntimeError("the free list names a block twice")
        free = set(self._free)
        for block, count in enumerate(counts):
            if count != self._references[block]:
                raise RuntimeError(f"block {block} counts {self._references[block]} references, {count} tables name it")
            if (count == 0) != (block in free):
                raise RuntimeError(f"block {block} has {count} references and is {'' if block in free else 'not '}free")
