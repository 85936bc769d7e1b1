"""Block-size constraints: values with an owner, and the one solver that takes them all.

Every component that restricts the KV block size says so with one of these values. The solver finds the smallest
size that all of them accept, or names the owners that clash and the sizes that would work without one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from math import gcd, lcm

from ..errors import BlockSizeError


@dataclass(frozen=True, slots=True)
class MultipleOf:
    """The block is a whole number of ``n`` tokens."""

    n: int
    owner: str

    def accepts(self, size: int) -> bool:
        """True if a block of ``size`` tokens suits the owner."""
        return size % self.n == 0

    def describe(self) -> str:
        """The rule in words."""
        return f"a multiple of {self.n}"


@dataclass(frozen=True, slots=True)
class OneOf:
    """The block is exactly one of ``sizes``: the owner's kernel cannot split it."""

    sizes: tuple[int, ...]
    owner: str

    def accepts(self, size: int) -> bool:
        """True if a block of ``size`` tokens suits the owner."""
        return size in self.sizes

    def describe(self) -> str:
        """The rule in words."""
        return f"exactly {_listed(self.sizes)}"


@dataclass(frozen=True, slots=True)
class AnyMultipleOf:
    """The block is a multiple of at least one of ``sizes``: the kernel knows only these kernel blocks."""

    sizes: tuple[int, ...]
    owner: str

    def accepts(self, size: int) -> bool:
        """True if a block of ``size`` tokens suits the owner."""
        return any(size % n == 0 for n in self.sizes)

    def describe(self) -> str:
        """The rule in words."""
        return f"a multiple of {_listed(_without_multiples(self.sizes))}"


@dataclass(frozen=True, slots=True)
class Divides:
    """The block goes a whole number of times into ``n`` tokens."""

    n: int
    owner: str

    def accepts(self, size: int) -> bool:
        """True if a block of ``size`` tokens suits the owner."""
        return self.n % size == 0

    def describe(self) -> str:
        """The rule in words."""
        return f"a divisor of {self.n}"


@dataclass(frozen=True, slots=True)
class AtLeastPage:
    """The attention page, ``bytes_per_token`` a token, holds at least ``page_bytes``."""

    page_bytes: int
    bytes_per_token: int
    owner: str

    @property
    def smallest(self) -> int:
        """The smallest block, in tokens, whose page is large enough."""
        return -(-self.page_bytes // self.bytes_per_token)

    def accepts(self, size: int) -> bool:
        """True if a block of ``size`` tokens suits the owner."""
        return size >= self.smallest

    def describe(self) -> str:
        """The rule in words."""
        return f"at least {self.smallest} ({self.page_bytes} bytes at {self.bytes_per_token} bytes per token)"


Constraint = MultipleOf | OneOf | AnyMultipleOf | Divides | AtLeastPage
CONSTRAINT_TYPES = (MultipleOf, OneOf, AnyMultipleOf, Divides, AtLeastPage)


def solve(constraints: Iterable[Constraint], start: int = 1) -> int:
    """The smallest block size, in tokens, from ``start`` on that every constraint accepts.

    :raises BlockSizeError: naming the owners that clash and the sizes that work without each of them.
    """
    rules = checked(constraints)
    size = smallest_accepted(rules, start)
    if size is None:
        raise _conflict(rules, start)
    return size


def checked(constraints: Iterable[Constraint]) -> tuple[Constraint, ...]:
    """The constraints without repeats, in an order that does not depend on the caller's.

    :raises BlockSizeError: for something that is not a constraint, or a constraint with a number below one.
    """
    rules = set()
    for rule in constraints:
        if not isinstance(rule, CONSTRAINT_TYPES):
            names = ", ".join(kind.__name__ for kind in CONSTRAINT_TYPES)
            raise BlockSizeError(
                f"{rule!r} is not a block-size constraint; use one of {names}",
                value=repr(rule),
                expected=names,
            )
        numbers = _numbers(rule)
        if not numbers or any(type(n) is not int or n < 1 for n in numbers):
            raise BlockSizeError(
                f"{rule.owner} declares {rule!r}; a block-size constraint needs whole numbers above zero, and sizes in "
                "a tuple",
                option=rule.owner,
                value=repr(rule),
                expected="whole numbers above zero",
            )
        rules.add(rule)
    return tuple(sorted(rules, key=lambda rule: (rule.owner, repr(rule))))


def smallest_accepted(rules: Sequence[Constraint], start: int) -> int | None:
    """The smallest size >= ``start`` that all accept; ``None`` if there is none."""
    finite = _finite_candidates(rules)
    if finite is not None:
        return min((n for n in finite if n >= start and _all_accept(rules, n)), default=None)
    floor = max(start, _lower_bound(rules))
    return min(-(-floor // step) * step for step in _steps(rules))


def largest_accepted(rules: Sequence[Constraint], end: int) -> int | None:
    """The largest size <= ``end`` that all accept; ``None`` if there is none."""
    finite = _finite_candidates(rules)
    if finite is not None:
        return max((n for n in finite if n <= end and _all_accept(rules, n)), default=None)
    floor = max(1, _lower_bound(rules))
    return max((n for step in _steps(rules) if (n := end // step * step) >= floor), default=None)


def nearest(rules: Sequence[Constraint], size: int) -> tuple[int, ...]:
    """The accepted sizes next to ``size``: the one below, if any, and the one above, if any."""
    below, above = largest_accepted(rules, size - 1), smallest_accepted(rules, size + 1)
    return tuple(n for n in (below, above) if n is not None)


def check(size: int, constraints: Iterable[Constraint], *, option: str = "block_size") -> None:
    """Check a size that somebody asked for; it is kept or refused, never replaced.

    :raises BlockSizeError: naming the option, every owner that refuses, and the nearest sizes that work.
    """
    rules = checked(constraints)
    refusing = [rule for rule in rules if not rule.accepts(size)]
    if not refusing:
        return
    said = " and ".join(f"{rule.owner} needs {rule.describe()}" for rule in refusing)
    sizes = nearest(rules, size)
    if not sizes:
        raise _conflict(rules, 1, prefix=f"{option} {size} is refused: {said}; no other size works either: ")
    raise BlockSizeError(
        f"{option} {size} is refused: {said}; {nearest_words(sizes)}",
        option=option,
        value=size,
        expected=sizes,
    )


def nearest_words(sizes: tuple[int, ...]) -> str:
    """The sizes as a hint: what to ask for instead."""
    if len(sizes) == 1:
        return f"the nearest size that works is {sizes[0]}"
    return f"the nearest sizes that work are {' and '.join(map(str, sizes))}"


def _conflict(rules: Sequence[Constraint], start: int, prefix: str = "") -> BlockSizeError:
    """The error for rules that cannot all hold: the smallest set of them that clashes, and ways out."""
    clash = _smallest_clash(rules, start)
    words = " but ".join(f"{rule.owner} needs {rule.describe()}" for rule in clash)
    ways = []
    sizes = []
    for dropped in clash:
        size = smallest_accepted([rule for rule in rules if rule != dropped], start)
        if size is not None:
            ways.append(f"without {dropped.owner} {size} works")
            sizes.append(size)
    outcome = "; ".join(ways) if ways else "dropping one of them alone is not enough"
    return BlockSizeError(
        f"{prefix}no KV block size{f' from {start} tokens on' if start > 1 else ''} suits all: {words}; {outcome}",
        option="block_size",
        value=[rule.owner for rule in clash],
        expected=sizes,
    )


def _smallest_clash(rules: Sequence[Constraint], start: int) -> list[Constraint]:
    """A subset that clashes and of which every part is needed for that; a pair where a pair suffices."""
    for i, first in enumerate(rules):
        for second in rules[i + 1 :]:
            if smallest_accepted([first, second], start) is None:
                return [first, second]
    needed = list(rules)
    for rule in rules:
        rest = [other for other in needed if other != rule]
        if rest and smallest_accepted(rest, start) is None:
            needed = rest
    return needed


def _all_accept(rules: Sequence[Constraint], size: int) -> bool:
    return all(rule.accepts(size) for rule in rules)


def _finite_candidates(rules: Sequence[Constraint]) -> set[int] | None:
    """Sizes that the finite rules leave; ``None`` if no rule is finite."""
    candidates: set[int] | None = None
    for rule in rules:
        if isinstance(rule, OneOf):
            sizes = set(rule.sizes)
        elif isinstance(rule, Divides):
            sizes = divisors(rule.n)
        else:
            continue
        candidates = sizes if candidates is None else candidates & sizes
    return candidates


def divisors(n: int) -> set[int]:
    """All whole numbers that divide ``n``."""
    small = [k for k in range(1, int(n**0.5) + 1) if n % k == 0]
    return {*small, *(n // k for k in small)}


def _lower_bound(rules: Sequence[Constraint]) -> int:
    return max((rule.smallest for rule in rules if isinstance(rule, AtLeastPage)), default=1)


def _steps(rules: Sequence[Constraint]) -> set[int]:
    """Every accepted size is a multiple of one of these, and every multiple is accepted above the lower bound."""
    base = lcm(*(rule.n for rule in rules if isinstance(rule, MultipleOf)))
    choices = [_without_multiples(rule.sizes) for rule in rules if isinstance(rule, AnyMultipleOf)]
    return {lcm(base, *choice) for choice in product(*choices)}


def _without_multiples(sizes: tuple[int, ...]) -> list[int]:
    """A multiple of 32 is one of 16 as well, so that 32 adds nothing beside 16."""
    return [n for n in set(sizes) if not any(n != m and gcd(n, m) == m for m in sizes)]


def _numbers(rule: Constraint) -> tuple[int, ...]:
    if isinstance(rule, (OneOf, AnyMultipleOf)):
        return rule.sizes if isinstance(rule.sizes, tuple) else ()
    if isinstance(rule, AtLeastPage):
        return (rule.page_bytes, rule.bytes_per_token)
    return (rule.n,)


def _listed(sizes: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(sizes)))
