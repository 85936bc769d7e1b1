"""The scheduler and the block pool without a model: nobody is lost, nothing leaks, order is kept."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from makeready.cache.group_pool import GroupPool, UnifiedPool
from makeready.cache.specs import AttentionSpec, LayerGroup, LayerSpec, MambaSpec, StateTensor
from makeready.config import SchedulerConfig
from makeready.engines.transformers.families import Traits
from makeready.engines.transformers.records import SamplingParams
from makeready.engines.transformers.requests import Request
from makeready.engines.transformers.scheduler import Scheduler, Step
from makeready.errors import CapacityError, ConfigError, RequestError

ATTENTION = AttentionSpec(num_query_heads=4, num_kv_heads=2, head_size=16, head_size_v=16, dtype="float32")
STATE = MambaSpec(kind="mamba2", states=(StateTensor(name="conv", shape=(8, 4), dtype="float32"),))
MAX_MODEL_LEN = 200


def groups_of(attention: int, states: int, block_size: int) -> tuple[LayerGroup, ...]:
    specs = [ATTENTION] * attention + [STATE] * states
    return tuple(
        LayerGroup(
            index=index,
            kind="state" if spec is STATE else "attention",
            layers=(LayerSpec(layer=index, spec=spec),),
            block_size=MAX_MODEL_LEN if spec is STATE else block_size,
        )
        for index, spec in enumerate(specs)
    )


def make(num_blocks=20, attention=1, states=1, block_size=4, seqs=4, tokens=16, **traits) -> Scheduler:
    return Scheduler(
        groups_of(attention, states, block_size),
        UnifiedPool(num_blocks),
        SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens),
        Traits(model_type="tiny", **traits),
        MAX_MODEL_LEN,
    )


def request(arrival: int, prompt: int, new: int) -> Request:
    params = SamplingParams(max_new_tokens=new)
    return Request(id=f"r{arrival}", prompt=tuple(range(prompt)), params=params, arrival=arrival)


def compute(scheduler: Scheduler, step: Step) -> list[Request]:
    """What the engine does with a step, without the model; the requests that ended."""
    scheduled = [(r, 1) for r in step.decodes] + [(chunk.request, chunk.length) for chunk in step.prefills]
    ended = []
    for running, length in scheduled:
        running.num_computed += length
        if running.samples_next:
            running.output.append(0)
            if len(running.output) == running.params.max_new_tokens:
                scheduler.finish(running)
                ended.append(running)
    return ended


def check_step(scheduler: Scheduler, pool: GroupPool, step: Step, seqs: int, tokens: int, single: bool) -> None:
    pool.check_integrity()
    assert len(scheduler.running) <= seqs
    assert len(step.decodes) + sum(chunk.length for chunk in step.prefills) <= tokens
    assert list(scheduler.running) == sorted(scheduler.running, key=lambda r: r.arrival)
    for chunk in step.prefills:
        assert chunk.start == chunk.request.num_computed
        assert single or chunk.length > 1 or chunk.start == 0
    for running, length in [(r, 1) for r in step.decodes] + [(c.request, c.length) for c in step.prefills]:
        assert running in scheduler.running
        for group, table in running.tables.items():
            assert table.num_tokens >= running.num_computed + length
            assert all(pool.owners(group, block) == (running.id,) for block in table.blocks), group
    for waiting in scheduler.waiting:
        assert not waiting.tables


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_every_request_ends_and_every_block_returns(data):
    replays, single, seqs = data.draw(st.booleans()), data.draw(st.booleans()), data.draw(st.integers(1, 5))
    tokens = data.draw(st.integers(3, 20))
    pool = UnifiedPool(data.draw(st.integers(4, 40)))
    groups = groups_of(data.draw(st.integers(0, 2)), data.draw(st.integers(1, 2)), data.draw(st.integers(1, 6)))
    config = SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=tokens)
    traits = Traits(model_type="tiny", replays_generated=replays, single_token_chunks=single)
    scheduler = Scheduler(groups, pool, config, traits, MAX_MODEL_LEN)
    sizes = data.draw(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=8))
    joins = sorted(data.draw(st.lists(st.integers(0, 30), min_size=len(sizes), max_size=len(sizes))))
    aborts = data.draw(st.dictionaries(st.integers(0, 40), st.integers(0, 7), max_size=2))

    live: dict[int, Request] = {}
    ended: set[int] = set()
    refused: set[int] = set()
    aborted: set[int] = set()
    arrivals, now = 0, 0
    while arrivals < len(sizes) or live:
        while arrivals < len(sizes) and joins[arrivals] <= now:
            new = request(arrivals, *sizes[arrivals])
            try:
                scheduler.add(new)
                live[arrivals] = new
            except CapacityError:
                refused.add(arrivals)
            arrivals += 1
        if aborts.get(now) in live:
            aborted.add(aborts[now])
            scheduler.abort(live.pop(aborts[now]))
        oldest = live[min(live)] if live else None
        step = scheduler.schedule()
        assert oldest not in step.preempted
        assert oldest is None or not step.is_empty
        check_step(scheduler, pool, step, seqs, tokens, single)
        for done in compute(scheduler, step):
            ended.add(done.arrival)
            del live[done.arrival]
        now += 1
        assert now < 3000
    assert ended | refused | aborted == set(range(len(sizes)))
    assert pool.num_free == pool.capacity
    assert not scheduler.has_requests()


def test_decodes_come_before_prefill_chunks():
    scheduler = make(num_blocks=40, tokens=6)
    scheduler.add(request(0, 3, 9))
    compute(scheduler, scheduler.schedule())
    scheduler.add(request(1, 20, 2))
    step = scheduler.schedule()
    assert [r.id for r in step.decodes] == ["r0"]
    assert [(c.request.id, c.start, c.length) for c in step.prefills] == [("r1", 0, 5)]


def test_admission_keeps_the_order_of_arrival():
    scheduler = make(num_blocks=8, tokens=64)
    for arrival, prompt in enumerate((12, 16, 1)):
        scheduler.add(request(arrival, prompt, 1))
    assert [chunk.request.id for chunk in scheduler.schedule().prefills] == ["r0"]
    assert [r.id for r in scheduler.waiting] == ["r1", "r2"], "a short request must not pass a long one that waits"


def test_the_latest_arrival_is_preempted_and_waits_at_its_old_place():
    scheduler = make(num_blocks=7, tokens=64)
    scheduler.add(request(0, 4, 8))
    scheduler.add(request(1, 8, 5))
    compute(scheduler, scheduler.schedule())
    scheduler.add(request(2, 1, 1))
    step = scheduler.schedule()
    assert [r.id for r in step.preempted] == ["r1"]
    assert [r.id for r in scheduler.waiting] == ["r1", "r2"]
    assert scheduler.waiting[0].output == [0], "its tokens stay, only their K, V and states go"


@pytest.mark.parametrize(("replays", "prefill"), [(False, 5), (True, 4)])
def test_generated_tokens_are_replayed_where_the_family_asks_for_it(replays, prefill):
    scheduler = make(replays_generated=replays)
    moved = request(0, 4, 8)
    scheduler.add(moved)
    compute(scheduler, scheduler.schedule())
    scheduler.restart([moved])
    step = scheduler.schedule()
    assert [chunk.length for chunk in step.prefills] == [prefill]
    compute(scheduler, step)
    assert len(moved.output) == (1 if replays else 2)


@pytest.mark.parametrize(("prompt", "chunks"), [(6, [3, 3]), (7, [3, 2, 2]), (4, [2, 2]), (1, [1])])
def test_a_chunk_of_one_token_never_follows_another(prompt, chunks):
    scheduler = make(tokens=3, single_token_chunks=False)
    scheduler.add(request(0, prompt, 1))
    seen = []
    while scheduler.has_requests():
        step = scheduler.schedule()
        seen += [chunk.length for chunk in step.prefills]
        compute(scheduler, step)
    assert seen == chunks


def test_too_few_tokens_per_step_for_such_chunks_are_refused():
    with pytest.raises(ConfigError, match="max_num_batched_tokens 2 leaves prefill chunks of one token"):
        make(tokens=2, single_token_chunks=False)


def test_what_can_never_fit_is_refused_at_once():
    scheduler = make(num_blocks=8, block_size=4)
    with pytest.raises(CapacityError, match="max_new_tokens 6 need 8 blocks, but the cache has 7, which hold 24"):
        scheduler.add(request(0, 20, 6))
    scheduler.add(request(1, 20, 5))
    while scheduler.has_requests():
        compute(scheduler, scheduler.schedule())


def test_an_empty_prompt_and_one_beyond_the_model_are_refused():
    scheduler = make()
    with pytest.raises(RequestError, match="the prompt is empty"):
        scheduler.add(request(0, 0, 1))
    with pytest.raises(RequestError, match="198 tokens and max_new_tokens 3 make 201, more than the 200 that"):
        scheduler.add(request(0, 198, 3))


def test_blocks_that_change_hands_are_told_in_order():
    scheduler = make()
    first = request(0, 5, 3)
    scheduler.add(first)
    handed = {blocks.group: blocks.ids for blocks in scheduler.schedule().handed_out}
    assert {group: len(ids) for group, ids in handed.items()} == {0: 2, 1: 1}
    scheduler.abort(first)
    step = scheduler.schedule()
    assert {blocks.group: blocks.ids for blocks in step.freed} == handed
    assert step.is_empty
