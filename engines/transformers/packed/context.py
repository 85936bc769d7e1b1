"""What the operators of a running forward look up: the step, the layer, and where its pages are.

Compiled code and captured graphs call the operators of :mod:`.ops` with tensors and numbers only. Pages, block tables
and kernels stay out of what is compiled, so that layers alike share their code; the operators find them here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ....attention_backends.metadata import StepMetadata
from ....errors import IntegrityError
from ..binding import AttentionLayer, Binding, StateLayer

if TYPE_CHECKING:
    from ....hybrid.mixers.batch import StateBatch
    from ....hybrid.mixers.interface import MixerKernels


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedStep:
    """B requests with T tokens in all, packed request after request; the first ``num_decodes`` have one token each."""

    query_lens: tuple[int, ...]
    """Tokens of each request; of rows that pad a bucket, 1."""
    num_decodes: int
    """Requests that are past their prompt; they come first."""
    metadata: Mapping[int, StepMetadata]
    """Per attention group."""
    prepared: Mapping[int, Any]
    """Per attention layer, what its backend made of the group's metadata."""
    states: Mapping[int, StateBatch]
    """Per state group."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return sum(self.query_lens)


@dataclass(frozen=True, slots=True)
class Begun:
    """Attention that runs aside."""

    attended: torch.Tensor
    """What it makes."""
    read: tuple[torch.Tensor, ...]
    """Query, key and value, whose memory nobody else may have while it runs."""


class ForwardContext:
    """One forward in progress. ``layer`` moves on as decoder layers run.

    :param aside: a stream for attention that a layer's state mixers do not need; None to run one after the other.
    """

    def __init__(
        self, binding: Binding, kernels: MixerKernels | None, step: PackedStep, aside: torch.cuda.Stream | None = None
    ) -> None:
        self.step = step
        self.aside = aside
        self.begun: Begun | None = None
        """Attention aside, from its beginning to its end."""
        self.layer = -1
        self._binding = binding
        self._kernels = kernels
        self._scan_heads: dict[int, int] = {}
        self._called: dict[tuple[int, str], int] = {}

    @property
    def kernels(self) -> MixerKernels:
        """What computes state mixers.

        :raises IntegrityError: for a model that was bound without any.
        """
        if self._kernels is None:
            raise IntegrityError(f"layer {self.layer} runs a state mixer, and the engine has no kernels for it")
        return self._kernels

    def attention_layer(self) -> AttentionLayer:
        """The attention of the running layer.

        :raises IntegrityError: if the plan has none there.
        """
        layer = self._binding.attention.get(self.layer)
        if layer is None:
            raise IntegrityError(
                f"layer {self.layer} called attention, but the plan has attention in layers"
                f" {sorted(self._binding.attention)} only"
            )
        return layer

    def state_layer(self, kind: str) -> StateLayer:
        """The states of the running layer; notes that its ``kind`` is used in this forward.

        :raises IntegrityError: if the plan has none there.
        """
        layer = self._binding.states.get(self.layer)
        if layer is None:
            raise IntegrityError(
                f"layer {self.layer} asked for a state, but the plan has states in layers"
                f" {sorted(self._binding.states)} only"
            )
        self._called[self.layer, kind] = self._called.get((self.layer, kind), 0) + 1
        return layer

    def next_scan_head(self) -> int:
        """How many scans of the running layer came before: a mixer of several heads scans once per head, in order."""
        head = self._scan_heads.get(self.layer, 0)
        self._scan_heads[self.layer] = head + 1
        return head

    def batch(self, layer: StateLayer) -> StateBatch:
        """The step as the state mixers of ``layer`` see it."""
        return self.step.states[layer.group]

    def check_complete(self) -> None:
        """See that every state was moved on by this forward.

        :raises IntegrityError: naming a layer whose model code went past the kernels: its state is stale now.
        """
        for index, layer in self._binding.states.items():
            for kind, states in (("conv", layer.conv), ("recurrent", layer.recurrent)):
                if states and (index, kind) not in self._called:
                    raise IntegrityError(
                        f"the forward of layer {index} did not pass through the engine's {kind} kernel, so its state"
                        " was not updated; the model's code is not what the engine was made for",
                        value=index,
                        expected=f"one call of the {kind} kernel",
                    )


_RUNNING: ContextVar[ForwardContext] = ContextVar("makeready_forward")


def running() -> ForwardContext:
    """The forward in progress on this thread.

    :raises IntegrityError: outside of one.
    """
    try:
        return _RUNNING.get()
    except LookupError:
        raise IntegrityError(
            "the model was called outside the engine that it belongs to; close the engine to use it without"
        ) from None


@contextmanager
def forward_of(context: ForwardContext) -> Iterator[ForwardContext]:
    """Make ``context`` the forward in progress, without gradients."""
    token = _RUNNING.set(context)
    try:
        with torch.no_grad():
            yield context
    finally:
        _RUNNING.reset(token)
