"""Registers the cuda platform: what the entry point ``cuda`` of the group ``makeready`` loads."""

from __future__ import annotations

from makeready.platforms.cuda import CUDA
from makeready.platforms.probing import probe_cuda
from makeready.platforms.provider import PlatformProvider
from makeready.plugins.hookspecs import hookimpl


@hookimpl
def makeready_platforms() -> tuple[PlatformProvider, ...]:
    """The cuda platform; its attention backends (flash, flex, reference) come with makeready itself."""
    return (PlatformProvider(name="cuda", platform=CUDA, probe=probe_cuda, distribution="makeready-cuda"),)
