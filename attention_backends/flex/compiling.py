"""flex_attention compiled for fixed shapes, with its compilations counted and their limit an error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ...errors import BackendError
from .masks import BlockLists, Modifier

try:
    from torch.nn.attention.flex_attention import AuxRequest
except ImportError:  # before torch 2.9
    AuxRequest = None  # type: ignore[assignment, misc]

VARIANT_LIMIT = 256
"""Compiled variants of one built backend: batch sizes x row lengths x masks x score modifiers."""


class CompiledFlex:
    """A torch.compile of its own, for static shapes but where a caller marks a dimension as dynamic.

    With symbolic ones torch's C++ template (2.13) writes code that does not compile whenever the names of two
    symbols happen to share a prefix, and the names are hashes. On a GPU the number of rows is marked.
    """

    def __init__(self, variant_limit: int = VARIANT_LIMIT) -> None:
        self.compile_count = 0
        self._limit = variant_limit
        limits: dict[str, Any] = {
            "recompile_limit": variant_limit,
            "accumulated_recompile_limit": variant_limit,
            "fail_on_recompile_limit_hit": True,
        }
        self._limits = torch._dynamo.config.patch(limits)
        # Torch keeps compiled variants on the code object; a code object of its own keeps backends apart.
        own = FunctionType(_attend.__code__.replace(), _attend.__globals__, "flex_attend")
        self._call: Callable[..., Any] = torch.compile(own, backend=self._compile, dynamic=False, fullgraph=True)

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lists: BlockLists,
        mask: Modifier,
        score: Modifier | None,
        blocks: tuple[int, int],
        scale: float,
        options: dict[str, Any],
        lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of (R, Hq, L, D) over (1, Hk, tokens, D).

        :param blocks: (query block, KV block) of the mask.
        :param lse: whether to return the log-sum-exp (R, Hq, L) as well.
        :raises BackendError: when the variants exceed the limit; eager attention never takes over.
        """
        visits = (lists.masked_counts, lists.masked, lists.whole_counts, lists.whole)
        try:
            with torch.no_grad(), self._limits:
                out: tuple[torch.Tensor, torch.Tensor | None] = self._call(
                    query, key, value, visits, mask, score, blocks, scale, options, lse
                )
                return out
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise BackendError(
                f"flex needs more than the {self._limit} compiled variants that it may have "
                f"({self.compile_count} are compiled)",
                option="backend",
                value="flex",
            ) from error

    def _compile(self, graph: torch.fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        self.compile_count += 1
        compiled: Callable[..., Any] = compile_fx(graph, inputs)  # type: ignore[assignment]
        return compiled


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visits: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    mask: Modifier,
    score: Modifier | None,
    blocks: tuple[int, int],
    scale: float,
    options: dict[str, Any],
    lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    # Only a backward pass reads the query lists, and torch before 2.9 insists on them: any lists will do. The
    # constructor takes them as they are, where from_kv_blocks would compute them.
    masked_counts, masked, whole_counts, whole = visits
    block_mask = BlockMask(
        seq_lengths=(query.shape[2], key.shape[2]),
        kv_num_blocks=masked_counts,
        kv_indices=masked,
        full_kv_num_blocks=whole_counts,
        full_kv_indices=whole,
        q_num_blocks=masked_counts,
        q_indices=masked,
        full_q_num_blocks=whole_counts,
        full_q_indices=whole,
        BLOCK_SIZE=blocks,
        mask_mod=mask,
    )
    extra: dict[str, Any] = {}
    if lse:
        extra = {"return_lse": True} if AuxRequest is None else {"return_aux": AuxRequest(lse=True)}
    run: Any = flex_attention
    out = run(
        query,
        key,
        value,
        score_mod=score,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=options,
        **extra,
    )
    if not lse:
        return out, None
    return out[0], out[1] if AuxRequest is None else out[1].lse
