"""The layout's numbers, checked byte by byte and then through torch's own ``as_strided``."""

import ast
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from makeready.cache import layout as layout_module
from makeready.cache.layout import CacheLayout, StridedView
from makeready.cache.specs import DTYPE_BYTES, AttentionSpec, LayerGroup, LayerSpec, MambaSpec, StateTensor
from makeready.config import LAYOUTS
from makeready.errors import ConfigError

BLOCK = 4


def attention(layer, heads=2, width=4, width_v=4, dtype="bfloat16", **more):
    spec = AttentionSpec(
        num_query_heads=4, num_kv_heads=heads, head_size=width, head_size_v=width_v, dtype=dtype, **more
    )
    return LayerSpec(layer=layer, spec=spec)


def state(layer, conv=(3, 5), conv_dtype="bfloat16", recurrent=(2, 3), recurrent_dtype="bfloat16"):
    states = (
        StateTensor(name="conv", shape=conv, dtype=conv_dtype),
        StateTensor(name="recurrent", shape=recurrent, dtype=recurrent_dtype),
    )
    return LayerSpec(layer=layer, spec=MambaSpec(kind="mamba2", states=states))


def group(index, *layers, block_size=BLOCK):
    return LayerGroup(index=index, kind=layers[0].kind, layers=layers, block_size=block_size)


def make(order="NHD", groups=None, num_blocks=5, page=None, slots=None):
    groups = groups or (
        group(0, attention(0), attention(2)),
        group(
            1,
            attention(1, heads=1, sliding_window=8),
            attention(3, heads=1, width=6, width_v=2, sliding_window=8),
        ),
        group(2, state(4), state(5), state(6), block_size=1 << 20),
    )
    layers = [layer for g in groups for layer in g.layers]
    needs = [x.spec.state_bytes if x.is_state else x.spec.page_size_bytes(BLOCK) for x in layers]
    return CacheLayout(
        order=order,
        num_blocks=num_blocks,
        slots_per_block=slots or max(len(g.layers) for g in groups),
        page_size_bytes=page or -(-max(needs) // 4) * 4,
        block_size=BLOCK,
        groups=groups,
    )


def views(layout, layer):
    return layout.state_views(layer) if layer.is_state else layout.attention_view(layer)


def bytes_of(view: StridedView, block: int) -> list[int]:
    """Every byte of the view's ``block``, element after element."""
    size = DTYPE_BYTES[view.dtype]
    inner = itertools.product(*(range(n) for n in view.shape[1:]))
    starts = (
        view.offset_bytes
        + size * (block * view.strides[0] + sum(i * s for i, s in zip(index, view.strides[1:], strict=True)))
        for index in inner
    )
    return [start + byte for start in starts for byte in range(size)]


@pytest.mark.parametrize("order", LAYOUTS)
def test_pages_of_one_group_never_overlap_and_stay_inside(order):
    layout = make(order)
    for g in layout.groups:
        taken: dict[int, tuple[int, int]] = {}
        for slot, layer in enumerate(g.layers):
            for block in range(layout.num_blocks):
                mine = [byte for view in views(layout, layer) for byte in bytes_of(view, block)]
                first = layout.page_offset(block, slot)
                assert len(set(mine)) == len(mine) == layout.used_bytes(layer)
                assert first <= min(mine)
                assert max(mine) < first + layout.page_size_bytes
                assert min(mine) >= 0
                assert max(mine) < layout.total_bytes
                assert not taken.keys() & set(mine)
                taken.update(dict.fromkeys(mine, (slot, block)))
            for view in views(layout, layer):
                assert max(bytes_of(view, layout.num_blocks - 1)) < view.end_bytes <= layout.total_bytes


@pytest.mark.parametrize("order", LAYOUTS)
def test_pages_tile_the_buffer(order):
    layout = make(order)
    firsts = [layout.page_offset(b, s) for b in range(layout.num_blocks) for s in range(layout.slots_per_block)]
    assert sorted(firsts) == list(range(0, layout.total_bytes, layout.page_size_bytes))
    if layout.is_block_major:
        assert firsts == sorted(firsts), "a block is one run of bytes"


@pytest.mark.parametrize("order", LAYOUTS)
def test_writing_a_pages_tail_touches_no_other_page(order):
    layout = make(order)
    for layer in layout.layers():
        _, slot = layout.place(layer)
        pages = layout.page_view(layer)
        for block in range(layout.num_blocks):
            buffer = torch.zeros(layout.total_bytes, dtype=torch.uint8)
            for view in views(layout, layer):
                typed(buffer, view)[block].view(torch.uint8).fill_(7)
            torch.as_strided(buffer, pages.shape, pages.strides, pages.offset)[block, layout.used_bytes(layer) :] = 7
            touched = buffer.nonzero().flatten().tolist()
            first = layout.page_offset(block, slot)
            assert touched == list(range(first, first + layout.page_size_bytes))


def typed(buffer: torch.Tensor, view: StridedView) -> torch.Tensor:
    return buffer.view(getattr(torch, view.dtype)).as_strided(view.shape, view.strides, view.offset)


@pytest.mark.parametrize("order", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
def test_numbers_are_what_permuting_a_plain_tensor_gives(order, dtype):
    """The design's stride orders, spelled with permute, on a buffer that counts its elements."""
    heads, width, num_blocks, slots = 2, 4, 3, 2
    layers = tuple(attention(i, heads=heads, width=width, width_v=width, dtype=dtype) for i in range(slots))
    layout = make(order, groups=(group(0, *layers),), num_blocks=num_blocks)
    size = DTYPE_BYTES[dtype]
    inner = (2, heads, BLOCK, width) if order.endswith("HND") else (BLOCK, 2, heads, width)
    outer = (num_blocks, slots) if order.startswith("cross") else (slots, num_blocks)
    count = torch.arange(layout.total_bytes // size, dtype=torch.int64)
    plain = count.view(*outer, *inner)
    if order.startswith("cross"):
        plain = plain.transpose(0, 1)
    plain = plain.permute(0, 1, 2, 4, 3, 5) if order.endswith("HND") else plain.permute(0, 1, 3, 2, 4, 5)
    for slot, layer in enumerate(layers):
        for kv, view in enumerate(layout.attention_view(layer)):
            got = count.as_strided(view.shape, view.strides, view.offset)
            assert torch.equal(got, plain[slot, :, kv])


def test_unpadded_slot_major_nhd_flattens_over_block_and_token_without_a_copy():
    layout = make("NHD", groups=(group(0, attention(0), attention(1)),))
    buffer = torch.zeros(layout.total_bytes, dtype=torch.uint8)
    for layer in layout.layers():
        for view in layout.attention_view(layer):
            assert view.strides[0] == view.strides[1] * BLOCK
            tensor = typed(buffer, view)
            assert tensor.view(-1, *view.shape[2:]).data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("order", ["HND", "cross_layer_HND"])
def test_hnd_has_one_token_every_head_size(order):
    layout = make(order)
    for layer in (x for x in layout.layers() if not x.is_state):
        key, value = layout.attention_view(layer)
        assert key.strides[1] == layer.spec.head_size
        assert value.strides[1] == layer.spec.head_size_v
        assert value.offset - key.offset == layer.spec.num_kv_heads * BLOCK * layer.spec.head_size


@pytest.mark.parametrize("order", LAYOUTS)
def test_last_axis_is_contiguous(order):
    layout = make(order)
    assert all(view.strides[-1] == 1 for layer in layout.layers() for view in views(layout, layer))


def test_mla_stores_latent_and_rotary_part_once():
    latent = attention(0, heads=1, width=6, width_v=2, mla=True)
    layout = make(groups=(group(0, latent),))
    key, value = layout.attention_view(latent)
    assert key.shape == (5, BLOCK, 1, 6)
    assert value.shape == (5, BLOCK, 1, 2)
    assert value.offset == 6
    assert layout.used_bytes(latent) == layout.page_size_bytes == BLOCK * 8 * 2


def test_one_layer_may_have_attention_and_a_state():
    both = (group(0, attention(3)), group(1, state(3), block_size=64))
    layout = make(groups=both)
    assert [layout.place(layer)[0].index for layer in layout.layers()] == [0, 1]


def test_span_counts_what_a_kernel_must_address():
    view = StridedView(offset_bytes=8, shape=(3, 2, 1), strides=(10, 4, 1), dtype="bfloat16")
    assert (view.offset, view.span, view.end_bytes) == (4, 25, 58)
    assert replace(view, shape=(3, 0, 1)).span == 0


@pytest.mark.parametrize("order", LAYOUTS)
def test_offsets_beyond_32_bits(order):
    """A terabyte: plain integers here, and the same strides on torch's meta device."""
    layers = tuple(attention(i, heads=8, width=128, width_v=128) for i in range(8))
    layout = make(order, groups=(group(0, *layers),), num_blocks=1 << 23)
    assert layout.total_bytes == 1 << 40
    buffer = torch.empty(layout.total_bytes, dtype=torch.uint8, device="meta")
    for slot, layer in enumerate(layers):
        for view in layout.attention_view(layer):
            tensor = typed(buffer, view)
            assert tensor.storage_offset() * 2 == view.offset_bytes
            assert tensor.stride() == view.strides
            assert tensor[-1].storage_offset() * 2 - view.offset_bytes == layout.page_offset((1 << 23) - 1, 0)
            assert view.end_bytes <= layout.total_bytes
            if slot == 7:
                assert tensor[-1].storage_offset() > 1 << 31


def test_impossible_numbers_are_refused_by_name():
    good = make()
    for change, words in (
        ({"order": "LBHNC"}, "layout 'LBHNC' is not known; choose from NHD"),
        ({"num_blocks": 1}, "num_blocks 1 .* at least 2 .*null block"),
        ({"slots_per_block": 0}, "slots_per_block 0"),
        ({"page_size_bytes": 4.0}, "page_size_bytes 4.0 must be a whole number"),
        ({"block_size": True}, "block_size True"),
        ({"groups": ()}, "at least one group"),
        ({"slots_per_block": 2}, "group 2 has 3 layers for 2 slots_per_block"),
        ({"groups": good.groups[1:]}, "group 1 stands at position 0"),
        (
            {"page_size_bytes": 64},
            r"layer 0 \(attention\) needs 128 bytes of each page, and page_size_bytes is 64",
        ),
        ({"page_size_bytes": 129}, "page_size_bytes 129 is not a multiple of 2"),
    ):
        with pytest.raises(ConfigError, match=words):
            replace(good, **change)


def test_groups_that_clash_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"group 0 mixes layer 0 \(attention\) with layer 4 \(mamba2\)"):
        make(groups=(group(0, attention(0), state(4)),))
    with pytest.raises(ConfigError, match=r"layer 7 \(attention\) is in the cache twice"):
        make(groups=(group(0, attention(7)), group(1, attention(7, heads=1))))
    with pytest.raises(ConfigError, match="0 layers"):
        make(groups=(LayerGroup(index=0, kind="attention", layers=(), block_size=BLOCK),), page=64, slots=1)


def test_a_state_that_starts_between_two_of_its_numbers_is_refused():
    odd = state(0, conv=(3, 5), recurrent_dtype="float32")
    with pytest.raises(ConfigError, match=r"the recurrent state of layer 0 .* float32 and starts at byte 30"):
        make(groups=(group(0, odd),))
    assert make(groups=(group(0, state(0, conv=(3, 4), recurrent_dtype="float32")),)).state_views


def test_views_of_the_wrong_layer_are_refused_by_name():
    layout = make()
    with pytest.raises(ConfigError, match=r"layer 4 \(mamba2\) keeps a state, not K and V"):
        layout.attention_view(state(4))
    with pytest.raises(ConfigError, match=r"layer 0 \(attention\) keeps K and V, not a state"):
        layout.state_views(attention(0))
    with pytest.raises(ConfigError, match=r"layer 9 .* is in no group"):
        layout.page_view(attention(9))


def test_quantised_pages_are_placed_but_have_no_plain_view():
    layer = attention(0, heads=2, width=32, width_v=32, dtype="nvfp4")
    layout = make(groups=(group(0, layer),))
    assert layout.page_view(layer).shape == (5, layout.page_size_bytes)
    with pytest.raises(ConfigError, match=r"layer 0 \(attention\) stores nvfp4"):
        layout.attention_view(layer)


def test_the_planner_half_does_not_import_torch():
    tree = ast.parse(Path(layout_module.__file__).read_text())
    imported = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    assert "torch" not in imported
