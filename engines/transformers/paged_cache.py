"""The cache object that models see: transformers' ``Cache`` protocol over the paged KV cache.

The protocol moved between transformers 5.17 and 5.23: models ask ``has_previous_state`` and reach through
``cache.layers[i].conv_states[j]`` in the one, and call ``get_conv_state`` in the other. Both columns are here. Models
change some of the tensors they are handed in place and tell nobody: a batch's gathered copies are therefore written
back by :meth:`PagedCache.flush` after every forward; a single request works on its pages directly.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from ...cache.write import write_kv
from ...errors import IntegrityError, UnsupportedModelError
from .binding import AttentionLayer, Binding, StateLayer
from .forward_step import ForwardStep


class PagedCache(Cache):
    """One forward pass's view of the cache; made anew for each.

    :param binding: the model's layers and their views.
    :param step: the requests of this forward and their blocks.
    """

    def __init__(self, binding: Binding, step: ForwardStep) -> None:
        views: list[Any] = [_LayerView(self, index) for index in range(binding.num_layers)]
        super().__init__(layers=views)
        self.step = step
        self._binding = binding
        self._gathered: dict[tuple[int, str, int], torch.Tensor] = {}
        self._updated: int | None = None
        self._scan_layer: int | None = None
        self._scan_head = 0

    # Attention

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write K and V of this step, (B, Hk, T, D), into their slots.

        :return: for MLA the stored latents of all tokens, (B, 1, longest, D), which the model expands; else the
            arguments, since the attention function reads the pages.
        """
        layer = self._attention_layer(layer_idx)
        metadata = self.step.metadata[layer.group]
        write_kv(_packed(key_states), _packed(value_states), layer.key, layer.value, metadata.slot_mapping)
        self._updated = layer_idx
        if not layer.spec.mla:
            return key_states, value_states
        latent = self._gather_latent(layer, layer.key).to(key_states.dtype)
        return latent, self._gather_latent(layer, layer.value).to(value_states.dtype)

    def take_attention_layer(self) -> AttentionLayer:
        """The layer of the last :meth:`update`; modules that layers share do not know their own index.

        :raises IntegrityError: if nothing was written since the last call.
        """
        if self._updated is None:
            raise IntegrityError("attention was called before its K and V were written to the cache")
        layer_idx, self._updated = self._updated, None
        return self._binding.attention[layer_idx]

    # States, as transformers 5.23 asks for them

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """The convolution states (B, channels, K) that this step starts from; None for fresh requests."""
        return None if self.step.is_fresh else self._state(layer_idx, "conv", state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """The recurrent states (B, ...) that this step starts from; None for fresh requests."""
        return None if self.step.is_fresh else self._state(layer_idx, "recurrent", state_idx)

    def is_recording_past(self, layer_idx: int) -> bool:
        """Never: nothing is rolled back."""
        return False

    # States, in both versions

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Keep the last K columns.

        :param conv_states: (B, channels, T), this step's inputs of the convolution.
        :return: what the convolution runs over: the kept columns and the new ones, or, for fresh requests, the
            new ones padded to at least K with zeros on the left.
        """
        state = self._state(layer_idx, "conv", state_idx)
        width = state.shape[-1]
        if conv_kernel_size not in (None, width):
            raise UnsupportedModelError(
                f"layer {layer_idx} convolves over {conv_kernel_size} columns, and its state keeps {width}",
                option="conv_kernel_size",
                value=conv_kernel_size,
                expected=width,
            )
        if self.step.is_fresh:
            missing = max(width - conv_states.shape[-1], 0)
            full = torch.nn.functional.pad(conv_states, (missing, 0))
        else:
            full = torch.cat([state, conv_states], dim=-1)
        state.copy_(full[..., -width:])
        self._scan_layer, self._scan_head = layer_idx, 0
        return full

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        """Keep the states (B, ...) after this step's tokens, and return them as kept."""
        return self._state(layer_idx, "recurrent", state_idx).copy_(recurrent_states)

    def take_scan_state(self) -> torch.Tensor | None:
        """The state that the mamba1 scan in progress starts from; None for fresh requests.

        A layer of several heads scans once per head, in order: each call takes the next head.
        """
        if self.step.is_fresh:
            return None
        if self._scan_layer is None:
            raise IntegrityError("a mamba1 scan ran before its convolution state was updated")
        state = self._state(self._scan_layer, "recurrent", 0)
        head, self._scan_head = self._scan_head, self._scan_head + 1
        return state[:, head] if state.dim() == 4 else state

    def flush(self) -> None:
        """Write the gathered states back; call it after each forward."""
        for (layer_idx, kind, state_idx), gathered in self._gathered.items():
            layer = self._state_layer(layer_idx)
            getattr(layer, kind)[state_idx].index_copy_(0, self.step.state_index[layer.group], gathered)
        self._gathered.clear()

    # States, as transformers 5.17 asks for them; it reads tensors through ``layers``

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether this step continues requests."""
        return not self.step.is_fresh

    # Lengths and masks

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before this step, of the longest request; positions are always passed, so nobody needs it."""
        return max(self.step.starts)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The same."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Keys and offset of a dense mask, which the registered attention never asks for."""
        return self.get_seq_length(layer_idx) + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: the scheduler knows the limits."""
        return -1

    @property
    def is_compileable(self) -> bool:
        """No: block tables change from step to step."""
        return False

    @property
    def is_sliding(self) -> list[bool]:
        """No layer drops tokens; the window is the attention function's."""
        return [False] * self._binding.num_layers

    @property
    def is_linear(self) -> list[bool]:
        """Layers with a state and without attention."""
        states, attention = self._binding.states, self._binding.attention
        return [index in states and index not in attention for index in range(self._binding.num_layers)]

    @property
    def is_dummy(self) -> list[bool]:
        """Layers that store nothing."""
        states, attention = self._binding.states, self._binding.attention
        return [index not in states and index not in attention for index in range(self._binding.num_layers)]

    def _attention_layer(self, layer_idx: int) -> AttentionLayer:
        layer = self._binding.attention.get(layer_idx)
        if layer is None:
            raise IntegrityError(
                f"layer {layer_idx} wrote K and V, but the plan has attention in layers"
                f" {sorted(self._binding.attention)} only"
            )
        return layer

    def _state_layer(self, layer_idx: int) -> StateLayer:
        layer = self._binding.states.get(layer_idx)
        if layer is None:
            raise IntegrityError(
                f"layer {layer_idx} asked for a state, but the plan has states in layers"
                f" {sorted(self._binding.states)} only"
            )
        return layer

    def _state(self, layer_idx: int, kind: str, state_idx: int) -> torch.Tensor:
        """(B, ...): the page itself for one request, a copy that :meth:`flush` writes back for more."""
        layer = self._state_layer(layer_idx)
        pages: tuple[torch.Tensor, ...] = getattr(layer, kind)
        if state_idx >= len(pages):
            raise IntegrityError(
                f"layer {layer_idx} asked for {kind} state {state_idx}, but the plan has {len(pages)} of them"
            )
        if self.step.num_requests == 1:
            block = self.step.state_blocks[layer.group][0]
            return pages[state_idx][block : block + 1]
        key = (layer_idx, kind, state_idx)
        if key not in self._gathered:
            self._gathered[key] = pages[state_idx].index_select(0, self.step.state_index[layer.group])
        return self._gathered[key]

    def _gather_latent(self, layer: AttentionLayer, pages: torch.Tensor) -> torch.Tensor:
        """(B, 1, longest, D): stored tokens in order, zeros after a shorter request's end."""
        metadata = self.step.metadata[layer.group]
        positions = torch.arange(max(metadata.seq_lens_host), device=pages.device)
        blocks = metadata.block_table.long()[:, positions // metadata.block_size]
        dense = pages[blocks, positions % metadata.block_size]
        missing = positions[None] >= metadata.seq_lens[:, None]
        return dense.masked_fill_(missing[:, :, None, None], 0).transpose(1, 2)


class _LayerView:
    """``cache.layers[i]`` as transformers 5.17's models read it."""

    is_sliding = False
    is_compileable = False
    supports_early_init = False
    record_past = False

    def __init__(self, cache: PagedCache, index: int) -> None:
        self.conv_states = _States(cache, index, "conv")
        self.recurrent_states = _States(cache, index, "recurrent")


class _States:
    """The states of one kind of one layer, by ``state_idx``."""

    def __init__(self, cache: PagedCache, index: int, kind: str) -> None:
        self._cache, self._index, self._kind = cache, index, kind

    def __getitem__(self, state_idx: int) -> torch.Tensor:
        return self._cache._state(self._index, self._kind, state_idx)


def _packed(states: torch.Tensor) -> torch.Tensor:
    """(B, H, T, D) as (B * T, H, D): token after token, request after request."""
    return states.transpose(1, 2).flatten(0, 1)
