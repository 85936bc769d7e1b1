"""Phase 1 and phase 2 through the platform's one method."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from makeready.attention_backends.interface import Capabilities
from makeready.cache.block_size import Divides, MultipleOf
from makeready.cache.specs import AttentionSpec, MambaSpec, StateTensor
from makeready.errors import BlockSizeError, ConfigError
from makeready.hybrid.model_specs import read_model
from makeready.platforms.cpu import CPU
from makeready.platforms.cuda import CUDA
from makeready.platforms.interface import BlockSizeRequest, Platform
from makeready.platforms.kernel_blocks import kernel_block_size, preferred_block_size
from makeready.platforms.xpu import XPU


def backend(name: str = "flex", **rules) -> Capabilities:
    return Capabilities(name=name, dtypes=frozenset(), kv_cache_dtypes=frozenset(), **rules)


FLEX = backend("flex", kernel_block_multiple=16)
FLASH_XPU = backend("flash", kernel_block_multiple=64)
CPU_MLA = backend("cpu_mla", exact_block_sizes=(16,))
PLATFORMS = st.sampled_from((CPU, CUDA, XPU))


def request(model: str, *backends: Capabilities, **settings) -> BlockSizeRequest:
    spec = read_model(model, engine="vllm")
    layers = [layer.spec for layer in spec.layers]
    return BlockSizeRequest(
        attention=tuple(s for s in layers if isinstance(s, AttentionSpec)),
        states=tuple(s for s in layers if isinstance(s, MambaSpec)),
        backends=backends or (FLEX,),
        **{"max_model_len": 32768, **settings},
    )


NANO = "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"


def test_nemotron_3_nano_on_xpu_with_flash() -> None:
    decision = XPU.update_block_size_for_backend(request(NANO, FLASH_XPU))
    assert (decision.phase1_block_size, decision.block_size) == (64, 2112)
    assert decision.block_size % 64 == 0
    assert decision.attention_page_bytes == decision.state_page_bytes == decision.mamba_page_size_padded == 2112 * 1024
    assert decision.kernel_block_sizes == {"flash": 2112}
    assert any("2134016 bytes" in reason and "2112" in reason for reason in decision.reasons)


def test_mamba_block_size_is_respected() -> None:
    free = XPU.update_block_size_for_backend(request(NANO, FLASH_XPU, mamba_cache_mode="align"))
    assert free.mamba_block_size == free.block_size == 2112
    twice = XPU.update_block_size_for_backend(
        request(NANO, FLASH_XPU, mamba_cache_mode="align", mamba_block_size=2 * 2112)
    )
    assert (twice.block_size, twice.mamba_block_size) == (2112, 4224)
    larger = XPU.update_block_size_for_backend(request(NANO, FLASH_XPU, mamba_cache_mode="all", mamba_block_size=4096))
    assert (larger.block_size, larger.mamba_block_size) == (4096, 4096)


def test_mamba_block_size_that_no_block_divides_is_refused_with_both_numbers() -> None:
    with pytest.raises(
        BlockSizeError,
        match="mamba_block_size 2048 is refused: it has to be a whole number of blocks, and the smallest block is 2112 "
        ".*; the nearest value that works is 2112",
    ) as caught:
        XPU.update_block_size_for_backend(request(NANO, FLASH_XPU, mamba_cache_mode="align", mamba_block_size=2048))
    assert caught.value.expected == (2112,)


def test_mamba_block_size_without_kept_states_is_refused() -> None:
    with pytest.raises(ConfigError, match="mamba_block_size 2112 is refused: mamba_cache_mode none keeps one"):
        XPU.update_block_size_for_backend(request(NANO, FLASH_XPU, mamba_block_size=2112))
    with pytest.raises(ConfigError, match="mamba_block_size 256 is refused: the model has no state layers"):
        CUDA.update_block_size_for_backend(request("Qwen/Qwen3-8B", mamba_cache_mode="align", mamba_block_size=256))


def test_block_and_mamba_block_size_of_the_user_have_to_fit() -> None:
    fits = request(NANO, FLASH_XPU, mamba_cache_mode="align", block_size=2176, mamba_block_size=4352)
    assert XPU.update_block_size_for_backend(fits).block_size == 2176
    with pytest.raises(
        BlockSizeError, match="block_size 2112 is refused: mamba_block_size needs a divisor of 4352; .* is 2176"
    ):
        XPU.update_block_size_for_backend(replace(fits, block_size=2112, mamba_block_size=4352))


def test_a_preference_gives_way_to_an_explicit_mamba_block_size() -> None:
    # CPU starts from 128, but kernels are content with 32 and the user's 2112 is no multiple of 128.
    asked = request("Qwen/Qwen3.5-9B", backend("cpu", kernel_block_multiple=32), mamba_cache_mode="align",
                    mamba_block_size=2112)  # fmt: skip
    decision = CPU.update_block_size_for_backend(asked)
    assert (decision.block_size, decision.mamba_block_size) == (704, 2112)
    assert any("this preference is dropped" in reason for reason in decision.reasons)


def test_a_users_block_size_is_kept_or_refused() -> None:
    asked = request(NANO, FLEX, FLASH_XPU)
    assert XPU.update_block_size_for_backend(replace(asked, block_size=2176)).block_size == 2176
    with pytest.raises(BlockSizeError, match="block_size 128 is refused: the mamba2 state needs at least 2084 .* 2112"):
        XPU.update_block_size_for_backend(replace(asked, block_size=128))
    with pytest.raises(BlockSizeError, match="block_size 2096 is refused: flash needs a multiple of 64; .* is 2112"):
        XPU.update_block_size_for_backend(replace(asked, block_size=2096))


def test_an_exact_kernel_and_a_large_state_clash_by_name() -> None:
    with pytest.raises(BlockSizeError, match="cpu_mla needs exactly 16 but the kda state needs at least"):
        CPU.update_block_size_for_backend(request("moonshotai/Kimi-Linear-48B-A3B-Instruct", CPU_MLA))


def test_xpu_asks_64_tokens_of_models_with_delta_nets() -> None:
    for model in ("Qwen/Qwen3.5-9B", "moonshotai/Kimi-Linear-48B-A3B-Instruct"):
        on_xpu, on_cuda = (p.update_block_size_for_backend(request(model)) for p in (XPU, CUDA))
        assert on_xpu.block_size % 64 == 0
        assert on_xpu.block_size - on_cuda.block_size < 64
        assert any("gated delta net on xpu" in reason for reason in on_xpu.reasons)
    assert XPU.declared_constraints(request(NANO)) == ()


def test_platforms_and_plugins_add_constraints() -> None:
    acme = Platform(name="acme", device_type="acme", constraints=(MultipleOf(24, owner="acme's cache lines"),))
    assert acme.update_block_size_for_backend(request("Qwen/Qwen3-8B")).block_size == 48
    linked = request("Qwen/Qwen3-8B", extra_constraints=(MultipleOf(160, owner="acme link"),))
    assert CUDA.update_block_size_for_backend(linked).block_size == 160
    with pytest.raises(BlockSizeError, match="flex needs a multiple of 16 .*acme link needs a divisor of 24|acme link"):
        CUDA.update_block_size_for_backend(
            replace(linked, extra_constraints=(Divides(24, owner="acme link"), MultipleOf(32, owner="flash")))
        )


def test_attention_only_skips_phase_2_and_state_only_has_state_pages() -> None:
    plain = CUDA.update_block_size_for_backend(request("Qwen/Qwen3-8B"))
    assert (plain.block_size, plain.state_page_bytes, plain.mamba_block_size) == (16, 0, None)
    assert "phase 2: skipped, the model has no state layers." in plain.reasons
    states = request(NANO)
    only = CUDA.update_block_size_for_backend(replace(states, attention=(), backends=()))
    assert only.page_bytes == only.state_page_bytes == only.state_raw_bytes == 2134016
    assert (only.block_size, only.attention_page_bytes, only.mamba_page_size_padded) == (16, 0, None)


def test_state_mixers_do_not_constrain_attention_blocks() -> None:
    mixer = backend("gdn", kernel_block_multiple=1000, is_ssm=True)
    with_mixer = CUDA.update_block_size_for_backend(request(NANO, FLEX, mixer))
    assert with_mixer == CUDA.update_block_size_for_backend(request(NANO, FLEX))


def test_a_backends_own_preference_counts() -> None:
    asked = request("Qwen/Qwen3-8B", FLEX, preferred_block_sizes={"flex": 128})
    assert CUDA.update_block_size_for_backend(asked).block_size == 128


@pytest.mark.parametrize(
    ("rules", "default", "preferred", "block", "kernel"),
    [
        ({"kernel_block_multiple": 64}, 16, 64, 2112, 2112),
        ({"kernel_block_multiple": 32}, 128, 128, 128, 128),
        ({"kernel_block_sizes": (16, 32, 64)}, 16, 16, 2112, 64),
        ({"kernel_block_sizes": (16, 32, 64)}, 16, 16, 912, 16),
        ({"kernel_block_sizes": (32, 64)}, 16, 32, 96, 32),
        ({"exact_block_sizes": (16,)}, 128, 16, 16, 16),
        ({}, 16, 16, 7, 7),
    ],
)
def test_kernel_blocks(rules: dict[str, object], default: int, preferred: int, block: int, kernel: int) -> None:
    assert preferred_block_size(backend(**rules), default) == preferred
    assert kernel_block_size(backend(**rules), block) == kernel


states = st.builds(
    lambda kind, rows, wide: MambaSpec(
        kind=kind,
        states=(
            StateTensor(name="conv", shape=(3, rows), dtype="bfloat16"),
            StateTensor(name="recurrent", shape=(rows, wide), dtype="float32"),
        ),
    ),
    st.sampled_from(("mamba2", "gdn", "kda", "mamba1")),
    st.integers(1, 5000),
    st.integers(1, 200),
)
attention = st.builds(
    lambda heads, size: AttentionSpec(
        num_query_heads=heads, num_kv_heads=heads, head_size=size, head_size_v=size, dtype="bfloat16"
    ),
    st.integers(1, 16),
    st.sampled_from((64, 80, 128, 256)),
)
backends = st.lists(
    st.one_of(
        st.builds(lambda n: backend(f"multiple{n}", kernel_block_multiple=n),
                  st.sampled_from((1, 16, 32, 48, 64, 128))),
        st.builds(lambda a, b: backend(f"sizes{a}_{b}", kernel_block_sizes=(a, b)), st.sampled_from((16, 64)),
                  st.sampled_from((32, 48, 128))),
    ),
    min_size=1,
    max_size=3,
)  # fmt: skip


@given(PLATFORMS, st.lists(attention, min_size=1, max_size=2), st.lists(states, min_size=1, max_size=2), backends,
       st.sampled_from(("none", "align", "all")), st.randoms())  # fmt: skip
def test_properties_of_every_decision(platform, specs, kept, capabilities, mode, random) -> None:
    asked = BlockSizeRequest(
        attention=tuple(specs),
        states=tuple(kept),
        backends=tuple(capabilities),
        mamba_cache_mode=mode,
        max_model_len=4096,
    )
    decision = platform.update_block_size_for_backend(asked)
    size = decision.block_size
    widest = max(spec.bytes_per_token for spec in specs)
    largest = max(spec.state_bytes for spec in kept)
    # Pages hold every state, and attention and state pages are one size.
    assert decision.page_bytes == decision.attention_page_bytes == decision.state_page_bytes == size * widest >= largest
    assert decision.mamba_page_size_padded == (None if largest == size * widest else size * widest)
    # Everybody accepts, and one alignment step less would not do.
    assert all(rule.accepts(size) for rule in decision.constraints)
    smaller = size - decision.phase1_block_size
    assert smaller <= 0 or smaller * widest < largest or not all(rule.accepts(smaller) for rule in decision.constraints)
    for used in capabilities:
        assert size % decision.kernel_block_sizes[used.name] == 0
    # The order in which things are named does not matter, and deciding twice changes nothing.
    shuffled = replace(
        asked,
        attention=tuple(random.sample(specs, len(specs))),
        states=tuple(random.sample(kept, len(kept))),
        backends=tuple(random.sample(capabilities, len(capabilities))),
    )
    again = platform.update_block_size_for_backend(shuffled)
    assert again == decision
    # The decision, given back as the user's own size, is accepted and kept.
    kept_size = platform.update_block_size_for_backend(replace(asked, block_size=size))
    assert (kept_size.block_size, kept_size.page_bytes) == (size, decision.page_bytes)
