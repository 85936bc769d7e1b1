"""Writing K and V: every layout against a dict of tokens, on memory poisoned with NaN."""

import math
import random

import pytest
import torch

from makeready.cache.allocation import allocate
from makeready.cache.block_table import BlockTable, pad_tables, slot_mapping
from makeready.cache.layout import CacheLayout
from makeready.cache.specs import AttentionSpec, LayerGroup, LayerSpec
from makeready.cache.write import gather_kv, write_kv
from makeready.config import LAYOUTS
from makeready.errors import ConfigError, IntegrityError

CPU = torch.device("cpu")
HEADS, WIDTH, WIDTH_V, NUM_BLOCKS = 2, 8, 4, 23


def make(order="NHD", dtype="float32", block_size=4, pad=0, device=CPU):
    spec = AttentionSpec(num_query_heads=4, num_kv_heads=HEADS, head_size=WIDTH, head_size_v=WIDTH_V, dtype=dtype)
    layers = tuple(LayerSpec(layer=i, spec=spec) for i in range(3))
    layout = CacheLayout(
        order=order,
        num_blocks=NUM_BLOCKS,
        slots_per_block=3,
        page_size_bytes=spec.page_size_bytes(block_size) + pad,
        block_size=block_size,
        groups=(LayerGroup(index=0, kind="attention", layers=layers, block_size=block_size),),
    )
    cache = allocate(layout, device)
    cache.poison()
    return cache


def tables_for(lens, block_size, seed):
    """Random placement: each request gets shuffled blocks with room for its tokens."""
    free = list(range(1, NUM_BLOCKS))
    random.Random(seed).shuffle(free)
    tables = []
    for length in lens:
        table = BlockTable(block_size)
        table.append([free.pop() for _ in range(table.num_blocks_for(length))])
        tables.append(table)
    return tables


def token_bytes(cache, layer):
    """The slow reading: {(k or v, slot): one token's numbers}, element by element."""
    found = {}
    for name, tensor in zip("kv", cache.key_value(layer), strict=True):
        size = tensor.shape[1]
        for slot in range(tensor.shape[0] * size):
            found[name, slot] = tensor[slot // size, slot % size].float().flatten().tolist()
    return found


def same(a, b):
    return len(a) == len(b) and all(x == y or (x != x and y != y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("order", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize(
    ("lens", "block_size", "pad"), [((1, 7, 4, 0, 13), 4, 0), ((5, 3, 17), 3, 8), ((2, 1, 1), 1, 0)]
)
def test_every_layout_against_a_dict_of_tokens(order, dtype, lens, block_size, pad):
    cache = make(order, dtype, block_size, pad)
    tables = tables_for(lens, block_size, seed=sum(lens))
    expected = token_bytes(cache, 1)
    assert all(x != x for numbers in expected.values() for x in numbers), "poisoned"
    torch.manual_seed(0)
    done = [0] * len(lens)
    while done != list(lens):
        counts = [min(random.Random(sum(done)).randint(1, 5), n - d) for n, d in zip(lens, done, strict=True)]
        slots = slot_mapping(tables, done, counts, CPU)
        key, value = torch.randn(sum(counts), HEADS, WIDTH), torch.randn(sum(counts), HEADS, WIDTH_V)
        skipped = torch.rand(sum(counts)) < 0.2
        slots[skipped] = -1
        write_kv(key, value, *cache.key_value(1), slots)
        for name, rows, view in zip("kv", (key, value), cache.key_value(1), strict=True):
            for slot, row in zip(slots.tolist(), rows, strict=True):
                if slot >= 0:
                    expected[name, slot] = row.to(view.dtype).float().flatten().tolist()
        done = [d + c for d, c in zip(done, counts, strict=True)]
    got = token_bytes(cache, 1)
    assert all(same(got[place], numbers) for place, numbers in expected.items())
    for neighbour in (0, 2):
        assert all(tensor.float().isnan().all() for tensor in cache.key_value(neighbour)), "other layers untouched"
    for table, length in zip(tables, lens, strict=True):
        for name, view in zip("kv", cache.key_value(1), strict=True):
            read = gather_kv(view, table.blocks, length)
            assert read.shape == (length, HEADS, view.shape[3])
            rows = read.float().flatten(1).tolist()
            assert all(same(row, expected[name, s]) for row, s in zip(rows, table.slots(0, length), strict=True))


def test_rows_may_be_strided_and_overflow_saturates():
    cache = make("HND", "fp8_e4m3")
    packed = torch.full((2, HEADS, WIDTH + WIDTH_V), 1e9)
    packed[0] = -float("inf")
    write_kv(packed[..., :WIDTH], packed[..., WIDTH:], *cache.key_value(0), torch.tensor([5, 6]))
    key, value = cache.key_value(0)
    assert key[1, 1].float().unique().tolist() == value[1, 1].float().unique().tolist() == [-448.0]
    assert key[1, 2].float().unique().tolist() == [448.0]


def test_nothing_to_write():
    cache = make()
    empty = torch.empty(0, HEADS, WIDTH), torch.empty(0, HEADS, WIDTH_V)
    write_kv(*empty, *cache.key_value(0), torch.empty(0, dtype=torch.int64))
    one = torch.ones(1, HEADS, WIDTH), torch.ones(1, HEADS, WIDTH_V)
    write_kv(*one, *cache.key_value(0), torch.tensor([-1]))
    assert (cache.buffer == 0xFF).all()


def test_what_does_not_fit_is_refused_and_nothing_is_written():
    cache = make()
    views, slots = cache.key_value(0), torch.tensor([4, 5])
    key, value = torch.ones(2, HEADS, WIDTH), torch.ones(2, HEADS, WIDTH_V)
    with pytest.raises(ConfigError, match=r"key has shape \(2, 1, 8\); 2 slots of this cache take \(2, 2, 8\)"):
        write_kv(key[:, :1], value, *views, slots)
    with pytest.raises(ConfigError, match=r"value has shape \(1, 2, 4\)"):
        write_kv(key, value[:1], *views, slots)
    with pytest.raises(ConfigError, match=r"key is torch.int64 and its cache torch.float32: .* floating-point dtypes"):
        write_kv(key.long(), value, *views, slots)
    for slot in (NUM_BLOCKS * 4, -2):
        with pytest.raises(IntegrityError, match=f"slot {slot} is outside the cache, which has 92 slots"):
            write_kv(key, value, *views, torch.tensor([4, slot]))
    assert (cache.buffer == 0xFF).all()
    with pytest.raises(IntegrityError, match="9 tokens are asked of 2 blocks of 4"):
        gather_kv(views[0], [1, 2], 9)


@pytest.mark.parametrize("computed", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stored", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_what_a_narrower_cache_cannot_hold_is_clamped_and_nan_stays(computed, stored):
    """65504, the end of float16, is 65536 in bfloat16: clamped there, it would be stored as infinity."""
    rows = torch.tensor([[[math.inf, -math.inf, 1e9, math.nan]]], dtype=computed)
    key, value = (torch.zeros(2, 4, 1, 4, dtype=stored) for _ in range(2))
    write_kv(rows, rows, key, value, torch.tensor([5]))
    most = torch.finfo(stored).max
    assert key[1, 1, 0, :3].tolist() == [most, -most, most]
    assert key[1, 1, 0, 3].isnan()


@pytest.mark.parametrize("scales", [None, (2.0, 2.0)])
def test_integer_caches_take_integers_as_they_are(scales):
    rows = torch.full((1, 1, 2), 7, dtype=torch.int8)
    key, value = (torch.zeros(2, 4, 1, 2, dtype=torch.int8) for _ in range(2))
    with pytest.raises(ConfigError, match="key is torch.float32 and its cache torch.int8: .*quantise the rows"):
        write_kv(rows.float(), rows.float(), key, value, torch.tensor([5]), scales=scales)
    if scales is None:
        write_kv(rows, rows, key, value, torch.tensor([5]))
        assert key[1, 1].tolist() == [[7, 7]]
    else:
        with pytest.raises(ConfigError, match="scales came with a key of torch.int8"):
            write_kv(rows, rows, key, value, torch.tensor([5]), scales=scales)
    angles = (torch.ones(1, 1), torch.ones(1, 1))
    with pytest.raises(ConfigError, match="(rotary|scales) came with a key of torch.int8"):
        write_kv(rows, rows, key, value, torch.tensor([5]), rotary=angles, scales=scales)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("order", LAYOUTS)
def test_a_step_on_cuda_never_waits_for_the_device(order):
    device = torch.device("cuda")
    cache, reference = make(order, "bfloat16", device=device), make(order, "bfloat16")
    (table,) = tables_for([11], 4, seed=3)
    key, value = torch.randn(11, HEADS, WIDTH), torch.randn(11, HEADS, WIDTH_V)
    key_there, value_there = key.to(device), value.to(device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cache.clear_blocks(0, table.blocks)
        slots = slot_mapping([table], [0], [11], device)
        slots[4:5].fill_(-1)
        write_kv(key_there, value_there, *cache.key_value(1), slots)
        padded = pad_tables([table.blocks, []], device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    reference.clear_blocks(0, table.blocks)
    here = slot_mapping([table], [0], [11], CPU)
    here[4] = -1
    write_kv(key, value, *reference.key_value(1), here)
    assert padded.tolist() == [table.blocks, [0] * len(table.blocks)]
    # Block 0 may differ: skipped tokens land there.
    assert torch.equal(cache.pages()[1:].cpu(), reference.pages()[1:])


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("computed", ["float16", "bfloat16", "float32"])
def test_every_pair_of_dtypes_can_be_written(computed, stored):
    rows = torch.tensor([[[1.0, -2.0]]], dtype=getattr(torch, computed))
    key, value = (torch.zeros(2, 4, 1, 2, dtype=getattr(torch, stored)) for _ in range(2))
    write_kv(rows, rows, key, value, torch.tensor([5]))
    assert key[1, 1].tolist() == [[1.0, -2.0]]


@pytest.mark.parametrize(("cos", "sin"), [((2, 4), (2, 4)), ((3, 4), (3, 2)), ((3, 5), (3, 5)), ((3, 0), (3, 0))])
def test_a_rotary_that_does_not_fit_is_refused(cos, sin):
    cache = make()
    view = cache.key_value(0)
    rows = (torch.ones(3, HEADS, WIDTH), torch.ones(3, HEADS, WIDTH_V))
    with pytest.raises(ConfigError, match=r"3 tokens of head size 8 take \(3, R / 2\) each"):
        write_kv(*rows, *view, torch.arange(4, 7), rotary=(torch.ones(cos), torch.ones(sin)))
