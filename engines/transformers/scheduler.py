"""Continuous batching: who runs in the next step, on which blocks. No torch, no model.

Requests are served in order of arrival. Running requests decode first, one token each; then prefill chunks share what
is left of ``max_num_batched_tokens``; then waiting requests are admitted while blocks and seats last. When a decode
needs a block and none is free, the latest-arrived running request gives all of its blocks back and waits again, at its
old place in the order. The oldest request therefore always moves, and because :meth:`Scheduler.add` refuses what cannot
fit in an empty cache, every request ends.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass

from ...cache.block_table import BlockTable
from ...cache.group_pool import GroupPool
from ...cache.specs import LayerGroup
from ...config import SchedulerConfig
from ...errors import CapacityError, ConfigError, RequestError
from .families import Traits
from .requests import Request


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Tokens ``start`` up to ``start + length`` of a request, computed in one forward."""

    request: Request
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of one group that changed hands."""

    group: int
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """What the engine does next. ``freed`` blocks changed hands before ``handed_out`` ones."""

    decodes: tuple[Request, ...]
    prefills: tuple[PrefillChunk, ...]
    freed: tuple[Blocks, ...]
    handed_out: tuple[Blocks, ...]
    preempted: tuple[Request, ...]

    @property
    def is_empty(self) -> bool:
        """True if nothing is computed."""
        return not self.decodes and not self.prefills


def _by_arrival(request: Request) -> int:
    return request.arrival


class Scheduler:
    """Queues of requests over one block pool.

    :param groups: layer groups; each has its own block table per request.
    :param pool: where the blocks of all groups come from.
    :param config: seats and tokens per step.
    :param traits: what the model's family asks of prefill chunks and of restarts.
    :param max_model_len: longest sequence, prompt and output together, in tokens.
    """

    def __init__(
        self,
        groups: Sequence[LayerGroup],
        pool: GroupPool,
        config: SchedulerConfig,
        traits: Traits,
        max_model_len: int,
    ) -> None:
        _check_chunks(config, traits)
        self._groups = tuple(groups)
        self._pool = pool
        self._config = config
        self._traits = traits
        self._max_model_len = max_model_len
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._freed: list[Blocks] = []
        self._handed_out: list[Blocks] = []

    @property
    def waiting(self) -> tuple[Request, ...]:
        """Requests without blocks, in order of arrival."""
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[Request, ...]:
        """Requests that hold blocks, in order of arrival."""
        return tuple(self._running)

    def has_requests(self) -> bool:
        """True while something waits or runs."""
        return bool(self._waiting or self._running)

    def blocks_needed(self, num_tokens: int) -> int:
        """Blocks that one request of ``num_tokens`` tokens holds over all groups."""
        return self._pool.blocks(self._need(num_tokens))

    def max_tokens(self) -> int:
        """The longest sequence, in tokens, that the empty cache holds for one request."""
        low, high = 0, self._max_model_len
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._pool.fits(self._need(middle)) else (low, middle - 1)
        return low

    def add(self, request: Request) -> None:
        """Queue ``request``.

        :raises RequestError: for an empty prompt, or more tokens than ``max_model_len``.
        :raises CapacityError: if not even the empty cache holds its prompt and output.
        """
        self._check_fits(request)
        insort(self._waiting, request, key=_by_arrival)

    def abort(self, request: Request) -> None:
        """Take ``request`` out, wherever it is; its blocks return at once."""
        self._release(request)
        self._remove(request)

    def finish(self, request: Request) -> None:
        """The same for a request that has ended by itself."""
        self.abort(request)

    def restart(self, requests: Sequence[Request]) -> None:
        """Let ``requests`` start over, those that still run: their forward did not end well."""
        for request in requests:
            if request in self._running:
                self._preempt(request)

    def is_short_of_blocks(self) -> bool:
        """True if the next step's decodes may take blocks from a running request.

        Tokens that are pending would be lost with it: read them before the next :meth:`schedule`.
        """
        if self._pool.can_allocate({group.index: len(self._running) for group in self._groups if not group.is_state}):
            return False
        need: dict[int, int] = {}
        for request in self._running:
            if not request.is_prefill and not request.awaits_last:
                for group, count in self._missing(request, request.num_computed + 1).items():
                    need[group] = need.get(group, 0) + count
        return not self._pool.can_allocate(need)

    def schedule(self) -> Step:
        """Choose the next step and hand out its blocks."""
        budget = self._config.max_num_batched_tokens
        decodes, preempted = self._schedule_decodes(budget)
        budget -= len(decodes)
        prefills = self._schedule_running_prefills(budget)
        budget -= sum(chunk.length for chunk in prefills)
        if not preempted:
            prefills += self._admit(budget)
        freed, handed_out = tuple(self._freed), tuple(self._handed_out)
        self._freed.clear()
        self._handed_out.clear()
        return Step(tuple(decodes), tuple(prefills), freed, handed_out, tuple(preempted))

    def _schedule_decodes(self, budget: int) -> tuple[list[Request], list[Request]]:
        decodes: list[Request] = []
        preempted: list[Request] = []
        for request in tuple(self._running):
            if len(decodes) == budget:
                break
            if request.is_prefill or request.awaits_last or (preempted and request not in self._running):
                continue
            if self._grow(request, preempted):
                decodes.append(request)
        return decodes, preempted

    def _grow(self, request: Request, preempted: list[Request]) -> bool:
        """Room for one more token of ``request``, taken from later arrivals if need be; False if it went itself."""
        need = self._missing(request, request.num_computed + 1)
        while not self._pool.can_allocate(need):
            victim = self._running[-1]
            self._preempt(victim)
            preempted.append(victim)
            if victim is request:
                return False
        self._allocate(request, need)
        return True

    def _schedule_running_prefills(self, budget: int) -> list[PrefillChunk]:
        chunks: list[PrefillChunk] = []
        for request in self._running:
            if request.is_prefill:
                length = self._chunk(request, budget)
                if length:
                    chunks.append(PrefillChunk(request, request.num_computed, length))
                    budget -= length
        return chunks

    def _admit(self, budget: int) -> list[PrefillChunk]:
        chunks: list[PrefillChunk] = []
        while self._waiting and len(self._running) < self._config.max_num_seqs:
            request = self._waiting[0]
            request.prefill_len = len(request.prompt) if self._traits.replays_generated else request.num_tokens
            length = self._chunk(request, budget)
            if not length or not self._pool.can_allocate(self._need(request.prefill_len)):
                break
            self._waiting.pop(0)
            request.tables = {group.index: BlockTable(group.block_size) for group in self._groups}
            self._allocate(request, self._missing(request, request.prefill_len))
            insort(self._running, request, key=_by_arrival)
            chunks.append(PrefillChunk(request, 0, length))
            budget -= length
        return chunks

    def _chunk(self, request: Request, budget: int) -> int:
        """Tokens of the next prefill chunk, 0 if none may run now.

        Where prefill and decode disagree, a prompt's token must not pass through the decode path, which is where
        a chunk of one token after the first would go.
        """
        remaining = request.prefill_len - request.num_computed
        length = min(remaining, budget)
        if self._traits.single_token_chunks or remaining == length:
            return length
        if remaining - length == 1:
            length -= 1
        return 0 if request.num_computed and length == 1 else max(length, 0)

    def _preempt(self, request: Request) -> None:
        self._release(request)
        self._running.remove(request)
        request.num_computed = 0
        request.num_preemptions += 1
        insort(self._waiting, request, key=_by_arrival)

    def _need(self, num_tokens: int) -> dict[int, int]:
        """Blocks per group that a request of ``num_tokens`` tokens holds."""
        return {group.index: self._group_blocks(group, num_tokens) for group in self._groups}

    def _missing(self, request: Request, num_tokens: int) -> dict[int, int]:
        """Blocks per group that ``request`` still lacks to hold ``num_tokens`` tokens."""
        return {
            group: max(0, count - len(request.tables[group].blocks)) for group, count in self._need(num_tokens).items()
        }

    def _allocate(self, request: Request, need: dict[int, int]) -> None:
        for group, count in need.items():
            if count:
                ids = self._pool.allocate(group, count, request.id)
                request.tables[group].append(ids)
                self._handed_out.append(Blocks(group, tuple(ids)))

    def _release(self, request: Request) -> None:
        for group, table in request.tables.items():
            if table.blocks:
                self._pool.free(group, table.blocks, request.id)
                self._freed.append(Blocks(group, tuple(table.blocks)))
        request.tables = {}

    def _remove(self, request: Request) -> None:
        for queue in (self._waiting, self._running):
            if request in queue:
                queue.remove(request)

    @staticmethod
    def _group_blocks(group: LayerGroup, num_tokens: int) -> int:
        """A state is kept once per request, however long; attention grows by the block."""
        return 1 if group.is_state else -(-num_tokens // group.block_size)

    def _check_fits(self, request: Request) -> None:
        prompt, new = len(request.prompt), request.params.max_new_tokens
        if not prompt:
            raise RequestError(
                "the prompt is empty; give at least one token", option="prompt", value=(), expected="1 token or more"
            )
        if prompt + new > self._max_model_len:
            raise RequestError(
                f"a prompt of {prompt} tokens and max_new_tokens {new} make {prompt + new}, more than the"
                f" {self._max_model_len} that one request may have here (max_model_len, or what the cache holds);"
                " shorten the prompt, ask for fewer new tokens, or give the cache more blocks",
                option="prompt", value=prompt + new, expected=f"<= {self._max_model_len}",
            )  # fmt: skip
        if not self._pool.fits(self._need(request.max_cached_tokens)):
            need = self.blocks_needed(request.max_cached_tokens)
            raise CapacityError(
                f"a prompt of {prompt} tokens and max_new_tokens {new} need {need} blocks, but the cache has"
                f" {self._pool.capacity}, which hold {self.max_tokens()} tokens of one request",
                option="prompt", value=prompt + new, expected=f"<= {self.max_tokens() + 1}",
            )  # fmt: skip


def _check_chunks(config: SchedulerConfig, traits: Traits) -> None:
    if not traits.single_token_chunks and config.max_num_batched_tokens < 3:
        raise ConfigError(
            f"max_num_batched_tokens {config.max_num_batched_tokens} leaves prefill chunks of one token, which"
            f" {traits.model_type} would compute as decode steps; give 3 or more",
            option="max_num_batched_tokens",
            value=config.max_num_batched_tokens,
            expected=">= 3",
        )
