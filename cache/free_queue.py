"""Which blocks are free, and which of them comes next: one queue, or the parts of large pages."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol


class FreeQueue(Protocol):
    """The free ids of a :class:`~makeready.cache.pool.BlockPool`."""

    def __len__(self) -> int: ...
    def __contains__(self, block_id: object) -> bool: ...
    def __iter__(self) -> Iterator[int]: ...

    def take(self, count: int) -> list[int]:
        """Take out the ``count`` ids that come next; there must be that many."""

    def add(self, block_id: int) -> None:
        """Put in an id that nobody holds any more."""

    def discard(self, block_id: int) -> None:
        """Take out ``block_id`` if it is free: somebody wants what it still holds."""

    def is_lent(self, block_id: int) -> bool:
        """Whether the memory of ``block_id`` serves something else at present, so that it is not free."""


class LeastRecentlyUsed(OrderedDict[int, None]):
    """Every id by itself; the one that has been free for longest comes next."""

    def __init__(self, ids: Iterable[int] = ()) -> None:
        super().__init__(dict.fromkeys(ids))

    def take(self, count: int) -> list[int]:
        """Take out the ids that have been free for longest."""
        return [self.popitem(last=False)[0] for _ in range(count)]

    def add(self, block_id: int) -> None:
        """Put ``block_id`` last."""
        self[block_id] = None

    def discard(self, block_id: int) -> None:
        """Take out ``block_id`` if it is free."""
        self.pop(block_id, None)

    def is_lent(self, block_id: int) -> bool:
        """Never: a block is nothing but a block."""
        return False


class CarvedPages:
    """Free parts of large pages, which several such queues carve up differently.

    A page that is free as a whole lies in ``whole``, for whichever queue comes first. The one that takes it carves it
    into ``parts`` ids, ``page * parts`` onwards, and puts it back when the last of them is free again. Fuller pages
    are filled first, so that others have a chance to come back whole.

    :param whole: pages that are free as a whole, the longest free first; shared by all queues of a pool.
    :param parts: ids in one page.
    :param kept: free ids of pages that are never whole, because something else lies in them.
    :param on_carve: called with a page before it is carved: what other queues remember of it is gone.
    """

    def __init__(
        self,
        whole: OrderedDict[int, None],
        parts: int,
        kept: Iterable[Sequence[int]] = (),
        on_carve: Callable[[int], None] = lambda page: None,
    ) -> None:
        self._whole = whole
        self._parts = parts
        self._open = {ids[0] // parts: OrderedDict.fromkeys(ids) for ids in kept if ids}
        self._kept = frozenset(self._open)
        self._carved = set(self._kept)
        self._num_open = sum(map(len, self._open.values()))
        self._on_carve = on_carve

    @property
    def num_open(self) -> int:
        """Free ids in pages that are carved already."""
        return self._num_open

    @property
    def num_kept(self) -> int:
        """Free ids in pages that are never whole."""
        return sum(len(self._open.get(page, ())) for page in self._kept)

    @property
    def carved(self) -> frozenset[int]:
        """Pages that this queue has carved, or that are never whole."""
        return frozenset(self._carved)

    def __len__(self) -> int:
        return self._num_open + self._parts * len(self._whole)

    def __contains__(self, block_id: object) -> bool:
        if not isinstance(block_id, int):
            return False
        page = block_id // self._parts
        return page in self._whole or block_id in self._open.get(page, ())

    def __iter__(self) -> Iterator[int]:
        for ids in self._open.values():
            yield from ids
        for page in self._whole:
            yield from range(page * self._parts, (page + 1) * self._parts)

    def take(self, count: int) -> list[int]:
        """Parts of the fullest page, the longest free first; a new page only where none is open."""
        taken: list[int] = []
        while len(taken) < count:
            page = min(self._open, key=self._fullness) if self._open else self._carve(next(iter(self._whole)))
            ids = self._open[page]
            number = min(count - len(taken), len(ids))
            taken += [ids.popitem(last=False)[0] for _ in range(number)]
            self._taken(page, number)
        return taken

    def add(self, block_id: int) -> None:
        """Put ``block_id`` back; its page as a whole if that was its last part."""
        page = block_id // self._parts
        ids = self._open.setdefault(page, OrderedDict())
        ids[block_id] = None
        self._num_open += 1
        if len(ids) == self._parts and page not in self._kept:
            del self._open[page]
            self._carved.discard(page)
            self._num_open -= self._parts
            self._whole[page] = None

    def discard(self, block_id: int) -> None:
        """Take out ``block_id`` if it is free, and carve its page for that if need be."""
        if block_id not in self:
            return
        page = block_id // self._parts
        if page in self._whole:
            self._carve(page)
        del self._open[page][block_id]
        self._taken(page, 1)

    def is_lent(self, block_id: int) -> bool:
        """Whether another queue has carved the page of ``block_id``."""
        page = block_id // self._parts
        return page not in self._whole and page not in self._carved

    def _fullness(self, page: int) -> tuple[bool, int]:
        """Pages that can never be whole first, then those with the fewest free parts."""
        return page not in self._kept, len(self._open[page])

    def _carve(self, page: int) -> int:
        self._on_carve(page)
        del self._whole[page]
        self._open[page] = OrderedDict.fromkeys(range(page * self._parts, (page + 1) * self._parts))
        self._carved.add(page)
        self._num_open += self._parts
        return page

    def _taken(self, page: int, count: int) -> None:
        self._num_open -= count
        if not self._open[page]:
            del self._open[page]
