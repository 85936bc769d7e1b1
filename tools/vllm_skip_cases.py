"""Writes tests/data/skip_layer_cases.json.gz: what vLLM 0.33.0's own planning code answers for skipped layers.

Run it where vLLM 0.33.0's Python files can be imported (its compiled parts are not needed) and makeready is on the
path: ``python tools/vllm_skip_cases.py tests/data/skip_layer_cases.json.gz``. vLLM decides the block size (phases 1 to
4), makes every layer's cache spec and groups them, for every preset that stores K and V in a quantised dtype but for
some layers, and for windows and latents without such layers; nothing of it is replaced but the model and the backend,
which are described by their numbers.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import vllm.model_executor.layers.mamba.abstract as mamba
import vllm.model_executor.models as models
from vllm.model_executor.layers.attention.attention import Attention
from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import Platform
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE, get_dtype_size
from vllm.v1.attention.backend import AttentionType, MultipleOf
from vllm.v1.core import kv_cache_planning as planning
from vllm.v1.kv_cache_interface import (
    KVCacheLayout,
    KVQuantMode,
    MambaSpec,
    MLAAttentionSpec,
    get_kv_quant_mode,
)
from vllm.v1.worker.utils import customize_attention_spec

from makeready.cache.specs import LATENT_BLOBS
from makeready.errors import MakereadyError
from makeready.hybrid.model_specs import ModelSpec, read_model
from makeready.hybrid.presets import preset_names

Case = dict[str, Any]
DTYPES = (
    "fp8", "nvfp4", "int8_per_token_head", "fp8_per_token_head", "int4_per_token_head", "fp8_ds_mla", "nvfp4_ds_mla"
)  # fmt: skip
KERNELS: tuple[tuple[list[str | int], int, str], ...] = (
    (["*16"], 16, "cuda"), ([16, 32, 64], 16, "cuda"), ([64], 64, "cuda"), (["*64"], 64, "cuda"), (["*32"], 128, "cpu")
)  # fmt: skip
"""Kernel blocks (``*16``: any multiple of 16), the size preferred from the platform's default, and the platform."""


def cases() -> list[Case]:
    """Presets x ranks x dtypes x sets of skipped layers x kernels, thinned out with a fixed seed."""
    source, found = random.Random(7), []
    for name in preset_names():
        for tp in (1, 2):
            for dtype in DTYPES:
                try:
                    model = read_model(name, engine="vllm", tensor_parallel_size=tp, kv_cache_dtype=dtype)
                except MakereadyError:
                    continue
                if model.dtype != "bfloat16" or not model.attention_layers or _twofold(model):
                    continue
                for skip in _skips(source, model):
                    for kernels, preferred, platform in KERNELS:
                        if source.random() >= 0.55:
                            mode = source.choice(("none", "align")) if model.state_layers else "none"
                            case = _case(model, tp, dtype, skip, kernels, preferred, mode)
                            found.append({**case, "platform": platform})
    return found


def _twofold(model: ModelSpec) -> bool:
    """Whether a layer has attention and a state."""
    return len({layer.layer for layer in model.layers}) < len(model.layers)


def _skips(source: random.Random, model: ModelSpec) -> list[list[int]]:
    every = [x.layer for x in model.attention_layers]
    windows = [x.layer for x in model.attention_layers if x.kind == "sliding"]
    full = [layer for layer in every if layer not in windows]
    sets = [every[:1], every[: max(1, len(every) // 2)], every, full[:1] or every[:1]]
    sets += [windows, windows[:1], full] if windows else []
    return [*source.sample(sets, 2), *([[]] if windows or model.attention_layers[0].kind == "mla" else [])]


def _case(
    model: ModelSpec, tp: int, dtype: str, skip: list[int], kernels: list[str | int], preferred: int, mode: str
) -> Case:
    spec: Any = model.attention_layers[0].spec
    words = {"attention": "a", "mla": "a", "sliding": "w"}
    letters = {x.layer: words.get(x.kind, "m") for x in model.layers}
    return {
        "model": model.name, "tp": tp, "kv_cache_dtype": dtype, "skip": sorted(skip), "kernels": kernels,
        "preferred": preferred, "mode": mode, "mla": spec.mla, "kv_heads": spec.num_kv_heads,
        "layers": "".join(letters.get(index, "x") for index in range(model.num_layers)),
        "head_size": spec.head_size + (spec.head_size_v if spec.mla else 0),
        "window": next((x.spec.sliding_window for x in model.attention_layers if x.kind == "sliding"), None),  # type: ignore[union-attr]
        "state_bytes": max((x.spec.state_bytes for x in model.state_layers), default=0),  # type: ignore[union-attr]
        "max_model_len": model.max_model_len,
    }  # fmt: skip


def backend_of(case: Case) -> Any:
    """A backend that declares the case's kernel blocks and packs as FlashInfer and Triton do."""
    sizes = [MultipleOf(int(rule[1:])) if isinstance(rule, str) else rule for rule in case["kernels"]]

    class Backend:
        get_name = staticmethod(lambda: "CASE")
        is_mla = staticmethod(lambda: case["mla"])
        get_supported_kernel_block_sizes = staticmethod(lambda spec=None: sizes)

        @staticmethod
        def supports_block_size(size: int) -> bool:
            return any(size % (rule.base if isinstance(rule, MultipleOf) else rule) == 0 for rule in sizes)

        @staticmethod
        def customize_spec(spec: Any) -> Any:
            mode = spec.kv_quant_mode
            if spec.state_content_bytes is None and mode.is_nvfp4:
                packed = spec.head_size // 2 + spec.head_size // 16
                return replace(spec, num_head_slots=2 * spec.num_kv_heads, state_content_bytes=packed)
            if spec.state_content_bytes is None and mode.is_per_token_head:
                half = 2 if mode == KVQuantMode.INT4_PER_TOKEN_HEAD else 1
                width = spec.head_size // half + spec.head_size_v // half
                return replace(spec, state_content_bytes=width * get_dtype_size(spec.dtype) + 8)
            return spec

    return Backend


def config_of(case: Case) -> Any:
    """The parts of vLLM's configuration that its planning reads."""
    cache = SimpleNamespace(
        cache_dtype=case["kv_cache_dtype"], block_size=None, user_specified_block_size=False,
        mamba_cache_mode=case["mode"], mamba_block_size=case["max_model_len"] if case["mode"] == "none" else None,
        mamba_page_size_padded=None, skip_page_size_padded=None, enable_prefix_caching=case["mode"] != "none",
        kv_cache_dtype_skip_layers=[str(layer) for layer in case["skip"]],
        get_resolved_kv_cache_layout=lambda: KVCacheLayout.LBNHC,
    )  # fmt: skip
    model = SimpleNamespace(
        dtype=torch.bfloat16, is_hybrid=bool(case["state_bytes"]), use_mla=case["mla"], architecture="case",
        max_model_len=case["max_model_len"], get_num_kv_heads=lambda parallel: case["kv_heads"],
        get_head_size=lambda: case["head_size"],
    )  # fmt: skip
    return SimpleNamespace(
        cache_config=cache, model_config=model, parallel_config=SimpleNamespace(), quant_config=None,
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False), kv_transfer_config=None,
    )  # fmt: skip


def spec_of(case: Case, config: Any, backend: Any, layer: int) -> Any:
    """What vLLM says that one layer stores, once the block size is decided."""
    cache, kind = config.cache_config, case["layers"][layer]
    if kind == "m":
        return MambaSpec(
            shapes=((case["state_bytes"],),), dtypes=(torch.uint8,), block_size=cache.mamba_block_size,
            page_size_padded=cache.mamba_page_size_padded, mamba_cache_mode=case["mode"],
        )  # fmt: skip
    stored = "auto" if layer in case["skip"] else case["kv_cache_dtype"]
    dtype = torch.bfloat16 if stored == "auto" else STR_DTYPE_TO_TORCH_DTYPE[stored]
    if case["mla"]:
        return MLAAttentionSpec(
            block_size=cache.block_size, num_kv_heads=1, head_size=case["head_size"], dtype=dtype,
            cache_dtype_str=stored, kv_quant_mode=get_kv_quant_mode(stored),
            state_content_bytes=LATENT_BLOBS.get(stored),
        )  # fmt: skip
    described = SimpleNamespace(
        attn_type=AttentionType.DECODER, kv_cache_dtype=stored, kv_cache_torch_dtype=dtype, attn_backend=backend,
        head_size=case["head_size"], head_size_v=case["head_size"], num_kv_heads=case["kv_heads"],
        sliding_window=case["window"] if kind == "w" else None,
    )  # fmt: skip
    return customize_attention_spec(backend, Attention.get_kv_cache_spec(described, config))


def answer(case: Case) -> Case:
    """The case with vLLM's answer, or the error that it dies on."""
    config, backend = config_of(case), backend_of(case)
    state = SimpleNamespace(
        get_mamba_state_shape_from_config=lambda config: ((case["state_bytes"],),),
        get_mamba_state_dtype_from_config=lambda config: (torch.uint8,),
    )
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (Platform, "_find_non_ssm_backends", classmethod(lambda cls, config: [backend])),
            (Platform, "_preferred_block_size_for_backends", classmethod(lambda cls, *given: case["preferred"])),
            (models.ModelRegistry, "resolve_model_cls", lambda *given, **more: (state, "case")),
            (mamba, "get_mamba_prefill_checkpoint_alignment", lambda config: None),
        ):
            stack.enter_context(patch.object(target, name, value))
        quiet = patch("vllm.config.vllm.set_current_vllm_config", lambda *given, **more: contextlib.nullcontext())
        stack.enter_context(quiet)
        try:
            (CpuPlatform if case["platform"] == "cpu" else Platform).update_block_size_for_backend(config)
            layers = [index for index, kind in enumerate(case["layers"]) if kind != "x"]
            specs = {f"layer{index}": spec_of(case, config, backend, index) for index in layers}
            groups = planning.get_kv_cache_groups(config, specs)
            pool = planning._get_kv_cache_bytes_per_block(groups, KVCacheLayout.LBNHC)
        except (AssertionError, NotImplementedError, ValueError) as error:
            return {**case, "output": None, "error": f"{type(error).__name__}: {str(error)[:160]}"}
    found = {
        "block_size": config.cache_config.block_size,
        "mamba_block_size": config.cache_config.mamba_block_size if case["state_bytes"] else None,
        "pool": pool,
        "groups": [
            {"layers": [int(name[5:]) for name in group.layer_names], "block_size": group.kv_cache_spec.block_size}
            for group in groups
        ],
    }
    return {**case, "output": found, "error": None}


def main(path: str) -> int:
    answered = [answer(case) for case in cases()]
    source = "answers of vLLM 0.33.0's own planning code, by tools/vllm_skip_cases.py"
    text = json.dumps({"source": source, "cases": answered}, separators=(",", ":"))
    Path(path).write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"{len(answered)} cases, {sum(case['error'] is not None for case in answered)} of them errors")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
