"""The embedded engine: requests in, tokens and text out, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import torch
import transformers

from ...cache.group_pool import pool_for
from ...errors import RequestError
from ..asked import require_followed
from .advice import without_kernel_advice
from .blocks import BlockKeeper
from .current_device import current
from .execution import decide
from .families import check_version, traits_of
from .loading import load_model
from .packed.driver import PackedDriver, StepTimes
from .packed.opening import open_packed
from .probe import check_plan
from .records import Completion, FinishReason, Output, Progress, Ready, SamplingParams
from .requests import Request
from .runner import ModelRunner, check_model
from .sampling import Sampler, choose
from .scheduler import Scheduler
from .text import TextStream, Tokenizer

__all__ = ["Completion", "Output", "Progress", "SamplingParams", "TransformersEngine", "load_model"]

Prompt = str | Sequence[int]


@dataclass(eq=False, slots=True)
class _Entry:
    """A live request with what makes its tokens and its text."""

    request: Request
    sampler: Sampler
    stream: TextStream | None


class TransformersEngine:
    """Continuous batching over the paged cache for a transformers model, unmodified.

    One engine owns its model from construction to :meth:`close`; it is not for use from several threads at once.

    :param model: a causal language model of transformers, in evaluation mode, on the cache's device.
    :param tokenizer: for prompts that are text, and for text in the outputs; ``None`` if token ids will do.
    :param ready: what startup made: cache, backends, groups and settings.
    :param poison_freed: overwrite freed blocks with NaN; a debug option that turns stale reads into NaN logits.
    :raises UnsupportedModelError: for a family, a transformers version, or a model that the plan does not fit.
    :raises ConfigError: for a model in training mode, on another device, or in another engine, and for settings
        that the engine does not serve.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer | None, ready: Ready, *, poison_freed: bool = False) -> None:
        check_version(transformers.__version__)
        self.traits = traits_of(model.config.get_text_config(decoder=True).model_type)
        require_followed(ready.config, model.device.type)
        check_model(model, ready)
        self._device: torch.device = model.device
        self.execution = decide(model, ready, self.traits)
        with without_kernel_advice(holds=self._device.type == "cuda" and not self.execution.packed):
            check_plan(model, self.traits, ready.groups, any_state_dtype=self.execution.packed)
        self.pool = pool_for(ready.cache.layout)
        self.scheduler = Scheduler(ready.groups, self.pool, ready.config.scheduler, self.traits, ready.max_model_len)
        self._blocks = BlockKeeper(ready, clear_states=not self.execution.packed, poison_freed=poison_freed)
        self._runner: ModelRunner | None = None
        self._driver: PackedDriver | None = None
        if self.execution.packed:
            with current(self._device):
                packed = open_packed(model, ready, self.traits, self.execution)
            self._driver = PackedDriver(
                self.scheduler, self._blocks, packed,
                deliver=self._deliver, sampler_of=self._sampler_of, ahead=self.execution.async_scheduling,
            )  # fmt: skip
        else:
            self._runner = ModelRunner(model, ready, self.traits)
        self._tokenizer = tokenizer
        self._seed = ready.config.model.seed
        self._eos = _eos_tokens(model)
        self._vocab_size = model.config.get_text_config(decoder=True).vocab_size
        self._entries: dict[str, _Entry] = {}
        self._arrivals = 0
        self._unread: list[Output] = []
        self.num_preemptions = 0

    @property
    def step_times(self) -> StepTimes | None:
        """Where the host's time went; None unless steps are packed."""
        return self._driver.times if self._driver is not None else None

    def close(self) -> None:
        """Abort every request and give the model its own attention back."""
        for request_id in tuple(self._entries):
            self.abort(request_id)
        if self._driver is not None:
            self._driver.close()
        if self._runner is not None:
            self._runner.close()

    def add_request(self, prompt: Prompt, params: SamplingParams | None = None) -> str:
        """Queue a request.

        :param prompt: text, or token ids.
        :return: its id, which outputs carry.
        :raises RequestError: for an empty or too long prompt, an unknown token, or a setting out of range.
        :raises CapacityError: if not even the empty cache holds its prompt and output.
        """
        params = (params or SamplingParams()).validated()
        arrival = self._arrivals
        request = Request(id=f"request-{arrival}", prompt=self._encode(prompt), params=params, arrival=arrival)
        self.scheduler.add(request)
        self._arrivals += 1
        stream = TextStream(self._tokenizer) if self._tokenizer is not None else None
        self._entries[request.id] = _Entry(request, Sampler(params, self._seed + arrival), stream)
        return request.id

    def abort(self, request_id: str) -> Output:
        """End a request now; its blocks return at once.

        :raises RequestError: for an id that is not live.
        """
        entry = self._entries.pop(request_id, None)
        if entry is None:
            raise RequestError(
                f"request {request_id!r} is not live; it ended, or never was",
                option="request_id", value=request_id, expected=sorted(self._entries),
            )  # fmt: skip
        self.scheduler.abort(entry.request)
        text = entry.stream.finish() if entry.stream else ""
        return Output(request_id=request_id, new_token_ids=(), text=text, finished=True, finish_reason="abort")

    def has_requests(self) -> bool:
        """True while :meth:`step` has something to do or to tell."""
        return bool(self._unread) or self.scheduler.has_requests()

    def step(self) -> list[Output]:
        """Run one step of everything that is scheduled, and return what came of it.

        If the model raises, the requests of the step start over with the next step, and the error goes on; what
        the step had made before comes with the next one.
        """
        with current(self._device):
            if self._driver is not None:
                self.num_preemptions += self._driver.step()
            if self._runner is not None:
                self._step_in_turn(self._runner)
        outputs, self._unread = self._unread, []
        return outputs

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        on_output: Callable[[Output], None] | None = None,
    ) -> list[Completion]:
        """Finish ``prompts`` and return them in order; other requests of this engine move on meanwhile.

        :param params: one for all, or one per prompt.
        :param on_progress: called after every step.
        :param on_output: called with each output of these prompts as it comes.
        :raises RequestError: as :meth:`add_request`; nothing of this call stays queued then.
        """
        if isinstance(prompts, str):
            raise RequestError(
                f"prompts {prompts!r} is one text, which would be taken letter by letter; give a list of prompts",
                option="prompts", value=prompts, expected=[prompts],
            )  # fmt: skip
        ids: list[str] = []
        entries: list[_Entry] = []
        reasons: dict[str, FinishReason] = {}
        try:
            for prompt, setting in zip(prompts, _per_prompt(prompts, params), strict=True):
                ids.append(self.add_request(prompt, setting))
                entries.append(self._entries[ids[-1]])
            while any(map(self._is_open, ids)):
                for output in self._step_for(frozenset(ids)):
                    if on_output:
                        on_output(output)
                    if output.finish_reason:
                        reasons[output.request_id] = output.finish_reason
                if on_progress:
                    tokens = sum(len(entry.request.output) for entry in entries)
                    on_progress(Progress(finished=len(reasons), total=len(ids), tokens=tokens))
        finally:
            self._abort_live(ids)
        return [_completion(entry, reasons.get(entry.request.id, "abort")) for entry in entries]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Output]:
        """Outputs of one request as they come; leaving the loop early aborts it."""
        request_id = self.add_request(prompt, params)
        try:
            while self._is_open(request_id):
                yield from self._step_for(frozenset((request_id,)))
        finally:
            self._abort_live([request_id])

    def _step_in_turn(self, runner: ModelRunner) -> None:
        """The decodes in one forward, then each prefill chunk in one of its own."""
        step = self.scheduler.schedule()
        self.num_preemptions += len(step.preempted)
        try:
            self._blocks.apply(step)
            if step.decodes:
                self._advance(runner, step.decodes, 1)
            for chunk in step.prefills:
                self._advance(runner, (chunk.request,), chunk.length)
        except BaseException:
            self.scheduler.restart([*step.decodes, *(chunk.request for chunk in step.prefills)])
            raise

    def _advance(self, runner: ModelRunner, requests: Sequence[Request], length: int) -> None:
        """Forward, then choose: nothing of a request changes before its forward has ended."""
        logits = runner.run(requests, length)
        for request in requests:
            request.num_computed += length
        rows = [index for index, request in enumerate(requests) if request.samples_next]
        if not rows:
            return
        if len(rows) < len(requests):
            logits = logits[rows]
        choosing = [requests[row] for row in rows]
        samplers = [(place, self._entries[request.id].sampler) for place, request in enumerate(choosing)]
        # One by one into what is unread: an error further on must not take along what a request has got already.
        for request, token in zip(choosing, choose(logits, logits.argmax(dim=-1).tolist(), samplers), strict=True):
            self._deliver(request, token)

    def _sampler_of(self, request: Request) -> Sampler | None:
        entry = self._entries.get(request.id)
        return entry.sampler if entry else None

    def _deliver(self, request: Request, token: int) -> None:
        self._unread.append(self._emit(self._entries[request.id], token))

    def _emit(self, entry: _Entry, token: int) -> Output:
        request = entry.request
        request.output.append(token)
        reason = self._finish_reason(request, token)
        text = entry.stream.push(token) if entry.stream else ""
        if reason:
            text += entry.stream.finish() if entry.stream else ""
            self.scheduler.finish(request)
            del self._entries[request.id]
        return Output(
            request_id=request.id,
            new_token_ids=(token,),
            text=text,
            finished=reason is not None,
            finish_reason=reason,
        )

    def _finish_reason(self, request: Request, token: int) -> FinishReason | None:
        params = request.params
        if token in params.stop_token_ids or (token in self._eos and not params.ignore_eos):
            return "stop"
        return "length" if len(request.output) >= params.max_new_tokens else None

    def _step_for(self, ids: frozenset[str]) -> list[Output]:
        """One step; outputs of other requests wait for whoever calls :meth:`step` next."""
        outputs = self.step()
        self._unread += [output for output in outputs if output.request_id not in ids]
        return [output for output in outputs if output.request_id in ids]

    def _is_open(self, request_id: str) -> bool:
        """Whether outputs of the request are to come, or wait to be read: another caller's step may have ended it."""
        return request_id in self._entries or any(output.request_id == request_id for output in self._unread)

    def _abort_live(self, ids: Sequence[str]) -> None:
        """End what still runs of ``ids``; outputs that nobody will read go too."""
        for request_id in ids:
            if request_id in self._entries:
                self.abort(request_id)
        self._unread = [output for output in self._unread if output.request_id not in ids]

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise RequestError(
                    "the prompt is text and the engine has no tokenizer; give token ids",
                    option="prompt", value=prompt, expected="token ids",
                )  # fmt: skip
            tokens = tuple(self._tokenizer.encode(_utf8(prompt)))
        elif not isinstance(prompt, Iterable) or isinstance(prompt, bytes):
            raise RequestError(
                f"the prompt {prompt!r} is neither text nor token ids",
                option="prompt", value=prompt, expected="text, or a list of token ids",
            )  # fmt: skip
        else:
            tokens = tuple(map(_token_id, prompt))
        wrong = [token for token in tokens if not 0 <= token < self._vocab_size]
        if wrong:
            raise RequestError(
                f"token {wrong[0]} is not in the vocabulary of {self._vocab_size} tokens",
                option="prompt", value=wrong[0], expected=f"0 to {self._vocab_size - 1}",
            )  # fmt: skip
        return tokens


def _utf8(prompt: str) -> str:
    """The prompt, once it is text: bytes of a shell that are no UTF-8 reach Python as lone surrogates."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the prompt has bytes that are no UTF-8 text, from character {error.start} on",
            option="prompt", value=ascii(prompt), expected="UTF-8 text, or token ids",
        ) from None  # fmt: skip
    return prompt


def _token_id(token: object) -> int:
    try:
        return index(token)  # type: ignore[arg-type]
    except TypeError:
        raise RequestError(
            f"{token!r} is no token id", option="prompt", value=token, expected="whole numbers, or a text"
        ) from None


def _completion(entry: _Entry, reason: FinishReason) -> Completion:
    request = entry.request
    return Completion(
        request_id=request.id,
        prompt_token_ids=request.prompt,
        token_ids=tuple(request.output),
        text=entry.stream.text if entry.stream else "",
        finish_reason=reason,
        num_preemptions=request.num_preemptions,
    )


def _per_prompt(
    prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * len(prompts)
    if len(params) != len(prompts):
        raise RequestError(
            f"{len(prompts)} prompts came with {len(params)} params; give one for all, or one each",
            option="params", value=len(params), expected=len(prompts),
        )  # fmt: skip
    return list(params)


def _eos_tokens(model: Any) -> frozenset[int]:
    generation = getattr(model, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    if eos is None:
        eos = getattr(model.config.get_text_config(decoder=True), "eos_token_id", None)
    if eos is None:
        return frozenset()
    return frozenset(eos if isinstance(eos, (list, tuple)) else (eos,))
