"""Subdivided pages in memory: views that never overlap, whatever lies in the pool, and refusals by name."""

from __future__ import annotations

import pytest
import torch

from makeready.cache.allocation import allocate
from makeready.cache.capacity import PoolShape
from makeready.cache.group_pool import pool_for
from makeready.cache.specs import AttentionSpec, LayerGroup, LayerSpec, MambaSpec, StateTensor
from makeready.cache.subdivided_layout import SubdividedLayout
from makeready.cache.subdivision import state_offsets, subdivide, subdivided_groups
from makeready.cache.write import gather_kv, write_kv
from makeready.errors import ConfigError, IntegrityError

CPU = torch.device("cpu")
BLOCK = 4


def attention(layer, heads=2):
    spec = AttentionSpec(num_query_heads=4, num_kv_heads=heads, head_size=8, head_size_v=8, dtype="float32")
    return LayerSpec(layer=layer, spec=spec)


def state(layer, conv, recurrent=(4, 4)):
    states = (
        StateTensor(name="conv", shape=conv, dtype="bfloat16"),
        StateTensor(name="recurrent", shape=recurrent, dtype="float32"),
    )
    return LayerSpec(layer=layer, spec=MambaSpec(kind="mamba2", states=states))


LARGE = (state(0, (33, 4), (64, 4)), state(1, (7, 3)), *(attention(n) for n in range(2, 6)))
SMALL = (state(0, (3, 4)), *(attention(n) for n in range(2, 6)))


def make(layers, order="cross_layer_NHD", num_blocks=23, widest=None):
    found = subdivide(layers, BLOCK, widest=widest)
    groups = subdivided_groups(layers, found, BLOCK, 64)
    return SubdividedLayout(order=order, num_blocks=num_blocks, block_size=BLOCK, shape=found.shape, groups=groups)


def test_shapes_of_these_models():
    assert make(LARGE, widest=1).shape == PoolShape(block_bytes=512, state_page_blocks=3)
    assert make(SMALL, widest=2).shape == PoolShape(block_bytes=1024, states_per_block=8)


@pytest.mark.parametrize("order", ["NHD", "HND", "cross_layer_NHD", "cross_layer_HND"])
@pytest.mark.parametrize("layers", [LARGE, SMALL])
def test_every_request_reads_what_it_wrote(layers, order):
    """A full pool of poisoned memory: each id of each view gets a number of its own, then everything is read back."""
    layout = make(layers, order, widest=2 if order.startswith("cross") else 1)
    cache, pool = allocate(layout, CPU), pool_for(layout)
    cache.poison()
    groups = {group.index: group for group in layout.groups}
    ids: dict[int, list[int]] = {index: [] for index in groups}
    number = 0
    need = dict.fromkeys(groups, 1)
    while pool.can_allocate(need):
        for index in groups:
            ids[index] += pool.allocate(index, 1, f"r{number}")
        number += 1
    assert number > 1
    expected = []
    for index, group in groups.items():
        for layer in group.layers:
            views = cache.states(layer.layer) if group.is_state else cache.key_value(layer.layer)
            for view in views:
                for block in ids[index]:
                    expected.append((view, block, len(expected) % 251))
                    view[block] = expected[-1][2]
    for view, block, value in expected:
        assert (view[block] == value).all()
    assert (cache.pages()[0] == 0xFF).all()


@pytest.mark.parametrize("order", ["NHD", "cross_layer_NHD", "cross_layer_HND"])
def test_slots_and_block_tables_are_ordinary(order):
    layout = make(LARGE, order, widest=2 if order.startswith("cross") else 1)
    cache = allocate(layout, CPU)
    cache.poison()
    key, value = cache.key_value(3)
    assert key.shape == (23, BLOCK, 2, 8)
    rows = torch.randn(6, 2, 8)
    blocks = [7, 2]
    slots = torch.tensor([blocks[t // BLOCK] * BLOCK + t % BLOCK for t in range(6)])
    write_kv(rows, rows + 1, key, value, slots)
    assert torch.equal(gather_kv(key, blocks, 6), rows)
    assert torch.equal(gather_kv(value, blocks, 6), rows + 1)


def test_states_start_at_aligned_bytes():
    layout = make(LARGE)
    starts = state_offsets(layout.groups[0].layers)
    assert starts == ((0, 272), (1296, 1344), (1408,))  # 33 x 4 x 2 = 264 bytes, up to the next 16
    for layer in layout.groups[0].layers:
        assert all(view.offset_bytes % 16 == 0 for view in layout.state_views(layer))
    first, second = layout.state_views(layout.groups[0].layers[1])
    assert (first.offset_bytes, second.offset_bytes) == starts[1]
    assert first.strides[0] * 2 == second.strides[0] * 4 == layout.shape.state_page_bytes


def test_clearing_and_poisoning_reach_exactly_what_an_id_stands_for():
    layout = make(LARGE, widest=2)
    cache = allocate(layout, CPU)
    page = layout.shape.state_page_bytes
    for fill, clear in ((0xFF, cache.clear_blocks), (0, cache.poison_blocks)):
        cache.buffer.fill_(fill)
        clear(0, [2])
        changed = (cache.buffer != fill).nonzero().flatten()
        assert (changed[0], changed[-1], len(changed)) == (2 * page, 3 * page - 1, page)
        cache.buffer.fill_(fill)
        clear(1, [5])
        changed = (cache.buffer != fill).nonzero().flatten()
        block = layout.shape.block_bytes
        assert (changed[0], changed[-1], len(changed)) == (5 * block, 6 * block - 1, block)
    with pytest.raises(IntegrityError, match=f"block {layout.num_states} cannot be cleared"):
        cache.clear_blocks(0, [layout.num_states])


def test_the_last_incomplete_state_page_is_no_state():
    layout = make(LARGE, widest=1, num_blocks=23)
    assert layout.num_states == 7  # of 3 blocks each; 2 blocks are left for attention
    for layer in layout.groups[0].layers:
        assert all(view.end_bytes <= layout.total_bytes for view in layout.state_views(layer))
    assert layout.attention_view(layout.groups[1].layers[0])[0].shape[0] == 23


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"order": "NDH"}, "layout 'NDH' is not known"),
        ({"num_blocks": 1}, "num_blocks 1 leaves nothing"),
        ({"groups": ()}, "keep all states in one group; here are 0 groups"),
        ({"order": "NHD"}, "layout NHD keeps a layer's pages together, and group 1 has 2 layers in a block"),
        ({"shape": PoolShape(block_bytes=1024)}, "group 0 needs 1408 bytes of each state page, which has 1024"),
        ({"block_size": 8}, "group 1 needs 2048 bytes of each block, which has 1024"),
    ],
)
def test_pieces_that_do_not_fit_are_refused(change, words):
    right = make(LARGE, widest=2)
    fields = {name: getattr(right, name) for name in ("order", "num_blocks", "block_size", "shape", "groups")}
    with pytest.raises(ConfigError, match=words):
        SubdividedLayout(**{**fields, **change})


def test_groups_must_count_up():
    right = make(LARGE, widest=2)
    wrong = LayerGroup(index=7, kind="attention", layers=right.groups[1].layers, block_size=BLOCK)
    with pytest.raises(ConfigError, match="group 7 with 2 layers stands at position 1"):
        SubdividedLayout(
            order=right.order, num_blocks=23, block_size=BLOCK, shape=right.shape, groups=(right.groups[0], wrong)
        )
    with pytest.raises(ConfigError, match="layer 99 .* is in no group"):
        right.attention_view(attention(99))
