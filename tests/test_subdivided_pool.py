"""The two-level pool: nothing is lost or handed out twice, and carved pages come back whole."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from makeready.cache.capacity import PoolShape
from makeready.cache.group_pool import UnifiedPool, make_pool
from makeready.cache.specs import LayerGroup, LayerSpec, MambaSpec, StateTensor
from makeready.cache.subdivided_pool import SubdividedPool
from makeready.errors import CapacityError, ConfigError, IntegrityError

STATES, FULL, SLIDING = 0, 1, 2


def pool_of(num_blocks: int, *, blocks: int = 1, states: int = 1) -> SubdividedPool:
    shape = PoolShape(block_bytes=12, state_page_blocks=blocks, states_per_block=states)
    return SubdividedPool(shape, num_blocks, frozenset({STATES}))


def pages_of(pool: SubdividedPool, group: int, ids: list[int]) -> set[int]:
    parts = pool.shape.states_per_block if group == STATES else pool.shape.state_page_blocks
    return {block // parts for block in ids}


def bytes_of(pool: SubdividedPool, group: int, block_id: int) -> range:
    size = pool.shape.state_page_bytes if group == STATES else pool.shape.block_bytes
    return range(block_id * size, (block_id + 1) * size)


class PoolMachine(RuleBasedStateMachine):
    """Random hand-outs and returns, against a list of who holds which bytes."""

    @initialize(blocks=st.integers(1, 5), states=st.integers(1, 4), num_blocks=st.integers(10, 40))
    def make(self, blocks, states, num_blocks):
        assume(blocks == 1 or states == 1)
        self.pool = pool_of(num_blocks, blocks=blocks, states=states)
        self.held: list[tuple[str, int, list[int]]] = []
        self.keys: dict[str, tuple[int, int]] = {}
        self.number = 0

    @rule(group=st.sampled_from([STATES, FULL, SLIDING]), count=st.integers(0, 9))
    def allocate(self, group, count):
        self.number += 1
        owner, possible = f"r{self.number}", self.pool.can_allocate({group: count})
        before = self.pool.num_free
        try:
            ids = self.pool.allocate(group, count, owner)
        except CapacityError:
            assert not possible
            assert self.pool.num_free == before
            return
        assert possible
        assert len(set(ids)) == count
        self.held.append((owner, group, ids))

    @rule(states=st.integers(0, 4), full=st.integers(0, 9), sliding=st.integers(0, 9), order=st.permutations(range(3)))
    def allocate_together(self, states, full, sliding, order):
        """What can_allocate promises for several groups holds in any order."""
        need = {STATES: states, FULL: full, SLIDING: sliding}
        if not self.pool.can_allocate(need):
            return
        self.number += 1
        for group in order:
            self.held.append((f"r{self.number}", group, self.pool.allocate(group, need[group], f"r{self.number}")))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data):
        owner, group, ids = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        count = data.draw(st.integers(0, len(ids)))
        self.pool.free(group, ids[:count], owner)
        if ids[count:]:
            self.held.append((owner, group, ids[count:]))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def remember(self, data):
        """Cache a block by a key, and share it again while it can be found."""
        _, group, ids = data.draw(st.sampled_from(self.held))
        books = self.pool.states if group == STATES else self.pool.attention
        if ids:
            self.number += 1
            books.cache_block(ids[0], self.number) if books._key_of_block.get(ids[0]) is None else None

    @precondition(lambda self: self.pool.attention._block_of_key or self.pool.states._block_of_key)
    @rule(data=st.data())
    def touch(self, data):
        group = STATES if self.pool.states._block_of_key else FULL
        books = self.pool.states if group == STATES else self.pool.attention
        key = data.draw(st.sampled_from(sorted(books._block_of_key)))
        block = books.lookup(key)
        self.number += 1
        books.touch([block], f"r{self.number}")
        self.held.append((f"r{self.number}", group, [block]))

    @invariant()
    def books_balance(self):
        self.pool.check_integrity()

    @invariant()
    def nobody_shares_bytes_with_another_block(self):
        user: dict[int, tuple[bool, int]] = {}
        for _, group, ids in self.held:
            for block in ids:
                for byte in bytes_of(self.pool, group, block):
                    assert byte >= self.pool.shape.block_bytes, "the null block"
                    assert byte < self.pool.num_blocks * self.pool.shape.block_bytes
                    assert user.setdefault(byte, (group == STATES, block)) == (group == STATES, block)

    @invariant()
    def free_and_held_make_the_whole(self):
        held = {(group == STATES, block) for _, group, ids in self.held for block in ids}
        attention = sum(not state for state, _ in held)
        pages = {block // self.pool.shape.states_per_block for state, block in held if state}
        taken = attention + len(pages) * self.pool.shape.state_page_blocks
        assert self.pool.num_free == self.pool.capacity - taken

    def teardown(self):
        if not hasattr(self, "pool"):
            return
        for owner, group, ids in self.held:
            self.pool.free(group, ids, owner)
        self.pool.check_integrity()
        assert self.pool.num_free == self.pool.capacity
        assert self.pool.num_whole_pages == self.pool.shape.num_state_pages(self.pool.num_blocks) - 1


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much]
)


def test_the_rest_of_the_null_page_and_the_end_go_first():
    pool = pool_of(14, blocks=4)  # pages 0 to 2, and the blocks 12 and 13
    assert sorted(pool.allocate(FULL, 5, "a")) == [1, 2, 3, 12, 13]
    assert pool.num_whole_pages == 2
    assert pool.allocate(STATES, 2, "a") == [1, 2]
    assert pool.num_free == 0


def test_requests_and_groups_share_a_carved_page_before_another_is_carved():
    pool = pool_of(16, blocks=4)
    pool.allocate(FULL, 3, "fills the null page")
    one, two = pool.allocate(FULL, 1, "a"), pool.allocate(SLIDING, 2, "b")
    assert len(pages_of(pool, FULL, one + two)) == 1
    assert pool.num_whole_pages == 2


def test_the_fullest_carved_page_is_filled_first():
    pool = pool_of(20, blocks=4)
    pool.allocate(FULL, 3, "fills the null page")
    ids = pool.allocate(FULL, 8, "a")
    pool.free(FULL, ids[:3] + ids[4:6], "a")  # pages with one and with two blocks held
    assert pages_of(pool, FULL, pool.allocate(FULL, 2, "b")) == {ids[4] // 4}
    assert pool.num_whole_pages == 2


def test_a_carved_page_returns_with_its_last_block():
    pool = pool_of(12, blocks=4)
    pool.allocate(FULL, 3, "null page")
    ids = pool.allocate(FULL, 4, "a")
    assert not pool.can_allocate({STATES: 2})
    pool.free(FULL, ids[:3], "a")
    assert pool.num_whole_pages == 1
    pool.free(FULL, ids[3:], "a")
    assert pool.num_whole_pages == 2
    assert sorted(pool.allocate(STATES, 2, "b")) == [1, 2]


def test_small_states_share_a_block_and_give_it_back():
    pool = pool_of(4, states=3)
    first = pool.allocate(STATES, 2, "a")
    assert first == [3, 4]
    assert pool.allocate(STATES, 2, "b") == [5, 6]
    assert pool.num_free == 1
    pool.free(STATES, first, "a")
    assert pool.num_free == 1  # "b" still has a share of block 1
    pool.free(STATES, [5], "b")
    assert pool.num_free == 2
    assert sorted(pool.allocate(FULL, 2, "c")) == [1, 3]


def test_what_a_page_held_is_forgotten_when_the_other_side_takes_it():
    pool = pool_of(8, blocks=4)
    pool.allocate(FULL, 3, "null page")
    ids = pool.allocate(FULL, 4, "a")
    pool.attention.cache_block(ids[1], "prefix")
    stamp = pool.attention.stamp(ids[1])
    pool.free(FULL, ids, "a")
    assert pool.attention.lookup("prefix") == ids[1]
    pool.allocate(STATES, 1, "b")
    assert pool.attention.lookup("prefix") is None
    with pytest.raises(IntegrityError, match="handed out again"):
        pool.attention.check_stamp(ids[1], stamp)


def test_a_cached_block_of_a_whole_page_can_be_shared_again():
    pool = pool_of(8, blocks=4)
    pool.allocate(FULL, 3, "null page")
    ids = pool.allocate(FULL, 4, "a")
    pool.attention.cache_block(ids[1], "prefix")
    pool.free(FULL, ids, "a")
    pool.attention.touch([pool.attention.lookup("prefix")], "b")
    pool.check_integrity()
    assert not pool.can_allocate({STATES: 1})
    assert pool.can_allocate({FULL: 3})
    assert ids[1] not in pool.allocate(FULL, 3, "c")


def test_faults_are_named():
    pool = pool_of(8, blocks=4)
    with pytest.raises(CapacityError, match="asked for 2 blocks, and 1 of 1 are free"):
        pool.allocate(STATES, 2, "a")
    with pytest.raises(IntegrityError, match="state 1 is free already"):
        pool.free(STATES, [1], "a")
    with pytest.raises(IntegrityError, match="state 2 is unknown: the pool has states 1 to 1"):
        pool.owners(STATES, 2)
    with pytest.raises(IntegrityError, match="state 2 is the null block"):
        pool_of(4, states=3).owners(STATES, 2)
    with pytest.raises(ConfigError, match="num_blocks 7 hold no state beside the null block: a state takes 4 blocks"):
        pool_of(7, blocks=4)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda pool: pool._whole.pop(2), "page 2 is lost"),
        (lambda pool: pool._whole.update({1: None}), "page 1 is states' and free"),
        (lambda pool: pool._whole.update({0: None}), "page 0 holds the null block and was given away"),
        (lambda pool: pool._block_queue._carved.add(1), "page 1 is attention's and states'"),
        (lambda pool: pool._block_queue._open[0].pop(2), "block 2 is lost"),
    ],
)
def test_check_integrity_sees_damage(damage, words):
    pool = pool_of(16, blocks=4)
    pool.allocate(STATES, 1, "a")
    pool.check_integrity()
    damage(pool)
    with pytest.raises(IntegrityError, match=words):
        pool.check_integrity()


@pytest.mark.parametrize(("blocks", "states"), [(1, 1), (3, 1), (1, 3)])
def test_capacity_counts_what_an_empty_pool_hands_out(blocks, states):
    """PoolShape.fits and least_blocks against trying."""
    spec = MambaSpec(kind="mamba2", states=(StateTensor(name="conv", shape=(4,), dtype="float32"),))
    group = LayerGroup(index=0, kind="mamba2", layers=(LayerSpec(layer=0, spec=spec),), block_size=64)
    shape = PoolShape(block_bytes=64, state_page_blocks=blocks, states_per_block=states)
    for num_blocks in range(2 * blocks, 15):
        for need in ({0: s, 1: b} for s in range(6) for b in range(16)):
            pool = make_pool([group], shape, num_blocks)
            assert isinstance(pool, UnifiedPool) == (blocks == states == 1)
            assert pool.can_allocate(need) == pool.fits(need) == shape.fits(num_blocks, need[0], need[1])
            assert shape.fits(num_blocks, need[0], need[1]) == (shape.least_blocks(need[0], need[1]) <= num_blocks)
            if pool.fits(need):
                for index, count in need.items():
                    pool.allocate(index, count, "a")
                assert pool.capacity - pool.num_free == pool.blocks(need)
