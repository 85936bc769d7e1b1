"""Refusals of shapes that no mixer could serve, before a kernel reads memory that is not there."""

from __future__ import annotations

import torch

from ...errors import BackendError
from .batch import StateBatch, check_batch


def check_tokens(batch: StateBatch, **tensors: torch.Tensor | None) -> int:
    """T, once the step is consistent, all tensors have T tokens and their last axis is contiguous.

    :raises RequestError: from :func:`check_batch`.
    :raises BackendError: for a tensor of another length, or one that kernels could not read.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first = next(iter(given))
    tokens = given[first].shape[0]
    check_batch(batch, tokens)
    for name, tensor in given.items():
        if tensor.shape[0] != tokens:
            raise _wrong(name, f"{tensor.shape[0]} tokens", f"{tokens}, as {first} has")
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise _wrong(name, f"a stride of {tensor.stride(-1)} along its last axis", "1")
    return tokens


def check_shape(name: str, tensor: torch.Tensor | None, *shape: int) -> None:
    """Refuse a tensor of another shape; -1 matches any size.

    :raises BackendError: with both shapes.
    """
    if tensor is None:
        return
    fits = tensor.dim() == len(shape) and all(
        want in (-1, size) for want, size in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        expected = tuple("any" if want == -1 else want for want in shape)
        raise _wrong(name, f"shape {tuple(tensor.shape)}", f"{expected}")


def check_divides(what: str, heads: int, groups: int) -> None:
    """Refuse heads that do not divide evenly over groups.

    :raises BackendError: with both numbers.
    """
    if groups < 1 or heads % groups:
        raise _wrong(what, f"{heads} heads over {groups} groups", "a number of groups that divides the heads")


def check_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor,
    batch: StateBatch,
    activation: str | None,
) -> None:
    """Refuse arguments of :meth:`MixerKernels.causal_conv` that contradict each other.

    :raises BackendError: naming the argument and what it should be.
    """
    check_tokens(batch, x=x)
    channels, kernel = weight.shape
    check_shape("x", x, -1, channels)
    check_shape("bias", bias, channels)
    check_shape("state", state, -1, channels, -1)
    if state.shape[-1] < kernel - 1:
        raise _wrong("state", f"{state.shape[-1]} columns", f"at least {kernel - 1}, one less than the kernel's width")
    if activation not in (None, "silu"):
        raise _wrong("activation", repr(activation), "'silu' or None")


def check_mamba2(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor,
    batch: StateBatch,
    D: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    z: torch.Tensor | None,
) -> None:
    """Refuse arguments of :meth:`MixerKernels.mamba2` that contradict each other.

    :raises BackendError: naming the argument and what it should be.
    """
    tokens = check_tokens(batch, x=x, dt=dt, B=B, C=C, z=z)
    heads, width = x.shape[1:]
    groups, size = B.shape[1:]
    check_divides("B", heads, groups)
    check_shape("dt", dt, tokens, heads)
    check_shape("A", A, heads)
    check_shape("C", C, tokens, groups, size)
    check_shape("state", state, -1, heads, width, size)
    check_shape("z", z, tokens, heads, width)
    check_shape("dt_bias", dt_bias, heads)
    check_shape("D", D, *((heads,) if D is not None and D.dim() == 1 else (heads, width)))


def check_delta(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    batch: StateBatch,
) -> None:
    """Refuse arguments of a delta rule that contradict each other; ``g`` has two axes or KDA's three.

    :raises BackendError: naming the argument and what it should be.
    """
    tokens = check_tokens(batch, q=q, k=k, v=v, g=g, beta=beta)
    key_heads, size = k.shape[1:]
    heads, width = v.shape[1:]
    check_divides("k", heads, key_heads)
    check_shape("q", q, tokens, key_heads, size)
    check_shape("g", g, *((tokens, heads) if g.dim() == 2 else (tokens, heads, size)))
    check_shape("beta", beta, tokens, heads)
    check_shape("state", state, -1, heads, size, width)


def grouped(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor,
    batch: StateBatch,
    z: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """B and C of :meth:`MixerKernels.mamba1` as (T, G, N) and the state as (num_slots, G, I / G, N), all checked.

    :raises BackendError: naming the argument and what it should be.
    """
    tokens = check_tokens(batch, x=x, dt=dt, B=B, C=C, z=z)
    inner, size = A.shape
    keys, queries = (side.unsqueeze(1) if side.dim() == 2 else side for side in (B, C))
    groups = keys.shape[1]
    check_divides("B", inner, groups)
    check_shape("x", x, tokens, inner)
    check_shape("dt", dt, tokens, inner)
    check_shape("z", z, tokens, inner)
    check_shape("B", keys, tokens, groups, size)
    check_shape("C", queries, tokens, groups, size)
    pages = state
    if state.dim() == 3 and state.shape[1] == inner:
        pages = state.view(state.shape[0], groups, inner // groups, size)
    check_shape("state", pages, -1, groups, inner // groups, size)
    return keys, queries, pages


def _wrong(name: str, found: str, expected: str) -> BackendError:
    return BackendError(f"{name} has {found}; expected {expected}", option=name, value=found, expected=expected)
