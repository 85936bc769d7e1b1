"""What one step of an engine looks like to attention: tensors only, passed as an argument, never global."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetadata:
    """B requests with T query tokens in all, packed request after request.

    Host integers stand beside the device tensors so that no backend has to wait for the device.
    """

    query_start: torch.Tensor
    """(B + 1,) int32: request ``i`` owns query rows ``query_start[i]:query_start[i + 1]``."""
    seq_lens: torch.Tensor
    """(B,) int32: tokens in the cache once this step's are written."""
    block_table: torch.Tensor
    """(B, max_blocks) int32: block ids in order; entries past a request's last block are 0."""
    slot_mapping: torch.Tensor
    """(T,) int64: ``block_id * block_size + offset`` of each query token."""
    query_lens_host: tuple[int, ...]
    """Query tokens of each request."""
    seq_lens_host: tuple[int, ...]
    """``seq_lens`` on the host; in a captured step an upper bound of each, which holds for every replay."""
    block_size: int
    """Tokens of a block."""
    captured: bool = False
    """True while a graph of the step is captured: tensors stay where they are, and T and B as they are.

    Later values come in by the tensors alone. A request that only fills the step up to its bucket has a
    ``seq_lens`` of 0 and slots of -1: its output rows are finite, and nothing is written for it. Unless
    ``num_ragged`` says otherwise, every request has one query token.
    """
    num_ragged: int = 0
    """Of a captured step: so many requests, the last ones, may have any number of query tokens in a replay, and those
    before them one or none. ``query_lens_host`` counts the tokens as they lie while the graph is captured: all T are
    the last request's, which only fills the step up."""

    @property
    def num_requests(self) -> int:
        """B."""
        return len(self.query_lens_host)

    @property
    def num_tokens(self) -> int:
        """T."""
        return sum(self.query_lens_host)
