"""Registers the xpu platform: what the entry point ``xpu`` of the group ``makeready`` loads."""

from __future__ import annotations

from makeready.platforms.probing import probe_xpu
from makeready.platforms.provider import PlatformProvider
from makeready.platforms.xpu import XPU
from makeready.plugins.hookspecs import hookimpl


@hookimpl
def makeready_platforms() -> tuple[PlatformProvider, ...]:
    """The xpu platform; its attention backends (flash, flex, reference) come with makeready itself."""
    return (PlatformProvider(name="xpu", platform=XPU, probe=probe_xpu, distribution="makeready-xpu"),)
