"""On a CUDA device: one graph of attention serves every way to share its tokens out, decodes and chunks alike."""

from dataclasses import replace
from importlib.util import find_spec
from itertools import accumulate

import pytest
import torch

from makeready.attention_backends.flash.triton_kernels import TritonProvider
from makeready.attention_backends.interface import AttentionCall, BuildRequest
from makeready.attention_backends.reference.impl import ReferenceAttention
from makeready.cache.specs import AttentionSpec
from makeready.config import AttentionConfig
from makeready.platforms.probing import probe_cuda
from paged_cases import make_case

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")]
CUDA = torch.device("cuda")
TOKENS, ROWS, RAGGED = 512, 12, 5
SHARES = [
    {7: (512, 512)},
    {0: (1, 700), 1: (1, 64), 2: (1, 1), 7: (300, 900), 8: (10, 20), 9: (1, 1)},
    {7: (100, 100), 8: (100, 2000), 9: (100, 101), 10: (100, 164)},
    {3: (1, 2111)},
    {},
]
"""Query tokens and keys of the requests, by row; the last row takes the tokens that are missing."""


def build(heads, sizes, *, mla=False, invariant=False):
    spec = AttentionSpec(
        num_query_heads=heads[0], num_kv_heads=heads[1], head_size=sizes[0], head_size_v=sizes[1], dtype="bfloat16",
        mla=mla,
    )  # fmt: skip
    request = BuildRequest(
        device=probe_cuda().devices[0], spec=spec, dtype="bfloat16", block_size=16, kernel_block_size=16,
        num_blocks=64, max_num_seqs=64, max_num_batched_tokens=8192, max_model_len=4096,
        config=AttentionConfig(batch_invariant=invariant),
    )  # fmt: skip
    return TritonProvider().build(request)


def fill(step, share, case, row_of):
    """The step's tensors as ``share`` has them; request ``i`` of the case has row ``row_of[i]``."""
    lens = [share[row][0] if row in share else 0 for row in range(ROWS)]
    lens[-1] = TOKENS - sum(lens)
    step.query_start.copy_(torch.tensor([0, *accumulate(lens)], dtype=torch.int32))
    step.seq_lens.copy_(torch.tensor([share[row][1] if row in share else 0 for row in range(ROWS)]))
    step.block_table.zero_()
    width = case.step.block_table.shape[1]
    for index, row in enumerate(row_of):
        step.block_table[row, :width] = case.step.block_table[index]


def empty_step():
    return {
        "query_start": torch.tensor([0] * ROWS + [TOKENS], dtype=torch.int32, device=CUDA),
        "seq_lens": torch.zeros(ROWS, dtype=torch.int32, device=CUDA),
        "block_table": torch.zeros(ROWS, 256, dtype=torch.int32, device=CUDA),
        "query_lens_host": (*[0] * (ROWS - 1), TOKENS),
        "seq_lens_host": (4096,) * ROWS,
        "captured": True,
        "num_ragged": RAGGED,
    }


@pytest.mark.parametrize(
    ("heads", "sizes", "invariant"),
    [
        ((12, 2), (128, 128), False),
        ((12, 2), (128, 128), True),
        ((16, 2), (256, 256), False),
        ((16, 2), (256, 256), True),
        ((32, 1), (512, 64), False),
    ],
)
def test_a_captured_step_follows_its_tensors(heads, sizes, invariant):
    mla = sizes == (512, 64)
    attention, width = build(heads, sizes, mla=mla, invariant=invariant), sum(sizes) if mla else sizes[0]
    torch.manual_seed(2)
    query = torch.randn(TOKENS, heads[0], width, device=CUDA).bfloat16()
    cases = []
    for share in SHARES:
        lens = [share[row] for row in sorted(share)] or [(1, 1)]
        cases.append(
            make_case(
                [keys for _, keys in lens], [count for count, _ in lens], heads=heads, head_size=sizes[0],
                head_size_v=sizes[1], dtype=torch.bfloat16, device=CUDA, clear=False,
            )
        )  # fmt: skip
    call = AttentionCall(scale=width**-0.5)
    blocks = max(case.key_cache.shape[0] for case in cases)
    pages = [
        torch.full((blocks, *cache.shape[1:]), float("nan"), dtype=cache.dtype, device=CUDA)
        for cache in (cases[0].key_cache, cases[0].value_cache)
    ]
    step = replace(cases[0].step, **empty_step())
    run = attention.forward_latent if mla else attention.forward
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(query, *pages, attention.prepare(step), call)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run(query, *pages, attention.prepare(step), call)
    reference = ReferenceAttention()
    for share, case in zip(SHARES, cases, strict=True):
        for page, cache in zip(pages, (case.key_cache, case.value_cache), strict=True):
            page.fill_(float("nan"))
            page[: cache.shape[0]] = cache
        fill(step, share, case, sorted(share))
        graph.replay()
        real = sum(count for count, _ in share.values())
        if share:
            slow = reference.forward_latent if mla else reference.forward
            expected = slow(query[:real].float(), case.key_cache, case.value_cache, case.step, call)
            assert (output[:real].float() - expected).norm() < 5e-3 * expected.norm()
        assert not output[real:].any()
