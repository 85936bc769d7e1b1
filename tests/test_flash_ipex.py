"""IPEX as a provider of flash. Its kernels run where it is installed: tools/ipex_environment.py makes such a place."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec

import pytest
import torch

from makeready.attention_backends.flash import FlashBackend
from makeready.attention_backends.flash.ipex import IpexProvider
from makeready.attention_backends.flash.ipex_attention import IpexAttention
from makeready.attention_backends.flash.self_check import check_against_reference, differences
from makeready.attention_backends.installed import installed_version
from makeready.attention_backends.interface import AttentionCall, BuildRequest
from makeready.attention_backends.metadata import StepMetadata
from makeready.attention_backends.reference.impl import ReferenceAttention
from makeready.cache.allocation import allocate
from makeready.cache.layout import CacheLayout
from makeready.cache.specs import AttentionSpec, LayerGroup, LayerSpec
from makeready.cache.write import write_kv
from makeready.config import AttentionConfig
from makeready.device import DeviceFacts
from makeready.errors import BackendError
from paged_cases import make_case

CPU, XPU = (DeviceFacts(platform=name, device_type=name) for name in ("cpu", "xpu"))
IPEX_IS_HERE = find_spec("intel_extension_for_pytorch") is not None
needs_ipex = pytest.mark.skipif(
    not IPEX_IS_HERE, reason="Intel Extension for PyTorch is not installed; see tools/ipex_environment.py"
)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def request_for(*, heads=(4, 2), head_size=64, block_size=16, dtype="float32", device=CPU, **spec):
    spec = {"head_size_v": head_size, "dtype": dtype} | spec
    return BuildRequest(
        device=device,
        spec=AttentionSpec(num_query_heads=heads[0], num_kv_heads=heads[1], head_size=head_size, **spec),
        dtype=dtype, block_size=block_size, kernel_block_size=block_size, num_blocks=8, max_num_seqs=4,
        max_num_batched_tokens=64, max_model_len=1024, config=AttentionConfig(),
    )  # fmt: skip


def provider(ipex="2.8.0", torch_version="2.8.0", load=None):
    versions = {"intel-extension-for-pytorch": ipex, "torch": torch_version}
    return IpexProvider(version_of=versions.get, load=load or (lambda: pytest.fail("IPEX must not be imported")))


class TestProbe:
    def test_absent(self):
        probe = provider(ipex=None).probe(CPU)
        assert not probe.available
        assert "not installed" in probe.reason
        assert "pip install torch==2.8.0 intel-extension-for-pytorch==2.8.0" in probe.reason

    @pytest.mark.parametrize(
        ("torch_version", "found"),
        [("2.13.0+cpu", "torch 2.13.0+cpu is installed"), (None, "torch is not installed")],
    )
    def test_another_torch_is_named_and_nothing_is_imported(self, torch_version, found):
        probe = provider(ipex="2.8.0+cpu", torch_version=torch_version).probe(CPU)
        assert not probe.available
        assert f"2.8.0+cpu needs torch 2.8, but {found}" in probe.reason

    def test_xpu_is_refused_with_the_reason(self):
        probe = provider().probe(XPU)
        assert not probe.available
        assert "contiguous" in probe.reason
        assert "never run on an XPU" in probe.reason

    @pytest.mark.parametrize("error", [ImportError("no libiomp5"), AttributeError("os.exit"), SystemExit(127)])
    def test_an_import_that_breaks_is_a_reason(self, error):
        def load():
            raise error

        probe = provider(load=load).probe(CPU)
        assert not probe.available
        assert f"does not import: {type(error).__name__}: {error}" in probe.reason

    def test_kernels_that_are_not_there_are_named(self):
        class Lacking:
            flash_attn_varlen_func = None

        assert "lacks the kernels single_query_cached_kv_attention" in provider(load=lambda: Lacking).probe(CPU).reason

    def test_there(self):
        class Kernels:
            flash_attn_varlen_func = single_query_cached_kv_attention = None

        probe = provider(torch_version="2.8.0+cu128", load=lambda: Kernels).probe(CPU)
        assert probe.available
        assert "2.8.0 is installed, and fits torch 2.8.0+cu128" in probe.reason

    @pytest.mark.skipif(IPEX_IS_HERE, reason="IPEX is installed here")
    def test_flash_on_the_cpu_says_what_is_missing_once(self):
        reason = FlashBackend().probe(CPU).reason
        assert reason.count("Intel Extension for PyTorch is not installed") == 1
        with pytest.raises(BackendError, match="ipex: Intel Extension for PyTorch is not installed"):
            FlashBackend().build(request_for())


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "why"),
        [
            ({"dtype": "float64"}, "dtype float64 is none of bfloat16, float16, float32"),
            ({"spec_dtype": "fp8_e5m2"}, "kept as fp8_e5m2"),
            ({"head_size_v": 32}, "head size of K 64 and of V 32 differ"),
            ({"head_size": 640, "head_size_v": 640}, "head size 640 is above 576"),
            ({"sliding_window": 1}, "sliding window of 1"),
        ],
    )
    def test_build_names_what_is_outside(self, change, why):
        change = dict(change)
        stored = change.pop("spec_dtype", None)
        request = request_for(**change)
        if stored:
            request = dataclasses.replace(request, spec=dataclasses.replace(request.spec, dtype=stored))

        class Kernels:
            flash_attn_varlen_func = single_query_cached_kv_attention = None

        with pytest.raises(BackendError, match=f"flash by ipex: .*{why}"):
            provider(load=lambda: Kernels).build(request)

    @pytest.mark.parametrize("layout", ["NHD", "cross_layer_NHD"])
    def test_pages_in_another_order(self, layout):
        case = make_case([20], [1], layout=layout)
        with pytest.raises(BackendError, match="reads HND pages: token stride 16, head stride 256") as error:
            forward(attention(), case, AttentionCall(scale=1.0))
        assert error.value.expected == ["HND", "cross_layer_HND"]

    def test_k_and_v_strides_must_agree(self):
        case = make_case([20], [1], layout="HND")
        apart = case.value_cache.clone(memory_format=torch.preserve_format)
        with pytest.raises(BackendError, match="one block stride for K and V; V has token stride"):
            attention().forward(case.query, case.key_cache, apart, (), AttentionCall(scale=1.0))

    def test_dtype_head_size_sinks_and_a_window_of_one(self):
        case = make_case([20], [1], layout="HND")
        for match, query, call in [
            ("dtype torch.bfloat16, not torch.float32", case.query.bfloat16(), AttentionCall(scale=1.0)),
            ("queries have 8, K 16, V 16", case.query[..., :8], AttentionCall(scale=1.0)),
            ("no attention sinks", case.query, AttentionCall(scale=1.0, sinks=torch.zeros(4))),
            ("sliding window of 1", case.query, AttentionCall(scale=1.0, sliding_window=1)),
        ]:
            with pytest.raises(BackendError, match=match):
                attention().forward(query, case.key_cache, case.value_cache, (), call)


class TestSelfCheck:
    @pytest.mark.parametrize("block_size", [16, 48])
    def test_the_reference_agrees_with_itself(self, block_size):
        request = request_for(block_size=block_size, heads=(4, 1), dtype="bfloat16")
        assert [difference for _, difference in differences(ReferenceAttention(), request)] == [0.0] * 6

    def test_a_kernel_that_ignores_the_window_is_found(self):
        class Blind(ReferenceAttention):
            def forward(self, query, key_cache, value_cache, metadata, call):
                call = dataclasses.replace(call, sliding_window=None)
                return super().forward(query, key_cache, value_cache, metadata, call)

        with pytest.raises(BackendError, match="flash by invented failed its self-check on cpu: decode with a window"):
            check_against_reference(Blind(), request_for(), provider="invented")

    def test_a_kernel_that_reads_unwritten_memory_is_found(self):
        class Greedy(ReferenceAttention):
            def forward(self, query, key_cache, value_cache, metadata, call):
                return super().forward(query, key_cache, value_cache, metadata, call) + 0 * key_cache.sum()

        with pytest.raises(BackendError, match="decode differs from the reference by nan"):
            check_against_reference(Greedy(), request_for(), provider="invented")


def attention(heads=(4, 2), head_size=16):
    """Refusals come before the first kernel, so none are needed."""
    return IpexAttention(None, request_for(heads=heads, head_size=head_size).spec)


def without_idle(case):
    """The case less its requests without queries, which the reference does not take."""
    busy = [index for index, count in enumerate(case.step.query_lens_host) if count]
    step = dataclasses.replace(
        case.step,
        block_table=case.step.block_table[busy],
        query_lens_host=tuple(case.step.query_lens_host[index] for index in busy),
        seq_lens_host=tuple(case.step.seq_lens_host[index] for index in busy),
    )
    keys, values = ([part[index] for index in busy] for part in (case.keys, case.values))
    return dataclasses.replace(case, step=step, keys=keys, values=values)


def forward(impl, case, call):
    return impl.forward(case.query, case.key_cache, case.value_cache, impl.prepare(case.step), call)


STEPS = {
    "decode": ([1, 130, 37, 600], [1, 1, 1, 1]),
    "prefill": ([5, 130, 64], [5, 130, 64]),
    "chunked prefill": ([40, 130], [7, 30]),
    "mixed": ([1, 130, 37, 600, 9], [1, 30, 1, 1, 9]),
    "with an idle request": ([20, 130, 37], [1, 0, 5]),
}


@needs_ipex
class TestKernels:
    @pytest.mark.parametrize("name", STEPS)
    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("block_size", [16, 48, 528, 5])
    @pytest.mark.parametrize("layout", ["HND", "cross_layer_HND"])
    def test_steps(self, name, dtype, block_size, layout):
        self.compare(*STEPS[name], dtype=dtype, block_size=block_size, layout=layout)

    @pytest.mark.parametrize("head_size", [64, 80, 128])
    @pytest.mark.parametrize("heads", [(2, 2), (8, 2), (20, 1)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_heads(self, heads, head_size, dtype):
        self.compare(*STEPS["mixed"], heads=heads, head_size=head_size, dtype=dtype, block_size=48)

    @pytest.mark.parametrize("window", [None, 2, 16, 17, 128, 1000])
    @pytest.mark.parametrize("soft_cap", [None, 2.0])
    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("name", ["decode", "mixed"])
    def test_windows_and_soft_caps(self, name, window, soft_cap, causal):
        call = AttentionCall(scale=0.25, causal=causal, sliding_window=window, soft_cap=soft_cap)
        self.compare(*STEPS[name], call=call, block_size=48)
        self.compare(*STEPS[name], call=call, block_size=16, dtype=torch.bfloat16)

    @pytest.mark.parametrize("name", ["decode", "mixed", "with an idle request"])
    @pytest.mark.parametrize("sizes", [(24, 16), (16, 24), (192, 128), (64, 64)])
    def test_gathered(self, name, sizes):
        seq_lens, q_lens = STEPS[name]
        case = make_case(seq_lens, q_lens, heads=(4, 4), head_size=sizes[0], head_size_v=sizes[1])
        call = AttentionCall(scale=sizes[0] ** -0.5)
        output = self.built().forward_gathered(case.query, case.keys, case.values, case.step, call)
        assert output.is_contiguous()
        busy = without_idle(case)
        expected = ReferenceAttention().forward_gathered(busy.query, busy.keys, busy.values, busy.step, call)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)

    def test_pages_with_padding_and_padding_slots(self):
        """The real cache of a hybrid model's shape: pages longer than K and V, slots of -1 in a step."""
        spec = AttentionSpec(num_query_heads=4, num_kv_heads=2, head_size=64, head_size_v=64, dtype="bfloat16")
        layers = tuple(LayerSpec(layer=index, spec=spec) for index in range(2))
        group = LayerGroup(index=0, kind="attention", layers=layers, block_size=48)
        for padding in (0, 2 * 16 * 64, 96):
            layout = CacheLayout(
                order="HND", num_blocks=6, slots_per_block=2, block_size=48, groups=(group,),
                page_size_bytes=spec.page_size_bytes(48) + padding,
            )  # fmt: skip
            cache = allocate(layout, torch.device("cpu"))
            cache.poison()
            key, value = cache.key_value(1)
            case = make_case([100], [1], head_size=64, block_size=48, dtype=torch.bfloat16)
            table = [5, 2, 3]
            slots = torch.tensor([table[t // 48] * 48 + t % 48 for t in range(100)] + [-1, -1])
            ones = torch.ones(2, 2, 64, dtype=torch.bfloat16)
            rows = (torch.cat([part[0], ones]) for part in (case.keys, case.values))
            write_kv(*rows, key, value, slots)
            step = dataclasses.replace(case.step, block_table=torch.tensor([table], dtype=torch.int32))
            impl, call = self.built(dtype="bfloat16", head_size=64, block_size=48), AttentionCall(scale=0.125)
            expected = ReferenceAttention().forward(case.query, key, value, step, call)
            output = impl.forward(case.query, key, value, impl.prepare(step), call)
            torch.testing.assert_close(output, expected, atol=2e-2, rtol=0)

    def test_layers_of_a_group_share_the_metadata(self):
        impl, call = self.built(head_size=16, block_size=48), AttentionCall(scale=0.25)
        one, two = (make_case(*STEPS["mixed"], layout="HND", block_size=48, slots=slots) for slots in (3, 5))
        metadata = impl.prepare(one.step)
        for case in (one, two):
            output = impl.forward(case.query, case.key_cache, case.value_cache, metadata, call)
            expected = ReferenceAttention().forward(case.query, case.key_cache, case.value_cache, case.step, call)
            torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("block_size", [16, 48])
    @pytest.mark.parametrize("q_len", [1, 20])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_blocks_that_a_window_has_left_may_hold_anything(self, block_size, q_len, dtype):
        call = AttentionCall(scale=0.25, sliding_window=17)
        case = make_case([300, 130], [q_len, q_len], layout="HND", block_size=block_size, dtype=dtype, clear=False)
        expected = forward(ReferenceAttention(), case, call)
        for table, length in zip(case.step.block_table, case.step.seq_lens_host, strict=True):
            left = table[: (length - q_len - 16) // block_size].long()
            case.key_cache[left] = case.value_cache[left] = torch.nan
        impl = self.built(head_size=16, block_size=block_size, dtype=str(dtype).removeprefix("torch."))
        torch.testing.assert_close(forward(impl, case, call), expected, atol=TOLERANCE[dtype], rtol=0)

    def test_a_step_of_nothing(self):
        impl = self.built(head_size=16)
        case = make_case([20], [1], layout="HND")
        empty = StepMetadata(
            query_start=torch.zeros(1, dtype=torch.int32), seq_lens=torch.zeros(0, dtype=torch.int32),
            block_table=torch.zeros(0, 1, dtype=torch.int32), slot_mapping=torch.zeros(0, dtype=torch.int64),
            query_lens_host=(), seq_lens_host=(), block_size=16,
        )  # fmt: skip
        call = AttentionCall(scale=1.0)
        output = impl.forward(case.query[:0], case.key_cache, case.value_cache, impl.prepare(empty), call)
        assert output.shape == (0, 4, 16)

    def test_flash_builds_it_and_says_so(self):
        assert FlashBackend().probe(CPU).reason == (
            f"flash by ipex: Intel Extension for PyTorch {installed_version('intel-extension-for-pytorch')} is "
            f"installed, and fits torch {installed_version('torch')}"
        )
        assert isinstance(FlashBackend().build(request_for(sliding_window=40)), IpexAttention)
        mla = request_for(heads=(4, 1), head_size=512, head_size_v=64, mla=True)
        assert isinstance(FlashBackend().build(mla), IpexAttention)

    def compare(self, seq_lens, q_lens, *, call=None, heads=(4, 2), head_size=16, dtype=torch.float32, **where):
        where = {"layout": "HND", "block_size": 16} | where
        case = make_case(seq_lens, q_lens, heads=heads, head_size=head_size, dtype=dtype, clear=False, **where)
        impl = self.built(
            heads=heads, head_size=head_size, dtype=str(dtype).removeprefix("torch."), block_size=where["block_size"]
        )
        call = call or AttentionCall(scale=head_size**-0.5)
        output = forward(impl, case, call)
        assert output.is_contiguous()
        expected = forward(ReferenceAttention(), without_idle(case), call)
        torch.testing.assert_close(output, expected, atol=TOLERANCE[dtype], rtol=0)

    def built(self, **shape):
        return IpexProvider().build(request_for(**shape))
