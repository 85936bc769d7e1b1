"""In which physical order pages lie: the first that every backend reads, in plans and on devices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..config import LAYOUTS


def common_order(readable: Sequence[Sequence[str]], *, block_major: bool = False) -> str | None:
    """The first order of the first backend that all the others read as well; ``None`` if there is none.

    :param readable: per backend the orders that it reads, best first; without any backend, any order will do.
    :param block_major: only orders that keep a block's pages together: subdivided blocks of several layers.
    """
    wished: Iterable[str] = readable[0] if readable else LAYOUTS
    if block_major:
        wished = (order for order in wished if is_block_major(order))
    return next((order for order in wished if all(order in orders for orders in readable)), None)


def is_block_major(order: str) -> bool:
    """Whether all pages of a block are one run of bytes."""
    return order.startswith("cross_layer_")
