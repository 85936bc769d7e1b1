"""The hooks that a plugin may implement. Each returns values; the host collects, checks and freezes them.

A plugin marks its functions with :data:`hookimpl` and registers in the entry-point group ``makeready``. Hooks may
take fewer arguments than their specification, so that an argument that is added later breaks nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pluggy

from ..attention_backends.interface import AttentionBackend
from ..cache.block_size import Constraint
from ..device import DeviceFacts
from ..hybrid.mixers.backend import MixerBackend
from ..platforms.decision import BlockSizeRequest
from ..platforms.provider import PlatformProvider
from .records import KVConnectorProvider

if TYPE_CHECKING:
    from ..platforms.ready import Ready

PROJECT = "makeready"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a function of a plugin as the implementation of the hook of the same name."""


@hookspec
def makeready_platforms() -> Sequence[PlatformProvider]:  # type: ignore[empty-body]
    """The platforms that this plugin can run, called once when plugins are loaded.

    Looking for devices is the provider's ``probe``, which is called later and only when the platform is wanted.
    """


@hookspec
def makeready_attention_backends(device: DeviceFacts) -> Sequence[AttentionBackend]:  # type: ignore[empty-body]
    """The attention backends that this plugin has for ``device``, best first; none for devices it does not know.

    Also called for devices that are only planned for (``device.present`` is false), so it neither imports torch
    nor asks the device: that is the backend's ``probe``.
    """


@hookspec
def makeready_mixer_backends(device: DeviceFacts) -> Sequence[MixerBackend]:  # type: ignore[empty-body]
    """The kernels of state layers that this plugin has for ``device``; none for devices it does not know.

    As for attention backends it is called for devices that are only planned for, and probing comes later.
    """


@hookspec
def makeready_kv_connectors() -> Sequence[KVConnectorProvider]:  # type: ignore[empty-body]
    """The KV connectors that this plugin brings, called once when plugins are loaded."""


@hookspec
def makeready_block_size_constraints(request: BlockSizeRequest) -> Sequence[Constraint]:  # type: ignore[empty-body]
    """What else the KV block size must satisfy, such as a transfer that moves whole 64-token chunks.

    Each constraint names its owner, so that a conflict can say who asks for what. Raising is an error for the
    whole request: a constraint that is left out would give a wrong block size.
    """


@hookspec
def makeready_engine_startup(ready: Ready) -> str | None:
    """Called once when an engine is ready to run: plan, device, cache and built backends are in ``ready``.

    Returns a sentence that ``Ready.explain()`` shows, or ``None``. Raising stops the start-up.
    """
