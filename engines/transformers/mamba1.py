"""Mamba1 prefill in chunks: give the scan the state that transformers leaves out.

In jamba, zamba, mamba and falcon_mamba, a forward of several tokens scans from a zero state even when the cache holds
one (transformers 5.17 to 5.23). The scan is linear in its initial state, so the missing part is added to what the
model's own scan returns, whichever kernel that is: with ``a_t = exp(A * (dt_0 + ... + dt_t))``, token ``t`` lacks
``C_t . (a_t * h)`` before the gate, and the final state lacks ``a_T * h``.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional

from ...errors import UnsupportedModelError
from .families import Traits
from .paged_cache import PagedCache

Scan = Callable[..., Any]

_SWAP = threading.Lock()
"""Held while a modeling module's scan is exchanged, so that two engines cannot restore each other's."""


def scan_module(model: torch.nn.Module, traits: Traits) -> ModuleType | None:
    """The modeling module whose scan must be helped; None for families that need no help.

    :raises UnsupportedModelError: if this transformers has no such function there.
    """
    if traits.scan is None:
        return None
    module = sys.modules[type(model).__module__]
    if not callable(getattr(module, traits.scan, None)):
        raise UnsupportedModelError(
            f"{module.__name__} has no function {traits.scan!r}, through which the engine continues a prefill of"
            f" {traits.model_type}; this transformers is not one of those it was made for",
            option="transformers",
            value=module.__name__,
            expected=traits.scan,
        )
    return module


@contextmanager
def initial_states(module: ModuleType, name: str, cache: PagedCache) -> Iterator[None]:
    """While active, scans of this thread start from the states in ``cache``; the module is restored after."""
    thread = threading.get_ident()
    with _SWAP:
        stock: Scan = getattr(module, name)

        def scan(*args: Any, **kwargs: Any) -> Any:
            state = cache.take_scan_state() if threading.get_ident() == thread else None
            return stock(*args, **kwargs) if state is None else continued_scan(stock, state, *args, **kwargs)

        setattr(module, name, scan)
        try:
            yield
        finally:
            setattr(module, name, stock)


def continued_scan(
    stock: Scan,
    state: torch.Tensor,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **kwargs: Any,
) -> Any:
    """``stock(...)`` as if it had started from ``state``.

    :param stock: a selective scan from a zero state; all other arguments are its own.
    :param state: (B, I, N), the initial state.
    :param hidden_states: (B, I, T); ``dt`` and ``z`` are alike, ``B`` and ``C`` are (B, N, T), ``A`` is (I, N).
    :return: the output (B, I, T), with the final state (B, I, N) if ``return_last_state``.
    """
    output, final = stock(
        hidden_states, dt, A, B, C, D=D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus,
        return_last_state=True, **kwargs,
    )  # fmt: skip
    steps = dt if delta_bias is None else dt + delta_bias.to(dt.dtype)[..., None]
    steps = (functional.softplus(steps) if delta_softplus else steps).float()
    decay = torch.exp(A.float()[None, :, None, :] * steps.cumsum(-1)[..., None])
    carried = decay * state.float()[:, :, None, :]
    missing = torch.einsum("bitn,bnt->bit", carried, C.float())
    if z is not None:
        missing = missing * functional.silu(z.float())
    output = output + missing.to(output.dtype)
    final = final + carried[:, :, -1].to(final.dtype)
    return (output, final) if return_last_state else output
