"""The cache object of packed forwards: it stores nothing itself, since kernels read and write pages in place.

Models think that every forward is the first of its requests: they then call the multi-token kernels, for any number
of tokens, and those know better (:mod:`.entry_points`).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from .mla import gather_latents


class PackedCache(Cache):
    """One object for the engine's life, with nothing in it that changes: compiled code may look at it freely.

    :param num_layers: layers of the model.
    :param state_layers: layers with a state and no attention.
    :param empty_layers: layers that store nothing.
    :param gathers: whether the model expands the stored latents of all requests (MLA).
    """

    def __init__(
        self, num_layers: int, state_layers: frozenset[int], empty_layers: frozenset[int], gathers: bool
    ) -> None:
        layers: Any = [_LayerView() for _ in range(num_layers)]
        super().__init__(layers=layers)
        self._state_layers, self._empty_layers, self._gathers = state_layers, empty_layers, gathers

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V as they are: attention writes and reads the pages. Or the stored latents of all requests."""
        if self._gathers:
            return gather_latents(key_states, value_states)
        return key_states, value_states

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The convolution's input as it is: its kernel prepends each request's columns."""
        return conv_states

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """Nothing: the kernel has written the states."""
        return recurrent_states

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """None (transformers 5.23): the kernel reads the pages."""
        return

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """None (transformers 5.23): the kernel reads the pages."""
        return

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """No (transformers 5.17): the kernel reads the pages."""
        return False

    def is_recording_past(self, layer_idx: int) -> bool:
        """Never: nothing is rolled back."""
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0; positions are always passed, so nobody needs it."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The same."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Keys and offset of a dense mask, which the registered attention never asks for."""
        return query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: the scheduler knows the limits."""
        return -1

    @property
    def is_compileable(self) -> bool:
        """No: models must not compile themselves around it; the engine compiles layers."""
        return False

    @property
    def is_sliding(self) -> list[bool]:
        """No layer drops tokens; the window is the attention function's."""
        return [False] * len(self.layers)

    @property
    def is_linear(self) -> list[bool]:
        """Layers with a state and without attention."""
        return [index in self._state_layers for index in range(len(self.layers))]

    @property
    def is_dummy(self) -> list[bool]:
        """Layers that store nothing."""
        return [index in self._empty_layers for index in range(len(self.layers))]


class _LayerView:
    """``cache.layers[i]`` as transformers 5.17's models read it."""

    is_sliding = False
    is_compileable = False
    supports_early_init = False
    record_past = False
