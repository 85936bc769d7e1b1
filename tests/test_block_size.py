"""The constraints and their solver, against trying every size."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from makeready.cache.block_size import (
    AnyMultipleOf,
    AtLeastPage,
    Constraint,
    Divides,
    MultipleOf,
    OneOf,
    check,
    solve,
)
from makeready.errors import BlockSizeError

LIMIT = 6000
small = st.integers(1, 24)
sizes = st.lists(small, min_size=1, max_size=3).map(tuple)
constraints = st.lists(
    st.one_of(
        st.builds(MultipleOf, small, owner=st.just("a")),
        st.builds(OneOf, st.lists(st.integers(1, 96), min_size=1, max_size=4).map(tuple), owner=st.just("b")),
        st.builds(AnyMultipleOf, sizes, owner=st.just("c")),
        st.builds(Divides, st.integers(1, 480), owner=st.just("d")),
        st.builds(AtLeastPage, st.integers(1, 900), st.integers(1, 9), owner=st.just("e")),
    ),
    max_size=4,
)


def by_trying(rules: list[Constraint], start: int) -> int | None:
    return next((n for n in range(start, LIMIT) if all(rule.accepts(n) for rule in rules)), None)


def nearest_by_trying(rules: list[Constraint], size: int) -> tuple[int, ...]:
    below = next((n for n in range(size - 1, 0, -1) if all(rule.accepts(n) for rule in rules)), None)
    above = by_trying(rules, size + 1)
    return tuple(n for n in (below, above) if n is not None)


@given(constraints, st.integers(1, 60), st.randoms())
def test_the_solver_finds_what_trying_finds(rules: list[Constraint], start: int, random) -> None:
    # Steps are at most lcm(1..24)-sized; what lies past the limit is checked by acceptance alone.
    wanted = by_trying(rules, start)
    shuffled = random.sample(rules, len(rules))
    try:
        found = solve(shuffled, start)
    except BlockSizeError:
        assert wanted is None
    else:
        assert found >= start
        assert all(rule.accepts(found) for rule in rules)
        assert wanted == found if wanted is not None else found >= LIMIT


@given(constraints, st.integers(1, 200))
def test_a_given_size_is_kept_or_refused_with_its_neighbours(rules: list[Constraint], size: int) -> None:
    if all(rule.accepts(size) for rule in rules):
        check(size, rules)
        return
    with pytest.raises(BlockSizeError, match=f"block_size {size} is refused") as caught:
        check(size, rules)
    sizes = nearest_by_trying(rules, size)
    if sizes and by_trying(rules, size + 1) is not None:
        assert caught.value.expected == sizes


@given(constraints)
def test_a_conflict_names_only_owners_that_clash(rules: list[Constraint]) -> None:
    if by_trying(rules, 1) is not None or not any(isinstance(rule, (OneOf, Divides)) for rule in rules):
        return  # without a finite rule, something large enough always suits
    with pytest.raises(BlockSizeError) as caught:
        solve(rules)
    assert isinstance(caught.value.value, list)
    assert by_trying([rule for rule in rules if rule.owner in caught.value.value], 1) is None
    assert all(owner in caught.value.message for owner in caught.value.value)


def test_a_conflict_names_both_owners_and_ways_out() -> None:
    state = AtLeastPage(1_000_000, 1000, owner="the kda state")
    rules = [OneOf((16,), owner="cpu_mla"), state, MultipleOf(8, owner="x")]
    with pytest.raises(
        BlockSizeError,
        match=r"cpu_mla needs exactly 16 but the kda state needs at least 1000 .*; "
        r"without cpu_mla 1000 works; without the kda state 16 works",
    ) as caught:
        solve(rules)
    assert caught.value.value == ["cpu_mla", "the kda state"]
    assert caught.value.expected == [1000, 16]


def test_three_that_clash_only_together_are_all_named() -> None:
    rules = [OneOf((12, 18, 32), owner="b"), MultipleOf(3, owner="a"), AnyMultipleOf((4, 9), owner="c")]
    assert solve(rules) == 12
    with pytest.raises(BlockSizeError, match="a needs .* but b needs .* but c needs") as caught:
        solve([OneOf((18, 32), owner="b"), MultipleOf(3, owner="a"), MultipleOf(4, owner="c")])
    assert caught.value.value == ["a", "b", "c"]
    assert caught.value.expected == [32, 12, 18]


def test_a_refused_size_gets_every_owner_that_refuses() -> None:
    rules = [MultipleOf(16, owner="flex"), MultipleOf(64, owner="flash"), AtLeastPage(4096, 4, owner="state")]
    with pytest.raises(
        BlockSizeError,
        match="block_size 1000 is refused: flash needs a multiple of 64 and flex needs a multiple of 16 and "
        "state needs at least 1024 .*; the nearest size that works is 1024",
    ):
        check(1000, rules)
    check(1088, rules)


@pytest.mark.parametrize("rule", [MultipleOf(0, owner="acme"), OneOf((), owner="acme"), Divides(-4, owner="acme")])
def test_a_constraint_without_sense_is_refused_by_owner(rule: Constraint) -> None:
    with pytest.raises(BlockSizeError, match="acme declares .* needs whole numbers above zero"):
        solve([rule])


def test_something_else_than_a_constraint_is_refused() -> None:
    with pytest.raises(BlockSizeError, match="64 is not a block-size constraint; use one of MultipleOf, OneOf"):
        solve([64])  # type: ignore[list-item]


@pytest.mark.parametrize("rule", [OneOf(16, owner="vendor"), MultipleOf("64", owner="vendor"), OneOf((), "vendor")])
def test_a_vendor_s_mistyped_constraint_is_named(rule):
    with pytest.raises(BlockSizeError, match="vendor declares .* whole numbers above zero, and sizes in a tuple"):
        solve([rule])


def test_sizes_that_others_imply_are_not_listed() -> None:
    assert AnyMultipleOf((16, 32, 64, 128), owner="a").describe() == "a multiple of 16"
    assert AnyMultipleOf((32, 16, 24), owner="a").describe() == "a multiple of 16 or 24"
