"""BlockManager: every block is free or counted, whatever the order of calls."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polyhead.engine import BlockManager
from polyhead.errors import ConfigError


@settings(max_examples=150)
@given(
    st.integers(1, 12),
    st.integers(1, 5),
    st.lists(st.tuples(st.sampled_from(["new", "extend", "share", "free"]), st.integers(0, 9), st.integers(0, 30))),
)
def test_no_block_is_lost_or_given_twice(num_blocks, block_size, calls):
    manager = BlockManager(num_blocks, block_size)
    tables: list[list[int]] = []
    for name, which, num_tokens in calls:
        if name == "new" or not tables:
            table: list[int] = []
            possible = manager.can_allocate(num_tokens)
            assert manager.extend(table, num_tokens) is possible
            assert len(table) == (-(-num_tokens // block_size) if possible else 0)
            tables.append(table)
        else:
            table = tables[which % len(tables)]
            if name == "free":
                manager.free(table)
                assert table == []
                tables.remove(table)
            elif name == "share":
                shared = manager.share(table, num_tokens)
                assert shared == table[: num_tokens // block_size]
                tables.append(shared)
            else:
                before, free = list(table), manager.free_blocks
                possible = manager.blocks_for(num_tokens) - len(table) <= manager.free_blocks
                assert manager.extend(table, num_tokens) is possible
                assert table[: len(before)] == before
                assert manager.free_blocks == free - (len(table) - len(before))
                assert not possible or len(table) * block_size >= num_tokens
        manager.check_integrity(tables)
        assert manager.free_blocks == num_blocks - len({block for table in tables for block in table})
    for table in tables:
        manager.free(table)
    manager.check_integrity([])
    assert manager.free_blocks == num_blocks


def test_spare_blocks_are_left():
    manager = BlockManager(4, 8)
    assert manager.can_allocate(24, spare=1)
    assert not manager.can_allocate(25, spare=1)
    assert manager.can_allocate(32)
    assert manager.capacity == 32


def test_a_shared_block_is_free_when_the_last_user_gives_it_up():
    manager = BlockManager(4, 2)
    first: list[int] = []
    manager.extend(first, 5)
    second = manager.share(first, 5)
    assert second == first[:2]
    manager.free(first)
    assert manager.free_blocks == 2
    manager.free(second)
    assert manager.free_blocks == 4


def test_misuse_is_found():
    manager = BlockManager(2, 2)
    table: list[int] = []
    manager.extend(table, 4)
    copy = list(table)
    with pytest.raises(RuntimeError, match="0 tables name it"):
        manager.check_integrity([])
    with pytest.raises(RuntimeError, match="twice"):
        manager.check_integrity([[0, 0]])
    manager.free(table)
    with pytest.raises(RuntimeError, match="no sequence uses it"):
        manager.free(copy)
    with pytest.raises(RuntimeError, match="cannot be shared"):
        manager.share(copy, 4)


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (4, 0), (-1, 16)])
def test_sizes_are_at_least_one(num_blocks, block_size):
    with pytest.raises(ConfigError, match="at least 1"):
        BlockManager(num_blocks, block_size)
