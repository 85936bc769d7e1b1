"""Persistent step buffers: the same values as a step made anew, at the same addresses, copying only what changed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from makeready.attention_backends.persistent import StepBuffers, copy_to_persistent
from makeready.cache.block_table import BlockTable, slot_mapping
from makeready.errors import ConfigError, IntegrityError

CPU = torch.device("cpu")
BLOCK = 4


def buffers(seqs=4, tokens=16, blocks=6):
    return StepBuffers(
        max_num_seqs=seqs, max_num_batched_tokens=tokens, max_blocks=blocks, block_size=BLOCK, device=CPU
    )


def table_of(*ids):
    table = BlockTable(BLOCK)
    table.append(ids)
    return table


def test_copy_to_persistent_keeps_address_and_strides():
    persistent = torch.zeros(4, 8, dtype=torch.int32)
    corner = copy_to_persistent(persistent, torch.arange(6, dtype=torch.int32).view(2, 3))
    assert corner.data_ptr() == persistent.data_ptr()
    assert corner.stride() == (8, 1)
    assert persistent[:2, :3].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert persistent.sum() == 15


@pytest.mark.parametrize("shape", [(5, 2), (2, 9), (8,)])
def test_copy_to_persistent_refuses_what_does_not_fit(shape):
    with pytest.raises(IntegrityError, match="does not fit"):
        copy_to_persistent(torch.zeros(4, 8), torch.zeros(*shape))


def test_copy_to_persistent_refuses_another_dtype():
    with pytest.raises(IntegrityError, match="torch.int64"):
        copy_to_persistent(torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int64))


def test_padding_rows_are_empty_and_write_nowhere():
    step = buffers().fill([table_of(3)], [2], [1], rows=4)
    assert step.seq_lens.tolist() == [3, 0, 0, 0]
    assert step.slot_mapping.tolist() == [14, -1, -1, -1]
    assert step.query_start.tolist() == [0, 1, 2, 3, 4]
    assert step.num_tokens == 4


def test_a_captured_step_has_the_addresses_of_every_later_step_of_its_bucket():
    made = buffers()
    captured = made.captured(4, max_seq_len=24)
    later = made.fill([table_of(1, 2)], [6], [1], rows=4)
    for name in ("query_start", "seq_lens", "block_table", "slot_mapping"):
        first, second = getattr(captured, name), getattr(later, name)
        assert first.data_ptr() == second.data_ptr()
        assert first.shape == second.shape
        assert first.stride() == second.stride()
    assert captured.captured
    assert captured.seq_lens_host == (24,) * 4
    assert not later.captured


def test_only_new_blocks_are_copied():
    made = buffers()
    table = table_of(5)
    step = made.fill([table], [0], [4])
    step.block_table[0, 0] = 99  # what is not copied again stays
    table.append([6])
    assert made.fill([table], [4], [1]).block_table[0, :2].tolist() == [99, 6]


@pytest.mark.parametrize(
    ("tables", "lens", "rows", "error", "words"),
    [
        (5, 1, None, IntegrityError, "5 requests"),
        (4, 5, None, IntegrityError, "20 tokens"),
        (3, 1, 2, ConfigError, "bucket of 2 rows"),
    ],
)
def test_steps_that_do_not_fit_are_refused(tables, lens, rows, error, words):
    made = buffers()
    filled = [table_of(2 * row + 1, 2 * row + 2) for row in range(tables)]
    with pytest.raises(error, match=words):
        made.fill(filled, [0] * tables, [lens] * tables, rows=rows)


def test_a_table_longer_than_its_row_is_refused():
    with pytest.raises(IntegrityError, match="7 blocks of one request"):
        buffers().fill([table_of(*range(1, 8))], [0], [1])


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_random_histories_equal_steps_made_anew(data):
    """Requests join, grow, leave and change rows; the tensors always hold every live block and slot."""
    made, free = buffers(seqs=4, tokens=16, blocks=6), list(range(1, 200))
    live: list[BlockTable] = []
    for _ in range(data.draw(st.integers(1, 8))):
        live = [table for table in live if data.draw(st.integers(0, 3))]
        while len(live) < 4 and data.draw(st.booleans()):
            live.insert(data.draw(st.integers(0, len(live))), table_of(free.pop()))
        for table in live:
            if len(table.blocks) < 6 and data.draw(st.booleans()):
                table.append([free.pop()])
        lens = [data.draw(st.integers(1, 3)) for _ in live]
        starts = [table.num_tokens - count for table, count in zip(live, lens, strict=True)]
        step = made.fill(live, starts, lens)
        assert _live_equal(step, live)
        assert torch.equal(step.slot_mapping, slot_mapping(live, starts, lens, CPU))
        assert step.seq_lens.tolist() == [table.num_tokens for table in live]


def _live_equal(step, live):
    """Entries past a request's last block mean nothing."""
    rows = zip(step.block_table.tolist(), live, strict=True)
    return all(row[: len(table.blocks)] == table.blocks for row, table in rows)
