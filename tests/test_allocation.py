"""The buffer: typed tensors that share its memory, clearing and poison."""

from dataclasses import replace

import pytest
import torch

from makeready.cache.allocation import allocate, torch_dtype
from makeready.cache.layout import CacheLayout
from makeready.cache.specs import DTYPE_BYTES, AttentionSpec, LayerGroup, LayerSpec, MambaSpec, StateTensor
from makeready.config import LAYOUTS
from makeready.errors import CapacityError, ConfigError, IntegrityError

CPU = torch.device("cpu")
BLOCK = 4


def make(order="NHD", dtype="bfloat16", num_blocks=6, page=None, kv_dtype=None):
    spec = AttentionSpec(num_query_heads=4, num_kv_heads=2, head_size=4, head_size_v=6, dtype=kv_dtype or dtype)
    size = DTYPE_BYTES[dtype]
    states = (
        StateTensor(name="conv", shape=(4, 3), dtype=dtype),
        StateTensor(name="recurrent", shape=(2, 2), dtype="float32"),
    )
    mamba = MambaSpec(kind="mamba2", states=states)
    groups = (
        LayerGroup(index=0, kind="attention", layers=(LayerSpec(layer=1, spec=spec),), block_size=BLOCK),
        LayerGroup(
            index=1,
            kind="mamba2",
            layers=(LayerSpec(layer=0, spec=mamba), LayerSpec(layer=1, spec=mamba)),
            block_size=1 << 20,
        ),
    )
    return CacheLayout(
        order=order,
        num_blocks=num_blocks,
        slots_per_block=3,
        page_size_bytes=page or 80 * size,
        block_size=BLOCK,
        groups=groups,
    )


@pytest.mark.parametrize("order", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "fp8_e4m3", "fp8_e5m2"])
def test_views_share_the_buffer_and_poison_is_nan(order, dtype):
    cache = allocate(make(order, dtype), CPU)
    key, value = cache.key_value(1)
    assert (key.shape, value.shape) == ((6, BLOCK, 2, 4), (6, BLOCK, 2, 6))
    assert key.dtype == value.dtype == torch_dtype(dtype)
    cache.poison()
    for tensor in (key, value, *cache.states(0), *cache.states(1)):
        assert tensor.untyped_storage().data_ptr() == cache.buffer.untyped_storage().data_ptr()
        assert tensor.float().isnan().all()


@pytest.mark.parametrize("order", LAYOUTS)
def test_what_one_view_writes_no_other_view_of_the_group_reads(order):
    cache = allocate(make(order, "float32"), CPU)
    tensors = [*cache.states(0), *cache.states(1)]
    for number, tensor in enumerate(tensors):
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) + 1000 * number)
    for number, tensor in enumerate(tensors):
        assert torch.equal(tensor, torch.arange(tensor.numel()).view(tensor.shape).float() + 1000 * number)


@pytest.mark.parametrize("order", LAYOUTS)
@pytest.mark.parametrize("page", [160, 164])
def test_clear_blocks_zeroes_the_groups_pages_of_those_blocks_only(order, page):
    cache = allocate(make(order, page=page), CPU)
    for group, slots in ((0, 1), (1, 2)):
        cache.poison()
        expected = cache.pages().clone()
        expected[[4, 2], :slots] = 0
        cache.clear_blocks(group, [4, 2])
        assert torch.equal(cache.pages(), expected)
        cache.clear_blocks(group, [])
        assert torch.equal(cache.pages(), expected)


@pytest.mark.parametrize("page", [81, 82])
def test_clear_blocks_works_on_pages_of_odd_sizes(page):
    layout = replace(make("cross_layer_NHD", kv_dtype="fp8_e4m3"), groups=make(kv_dtype="fp8_e4m3").groups[:1])
    cache = allocate(replace(layout, page_size_bytes=page), CPU)
    cache.poison()
    cache.clear_blocks(0, [5])
    assert cache.pages().nonzero().shape[0] == 17 * page
    assert (cache.pages()[5, 0] == 0).all()


def test_clear_blocks_refuses_what_is_not_there_and_clears_nothing():
    cache = allocate(make(), CPU)
    cache.poison()
    with pytest.raises(IntegrityError, match="block 6 cannot be cleared: the cache has 6 blocks"):
        cache.clear_blocks(0, [1, 6])
    with pytest.raises(IntegrityError, match="block -1 cannot be cleared"):
        cache.clear_blocks(0, [-1])
    with pytest.raises(IntegrityError, match="group 2 is not one of the cache's 2 groups"):
        cache.clear_blocks(2, [1])
    assert (cache.buffer == 0xFF).all()


@pytest.mark.parametrize("order", LAYOUTS)
def test_pages_show_every_block_whatever_the_order(order):
    layout = make(order)
    cache = allocate(layout, CPU)
    cache.buffer.copy_(torch.arange(layout.total_bytes) // layout.page_size_bytes)
    page_numbers = cache.pages()[..., 0].int()
    first = [[layout.page_offset(b, s) // layout.page_size_bytes for s in range(3)] for b in range(6)]
    assert page_numbers.tolist() == first
    assert (cache.pages() == cache.pages()[..., :1]).all()


def test_the_null_block_starts_as_zeros():
    assert (allocate(make(), CPU).pages()[0] == 0).all()


def test_layers_without_what_is_asked_are_refused_by_name():
    cache = allocate(make(), CPU)
    with pytest.raises(ConfigError, match=r"layer 0 stores no K and V .*layers that do: \[1\]"):
        cache.key_value(0)
    with pytest.raises(ConfigError, match=r"layer 2 stores no state .*layers that do: \[0, 1\]"):
        cache.states(2)
    quantised = allocate(make(kv_dtype="int8_per_token_head"), CPU)
    with pytest.raises(ConfigError, match="layer 1 stores no K and V with a plain dtype"):
        quantised.key_value(1)


def test_too_much_memory_is_refused_with_the_number():
    with pytest.raises(CapacityError, match=r"\d+ blocks need .* TiB on cpu, which refused"):
        allocate(make(num_blocks=1 << 50), CPU)


@pytest.mark.parametrize("order", LAYOUTS)
def test_strides_of_a_huge_cache_on_the_meta_device(order):
    layout = make(order, num_blocks=1 << 32)
    cache = allocate(layout, torch.device("meta"))
    key, value = cache.key_value(1)
    assert key.numel() > 1 << 31
    for tensor, view in zip((key, value), layout.attention_view(layout.groups[0].layers[0]), strict=True):
        assert tensor.stride() == view.strides
        assert tensor[-1].storage_offset() * 2 == view.offset_bytes + layout.page_offset((1 << 32) - 1, 0)
    last = cache.states(1)[1][-1]
    assert last.storage_offset() * 4 == layout.page_offset((1 << 32) - 1, 1) + 24


def test_dtype_names():
    assert torch_dtype("fp8_e5m2") is torch.float8_e5m2
    assert {torch_dtype(name).itemsize - size for name, size in DTYPE_BYTES.items()} == {0}
    with pytest.raises(ConfigError, match="'nn' has no torch dtype"):
        torch_dtype("nn")
