"""Steps of a packed model, one behind the other on the device, with the host up to one step ahead of what it reads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

from ..blocks import BlockKeeper
from ..requests import Request
from ..sampling import Sampler, choose
from ..scheduler import Scheduler
from .flight import Flight
from .rows import rows_of
from .runner import PackedRunner

Deliver = Callable[[Request, int], None]
SamplerOf = Callable[[Request], Sampler | None]


@dataclass(slots=True)
class StepTimes:
    """Where the host's time went since the engine was made."""

    steps: int = 0
    total_s: float = 0.0
    """In steps, waiting included."""
    waited_s: float = 0.0
    """Waiting for the device's tokens; what is left of the total is the host's own work."""


class PackedDriver:
    """Schedules, launches, and reads back.

    While the device works on a step, the next one is scheduled and queued behind it: its requests start from tokens
    that the host has not seen. A stop token is therefore noticed one step late; what the request computed meanwhile
    is dropped. The device works in order, so blocks of a request that ended may change hands at once.

    :param deliver: takes a request's token, once it is read; called only for requests that are still live.
    :param sampler_of: how a request chooses; ``None`` for one that is not live.
    :param ahead: whether to read one step late.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        blocks: BlockKeeper,
        runner: PackedRunner,
        *,
        deliver: Deliver,
        sampler_of: SamplerOf,
        ahead: bool,
    ) -> None:
        self._scheduler, self._blocks, self._runner = scheduler, blocks, runner
        self._deliver, self._sampler_of = deliver, sampler_of
        self._late = 1 if ahead else 0
        self._flights: deque[Flight] = deque()
        self.times = StepTimes()

    def step(self) -> int:
        """Queue the next step and read what is due; returns how many requests were preempted.

        If anything raises, the requests it concerns start over with the next step.
        """
        begun = perf_counter()
        try:
            return self._step()
        finally:
            self.times.steps += 1
            self.times.total_s += perf_counter() - begun

    def close(self) -> None:
        """Forget steps that are not read, and give the model back."""
        self._flights.clear()
        self._runner.close()

    def _step(self) -> int:
        if self._flights and self._scheduler.is_short_of_blocks():
            self._land(0)
        step = self._scheduler.schedule()
        try:
            self._blocks.apply(step)
            flight = None if step.is_empty else self._runner.launch(step)
        except BaseException:
            self._land_before_restart()
            self._scheduler.restart([*step.decodes, *(chunk.request for chunk in step.prefills)])
            raise
        if flight is None:
            self._land(0)
            return len(step.preempted)
        for row in rows_of(step):
            row.request.num_computed += row.length
        for request in flight.requests:
            request.num_pending += 1
        self._flights.append(flight)
        self._land(0 if self._draws(flight) else self._late)
        return len(step.preempted)

    def _draws(self, flight: Flight) -> bool:
        """True if a token must be drawn by the host before its request can go on."""
        samplers = map(self._sampler_of, flight.requests)
        return any(sampler is not None and not sampler.is_greedy for sampler in samplers)

    def _land(self, remaining: int) -> None:
        """Read the oldest steps until ``remaining`` are left."""
        while len(self._flights) > remaining:
            flight = self._flights[0]
            try:
                self._read(flight)
            except BaseException:
                self._abandon()
                raise
            self._flights.popleft()

    def _read(self, flight: Flight) -> None:
        begun = perf_counter()
        likeliest = flight.read()
        self.times.waited_s += perf_counter() - begun
        live = [(place, self._sampler_of(request)) for place, request in enumerate(flight.requests)]
        tokens = choose(flight.logits, likeliest, [(place, sampler) for place, sampler in live if sampler is not None])
        for request, token in zip(flight.requests, tokens, strict=True):
            request.num_pending -= 1
            # An earlier delivery may have ended a request, so this is asked anew.
            if self._sampler_of(request) is not None:
                self._deliver(request, token)

    def _land_before_restart(self) -> None:
        """Keep what earlier steps have computed, unless the device lost that too."""
        try:
            self._land(0)
        except Exception:
            self._abandon()

    def _abandon(self) -> None:
        """Start the requests of all unread steps over."""
        lost: Sequence[Request] = [request for flight in self._flights for request in flight.requests]
        for request in lost:
            request.num_pending = 0
        self._flights.clear()
        self._scheduler.restart(lost)
