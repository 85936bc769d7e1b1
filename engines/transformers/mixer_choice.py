"""Which kernels compute the state layers of packed steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...cache.specs import MambaSpec
from ...errors import BackendError
from .records import Ready

if TYPE_CHECKING:
    from ...hybrid.mixers.backend import MixerBackend
    from ...hybrid.mixers.interface import MixerKernels


def choose_kernels(asked: str, ready: Ready) -> tuple[bool, MixerKernels | None, str]:
    """Whether steps are packed, with which kernels, and why.

    :param asked: a name of kernels, or ``auto``, which takes the first that can serve every state layer, the reference
        never.
    :raises BackendError: for a name that is not known, or kernels that cannot serve.
    """
    kinds = {layer.spec.kind for group in ready.groups for layer in group.layers if isinstance(layer.spec, MambaSpec)}
    if not kinds:
        return True, None, "state_mixers: none needed; no layer keeps a state."
    known = {backend.name: backend for backend in _backends()}
    if asked != "auto" and asked not in known:
        raise BackendError(
            f"state_mixers {asked!r} is not known; known are auto, model, {', '.join(known)}",
            option="state_mixers",
            value=asked,
            expected=["auto", "model", *known],
        )
    refusals: list[str] = []
    for name in [name for name in known if name != "reference"] if asked == "auto" else [asked]:
        reason = _refusal(known[name], kinds, ready)
        if reason is None:
            why = "as asked" if asked != "auto" else "the first that computes every state layer"
            return True, known[name].build(ready.device), f"state_mixers: {name}, {why}."
        refusals.append(f"{name}: {reason}")
    if asked != "auto":
        raise BackendError(
            f"state_mixers {asked} cannot be used: {refusals[0]}", option="state_mixers", value=asked, expected="model"
        )
    return False, None, f"state_mixers: model, since no kernels serve ({'; '.join(refusals)})."


def _backends() -> tuple[MixerBackend, ...]:
    """Best first. The reference must be asked for: it is made to be right, not fast."""
    from ...hybrid.mixers.reference import ReferenceMixerBackend
    from ...hybrid.mixers.triton import TritonMixerBackend

    return (TritonMixerBackend(), ReferenceMixerBackend())


def _refusal(backend: MixerBackend, kinds: set[str], ready: Ready) -> str | None:
    missing = sorted(kinds - backend.mixers(ready.device))
    if missing:
        return f"it has no kernel for {', '.join(missing)}"
    if not backend.capabilities(ready.device).dtypes:
        return f"its kernels do not run on {ready.device.device_type}"
    probe = backend.probe(ready.device)
    return None if probe.available else probe.reason
