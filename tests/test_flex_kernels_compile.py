"""Flex's Triton kernels compile for Hopper, without a device: the interpreter is laxer than the compiler."""

from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")

FILL = {
    "UNITS": 64, "LENGTH": 1, "IDENTITY": True, "PER_BLOCK": 33, "BLOCK_STRIDE": 33, "KERNEL_BLOCK": 16, "CAUSAL": True,
    "WINDOW": 0, "QUERY_BLOCK": 1, "KV_BLOCK": 16, "ALL_MASKED": False, "SPLIT": True, "LEAST": 16, "CHUNK": 256,
}  # fmt: skip
ROWS = {"SIZE": 80, "WIDTH": 128}
CASES = [
    ("fill", "fill_rows", FILL),
    ("fill", "fill_rows", FILL | {"SPLIT": False, "WINDOW": 100, "QUERY_BLOCK": 128, "KV_BLOCK": 128}),
    ("fill", "fill_rows", FILL | {"IDENTITY": False, "CAUSAL": False, "WINDOW": 100, "LENGTH": 4}),
    ("fill", "fill_rows", FILL | {"ALL_MASKED": True}),
    ("rows", "pack_rows", {"GROUP": 3, "LENGTH": 4, "QUERIES": 16, **ROWS}),
    ("rows", "unpack_rows", {"HEADS": 6, "QUERIES": 64, **ROWS}),
    ("rows", "merge_rows", {"KV_HEADS": 2, "GROUP": 3, "LENGTH": 4, "SINKS": False, "STEP": 8, **ROWS}),
    ("rows", "merge_rows", {"KV_HEADS": 2, "GROUP": 3, "LENGTH": 4, "SINKS": True, "STEP": 8, **ROWS}),
    (
        "pages",
        "gather_pages",
        {"HEADS": 2, "SIZE": 80, "OTHER_SIZE": 80, "WIDTH": 128, "BLOCK": 528, "CHUNK": 128, "TOKENS": 64},
    ),
]
POINTERS = {
    "table": "*i32", "query_start": "*i32", "seq_lens": "*i32", "requests": "*i32", "whole": "*i32", "masked": "*i32",
    "whole_counts": "*i32", "masked_counts": "*i32", "facts": "*i32", "unit_rows": "*i32", "places": "*i32",
    "query": "*bf16", "out": "*bf16", "parts": "*bf16", "lse": "*fp32", "sinks": "*fp32", "source": "*bf16",
    "other": "*bf16", "other_out": "*bf16", "chunks": "*i32",
}  # fmt: skip


@pytest.mark.parametrize(("module", "name", "constants"), CASES)
def test_compiles_for_hopper(module, name, constants, monkeypatch):
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"makeready.attention_backends.flex.kernels.{module}"), name)
    if not isinstance(kernel, triton.runtime.JITFunction):
        pytest.skip("Triton interprets in this process")
    pointers = POINTERS | ({"rows": "*bf16"} if name == "unpack_rows" else {})
    signature = {
        argument: "constexpr" if argument in constants else pointers.get(argument, "i32")
        for argument in kernel.arg_names
    }
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants), target=GPUTarget("cuda", 90, 32)
    )
    assert compiled.asm["ptx"]
