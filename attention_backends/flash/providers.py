"""Who brings flash kernels: the interface a provider fills, and the libraries that are worth looking for."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from ...device import DeviceFacts
from ..interface import AttentionImpl, BuildRequest, Capabilities, Probe


class FlashProvider(ABC):
    """One library's paged attention kernels behind the flash backend. Torch only in :meth:`build`."""

    name: str
    """Short name of the library, such as ``ipex``."""
    device_types: frozenset[str]
    """Device types that it has an answer for, as ``torch.device`` calls them."""
    module: str = ""
    """What it imports, if that is one of :data:`LIBRARIES`: its probe speaks for the library then."""

    @abstractmethod
    def probe(self, device: DeviceFacts) -> Probe:
        """Whether the library is installed and loads here. Never raises; the reason says how to get it."""

    @abstractmethod
    def constraints(self, device: DeviceFacts) -> Capabilities:
        """What these kernels can do on ``device``, within what the flash backend declares. No probing."""

    @abstractmethod
    def build(self, request: BuildRequest) -> AttentionImpl:
        """The kernels ready to run.

        :raises BackendError: when the request is outside :meth:`constraints`.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """A third-party library with flash kernels, for a probe that can say what is missing."""

    title: str
    module: str
    """What would be imported."""
    device_types: frozenset[str]
    install: str
    """The command that installs it."""
    least: tuple[str, tuple[int, int]] | None = None
    """A distribution and its first version (major, minor) that has what is needed; ``None`` for any."""

    def describe(self) -> str:
        """One clause: found or not, and how to get it."""
        if _installed(self.module) and self.least is not None and _release(self.least[0]) < self.least[1]:
            name, (major, minor) = self.least
            return f"{self.title} needs {name} {major}.{minor}, and {_version(name)} is installed ({self.install})"
        if _installed(self.module):
            return f"{self.title} is installed ({self.module}) but no provider for it is registered"
        return f"{self.title} is not installed ({self.install})"


LIBRARIES: tuple[Library, ...] = (
    Library(
        title="FlashAttention 3",
        module="flash_attn_interface",
        device_types=frozenset({"cuda"}),
        install="build the hopper folder of github.com/Dao-AILab/flash-attention",
    ),
    Library(
        title="FlashAttention 4",
        module="flash_attn.cute",
        device_types=frozenset({"cuda"}),
        install="pip install --pre flash-attn-4",
    ),
    Library(
        title="torch's varlen attention with a block table",
        module="torch.nn.attention.varlen",
        device_types=frozenset({"cuda"}),
        install="pip install 'torch>=2.12' for CUDA",
        least=("torch", (2, 12)),
    ),
    Library(
        title="vLLM's XPU kernels",
        module="vllm_xpu_kernels",
        device_types=frozenset({"xpu"}),
        install="pip install vllm-xpu-kernels with its torch+xpu and oneAPI",
    ),
    Library(
        title="Intel Extension for PyTorch",
        module="intel_extension_for_pytorch",
        device_types=frozenset({"cpu", "xpu"}),
        install="pip install torch==2.8.0 intel-extension-for-pytorch==2.8.0",
    ),
)


def default_providers() -> tuple[FlashProvider, ...]:
    """The providers that come with the package, best first; a wheel passes its own to ``FlashBackend``."""
    from .ipex import IpexProvider

    return (IpexProvider(),)


def missing(device: DeviceFacts, libraries: Sequence[Library] = LIBRARIES) -> str:
    """Clauses on every library that could serve ``device``, joined; empty when there is none."""
    return "; ".join(lib.describe() for lib in libraries if device.device_type in lib.device_types)


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "none"


def _release(distribution: str) -> tuple[int, ...]:
    """Major and minor of what is installed; empty, which is less than any, if nothing is."""
    found = re.match(r"(\d+)\.(\d+)", _version(distribution))
    return tuple(map(int, found.groups())) if found else ()


def _installed(module: str) -> bool:
    """Whether ``module`` could be imported. Nothing is loaded: a submodule is looked for as a file."""
    top, *rest = module.split(".")
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):
        return False
    if spec is None or not rest:
        return spec is not None
    paths = [Path(location, *rest) for location in spec.submodule_search_locations or ()]
    return any(path.is_dir() or path.with_suffix(".py").is_file() for path in paths)
