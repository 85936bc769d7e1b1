"""The pool against a simple model of it, with its books recounted after every step."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from makeready.cache.pool import BlockPool
from makeready.errors import CapacityError, ConfigError, IntegrityError

NUM_BLOCKS = 7
OWNERS = st.sampled_from(["ann", "bob", "cy"])
KEYS = st.integers(0, 4)
PICKS = st.lists(st.integers(0, 50), max_size=3)


class PoolMachine(RuleBasedStateMachine):
    """The model: a list as the free queue, a list of owners per block, a key per block."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.queue = list(range(1, NUM_BLOCKS))
        self.held = {block: [] for block in self.queue}
        self.keys = {}
        self.stamps = dict.fromkeys(self.queue, 0)

    def pick(self, blocks, picks):
        return list(dict.fromkeys(blocks[i % len(blocks)] for i in picks)) if blocks else []

    @rule(count=st.integers(0, NUM_BLOCKS), owner=OWNERS)
    def allocate(self, count, owner):
        assert self.pool.can_allocate(count) == (count <= len(self.queue))
        if count > len(self.queue):
            with pytest.raises(CapacityError, match=f"{len(self.queue)} of {NUM_BLOCKS - 1} are free"):
                self.pool.allocate(count, owner)
            return
        expected, self.queue = self.queue[:count], self.queue[count:]
        assert self.pool.allocate(count, owner) == expected, "least recently used first"
        for block in expected:
            self.held[block] = [owner]
            self.keys.pop(block, None)
            self.stamps[block] += 1

    @rule(owner=OWNERS, picks=PICKS)
    def free(self, owner, picks):
        blocks = self.pick([b for b, owners in self.held.items() if owner in owners], picks)
        self.pool.free(blocks, owner)
        for block in blocks:
            self.held[block].remove(owner)
            if not self.held[block]:
                self.queue.append(block)

    @rule(owner=OWNERS, picks=PICKS)
    def share(self, owner, picks):
        can = [b for b, owners in self.held.items() if owner not in owners and (owners or b in self.keys)]
        blocks = self.pick(can, picks)
        self.pool.touch(blocks, owner)
        for block in blocks:
            self.held[block].append(owner)
            if block in self.queue:
                self.queue.remove(block)

    @rule(key=KEYS, pick=st.integers(0, 50))
    def cache(self, key, pick):
        blocks = self.pick([b for b, owners in self.held.items() if owners and self.keys.get(b, key) == key], [pick])
        for block in blocks:
            first = next((b for b, k in self.keys.items() if k == key), block)
            assert self.pool.cache_block(block, key) == first
            self.keys.setdefault(first, key)

    @precondition(lambda self: self.queue)
    @rule(owner=OWNERS, pick=st.integers(0, 50))
    def double_free(self, owner, pick):
        block = self.queue[pick % len(self.queue)]
        mine = [b for b, owners in self.held.items() if owner in owners]
        with pytest.raises(IntegrityError, match=f"block {block} is free already.*'{owner}'"):
            self.pool.free([*mine, block], owner)

    @rule(owner=OWNERS, pick=st.integers(0, 50))
    def foreign_free(self, owner, pick):
        mine = [b for b, owners in self.held.items() if owner in owners]
        others = self.pick([b for b, owners in self.held.items() if owners and owner not in owners], [pick])
        for block in others:
            with pytest.raises(IntegrityError, match=f"block {block} belongs to '{self.held[block][0]}'.*'{owner}'"):
                self.pool.free([*mine, block], owner)

    @rule(block=st.sampled_from([-1, 0, NUM_BLOCKS, NUM_BLOCKS + 9]), owner=OWNERS)
    def unknown_block(self, block, owner):
        for call in (self.pool.free, self.pool.touch):
            with pytest.raises(IntegrityError, match=f"block {block} is (unknown|the null block).*'{owner}'"):
                call([block], owner)

    @invariant()
    def books_balance(self):
        self.pool.check_integrity()
        assert self.pool.num_free == len(self.queue)
        for block, owners in self.held.items():
            assert self.pool.owners(block) == tuple(owners)
            assert self.pool.stamp(block) == self.stamps[block]
        for key in range(5):
            assert self.pool.lookup(key) == next((b for b, k in self.keys.items() if k == key), None)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_capacity_leaves_the_null_block_out():
    pool = BlockPool(4)
    assert (pool.num_blocks, pool.capacity, pool.num_free) == (4, 3, 3)
    assert pool.allocate(3, "a") == [1, 2, 3]
    assert not pool.can_allocate(1)
    assert pool.can_allocate(0)
    assert pool.allocate(0, "b") == []


@pytest.mark.parametrize("num_blocks", [1, 0, -3])
def test_a_pool_without_blocks_is_refused(num_blocks):
    with pytest.raises(ConfigError, match=f"num_blocks {num_blocks} leaves nothing"):
        BlockPool(num_blocks)


def test_exhaustion_changes_nothing():
    pool = BlockPool(5)
    kept = pool.allocate(2, "a")
    pool.cache_block(kept[0], "key")
    pool.free(kept, "a")
    with pytest.raises(CapacityError, match="'b' asked for 5 blocks, and 4 of 4 are free"):
        pool.allocate(5, "b")
    assert pool.lookup("key") == kept[0]
    assert [pool.stamp(b) for b in range(1, 5)] == [1, 1, 0, 0]
    assert pool.allocate(4, "b") == [3, 4, *kept]
    assert not pool.can_allocate(-1)
    with pytest.raises(ConfigError, match="'b' asked for -1 blocks"):
        pool.allocate(-1, "b")


def test_a_cached_block_is_found_until_it_is_handed_out_again():
    pool = BlockPool(4)
    one, two = pool.allocate(2, "a")
    pool.cache_block(one, "first")
    pool.cache_block(two, "second")
    seen = pool.stamp(one)
    pool.free([two, one], "a")
    pool.touch([pool.lookup("first")], "b")
    pool.check_stamp(one, seen)
    assert pool.allocate(2, "c") == [3, two]
    assert pool.lookup("second") is None
    assert pool.lookup("first") == one
    pool.free([one], "b")
    pool.allocate(1, "c")
    with pytest.raises(IntegrityError, match=f"block {one} has stamp 2, not 1"):
        pool.check_stamp(one, seen)


def test_the_first_block_under_a_key_stays_the_one():
    pool = BlockPool(4)
    one, two = pool.allocate(2, "a")
    assert pool.cache_block(one, "key") == one
    assert pool.cache_block(two, "key") == one
    pool.free([one], "a")
    pool.allocate(2, "b")
    assert pool.lookup("key") is None
    pool.check_integrity()


def test_faults_name_block_and_owner_and_change_nothing():
    pool = BlockPool(5)
    mine = pool.allocate(2, "mine")
    pool.cache_block(mine[0], "key")
    for call, words in (
        (lambda: pool.free([mine[0], mine[0]], "mine"), "block 1 is named twice in one call.*'mine'"),
        (
            lambda: pool.touch([mine[0]], "mine"),
            "block 1 is touched by an owner that holds it already.*'mine'",
        ),
        (lambda: pool.touch([mine[0], 3], "other"), "block 3 is touched while it is free.*'other'"),
        (lambda: pool.cache_block(3, "x"), "block 3 is free, so 'x' cannot"),
        (lambda: pool.cache_block(1, "x"), "block 1 holds 'key' and cannot hold 'x'"),
        (lambda: pool.check_owner(1, "other"), "block 1 belongs to 'mine'.*'other'"),
        (lambda: pool.check_owner(4, "other"), "block 4 is free already"),
        (lambda: pool.stamp(99), "block 99 is unknown: the pool has blocks 1 to 4"),
        (lambda: pool.owners(0), "block 0 is the null block"),
    ):
        with pytest.raises(IntegrityError, match=words):
            call()
        pool.check_integrity()
        assert pool.num_free == 2
        assert pool.owners(1) == pool.owners(2) == ("mine",)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda pool: pool._free.pop(3), "block 3 is lost"),
        (lambda pool: pool._free.update({1: None}), "block 1 is in the free queue"),
        (lambda pool: pool._owners.__setitem__(1, ("a", "a")), "held twice by one owner"),
        (lambda pool: pool._owners.__setitem__(0, ("a",)), "block 0 is the null block"),
        (lambda pool: pool._free.update({9: None}), "ids that are no blocks"),
        (lambda pool: pool._block_of_key.update({"k": 2}), "do not lead to each other"),
    ],
)
def test_check_integrity_sees_damage(damage, words):
    pool = BlockPool(5)
    pool.allocate(2, "a")
    pool.check_integrity()
    damage(pool)
    with pytest.raises(IntegrityError, match=words):
        pool.check_integrity()
