"""What a set of mixer kernels declares, and who builds it. No torch: ``plan`` and ``doctor`` read it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...attention_backends.interface import Capabilities, Probe
from ...cache.block_size import Constraint
from ...config import AttentionConfig
from ...device import DeviceFacts

if TYPE_CHECKING:
    from .interface import MixerKernels

MIXERS: tuple[str, ...] = ("mamba1", "mamba2", "gdn", "kda", "shortconv", "lightning", "zaya")
"""Kinds of state layers (``MambaSpec.kind``) that the interface computes; ``zaya`` is convolutions only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixerRequest:
    """What the state layers of one kind ask of mixer kernels."""

    layer: int
    kind: str
    """``MambaSpec.kind``."""
    dtype: str
    """Dtype of tokens."""
    state_dtypes: tuple[str, ...]
    """Dtypes in which the states are stored, convolution first."""


class MixerBackend(ABC):
    """A way to compute state mixers: the counterpart of an attention backend, with ``is_ssm`` true."""

    name: str

    @abstractmethod
    def capabilities(self, device: DeviceFacts) -> Capabilities:
        """What these kernels can do on ``device``; ``is_ssm`` is true; no probing, no torch."""

    @abstractmethod
    def mixers(self, device: DeviceFacts) -> frozenset[str]:
        """Kinds of state layers that they compute on ``device``."""

    def configured(self, config: AttentionConfig, device: DeviceFacts) -> MixerBackend:
        """These kernels as the user's settings make them; their capabilities say so from then on."""
        return self

    def why_not(self, kind: str) -> str | None:
        """Why a kind of state layers is not among :meth:`mixers`, where there is more to say than that it is not."""
        return None

    def block_size_constraints(self, kinds: frozenset[str], device: DeviceFacts) -> tuple[Constraint, ...]:
        """What the kernels of these kinds of state layers ask of the block size, each with its owner."""
        return ()

    @abstractmethod
    def probe(self, device: DeviceFacts) -> Probe:
        """Whether what they need is installed and loads. Never raises."""

    @abstractmethod
    def build(self, device: DeviceFacts) -> MixerKernels:
        """The kernels, ready to run; imports torch.

        :raises BackendError: for a device that :meth:`capabilities` leaves out.
        """
