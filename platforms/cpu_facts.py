"""Facts about this machine's CPU, from the operating system alone."""

from __future__ import annotations

import os
import platform
from pathlib import Path

# Best first: the first whose flags are all there names the instruction set.
_ISA_FLAGS: tuple[tuple[str, frozenset[str]], ...] = (
    ("AMX", frozenset({"amx_tile", "amx_bf16"})),
    ("AVX512_BF16", frozenset({"avx512f", "avx512_bf16"})),
    ("AVX512", frozenset({"avx512f", "avx512bw", "avx512vl"})),
    ("AVX2", frozenset({"avx2", "fma"})),
    ("SVE", frozenset({"sve"})),
    ("NEON", frozenset({"asimd"})),
)


def core_count() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not Linux
        return os.cpu_count() or 1


def memory_bytes(
    meminfo: Path = Path("/proc/meminfo"), cgroup_limit: Path = Path("/sys/fs/cgroup/memory.max")
) -> int | None:
    """Memory that this process may use, in bytes: the machine's, or a container's limit if that is lower."""
    limits = [size for size in (_machine_memory(meminfo), _cgroup_limit(cgroup_limit)) if size]
    return min(limits) if limits else None


def isa(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """The best instruction set that kernels choose by, or ``None`` where the system does not say."""
    flags = frozenset(_cpuinfo_field(cpuinfo, ("flags", "Features")).split())
    return next((name for name, needed in _ISA_FLAGS if needed <= flags), None)


def model_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's name as the system tells it."""
    return _cpuinfo_field(cpuinfo, ("model name",)) or platform.processor() or platform.machine() or "unknown"


def _cpuinfo_field(cpuinfo: Path, keys: tuple[str, ...]) -> str:
    for line in _read(cpuinfo).splitlines():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""


def _machine_memory(meminfo: Path) -> int | None:
    for line in _read(meminfo).splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _cgroup_limit(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
