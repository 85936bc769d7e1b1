"""Runs steps of a model whose requests are packed into one row; the model's code is untouched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from ....cache.staging import stage
from ....errors import IntegrityError
from ..attention import PACKED_NAME
from ..binding import bind
from ..families import Traits
from ..ledger import StateLedger
from ..records import Ready
from ..scheduler import Step
from .attention import EXPANDED, LATENTS, STORED, register
from .buckets import TOKENS, decode_buckets, ragged_buckets
from .building import StepBuilder
from .cache import PackedCache
from .capturing import nothing_collected
from .choosing import likeliest
from .context import ForwardContext, PackedStep, forward_of
from .decode_inputs import DecodeInputs
from .flight import Flight
from .graphs import DecodeGraphs
from .layers import DecoderLayers, LayerForward
from .patching import attends_latents, exchange_for
from .ragged_graphs import RaggedGraphs
from .ragged_inputs import RaggedInputs
from .rows import ON_DEVICE, Row, rows_of
from .seats import Seats
from .warming import dummy_steps

if TYPE_CHECKING:
    from ....hybrid.mixers.interface import MixerKernels
Limits = Callable[[], AbstractContextManager[None]]


class PackedRunner:
    """A model whose attention and states live in the paged cache, all requests of a step in one forward.

    From construction to :meth:`close` the model calls makeready's attention, so it cannot be used elsewhere.

    :param kernels: what computes state mixers; ``None`` for models without any.
    :param run_layer: how a decoder layer is run; ``None`` for its own forward.
    :param limits: active while a forward runs.
    :param cuda_graphs: whether steps of decodes are captured and replayed.
    :param prefill_graphs: whether steps with prefill are, too.
    :raises UnsupportedModelError: if the family's mixers are not where this transformers should have them.
    """

    def __init__(
        self,
        model: Any,
        ready: Ready,
        traits: Traits,
        kernels: MixerKernels | None,
        run_layer: LayerForward | None = None,
        *,
        limits: Limits = nullcontext,
        cuda_graphs: bool = False,
        prefill_graphs: bool = False,
    ) -> None:
        config, scheduler = model.config.get_text_config(decoder=True), ready.config.scheduler
        self._model, self._traits, self._kernels = model, traits, kernels
        self._attends_latents = attends_latents(ready, traits)
        self._exchange, self._limits = exchange_for(model, traits, latents=self._attends_latents), limits
        self._binding = bind(ready, config.num_hidden_layers)
        self._device = model.device
        self._ledger = StateLedger()
        self._seats = Seats(scheduler.max_num_seqs, self._device)
        largest = TOKENS[-1] if prefill_graphs else 0
        self._dummies = tuple(
            dummy_steps(scheduler.max_num_batched_tokens, ready.max_model_len, scheduler.max_num_seqs, largest)
        )
        ragged = ragged_buckets(scheduler.max_num_seqs, scheduler.max_num_batched_tokens)
        self._builder = StepBuilder(
            self._binding,
            max_rows=max(scheduler.max_num_seqs, *(bucket.rows for bucket in ragged)),
            max_num_batched_tokens=max(scheduler.max_num_batched_tokens, ragged[-1].tokens, scheduler.max_num_seqs),
            max_model_len=ready.max_model_len,
            device=self._device,
        )
        gathers = traits.expand_latents is not None and not self._attends_latents
        self._cache = _cache_for(self._binding, gathers)
        self._layers = DecoderLayers(model, config.num_hidden_layers, run_layer)
        self._stock_attention = model.config._attn_implementation
        register()
        model.set_attn_implementation(PACKED_NAME)
        self._decode_sizes = decode_buckets(scheduler.max_num_seqs)
        self._graphs: DecodeGraphs | None = None
        self._ragged: RaggedGraphs | None = None
        self._aside: Any = None
        groups = self._builder.state_groups
        if cuda_graphs:
            self._aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            pool = torch.cuda.graph_pool_handle()
            inputs = DecodeInputs(self._seats, groups, scheduler.max_num_seqs, self._device)
            self._graphs = DecodeGraphs(self._builder, inputs, self._decode, self._decode_sizes, pool)
            if prefill_graphs:
                tokens = RaggedInputs(self._seats, groups, ragged, self._device)
                self._ragged = RaggedGraphs(self._builder, tokens, self._prefill, ragged, pool)

    def warm_up(self) -> None:
        """Compile and capture now what later steps run; no page is touched."""
        if self._device.type == "cuda":
            for lens, seq_lens in self._dummies:
                self._run_dummy(lens, self._builder.dummy(lens, seq_lens))
            for size in self._decode_sizes if self._graphs is None else ():
                lens = (1,) * size
                self._run_dummy(lens, self._builder.dummy(lens, lens, decode_only=True))
        captured = [graphs for graphs in (self._ragged, self._graphs) if graphs is not None]
        if captured:
            with nothing_collected():
                for graphs in captured:
                    graphs.capture()

    def _run_dummy(self, lens: Sequence[int], step: PackedStep) -> None:
        nothing = torch.zeros(sum(lens), dtype=torch.int64, device=self._device)
        ends = stage([end - 1 for end in accumulate(lens)], torch.int64, self._device)
        likeliest(self._in_context(step, nothing, nothing, ends))

    def close(self) -> None:
        """Give the model its own attention and its layers back."""
        self._model.set_attn_implementation(self._stock_attention)
        self._layers.release()

    def launch(self, step: Step) -> Flight:
        """Queue ``step`` on the device, and the copy of its tokens to the host behind it.

        :raises IntegrityError: if a state is not the request's, or not of its tokens so far, and if the model no
            longer calls the engine's attention: the engine was closed, or somebody gave the model another.
        """
        self._check_attention()
        rows = rows_of(step)
        requests, lengths = [row.request for row in rows], [row.length for row in rows]
        blocks = {
            group: tuple(request.tables[group].blocks[0] for request in requests)
            for group in self._builder.state_groups
        }
        self._ledger.begin(requests, blocks)
        logits, tokens = self._forward(rows)
        self._ledger.commit(requests, blocks, lengths)
        return Flight(tuple(row.request for row in rows if row.samples), logits, tokens)

    def _forward(self, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (S, V) and likeliest tokens (S,) of the rows that sample."""
        seats = self._seats.of([row.request for row in rows])
        if self._graphs is not None and all(row.is_decode and row.samples for row in rows):
            return self._graphs.replay(rows, seats)
        bucket = self._ragged.bucket(rows) if self._ragged is not None else None
        if self._ragged is not None and bucket is not None:
            return self._ragged.replay(bucket, rows, seats)
        sampled, ends = self._sampled(rows)
        ids, positions = self._input_ids(rows, seats), self._positions(rows)
        logits = self._in_context(self._builder.build(rows), ids, positions, ends)
        tokens = likeliest(logits)
        places = stage([seats[index] for index in sampled], torch.int64, self._device)
        self._seats.last_tokens.index_copy_(0, places, tokens)
        return logits, tokens

    def _decode(self, step: PackedStep, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits of every row of a step of decodes."""
        return self._in_context(step, ids, positions, 0, self._aside)

    def _prefill(
        self, step: PackedStep, ids: torch.Tensor, positions: torch.Tensor, ends: torch.Tensor
    ) -> torch.Tensor:
        """Logits of the tokens ``ends`` of a captured step with prefill."""
        return self._in_context(step, ids, positions, ends, self._aside)

    def _in_context(
        self,
        step: PackedStep,
        ids: torch.Tensor,
        positions: torch.Tensor,
        keep: torch.Tensor | int,
        aside: torch.cuda.Stream | None = None,
    ) -> torch.Tensor:
        context = ForwardContext(self._binding, self._kernels, step, aside)
        with self._exchange.active(), self._limits(), forward_of(context):
            logits = self._logits(ids, positions, keep)
        context.check_complete()
        return logits

    def _logits(self, input_ids: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor | int) -> torch.Tensor:
        """One forward of the model: (T,) ids and positions to (S, V) logits of tokens ``keep``; 0 keeps all."""
        inputs: dict[str, Any] = {
            "input_ids": input_ids[None],
            self._traits.cache_argument: self._cache,
            "use_cache": True,
            "logits_to_keep": keep,
        }
        if self._traits.expand_latents:
            inputs[LATENTS] = STORED if self._attends_latents else EXPANDED
        if self._traits.takes_positions:
            inputs["position_ids"] = positions[None]
        logits: torch.Tensor = self._model(**inputs).logits
        return logits[0]

    def _sampled(self, rows: Sequence[Row]) -> tuple[list[int], torch.Tensor]:
        """Rows that sample, and the place of each one's last token among all tokens, (S,) int64."""
        sampled, ends, end = [], [], 0
        for index, row in enumerate(rows):
            end += row.length
            if row.samples:
                sampled.append(index)
                ends.append(end - 1)
        return sampled, stage(ends, torch.int64, self._device)

    def _input_ids(self, rows: Sequence[Row], seats: Sequence[int]) -> torch.Tensor:
        known = [token for row in rows for token in row.tokens()]
        ids = stage(known, torch.int64, self._device)
        pending = [index for index, token in enumerate(known) if token == ON_DEVICE]
        if pending:
            # Only decodes have such tokens, and they come first, one token each.
            places = stage([*pending, *(seats[index] for index in pending)], torch.int64, self._device).view(2, -1)
            ids.index_copy_(0, places[0], self._seats.last_tokens[places[1]])
        return ids

    def _positions(self, rows: Sequence[Row]) -> torch.Tensor:
        return stage([position for row in rows for position in range(row.start, row.end)], torch.int64, self._device)

    def _check_attention(self) -> None:
        attention = self._model.config._attn_implementation
        if attention != PACKED_NAME:
            raise IntegrityError(
                f"the model calls attention {attention!r}, which knows nothing of the cache; an engine that was closed"
                f" cannot go on, and while one is open the attention must stay {PACKED_NAME!r}",
                value=attention,
                expected=PACKED_NAME,
            )


def _cache_for(binding: Any, gathers: bool) -> PackedCache:
    states, attention = binding.states, binding.attention
    layers = range(binding.num_layers)
    return PackedCache(
        binding.num_layers,
        state_layers=frozenset(index for index in layers if index in states and index not in attention),
        empty_layers=frozenset(index for index in layers if index not in states and index not in attention),
        gathers=gathers,
    )
