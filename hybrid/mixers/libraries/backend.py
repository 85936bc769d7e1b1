"""What mixer backends that stand on a library have in common. No torch here: ``plan`` and ``doctor`` read it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ....attention_backends.installed import (
    found_module,
    installed_version,
    lacking_parameters,
    load_attribute,
    release,
)
from ....attention_backends.interface import Capabilities, Probe
from ....config import DTYPES
from ....device import DeviceFacts
from ....errors import BackendError
from ..backend import MixerBackend
from ..environment import interpreted

if TYPE_CHECKING:
    from ..interface import MixerKernels

HALF = frozenset({"bfloat16", "float16"})


@dataclass(frozen=True, slots=True, kw_only=True)
class LibraryFunction:
    """A function that we call, and what we pass to it by name: another release may lack it."""

    module: str
    name: str
    parameters: tuple[str, ...]


class LibraryMixerBackend(MixerBackend):
    """A library's prefill kernels between gathered and scattered states; one-step kernels of our own for decodes.

    :param version_of: version of a distribution, or ``None``.
    :param load: returns ``module.name``; imports the library.
    :param found: whether the top of a module could be imported.
    """

    title: str
    """What people call it."""
    distributions: tuple[str, ...]
    """Distributions that bring it; the first that is installed gives the version."""
    oldest: tuple[int, int]
    """The oldest release whose functions were read or run."""
    install: str
    """How to get it."""
    functions: Mapping[str, LibraryFunction]
    """By the names under which :meth:`kernels` gets them."""
    kinds: frozenset[str]
    """Kinds of state layers that they serve."""
    device_types: frozenset[str]
    lacks: Mapping[str, str]
    """Why a kind of state layers is not served, where the library has something like it."""

    def __init__(
        self,
        version_of: Callable[[str], str | None] = installed_version,
        load: Callable[[str, str], Any] = load_attribute,
        found: Callable[[str], bool] = found_module,
    ) -> None:
        self._version_of, self._load, self._found = version_of, load, found

    @abstractmethod
    def kernels(self, functions: Mapping[str, Callable[..., Any]]) -> MixerKernels:
        """The mixers on these functions of the library."""

    def capabilities(self, device: DeviceFacts) -> Capabilities:
        """Tokens of 16 bits: in float32 these libraries round products to tf32. States of any dtype.

        Not batch invariant: what is summed in which order follows from where a request starts in the packed step, or
        from programs that were timed when they first ran.
        """
        dtypes = HALF if device.device_type in self.device_types else frozenset[str]()
        return Capabilities(
            name=self.name,
            dtypes=frozenset(DTYPES) if interpreted() else dtypes,
            kv_cache_dtypes=frozenset(DTYPES),
            is_ssm=True,
        )

    def mixers(self, device: DeviceFacts) -> frozenset[str]:
        """What the library has operators for."""
        return self.kinds

    def why_not(self, kind: str) -> str | None:
        """What the library's own operator of that kind cannot do."""
        return self.lacks.get(kind)

    def probe(self, device: DeviceFacts) -> Probe:
        """Not for this device, not installed, too old, not loadable, another signature, or there: in a sentence."""
        refusal = self.refusal(device)
        if refusal is not None:
            return Probe(available=False, reason=refusal)
        return Probe(available=True, reason=f"{self.title} {self.version() or 'of unknown version'} loads")

    def build(self, device: DeviceFacts) -> MixerKernels:
        """Loads the library; its kernels are compiled when a layer first runs.

        :raises BackendError: where :meth:`probe` says that it is not available.
        """
        refusal = self.refusal(device)
        if refusal is not None:
            raise BackendError(
                f"mixers by {self.name}: {refusal}", option="mixer_backend", value=self.name, expected="another backend"
            )
        return self.kernels({key: self._load(wanted.module, wanted.name) for key, wanted in self.functions.items()})

    def version(self) -> str | None:
        """Of the first distribution that is installed."""
        return next((found for name in self.distributions if (found := self._version_of(name)) is not None), None)

    def refusal(self, device: DeviceFacts) -> str | None:
        """The first thing in the way, or ``None``; imports the library if nothing else is."""
        if not self.capabilities(device).dtypes:
            return f"{self.title} has kernels for {', '.join(sorted(self.device_types))}, not for {device.device_type}"
        for package in ("torch", "triton"):
            if find_spec(package) is None:
                return f"{self.name} needs {package} for decodes, which is not installed: pip install {package}"
        if not all(self._found(wanted.module) for wanted in self.functions.values()):
            return f"{self.title} is not installed ({self.install})"
        version = self.version()
        if version is not None and release(version) < self.oldest:
            least = ".".join(map(str, self.oldest))
            return f"{self.title} {version} is older than {least}, the oldest release that is known ({self.install})"
        for wanted in self.functions.values():
            refusal = self._load_refusal(wanted)
            if refusal is not None:
                return refusal
        return None

    def _load_refusal(self, wanted: LibraryFunction) -> str | None:
        """Import errors (a kernel library may raise anything) and another signature, as a sentence."""
        called = f"{self.title} {self.version() or 'of unknown version'}"
        try:
            lacking = lacking_parameters(self._load(wanted.module, wanted.name), wanted.parameters)
        except (Exception, SystemExit) as error:
            return f"{called} does not load: {type(error).__name__}: {' '.join(str(error).split())}"
        if lacking:
            return (
                f"{called} has a {wanted.name} without {', '.join(lacking)}; install one that has them ({self.install})"
            )
        return None
