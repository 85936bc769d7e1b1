"""What flex declares on each kind of device. No torch but inside :meth:`FlexBackend.probe` and ``build``."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

from ...config import DTYPES, LAYOUTS, AttentionConfig
from ...device import DeviceFacts
from ...errors import BackendError
from ..interface import AttentionBackend, AttentionImpl, BuildRequest, Capabilities, LayerRequest, Probe
from ..workspace import StepLimits, Workspace
from .settings import KERNEL_BLOCKS, check_layer, flex_settings

DEVICE_TYPES = ("cpu", "cuda", "xpu", "hpu", "mps")
"""What torch's flex_attention accepts; any other device is refused there by name."""
INT32_ELEMENTS = 2**31 - 1
FIRST_TORCH_WITH_LONG_INDEX = (2, 14)


class FlexBackend(AttentionBackend):
    """Block masks straight from the block table: the cache is never copied, and only live blocks are read.

    :param config: the user's tiles and mask blocks; ``None`` leaves them to the kernels.
    """

    name = "flex"

    def __init__(self, config: AttentionConfig | None = None) -> None:
        self._config = config or AttentionConfig()

    def configured(self, config: AttentionConfig, device: DeviceFacts) -> FlexBackend:
        """With the user's tiles, which a layer may not fit."""
        return FlexBackend(config)

    def capabilities(self, device: DeviceFacts) -> Capabilities:
        """Nothing outside :data:`DEVICE_TYPES`; on a GPU the limits of torch's Triton templates.

        Batch invariance: on CUDA and CPU, where one tile and one order of blocks serve every query.
        """
        known = device.device_type in DEVICE_TYPES
        cpu = device.device_type == "cpu"
        dtypes = frozenset(DTYPES if known else ())
        return Capabilities(
            name=self.name,
            dtypes=dtypes,
            kv_cache_dtypes=dtypes,
            same_kv_dtype=True,
            kernel_block_multiple=16,
            kernel_block_sizes=KERNEL_BLOCKS,
            # Triton's matrix products want at least 16 columns, and tiles that fit in shared memory.
            head_size_multiple=1 if cpu else 16,
            max_head_size=1 << 30 if cpu else 256,
            layouts=LAYOUTS if known else (),
            batch_invariant=device.device_type in ("cpu", "cuda"),
            sliding_window=known,
            soft_cap=known,
            # A sink rescales the output by its log-sum-exp, which the compiled CPU kernel does not return.
            sinks=device.device_type in ("cuda", "xpu"),
            encoder_only=known,
            mla=known,
            reads_unwritten_slots=True,
            max_view_elements=None if cpu or _has_tma(device) or _indexes_in_64_bits(device) else INT32_ELEMENTS,
        )

    def declared_refusals(self, request: LayerRequest, device: DeviceFacts) -> tuple[str, ...]:
        """Tiles that ``device`` cannot follow, and query heads that they cannot hold."""
        config = replace(self._config, batch_invariant=request.batch_invariant)
        try:
            check_layer(config, request.spec, device, invariant=self.capabilities(device).batch_invariant)
        except BackendError as error:
            return (error.message,)
        return ()

    def workspace(self, request: LayerRequest, device: DeviceFacts, limits: StepLimits) -> Workspace:
        """Block lists, which steps share, and the run that long queries read K and V from; latents have neither.

        The numbers of the shortest kernel block, which has the longest lists; 8 bytes a block of the pool come on top.
        """
        if request.spec.mla:
            return Workspace()
        config = replace(self._config, batch_invariant=request.batch_invariant)
        block = config.flex_attn_kv_block_size or config.flex_attn_block_n or KERNEL_BLOCKS[0]
        settings = flex_settings(
            BuildRequest(
                device=device,
                spec=request.spec,
                dtype=request.dtype,
                block_size=block,
                kernel_block_size=block,
                num_blocks=0,
                max_num_seqs=limits.max_num_seqs,
                max_num_batched_tokens=limits.max_num_batched_tokens,
                max_model_len=limits.max_model_len,
                config=config,
            ),
            self.capabilities(device),
        )
        return Workspace(kept_bytes=settings.buffer_bytes, layer_bytes=settings.run_bytes)

    def supports_batch_invariance(self, device: DeviceFacts) -> bool:
        """Whether the same request has the same bits in every batch, once ``batch_invariant`` asks for it."""
        return self.capabilities(device).batch_invariant

    def probe(self, device: DeviceFacts) -> Probe:
        """Torch, a device type that flex_attention accepts, and the compiler that its templates need."""
        if device.device_type not in DEVICE_TYPES:
            return _no(f"torch's flex_attention serves {', '.join(DEVICE_TYPES)}, not {device.device_type}")
        if find_spec("torch") is None:
            return _no("flex needs torch, which is not installed: pip install torch")
        return _probe_cpu() if device.device_type == "cpu" else _probe_triton(device)

    def build(self, request: BuildRequest) -> AttentionImpl:
        """Check the request against the settings and the address range; compile on first use.

        :raises BackendError: with both numbers, for a block, tile, dtype or cache that cannot be served.
        """
        settings = flex_settings(request, self.capabilities(request.device))
        from .impl import FlexAttention

        return FlexAttention(settings)


def _no(reason: str) -> Probe:
    return Probe(available=False, reason=reason)


def _probe_cpu() -> Probe:
    """The C++ template: AVX2 and a compiler."""
    try:
        import torch
        from torch._inductor.cpp_builder import get_cpp_compiler

        if torch.xpu.is_available():
            return _no("torch compiles flex for CPU only where it sees no xpu device, and here it sees one")
        isa = torch.backends.cpu.get_cpu_capability()
        if not isa.startswith("AVX"):
            return _no(f"flex on CPU needs AVX2, and torch reports {isa}")
        compiler = get_cpp_compiler()
    except Exception as error:  # a broken installation or a missing compiler is an answer, not a crash
        return _no(f"flex on CPU cannot compile: {error} (install g++)")
    return Probe(available=True, reason=f"flex_attention of torch {torch.__version__} with {isa} and {compiler}")


def _probe_triton(device: DeviceFacts) -> Probe:
    """The Triton templates: a torch that sees the device, and triton."""
    try:
        import torch

        module = getattr(torch, device.device_type, None)
        if module is None or not module.is_available():
            return _no(f"torch {torch.__version__} sees no {device.device_type} device")
    except Exception as error:  # a broken torch is an answer, not a crash
        return _no(f"torch does not load: {error}")
    if device.device_type in ("cuda", "xpu") and find_spec("triton") is None:
        return _no("flex needs triton, which is not installed: pip install triton")
    return Probe(available=True, reason=f"flex_attention of torch {torch.__version__} on {device.name}")


def _has_tma(device: DeviceFacts) -> bool:
    """Whether kernels may address tokens instead of elements (Hopper and later), so that nothing wraps."""
    return device.device_type == "cuda" and (device.compute_capability or (0, 0)) >= (9, 0)


def _indexes_in_64_bits(device: DeviceFacts) -> bool:
    """Whether the probed torch addresses K and V with 64 bits; an unknown torch is taken to wrap."""
    version = dict(device.versions).get("torch", "0.0")
    major, minor, *_ = (int("".join(filter(str.isdigit, part)) or 0) for part in f"{version}.0".split("."))
    return (major, minor) >= FIRST_TORCH_WITH_LONG_INDEX
