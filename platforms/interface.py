"""A platform is data: one kind of device and all that differs because of it.

A vendor makes one :class:`Platform` with its numbers. Nothing is overridden: what a platform needs beyond the
common rules it declares as a constraint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from ..cache.block_size import Constraint
from ..device import DeviceFacts
from .decision import BlockSizeDecision, BlockSizeRequest
from .phases import decide

__all__ = ["BlockSizeDecision", "BlockSizeRequest", "Platform", "StateConstraint"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StateConstraint:
    """A constraint on the block size that holds where a model has states of these kinds."""

    kinds: frozenset[str]
    """Mixer names, as in ``MambaSpec.kind``."""
    constraint: Constraint


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """One kind of device."""

    name: str
    """What the user writes after ``--platform``."""
    device_type: str
    """What ``torch.device`` calls it."""
    default_block_size: int = 16
    """Tokens that phase 1 starts from."""
    backend_order: tuple[str, ...] = ("flash", "flex", "reference")
    """Attention backends that automatic selection tries, best first."""
    seldom_installed: tuple[str, ...] = ()
    """Backends whose software few machines have: used where it is, planned for only when asked, or last."""
    constraints: tuple[Constraint, ...] = ()
    """What every block size on this platform must satisfy."""
    state_constraints: tuple[StateConstraint, ...] = ()
    """What models with certain states must satisfy on top."""
    covers_skipped_layers: bool = True
    """Whether engine vLLM makes blocks longer for layers that keep the model's dtype; on a CPU it does not."""
    min_compute_capability: tuple[int, int] | None = None
    """Oldest CUDA compute capability that is served; ``None`` for all."""

    @property
    def planned_order(self) -> tuple[str, ...]:
        """``backend_order`` for a device that is not probed."""
        return (*(name for name in self.backend_order if name not in self.seldom_installed), *self.seldom_installed)

    def declared_constraints(self, request: BlockSizeRequest) -> tuple[Constraint, ...]:
        """What this platform adds for the states in ``request``."""
        kinds = {spec.kind for spec in request.states}
        found = [entry.constraint for entry in self.state_constraints if kinds & entry.kinds]
        return (*self.constraints, *found)

    def update_block_size_for_backend(self, request: BlockSizeRequest) -> BlockSizeDecision:
        """The KV block size and all pages, in phase 1 and phase 2; changes nothing.

        :raises BlockSizeError: naming the owners that clash, or the user's size and the nearest that work.
        :raises ConfigError: for a ``mamba_block_size`` where no states are kept.
        """
        return decide(
            request,
            platform=self.name,
            default_block_size=self.default_block_size,
            declared=self.declared_constraints(request),
            covers_skipped_layers=self.covers_skipped_layers,
        )

    def refusal(self, device: DeviceFacts) -> str | None:
        """Why ``device`` cannot be served, in a sentence; ``None`` if it can."""
        if device.platform != self.name:
            return f"device {device.name} belongs to platform {device.platform}, not to {self.name}."
        least, found = self.min_compute_capability, device.compute_capability
        if least is not None and found is not None and found < least:
            return (
                f"device {device.name} has compute capability {found[0]}.{found[1]}; {self.name} needs "
                f"{least[0]}.{least[1]} or newer."
            )
        return None
