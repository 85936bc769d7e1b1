"""Checks of the K/V write kernel against the slow way; run by test_triton_interpreted.py, in its process."""

import pytest
import torch

from makeready.cache.write import rotate, write_kv
from makeready.cache.write_triton import write_rows
from makeready.config import LAYOUTS
from paged_cases import cache_views

TOKENS, BLOCKS, BLOCK_SIZE = 37, 10, 16


def tokens(heads, width, width_v, dtype=torch.float32):
    return torch.randn(TOKENS, heads, width).to(dtype), torch.randn(TOKENS, heads, width_v).to(dtype)


def slots_of_some():
    slots = torch.randperm(BLOCKS * BLOCK_SIZE)[:TOKENS]
    slots[[0, 5, 36]] = -1
    return slots


def views(layout, heads, width, width_v, dtype=torch.float32):
    return cache_views(layout, BLOCKS, 3, BLOCK_SIZE, heads, width, width_v, dtype, "cpu")


def same_bits(a, b):
    return torch.equal(a.float().nan_to_num(77.0), b.float().nan_to_num(77.0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("heads", "width", "width_v"), [(2, 32, 32), (3, 24, 16), (1, 128, 64), (16, 8, 8)])
def test_every_layout_and_nothing_else_is_written(layout, heads, width, width_v):
    key, value = tokens(heads, width, width_v)
    slots = slots_of_some()
    slow, fast = views(layout, heads, width, width_v), views(layout, heads, width, width_v)
    write_kv(key, value, *slow, slots)
    write_rows(key, value, *fast, slots, elements=256)
    assert all(same_bits(a, b) for a, b in zip(slow, fast, strict=True))


@pytest.mark.parametrize("turned", [8, 24, 32])
@pytest.mark.parametrize("scales", [None, (2.0, 0.5)])
def test_rotary_and_scales(turned, scales):
    key, value = tokens(2, 32, 32)
    rotary = (torch.randn(TOKENS, turned // 2), torch.randn(TOKENS, turned // 2))
    slots, slow, fast = slots_of_some(), views("NHD", 2, 32, 32), views("NHD", 2, 32, 32)
    write_kv(key, value, *slow, slots, rotary=rotary, scales=scales)
    write_rows(key, value, *fast, slots, rotary=rotary, scales=scales)
    for a, b in zip(slow, fast, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_rotary_turns_halves():
    rows, angle = torch.randn(5, 2, 8), torch.rand(5, 3)
    turned = rotate(rows, angle.cos(), angle.sin())
    pair = torch.complex(rows[..., :3], rows[..., 3:6]) * torch.polar(torch.ones(5, 1, 3), angle[:, None])
    assert torch.allclose(turned, torch.cat([pair.real, pair.imag, rows[..., 6:]], dim=-1), atol=1e-6)


def test_numbers_beyond_the_cache_dtype_are_clamped():
    key, value = tokens(2, 16, 16)
    slots, slow, fast = slots_of_some(), *(views("NHD", 2, 16, 16, torch.float16) for _ in range(2))
    write_kv(key * 1e6, value, *slow, slots)
    write_rows(key * 1e6, value, *fast, slots)
    assert all(same_bits(a, b) for a, b in zip(slow, fast, strict=True))


@pytest.mark.parametrize("scales", [None, (2.0, 0.5)])
def test_nan_stays_nan_and_infinities_are_clamped(scales):
    """In half precision: the interpreter's own fp8 has no NaN. test_triton_cuda.py has the others."""
    key, value = tokens(2, 16, 16)
    for rows in (key, value):
        rows[:, :, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e9])
    slots, slow, fast = slots_of_some(), *(views("NHD", 2, 16, 16, torch.float16) for _ in range(2))
    write_kv(key, value, *slow, slots, scales=scales)
    write_rows(key, value, *fast, slots, scales=scales)
    written = slots[slots >= 0]
    for a, b in zip(slow, fast, strict=True):
        rows = b[written // BLOCK_SIZE, written % BLOCK_SIZE].float()
        assert rows[..., 0].isnan().all()
        assert not rows[..., 1:].isnan().any()
        assert same_bits(a, b)


def test_rows_that_are_a_slice_of_a_wider_projection():
    wide = torch.randn(TOKENS, 6, 32)
    slots, slow, fast = slots_of_some(), views("NHD", 2, 32, 32), views("NHD", 2, 32, 32)
    write_kv(wide[:, 2:4], wide[:, 4:], *slow, slots)
    write_rows(wide[:, 2:4], wide[:, 4:], *fast, slots)
    assert all(same_bits(a, b) for a, b in zip(slow, fast, strict=True))


def test_angles_and_slots_that_are_slices():
    key, value = tokens(2, 32, 32)
    angles, sines = torch.randn(8, TOKENS).T, torch.randn(TOKENS, 24)[:, 16:]
    slots = torch.stack([slots_of_some(), torch.zeros(TOKENS, dtype=torch.int64)], dim=1)[:, 0]
    slow, fast = views("NHD", 2, 32, 32), views("NHD", 2, 32, 32)
    write_kv(key, value, *slow, slots, rotary=(angles, sines))
    write_rows(key, value, *fast, slots, rotary=(angles, sines))
    for a, b in zip(slow, fast, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6, equal_nan=True)
