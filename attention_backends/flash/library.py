"""Providers that are one function of one library: what is the same in all of them. No torch here."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...cache.specs import AttentionSpec
from ...device import DeviceFacts
from ...errors import BackendError
from ..installed import found_module, installed_version, lacking_parameters, load_attribute
from ..interface import AttentionImpl, BuildRequest, Probe
from .providers import FlashProvider, build_refusals

if TYPE_CHECKING:
    import torch

    from .one_call import KernelCall

HALF = frozenset({"bfloat16", "float16"})


class LibraryProvider(FlashProvider):
    """A library with one function that serves a whole step.

    :param version_of: version of a distribution, or ``None``.
    :param load: returns the function; imports the library.
    """

    title: str
    """What people call it."""
    module: str
    """Where :attr:`function` is imported from."""
    function: str
    parameters: tuple[str, ...]
    """What we pass to it by name: another release may lack one."""
    distributions: tuple[str, ...]
    """Distributions that bring it; the first that is installed gives the version."""
    install: str
    """How to get it."""
    capturable: bool = False
    """Whether the call was seen to run inside a CUDA graph."""
    reads_unwritten_slots: bool = False

    def __init__(
        self,
        version_of: Callable[[str], str | None] = installed_version,
        load: Callable[[str, str], Any] = load_attribute,
        found: Callable[[str], bool] = found_module,
    ) -> None:
        self._version_of, self._load, self._found = version_of, load, found

    @abstractmethod
    def device_refusal(self, device: DeviceFacts) -> str | None:
        """Why these kernels do not run on ``device``, or ``None``. By its facts: nothing is loaded."""

    @abstractmethod
    def attend(self, function: Callable[..., Any], call: KernelCall) -> torch.Tensor:
        """Call the library's function; (T, Hq, D)."""

    def version(self) -> str | None:
        """Of the first distribution that is installed."""
        return next((found for name in self.distributions if (found := self._version_of(name)) is not None), None)

    def probe(self, device: DeviceFacts) -> Probe:
        """Not for this device, not installed, not loadable, another signature, or there: each in a sentence."""
        refusal = self.why_not(device)
        if refusal is not None:
            return Probe(available=False, reason=refusal)
        return Probe(available=True, reason=f"{self.title} {self.version() or 'of unknown version'} loads")

    def why_not(self, device: DeviceFacts) -> str | None:
        """The first thing in the way, or ``None``."""
        if refusal := self.device_refusal(device):
            return refusal
        if not self._found(self.module):
            return f"{self.title} is not installed ({self.install})"
        return self.version_refusal() or self._load_refusal()

    def version_refusal(self) -> str | None:
        """Why this version cannot serve, before anything is imported."""
        return None

    def loaded_refusal(self) -> str | None:
        """Why the library, though it imports, cannot serve."""
        return None

    def spec_refusal(self, spec: AttentionSpec) -> str | None:
        """One head size for queries, K and V."""
        if spec.mla or spec.head_size == spec.head_size_v:
            return None
        return f"takes one head size, and the layer's K have {spec.head_size} and its V {spec.head_size_v}"

    def build(self, request: BuildRequest) -> AttentionImpl:
        """The kernels, once they agreed with the reference on a small cache of the request's own shape.

        :raises BackendError: where the library is not available, for a request outside :meth:`constraints`, and where
            the self-check differs.
        """
        refusal = self.why_not(request.device) or "; ".join(build_refusals(self, request))
        if refusal:
            raise BackendError(
                f"flash by {self.name}: {refusal}",
                option="flash_provider",
                value=self.name,
                expected="another provider or backend",
            )
        from .one_call import OneCallAttention
        from .self_check import check_against_reference

        function = self._load(self.module, self.function)
        attention = OneCallAttention(
            lambda call: self.attend(function, call),
            provider=self.name,
            capturable=self.capturable,
            reads_unwritten_slots=self.reads_unwritten_slots,
            block_size=request.block_size,
        )
        check_against_reference(attention, request, provider=self.name, order=request.layout or "NHD", thorough=False)
        return attention

    def _load_refusal(self) -> str | None:
        """Import errors (a kernel library may raise anything) and another signature, as a sentence."""
        try:
            unusable = self.loaded_refusal()
            if unusable is not None:
                return unusable
            function = self._load(self.module, self.function)
            lacking = lacking_parameters(function, self.parameters)
        except (Exception, SystemExit) as error:
            said = " ".join(str(error).split())
            return f"{self.title} {self.version() or ''} does not load: {type(error).__name__}: {said}".replace(
                "  ", " "
            )
        if lacking:
            return (
                f"{self.title} {self.version() or 'of unknown version'} has a {self.function} without "
                f"{', '.join(lacking)}; install one that has them ({self.install})"
            )
        return None


def capability_refusal(title: str, device: DeviceFacts, served: tuple[int, ...], least: tuple[int, int]) -> str | None:
    """Why a CUDA device's compute capability is not served.

    :param served: major versions.
    :param least: lowest (major, minor).
    """
    found = device.compute_capability
    if found is None or (found[0] in served and found >= least):
        return None
    majors = ", ".join(f"{major}.x" for major in served)
    return f"{title} runs on compute capability {majors}, and this device has {found[0]}.{found[1]}"
