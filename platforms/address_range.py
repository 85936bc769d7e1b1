"""How many blocks every kernel of a pool can address: what lies beyond is planned around or refused, never wrapped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..attention_backends.interface import Capabilities
from ..cache.layout import Layout
from ..cache.specs import AttentionSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """The backend that addresses the fewest blocks of a pool."""

    num_blocks: int
    """Blocks that it can address, the null block included."""
    backend: str
    max_view_elements: int
    elements_per_block: int
    """From a layer's page in one block to its page in the next, in elements."""

    def sentence(self) -> str:
        """Why no more blocks can be used."""
        return (
            f"{self.backend} addresses {self.max_view_elements} elements of a layer's K or V, and a block is "
            f"{self.elements_per_block} elements on: {self.num_blocks} blocks are in its reach"
        )


def shortest_reach(layout: Layout, backends: Mapping[int, Capabilities]) -> Reach | None:
    """The shortest reach over all attention layers; ``None`` if every backend addresses 64 bits.

    MLA layers do not count: their latents are gathered before a kernel sees them.

    :param backends: per attention layer the capabilities of its backend.
    """
    found = []
    for layer in layout.layers():
        spec = layer.spec
        if not isinstance(spec, AttentionSpec) or spec.mla:
            continue
        capabilities = backends[layer.layer]
        if capabilities.max_view_elements is None:
            continue
        step = layout.attention_view(layer)[0].strides[0]
        found.append(
            Reach(
                num_blocks=capabilities.max_view_elements // step,
                backend=capabilities.name,
                max_view_elements=capabilities.max_view_elements,
                elements_per_block=step,
            )
        )
    return min(found, key=lambda reach: reach.num_blocks, default=None)
