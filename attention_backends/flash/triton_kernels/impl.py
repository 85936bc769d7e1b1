"""Paged attention by our Triton kernels: who of a step decodes, who prefills, and which kernels they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.functional import pad

from ....errors import BackendError
from ...interface import AttentionCall, AttentionImpl, BuildRequest
from ...metadata import StepMetadata
from .configs import short_queries
from .latent_launch import LatentWork, attend_latents, plan_latent
from .launch import (
    DecodeWork,
    PrefillWork,
    Shape,
    decode,
    plan_decode,
    plan_prefill,
    plan_ragged_prefill,
    prefill,
)
from .tuned import Configs, read_table

GATHERED_BLOCK = 16
"""Tokens of a block of the small cache that gathered K and V are laid out as."""


@dataclass(frozen=True, slots=True)
class Works:
    """Launches that serve a step for layers of one shape and one window."""

    decodes: tuple[DecodeWork, ...]
    prefill: PrefillWork | None


@dataclass(frozen=True, slots=True)
class TritonStep:
    """One step. What depends on a layer is added when its first layer asks, and layers of a kind share it."""

    step: StepMetadata
    works: dict[tuple[object, ...], Works] = field(default_factory=dict)
    latent: LatentWork | None = None
    """For layers that store latents."""


class TritonImpl(AttentionImpl):
    """Decode shared out evenly, prefill by tiles; a step that has both launches both.

    :param request: its ``spec`` says for which layers :meth:`prepare` shares the work out already.
    :param compute_units: multiprocessors of the device.
    :param configs: the kernels' configurations; ``None`` reads the table of the package.
    """

    name = "flash"
    capturable = True
    captures_ragged = True
    attends_latents = True

    def __init__(self, request: BuildRequest, compute_units: int, configs: Configs | None = None) -> None:
        self._request = request
        self._configs = Configs(read_table()) if configs is None else configs
        self._units = compute_units
        self._invariant = request.config.batch_invariant

    def prepare(self, step: StepMetadata) -> TritonStep:
        """Share the step's work out.

        :raises BackendError: for blocks of another size than the build's.
        """
        if step.block_size != self._request.block_size:
            raise BackendError(
                f"flash by triton was built for blocks of {self._request.block_size} tokens, and the step's have "
                f"{step.block_size}",
                option="block_size",
                value=step.block_size,
                expected=self._request.block_size,
            )
        spec = self._request.spec
        if spec.mla and step.num_requests:
            latent = plan_latent(
                step, spec.num_query_heads, self._request.device, self._units, invariant=self._invariant
            )
            return TritonStep(step, latent=latent)
        prepared = TritonStep(step)
        if step.num_requests:
            shape = Shape(
                num_heads=spec.num_query_heads,
                num_kv_heads=spec.num_kv_heads,
                head_size=spec.head_size,
                head_size_v=spec.head_size_v,
            )
            self._works(prepared, shape, spec.sliding_window, causal=True, narrow=spec.dtype.startswith("fp8"))
        return prepared

    def forward(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        metadata: TritonStep,
        call: AttentionCall,
    ) -> torch.Tensor:
        """Attention over the paged cache; shapes as in :class:`AttentionImpl`."""
        return self._run(query, key_cache, value_cache, metadata, call, None)

    def forward_with_lse(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        metadata: TritonStep,
        call: AttentionCall,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`forward`, and the logarithm of every row's sum, (T, Hq) float32; -inf where it saw no key."""
        lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
        return self._run(query, key_cache, value_cache, metadata, call, lse), lse

    def forward_gathered(
        self,
        query: torch.Tensor,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        step: StepMetadata,
        call: AttentionCall,
    ) -> torch.Tensor:
        """Attention over K and V that were gathered per request; shapes as in :class:`AttentionImpl`."""
        if not keys:
            return query.new_empty(*query.shape[:2], query.shape[-1])
        counts = [-(-length // GATHERED_BLOCK) for length in step.seq_lens_host]
        table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        first = 0
        for row, count in zip(table, counts, strict=True):
            row[:count] = torch.arange(first, first + count)
            first += count
        gathered = StepMetadata(
            query_start=step.query_start,
            seq_lens=step.seq_lens,
            block_table=table.to(query.device),
            slot_mapping=step.slot_mapping,
            query_lens_host=step.query_lens_host,
            seq_lens_host=step.seq_lens_host,
            block_size=GATHERED_BLOCK,
        )
        return self._run(query, _as_blocks(keys), _as_blocks(values), TritonStep(gathered), call, None)

    def forward_latent(
        self,
        query: torch.Tensor,
        latent_cache: torch.Tensor,
        rope_cache: torch.Tensor,
        metadata: TritonStep,
        call: AttentionCall,
    ) -> torch.Tensor:
        """Attention over stored latents; shapes as in :class:`AttentionImpl`."""
        call.refuse_beyond_scale("attention over latents of flash by triton")
        if metadata.latent is None:
            return query.new_empty(*query.shape[:2], latent_cache.shape[-1])
        return attend_latents(query, latent_cache, rope_cache, metadata.step, metadata.latent, call)

    def _run(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        metadata: TritonStep,
        call: AttentionCall,
        lse: torch.Tensor | None,
    ) -> torch.Tensor:
        call.refuse_own_masks("flash by triton")
        step = metadata.step
        out = query.new_empty(*query.shape[:2], value_cache.shape[-1])
        if not step.num_requests:
            return out
        query = query if query.is_contiguous() else query.contiguous()
        shape = Shape(
            num_heads=query.shape[1],
            num_kv_heads=key_cache.shape[2],
            head_size=query.shape[2],
            head_size_v=value_cache.shape[3],
        )
        narrow = key_cache.element_size() == 1
        works = self._works(metadata, shape, call.sliding_window, causal=call.causal, narrow=narrow)
        if works.prefill is not None:
            prefill(out, lse, query, key_cache, value_cache, step, shape, works.prefill, call)
        for work in works.decodes:
            decode(out, lse, query, key_cache, value_cache, step, shape, work, call)
        return out

    def _works(self, prepared: TritonStep, shape: Shape, window: int | None, *, causal: bool, narrow: bool) -> Works:
        key = (shape, window, causal, narrow)
        if key not in prepared.works:
            prepared.works[key] = self._shared_out(prepared.step, shape, window, causal=causal, narrow=narrow)
        return prepared.works[key]

    def _shared_out(self, step: StepMetadata, shape: Shape, window: int | None, *, causal: bool, narrow: bool) -> Works:
        """One query token decodes; a few take the same kernel with more rows, if causal; the others prefill."""
        if step.num_ragged:
            return self._ragged(step, shape, window, causal=causal, narrow=narrow)
        device, lens = self._request.device, step.query_lens_host
        most = short_queries(shape.group) if causal and not self._invariant else 1
        decodes = []
        for fewest, queries in ((1, 1), (2, most)):
            if any(fewest <= count <= queries for count in lens):
                decodes.append(self._decodes(step, shape, window, fewest, queries, narrow=narrow))
        long = [(count, length) for count, length in zip(lens, step.seq_lens_host, strict=True) if count > most]
        if not long:
            return Works(tuple(decodes), None)
        tiles = self._configs.prefill(
            device, shape.head_size, shape.head_size_v, shape.group, requests=len(long),
            queries=sum(count for count, _ in long), keys=sum(length for _, length in long),
            block_size=step.block_size, causal=causal, narrow=narrow,
            invariant=self._invariant, max_model_len=self._request.max_model_len,
        )  # fmt: skip
        return Works(tuple(decodes), plan_prefill(step, shape, tiles, fewest=most + 1))

    def _ragged(self, step: StepMetadata, shape: Shape, window: int | None, *, causal: bool, narrow: bool) -> Works:
        """Who has how many tokens only the device knows: one token decodes, more prefill."""
        tiles = self._configs.prefill(
            self._request.device, shape.head_size, shape.head_size_v, shape.group, requests=step.num_tokens, queries=0,
            keys=0, block_size=step.block_size, causal=causal, narrow=narrow, invariant=self._invariant,
            max_model_len=self._request.max_model_len,
        )  # fmt: skip
        decodes = (self._decodes(step, shape, window, 1, 1, narrow=narrow),)
        return Works(decodes, plan_ragged_prefill(step, shape, tiles, fewest=2))

    def _decodes(
        self, step: StepMetadata, shape: Shape, window: int | None, fewest: int, queries: int, *, narrow: bool
    ) -> DecodeWork:
        """Requests of ``fewest`` to ``queries`` query tokens."""
        config = self._configs.decode(
            self._request.device, head_size=max(shape.padded, shape.padded_v), rows=queries * shape.group,
            narrow=narrow, invariant=self._invariant, max_model_len=self._request.max_model_len,
        )  # fmt: skip
        return plan_decode(step, shape, config, self._units, fewest=fewest, queries=queries, window=window)


def _as_blocks(gathered: Sequence[torch.Tensor]) -> torch.Tensor:
    """Per request (length, Hk, D) -> (num_blocks, GATHERED_BLOCK, Hk, D), each request filled up with zeros."""
    filled = torch.cat([pad(rows, (0, 0, 0, 0, 0, -rows.shape[0] % GATHERED_BLOCK)) for rows in gathered])
    return filled.view(-1, GATHERED_BLOCK, *filled.shape[1:])
