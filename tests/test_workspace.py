"""What kernels take beside the cache: no less than they allocate, and counted where a device's memory is shared out."""

from __future__ import annotations

import pytest
import torch

import makeready
from makeready.attention_backends.flash import FlashBackend
from makeready.attention_backends.flex import FlexBackend
from makeready.attention_backends.interface import AttentionCall, BuildRequest, LayerRequest
from makeready.attention_backends.workspace import StepLimits, Workspace, total_bytes
from makeready.cache.specs import AttentionSpec
from makeready.config import AttentionConfig
from makeready.device import DeviceFacts
from makeready.errors import CapacityError
from makeready.platforms.probing import probe_cuda
from paged_cases import make_case

HOPPER = DeviceFacts(platform="cuda", device_type="cuda", compute_capability=(9, 0), compute_units=132)
PLANNED = DeviceFacts(platform="cuda", device_type="cuda", present=False)
GIB = 2**30


def request_of(heads=(8, 2), size=64, dtype="bfloat16", **asked):
    spec = AttentionSpec(num_query_heads=heads[0], num_kv_heads=heads[1], head_size=size, head_size_v=size, dtype=dtype)
    return LayerRequest(layer=0, spec=spec, dtype="bfloat16", **asked)


def llama(layers=4, heads=(32, 8), size=128, longest=131072):
    return {
        "model_type": "llama", "hidden_size": heads[0] * size, "num_attention_heads": heads[0], "head_dim": size,
        "num_key_value_heads": heads[1], "num_hidden_layers": layers, "intermediate_size": 64, "vocab_size": 64,
        "dtype": "bfloat16", "max_position_embeddings": longest,
    }  # fmt: skip


class Nothing:
    """Stands in for a kernel."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize(("heads", "size"), [((8, 2), 64), ((8, 1), 128), ((4, 4), 80)])
@pytest.mark.parametrize(
    "step", [((900, 700, 512), (900, 1, 400)), ((1024, 1024), (1, 1)), ((1024, 130), (200, 9)), ((40,), (40,))]
)
def test_triton_kernels_allocate_no_more_than_they_declare(heads, size, step, invariant, monkeypatch):
    pytest.importorskip("triton")
    from makeready.attention_backends.flash.triton_kernels import launch
    from makeready.attention_backends.flash.triton_kernels.impl import TritonImpl
    from makeready.attention_backends.flash.triton_kernels.scratch import workspace_of

    for name in ("plan_kernel", "decode_kernel", "gather_kernel", "prefill_kernel"):
        monkeypatch.setattr(launch, name, Nothing())
    taken, empty = [], torch.empty

    def recording(*shape, **options):
        made = empty(*shape, **options)
        if made.is_floating_point():
            taken.append(made.nbytes)
        return made

    lens, queries = step
    case = make_case(lens, queries, heads=heads, head_size=size, dtype=torch.bfloat16, block_size=16, clear=False)
    limits = StepLimits(max_num_seqs=4, max_num_batched_tokens=sum(queries), max_model_len=max(lens))
    spec = request_of(heads, size).spec
    attention = TritonImpl(
        BuildRequest(
            device=HOPPER, spec=spec, dtype="bfloat16", block_size=16, kernel_block_size=16, num_blocks=64,
            max_num_seqs=4, max_num_batched_tokens=sum(queries), max_model_len=max(lens),
            config=AttentionConfig(batch_invariant=invariant),
        ),
        132,
    )  # fmt: skip
    monkeypatch.setattr(launch.torch, "empty", recording)
    attention.forward(
        case.query, case.key_cache, case.value_cache, attention.prepare(case.step), AttentionCall(scale=0.1)
    )
    declared = workspace_of(spec, HOPPER, limits, invariant=invariant)
    assert sum(taken) <= total_bytes([declared])
    if queries[0] == 1 or sum(queries) > 1000:
        assert taken


@pytest.mark.cuda
@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize(
    "backend", [FlashBackend().configured(AttentionConfig(flash_provider="triton"), HOPPER), FlexBackend()]
)
@pytest.mark.parametrize("step", [((20_000, 1500, 900), (1000, 1500, 1)), ((20_000, 9000, 900, 5), (1, 1, 1, 1))])
def test_peak_memory_of_a_step_is_within_what_is_declared(backend, step, invariant):
    """Beside rows as large as the queries: a few copies of those are a step's own."""
    (device,) = probe_cuda().devices
    lens, queries = step
    heads, size = (32, 8), 128
    case = make_case(lens, queries, heads=heads, head_size=size, dtype=torch.bfloat16, device="cuda")
    limits = StepLimits(max_num_seqs=4, max_num_batched_tokens=sum(queries), max_model_len=max(lens))
    asked = request_of(heads, size, batch_invariant=invariant)
    impl = backend.build(
        BuildRequest(
            device=device, spec=asked.spec, dtype="bfloat16", block_size=16, kernel_block_size=16,
            num_blocks=case.key_cache.shape[0], max_num_seqs=4, max_num_batched_tokens=sum(queries),
            max_model_len=max(lens), config=AttentionConfig(batch_invariant=invariant),
        )
    )  # fmt: skip
    call = AttentionCall(scale=0.1)
    for _ in range(2):  # the first call compiles and makes what is kept
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = impl.forward(case.query, case.key_cache, case.value_cache, impl.prepare(case.step), call)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del out
    declared = total_bytes([backend.workspace(asked, device, limits)])
    assert peak <= declared + 6 * case.query.nbytes + (1 << 20), (peak, declared)


def test_kinds_of_layers_keep_their_own_and_share_the_rest():
    assert total_bytes([Workspace(kept_bytes=5, layer_bytes=7), Workspace(kept_bytes=1, layer_bytes=9)]) == 15
    assert total_bytes([]) == 0


def test_flex_declares_the_run_of_long_queries():
    limits = StepLimits(max_num_seqs=8, max_num_batched_tokens=512, max_model_len=100_000)
    found = FlexBackend().workspace(request_of(), PLANNED, limits)
    assert found.layer_bytes == -(-100_000 // 128) * 128 * 2 * (64 + 64) * 2
    assert 0 < found.kept_bytes < found.layer_bytes
    tiled = FlexBackend().configured(AttentionConfig(flex_attn_block_n=64), PLANNED)
    assert tiled.workspace(request_of(), PLANNED, limits).layer_bytes == found.layer_bytes
    cpu = DeviceFacts(platform="cpu", device_type="cpu")
    assert FlexBackend().workspace(request_of(), cpu, limits) == Workspace()


def test_a_plan_takes_the_largest_of_the_providers_that_may_serve():
    limits = StepLimits(max_num_seqs=8, max_num_batched_tokens=512, max_model_len=4096)
    flash = FlashBackend()
    assert flash.workspace(request_of(), PLANNED, limits).layer_bytes > 0
    asked = flash.configured(AttentionConfig(flash_provider="fa3"), PLANNED)
    assert asked.workspace(request_of(), PLANNED, limits) == Workspace()


def test_a_budget_leaves_room_for_the_kernels_of_the_embedded_engine():
    options = {"platform": "cuda", "device_memory_bytes": 80 * GIB, "backend": "flex"}
    ours = makeready.plan(llama(), engine="transformers", **options)
    run = 131072 * 8 * 256 * 2
    assert 0.9 * 80 * GIB - 1.2 * run < ours.capacity.memory_bytes < 0.9 * 80 * GIB - run
    said = next(reason for reason in ours.reasons if reason.startswith("memory:"))
    assert "that attention kernels take in a step, leaves" in said
    theirs = makeready.plan(llama(), engine="vllm", **options)
    assert theirs.capacity.memory_bytes > ours.capacity.memory_bytes + run
    assert not any("attention kernels take" in reason for reason in theirs.reasons)


def test_memory_that_the_user_gave_to_the_cache_is_the_cache_s():
    given = makeready.plan(llama(), platform="cuda", engine="transformers", backend="flex", memory_bytes=GIB)
    assert GIB - given.pool_bytes_per_block < given.capacity.memory_bytes <= GIB
    assert any("as the user set; attention kernels take up to" in reason for reason in given.reasons)


def test_the_workspace_is_that_of_the_sequences_which_fit():
    """16 million tokens would need a run of 64 GiB; what fits needs a fifth of the cache's memory."""
    small = makeready.plan(
        llama(longest=1 << 24), platform="cuda", engine="transformers", backend="flex", device_memory_bytes=10 * GIB
    )
    assert small.max_model_len < 1 << 24
    assert small.capacity.memory_bytes > 0.6 * 9 * GIB


def test_a_workspace_that_leaves_nothing_is_refused_with_the_numbers():
    with pytest.raises(CapacityError, match="attention kernels up to .* in a step; use more memory, or a smaller"):
        makeready.plan(
            llama(layers=1), platform="cuda", engine="transformers", backend="flex", device_memory_bytes=GIB,
            max_num_batched_tokens=1 << 20,
        )  # fmt: skip
