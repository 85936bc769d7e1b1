"""Block tables against the definition of a slot."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from makeready.cache.block_table import BlockTable, pad_tables, slot_mapping
from makeready.errors import ConfigError, IntegrityError

CPU = torch.device("cpu")


def table(block_size, *blocks):
    made = BlockTable(block_size)
    made.append(blocks)
    return made


@given(st.integers(1, 9), st.lists(st.integers(1, 99), unique=True, max_size=6), st.data())
def test_slots_are_block_times_size_plus_offset(block_size, blocks, data):
    made = table(block_size, *blocks)
    start = data.draw(st.integers(0, made.num_tokens))
    end = data.draw(st.integers(start, made.num_tokens))
    expected = [blocks[t // block_size] * block_size + t % block_size for t in range(start, end)]
    assert made.slots(start, end) == expected


@pytest.mark.parametrize(("tokens", "missing"), [(0, 0), (1, 0), (8, 0), (9, 1), (12, 1), (13, 2)])
def test_num_blocks_for_counts_what_is_missing(tokens, missing):
    assert table(4, 7, 3).num_blocks_for(tokens) == missing


def test_tokens_without_a_block_are_refused():
    made = table(4, 7, 3)
    with pytest.raises(IntegrityError, match="tokens 6 to 9 are asked of a table with room for 8"):
        made.slots(6, 9)
    for start, end in ((-1, 2), (3, 2)):
        with pytest.raises(IntegrityError, match=f"tokens {start} to {end}"):
            made.slots(start, end)


def test_blocks_that_cannot_be_appended_are_refused_and_nothing_is_added():
    made = table(4, 7)
    for blocks, words in (
        ([3, 0], "null block"),
        ([3, 7], "block 7 is in this"),
        ([3, 3], "block 3 is in this"),
    ):
        with pytest.raises(IntegrityError, match=words):
            made.append(blocks)
        assert made.blocks == [7]
    with pytest.raises(ConfigError, match="block_size 0 holds no token"):
        BlockTable(0)


def test_released_blocks_leave_later_tokens_where_they_are():
    made = table(4, 7, 3, 9)
    assert made.release_before(3) == []
    assert made.release_before(11) == [7, 3]
    assert made.release_before(11) == []
    assert made.blocks == [0, 0, 9]
    assert made.slots(8, 10) == [36, 37]
    assert made.num_blocks_for(13) == 1
    with pytest.raises(IntegrityError, match="the block of token 7 was given back"):
        made.slots(7, 9)
    made.append([7])
    assert made.release_before(99) == [9, 7]


def test_pad_tables():
    padded = pad_tables([[5, 2, 8], [], [4]], CPU)
    assert padded.dtype == torch.int32
    assert padded.tolist() == [[5, 2, 8], [0, 0, 0], [4, 0, 0]]
    assert pad_tables([], CPU).shape == (0, 0)
    assert pad_tables([[], []], CPU).shape == (2, 0)


def test_slot_mapping_packs_requests_in_order():
    mapping = slot_mapping([table(4, 5, 2), table(4), table(2, 9)], [3, 0, 0], [3, 0, 2], CPU)
    assert mapping.dtype == torch.int64
    assert mapping.tolist() == [23, 8, 9, 18, 19]
    assert slot_mapping([], [], [], CPU).shape == (0,)
    huge = slot_mapping([table(1 << 10, 1 << 30)], [5], [1], CPU)
    assert huge.tolist() == [(1 << 40) + 5]
