"""Intel Extension for PyTorch as a provider of flash kernels: whether it is here, and what it can do. No torch here."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

from ...device import DeviceFacts
from ...errors import BackendError
from ..installed import installed_version
from ..interface import AttentionImpl, BuildRequest, Capabilities, Probe
from .providers import FlashProvider

MODULE = "intel_extension_for_pytorch"
INSTALL = "pip install torch==2.8.0 intel-extension-for-pytorch==2.8.0"
DTYPES = frozenset({"float32", "bfloat16", "float16"})
KERNELS = ("single_query_cached_kv_attention", "flash_attn_varlen_func")


def load_kernels() -> Any:
    """IPEX's ``PagedAttention`` class, whose class methods are the kernels. Imports torch and IPEX (seconds)."""
    return import_module(MODULE).llm.modules.PagedAttention


class IpexProvider(FlashProvider):
    """IPEX's paged decode and varlen kernels, on the CPU.

    IPEX ended with 2.8, whose wheels on PyPI are for the CPU. It is bound to torch 2.8: with any other torch its
    import leaves the process half changed, so versions are compared before anything is imported.

    :param version_of: version of a distribution, or ``None``.
    :param load: imports IPEX and returns its ``PagedAttention``.
    """

    name = "ipex"
    device_types = frozenset({"cpu", "xpu"})

    def __init__(
        self,
        version_of: Callable[[str], str | None] = installed_version,
        load: Callable[[], Any] = load_kernels,
    ) -> None:
        self._version_of = version_of
        self._load = load

    def constraints(self, device: DeviceFacts) -> Capabilities:
        """What was measured with IPEX 2.8.0 on a CPU (docs/ipex.md). Any block size; whole HND pages only."""
        if device.device_type != "cpu":
            return Capabilities(name="flash", dtypes=frozenset(), kv_cache_dtypes=frozenset(), layouts=())
        return Capabilities(
            name="flash",
            owner="flash by ipex",
            dtypes=DTYPES,
            kv_cache_dtypes=DTYPES,
            max_head_size=576,
            layouts=("HND", "cross_layer_HND"),
            sliding_window=True,
            soft_cap=True,
            encoder_only=True,
            mla=True,
        )

    def probe(self, device: DeviceFacts) -> Probe:
        """Not installed, bound to another torch, not loadable, not for this device, or there: each in a sentence."""
        refusal = self._why_not(device)
        if refusal is not None:
            return Probe(available=False, reason=refusal)
        version = self._version_of("intel-extension-for-pytorch")
        return Probe(
            available=True, reason=f"Intel Extension for PyTorch {version} is installed, and fits torch {self._torch()}"
        )

    def build(self, request: BuildRequest) -> AttentionImpl:
        """The kernels, once they agreed with the reference on a small cache of the request's own shape.

        :raises BackendError: where IPEX is not available, for a request outside :meth:`constraints`, and where the
            self-check differs.
        """
        refusal = self._why_not(request.device) or _outside(request, self.constraints(request.device))
        if refusal is not None:
            raise BackendError(f"flash by ipex: {refusal}", option="backend", value="flash", expected="another backend")
        from .ipex_attention import IpexAttention
        from .self_check import check_against_reference

        attention = IpexAttention(self._load(), request.spec)
        check_against_reference(attention, request, provider="ipex")
        return attention

    def _torch(self) -> str | None:
        return self._version_of("torch")

    def _why_not(self, device: DeviceFacts) -> str | None:
        """The first thing in the way, or ``None``."""
        if device.device_type == "xpu":
            return (
                "Intel Extension for PyTorch is not used on XPU: its kernels there take only K and V that are "
                "contiguous, makeready keeps K and V of a block in one page, and no copy of the cache is made; "
                "never run on an XPU (vllm-xpu-kernels reads such pages)"
            )
        ipex, torch = self._version_of("intel-extension-for-pytorch"), self._torch()
        if ipex is None:
            return f"Intel Extension for PyTorch is not installed ({INSTALL})"
        if torch is None or _minor(torch) != _minor(ipex):
            found = "torch is not installed" if torch is None else f"torch {torch} is installed"
            return f"Intel Extension for PyTorch {ipex} needs torch {_minor(ipex)}, but {found} ({INSTALL})"
        return self._why_not_loaded(ipex)

    def _why_not_loaded(self, ipex: str) -> str | None:
        """Import errors (IPEX may even exit from its import) and missing kernels, as a sentence."""
        try:
            kernels = self._load()
        except (Exception, SystemExit) as error:
            return f"Intel Extension for PyTorch {ipex} does not import: {type(error).__name__}: {error}"
        lacking = [name for name in KERNELS if not hasattr(kernels, name)]
        if lacking:
            return f"Intel Extension for PyTorch {ipex} lacks the kernels {', '.join(lacking)}"
        return None


def _minor(version: str) -> str:
    """``2.8`` of ``2.8.0+cpu``."""
    return ".".join(re.split(r"[.+]", version)[:2])


def _outside(request: BuildRequest, can: Capabilities) -> str | None:
    """Why the request is outside what these kernels can do, or ``None``."""
    spec = request.spec
    if request.dtype not in can.dtypes:
        return f"dtype {request.dtype} is none of {', '.join(sorted(can.dtypes))}"
    if spec.dtype != request.dtype:
        return f"K and V are kept as {spec.dtype}, but these kernels read only the queries' dtype {request.dtype}"
    if not spec.mla and spec.head_size_v != spec.head_size:
        return f"head size of K {spec.head_size} and of V {spec.head_size_v} differ; these kernels take one for both"
    if spec.head_size > can.max_head_size:
        return f"head size {spec.head_size} is above {can.max_head_size}, the largest that was tried"
    if spec.sliding_window == 1:
        return "a sliding window of 1 is computed wrong by the varlen kernel, which takes it for no window"
    return None
