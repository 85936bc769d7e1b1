"""Which software is installed, read from package metadata alone: nothing is imported."""

from __future__ import annotations

from importlib import metadata

TRITON_PACKAGES: tuple[str, ...] = (
    "triton",
    "triton-xpu",
    "pytorch-triton",
    "pytorch-triton-xpu",
    "pytorch-triton-rocm",
    "triton-windows",
)
"""Distributions that all install a package folder named ``triton``."""

IPEX = "intel-extension-for-pytorch"
XPU_KERNELS = "vllm-xpu-kernels"


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, or ``None``. Never raises."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
    except Exception:  # a damaged dist-info folder: the files are there, the version is not
        return "unknown"


def installed_versions(*distributions: str) -> tuple[tuple[str, str], ...]:
    """(name, version) of those that are installed, in the order asked."""
    found = ((name, installed_version(name)) for name in distributions)
    return tuple((name, version) for name, version in found if version is not None)


def triton_clash() -> str | None:
    """A sentence if two distributions share the folder ``triton``, so that the last one installed wins."""
    found = installed_versions(*TRITON_PACKAGES)
    if len(found) < 2:
        return None
    names = " and ".join(f"{name} {version}" for name, version in found)
    return (
        f"{names} are both installed and overwrite each other's folder 'triton'; "
        f"uninstall all of them, then install only the one that your torch needs"
    )


def ipex_clash() -> str | None:
    """A sentence if the installed IPEX does not load in the installed torch (they must agree in major.minor)."""
    ipex, torch = installed_version(IPEX), installed_version("torch")
    if ipex is None or torch is None or _minor(ipex) == _minor(torch):
        return None
    return (
        f"{IPEX} {ipex} loads only in torch {_minor(ipex)}.*, found torch {torch}; "
        f"use an environment of its own with torch {_minor(ipex)} for it"
    )


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])
