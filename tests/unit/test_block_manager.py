"""BlockManager: every block is free or counted, whatever the order of calls, and found only under its own contents."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polyhead.engine import BlockManager
from polyhead.engine.block_keys import block_key, root_key
from polyhead.errors import ConfigError

KEYS = [bytes([i]) for i in range(8)]


@settings(max_examples=150)
@given(
    st.integers(1, 12),
    st.integers(1, 5),
    st.lists(
        st.tuples(st.sampled_from(["new", "extend", "publish", "find", "free"]), st.integers(0, 9), st.integers(0, 30)),
        max_size=60,
    ),
)
def test_no_block_is_lost_or_given_twice(num_blocks, block_size, calls):
    manager = BlockManager(num_blocks, block_size)
    tables: list[list[int]] = []
    for name, which, number in calls:
        if name == "new" or not tables:
            table: list[int] = []
            possible = manager.can_allocate(number)
            assert manager.extend(table, number) is possible
            assert len(table) == (-(-number // block_size) if possible else 0)
            tables.append(table)
        elif name == "find":
            found = manager.find(KEYS[number % 8 :])
            shared: list[int] = []
            assert len(found) == len(set(found))
            manager.reuse(shared, found)
            assert shared == found
            tables.append(shared)
        else:
            table = tables[which % len(tables)]
            if name == "free":
                manager.free(table)
                tables = [other for other in tables if other is not table]
            elif name == "publish":
                if table:
                    block = table[number % len(table)]
                    free = [key for key in KEYS if not manager.find([key])]
                    if free and all(manager.find([key]) != [block] for key in KEYS):
                        manager.publish(block, free[0])
                        assert manager.find([free[0]]) == [block]
            else:
                before, free_blocks = list(table), manager.free_blocks
                possible = manager.blocks_for(number) - len(table) <= manager.free_blocks
                assert manager.extend(table, number) is possible
                assert table[: len(before)] == before
                assert manager.free_blocks == free_blocks - (len(table) - len(before))
                assert not possible or len(table) * block_size >= number
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


def filled(manager: BlockManager, keys: list[bytes]) -> list[int]:
    """The table of a sequence with a published block for each key."""
    table: list[int] = []
    assert manager.extend(table, len(keys) * manager.block_size)
    for block, key in zip(table, keys, strict=True):
        manager.publish(block, key)
    return table


def test_a_shared_block_is_free_when_the_last_user_gives_it_up():
    manager = BlockManager(4, 2)
    first = filled(manager, KEYS[:2])
    second: list[int] = []
    manager.reuse(second, manager.find(KEYS[:3]))
    assert second == first
    manager.free(first)
    assert manager.free_blocks == 2
    manager.free(second)
    assert manager.free_blocks == 4
    assert manager.find(KEYS[:3]) == first, "its contents may still be used"


def test_what_was_given_up_longest_ago_is_forgotten_first_and_ends_before_beginnings():
    manager = BlockManager(6, 2)
    old, new = filled(manager, KEYS[:2]), filled(manager, KEYS[2:4])
    manager.free(old)
    manager.free(new)
    table: list[int] = []
    manager.extend(table, 4)
    assert manager.cached_blocks == 4, "blocks without contents go first"
    manager.extend(table, 6)
    assert (manager.find(KEYS[:2]), manager.find(KEYS[2:4])) == (old[:1], new)
    manager.reuse(kept := [], manager.find(KEYS[:1]))  # used again, so no longer the oldest
    manager.free(kept)
    manager.extend(table, 10)
    assert (manager.find(KEYS[:1]), manager.find(KEYS[2:4])) == (old[:1], [])
    manager.check_integrity([table])


def test_room_counts_what_would_be_reused_and_given_up():
    manager = BlockManager(5, 2)
    first = filled(manager, KEYS[:3])
    manager.reuse(second := [], manager.find(KEYS[:2]))
    assert not manager.can_allocate(8)
    assert manager.can_allocate(8, reuse=first[:2])
    assert not manager.can_allocate(8, spare=1, reuse=first[:2])
    assert manager.can_allocate(8, spare=1, reuse=first[:2], given_up=[first])
    assert not manager.can_allocate(8, given_up=[first]), "second still holds two of its blocks"
    assert manager.can_allocate(10, given_up=[first, second])
    assert not manager.can_allocate(12, given_up=[first, second])
    manager.free(first)
    manager.free(second)
    assert manager.can_allocate(10, reuse=first)
    assert not manager.can_allocate(12, reuse=first), "blocks to be reused are not free for anything else"


def test_the_first_block_published_under_a_key_stays():
    manager = BlockManager(4, 2)
    first, second = filled(manager, KEYS[:1]), filled(manager, KEYS[:1])
    assert manager.find(KEYS[:1]) == first
    manager.free(second)
    manager.check_integrity([first])
    manager.free(first)
    manager.check_integrity([])
    assert manager.cached_blocks == 1


def test_misuse_is_found():
    manager = BlockManager(2, 2)
    table: list[int] = []
    manager.extend(table, 4)
    with pytest.raises(RuntimeError, match="0 tables name it"):
        manager.check_integrity([])
    with pytest.raises(RuntimeError, match="twice"):
        manager.check_integrity([[0, 0]])
    with pytest.raises(RuntimeError, match="cannot be shared"):
        manager.reuse([], table)
    manager.free(table)
    with pytest.raises(RuntimeError, match="no sequence uses it"):
        manager.free(table)
    with pytest.raises(RuntimeError, match="cannot be published"):
        manager.publish(0, b"key")


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (4, 0), (-1, 16)])
def test_sizes_are_at_least_one(num_blocks, block_size):
    with pytest.raises(ConfigError, match="at least 1"):
        BlockManager(num_blocks, block_size)


def test_a_key_depends_on_its_tokens_on_all_before_and_on_the_salt():
    roots = [root_key(b""), root_key(b"a")]
    first = [block_key(root, tokens) for root in roots for tokens in ([1, 2], [2, 1], [1, 3], [1, 2 + 2**32])]
    second = [block_key(parent, [1, 2]) for parent in first]
    assert len({*roots, *first, *second}) == 18
    assert block_key(root_key(b""), [1, 2]) == first[0]
