"""Decoding on CUDA: rows of (request, split) through torch's kernel, everything around it in three small ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, ref

import torch

from ...cache.staging import stage
from ...errors import BackendError
from ..interface import AttentionCall
from ..metadata import StepMetadata
from .compiling import CompiledFlex
from .decode_plan import DecodePlan, fills_once
from .kernel_options import decode_options
from .kernels.fill import FACTS, fill_rows
from .kernels.rows import merge_rows, pack_rows
from .masks import BlockLists, RowFacts, mark_rows, modifiers
from .settings import IN_FLIGHT, FlexSettings
from .views import FlatCache

LEAST_SPLIT = 256
"""Tokens that a split reads at least."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What block lists depend on beside the step: layers of a kind share them."""

    block_stride: int
    num_blocks: int
    causal: bool
    window: int | None
    all_masked: bool


@dataclass(frozen=True, slots=True, weakref_slot=True)
class DecodeRows:
    """A plan's rows on the device."""

    plan: DecodePlan
    lists: BlockLists
    facts: torch.Tensor
    """(:data:`FACTS`, max rows) int32."""
    unit_rows: torch.Tensor
    """(units + 1,) int32: rows of unit ``i`` are ``unit_rows[i]:unit_rows[i + 1]``."""


class RowBuffers:
    """Persistent block lists and facts of one kind of layer, for one step.

    Rows follow the requests of a step and the blocks that a sequence can have; a step's tensors are slices with the
    strides of the whole, which compiled kernels know.
    """

    def __init__(self, settings: FlexSettings, kind: Kind, device: torch.device) -> None:
        self.settings, self.kind = settings, kind
        rows, (whole, masked) = settings.max_decode_rows, settings.list_columns
        # With the user's mask the list of masked blocks is the long one.
        self._columns = (masked, whole) if kind.all_masked else (whole, masked)
        self._stride = whole + masked

        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.int32, device=device)

        self.lists = ints(rows * self._stride)
        self.counts = ints(2, rows, 1, 1)
        self.facts = ints(FACTS, rows)
        self.unit_rows = ints(settings.max_num_seqs + 1)
        self.places = ints(kind.num_blocks + 1)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(t.nbytes for t in (self.lists, self.counts, self.facts, self.unit_rows, self.places))

    def fill(self, plan: DecodePlan, step: StepMetadata) -> DecodeRows:
        """The rows of ``plan``, by one kernel that reads the step's tensors; nothing waits for it."""
        settings, kind, rows = self.settings, self.kind, plan.rows
        self._check(plan, step)
        whole, masked = self._views(rows)
        requests = step.seq_lens
        identity = plan.units == step.num_requests
        if not identity:
            requests = stage(plan.requests, torch.int32, step.seq_lens.device)
        fill_rows[(rows,)](
            step.block_table,
            step.block_table.stride(0),
            step.query_start,
            step.seq_lens,
            requests,
            whole,
            masked,
            self._stride,
            self.counts[0],
            self.counts[1],
            self.facts,
            self.facts.stride(0),
            self.unit_rows,
            self.places,
            plan.units,
            rows,
            UNITS=max(16, 1 << (plan.units - 1).bit_length()),
            LENGTH=plan.length,
            IDENTITY=identity,
            PER_BLOCK=settings.block_size // settings.kernel_block_size,
            BLOCK_STRIDE=kind.block_stride // settings.kernel_block_size,
            KERNEL_BLOCK=settings.kernel_block_size,
            CAUSAL=kind.causal,
            WINDOW=kind.window or 0,
            QUERY_BLOCK=settings.align,
            KV_BLOCK=settings.order[1] if settings.order else settings.kernel_block_size,
            ALL_MASKED=kind.all_masked,
            SPLIT=plan.split,
            LEAST=max(1, LEAST_SPLIT // settings.kernel_block_size),
            CHUNK=256,
            num_warps=4,
        )
        position, seq_len, request = self.facts[:3, :rows].unbind()
        ragged = (self.facts[5, :rows], self.facts[6, :rows]) if self._one_ragged(plan) else None
        facts = RowFacts(position, seq_len, request, self.places, ragged)
        lists = BlockLists(self.counts[1, :rows], masked, self.counts[0, :rows], whole, facts)
        mark_rows(lists)
        return DecodeRows(plan, lists, self.facts, self.unit_rows)

    def _one_ragged(self, plan: DecodePlan) -> bool:
        """Whether only a row's last masked block is ragged: single causal queries over all that went before."""
        kind = self.kind
        return plan.length == 1 and kind.causal and kind.window is None and not kind.all_masked

    def _views(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(R, 1, 1, C) of whole and of masked blocks, side by side in each row: both walk with the same strides."""
        whole, masked = self._columns
        strides = (self._stride, self._stride, self._stride, 1)
        return (
            self.lists.as_strided((rows, 1, 1, whole), strides, 0),
            self.lists.as_strided((rows, 1, 1, masked), strides, whole),
        )

    def _check(self, plan: DecodePlan, step: StepMetadata) -> None:
        settings = self.settings
        longest = max(step.seq_lens_host[index] for index in plan.requests)
        limit = settings.max_blocks_per_row * settings.kernel_block_size
        if longest > limit:
            raise BackendError(
                f"a sequence of {-(-longest // settings.kernel_block_size)} kernel blocks of "
                f"{settings.kernel_block_size} tokens is longer than the {settings.max_blocks_per_row} that flex was "
                "built for",
                option="max_model_len",
                value=longest,
                expected=f"<= {limit}",
            )
        if plan.units > settings.max_num_seqs:
            raise BackendError(
                f"a step of {plan.units} requests is larger than the {settings.max_num_seqs} that flex was built for",
                option="max_num_seqs",
                value=plan.units,
                expected=f"<= {settings.max_num_seqs}",
            )


class RowPool:
    """The buffers of one kind: :data:`IN_FLIGHT` from the start, more if more steps or layer groups are alive at once.

    Buffers are free again once their rows are: what is queued on the device with them comes before what follows.
    """

    def __init__(self, settings: FlexSettings, kind: Kind, device: torch.device) -> None:
        self._settings, self._kind, self._device = settings, kind, device
        self._buffers = [RowBuffers(settings, kind, device) for _ in range(IN_FLIGHT)]
        self._users: list[ReferenceType[DecodeRows] | None] = [None] * IN_FLIGHT

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(buffers.nbytes for buffers in self._buffers)

    def fill(self, plan: DecodePlan, step: StepMetadata) -> DecodeRows:
        """The rows of ``plan`` in buffers that nobody uses."""
        free = next((i for i, user in enumerate(self._users) if user is None or user() is None), len(self._users))
        if free == len(self._users):
            self._buffers.append(RowBuffers(self._settings, self._kind, self._device))
            self._users.append(None)
        rows = self._buffers[free].fill(plan, step)
        self._users[free] = ref(rows)
        return rows


def attend_rows(
    flex: CompiledFlex,
    query: torch.Tensor,
    cache: FlatCache,
    rows: DecodeRows,
    settings: FlexSettings,
    call: AttentionCall,
    output: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of the units' query tokens.

    :param query: (T, Hq, D), of the step.
    :param output: (T, Hq, Dv) to write the units' tokens into, or ``None`` if the units are the whole step.
    :return: ``output``, or a tensor of its shape.
    """
    plan, group = rows.plan, settings.group_size
    direct = plan.whole_step and plan.rows == plan.units and call.sinks is None
    packed = query.view(plan.units, settings.num_kv_heads, group, -1) if direct else _pack(query, rows, settings)
    torch._dynamo.mark_dynamic(packed, 0)
    mask, score = modifiers(rows.lists.facts, cache, call, group, settings.kernel_block_size)
    out, lse = flex(
        packed,
        cache.key,
        cache.value,
        rows.lists,
        mask,
        score,
        (settings.mask_query_block, settings.kernel_block_size),
        call.scale * call.key_scale,
        decode_options(
            settings, plan.length * group, split=plan.split, wave=fills_once(plan.units, settings), wide=cache.wide
        ),
        not direct,
    )
    if direct:
        return out.reshape(plan.units, settings.num_kv_heads * group, -1)
    if output is None:
        output = query.new_empty(*query.shape[:2], out.shape[-1])
    _merge(out, lse, rows, settings, call, output)
    return output


def _pack(query: torch.Tensor, rows: DecodeRows, settings: FlexSettings) -> torch.Tensor:
    """(R, Hk, length * G, D)."""
    plan, group, size = rows.plan, settings.group_size, query.shape[-1]
    packed = query.new_empty(plan.rows, settings.num_kv_heads, plan.length * group, size)
    pack_rows[(plan.rows, settings.num_kv_heads)](
        query,
        query.stride(0),
        query.stride(1),
        rows.facts,
        rows.facts.stride(0),
        packed,
        packed.stride(0),
        packed.stride(1),
        packed.stride(2),
        GROUP=group,
        LENGTH=plan.length,
        QUERIES=_power_of_two(plan.length * group),
        SIZE=size,
        WIDTH=_power_of_two(size),
        num_warps=2,
    )
    return packed


def _merge(
    parts: torch.Tensor,
    lse: Any,
    rows: DecodeRows,
    settings: FlexSettings,
    call: AttentionCall,
    output: torch.Tensor,
) -> None:
    plan, size = rows.plan, parts.shape[-1]
    merge_rows[(plan.units * plan.length, output.shape[1])](
        parts,
        lse,
        rows.unit_rows,
        rows.facts,
        rows.facts.stride(0),
        lse if call.sinks is None else call.sinks,
        output,
        KV_HEADS=settings.num_kv_heads,
        GROUP=settings.group_size,
        LENGTH=plan.length,
        SIZE=size,
        WIDTH=_power_of_two(size),
        SINKS=call.sinks is not None,
        STEP=8,
        num_warps=2,
    )


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
