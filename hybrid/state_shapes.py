"""State mixers: the shapes of what each keeps per request and rank. One calculator per mixer, none per model.

``k`` is the convolution kernel's width, ``s`` the speculative tokens. vLLM keeps ``k - 1 + s`` columns of
convolution input as rows (columns, channels); transformers keeps all ``k`` as (channels, columns). The records here
live for one reading of a configuration, so that they are named tuples, a tenth of a dataclass's cost at import.
"""

from __future__ import annotations

from typing import NamedTuple

from ..errors import UnsupportedModelError

Shapes = tuple[tuple[str, tuple[int, ...]], ...]
"""(name of the state tensor, shape), in the order in which they lie in a page."""


class Rank(NamedTuple):
    """For whom shapes are computed."""

    engine: str
    """``vllm`` or ``transformers``."""
    tp: int = 1
    """Ranks that share a layer."""
    speculative: int = 0
    """Draft tokens that a convolution state keeps room for."""

    def conv(self, channels: int, kernel: int, *, speculative: bool = True) -> tuple[str, tuple[int, ...]]:
        """The convolution state of ``channels`` channels on this rank."""
        if self.engine == "transformers":
            return "conv", (channels, kernel)
        return "conv", (kernel - 1 + (self.speculative if speculative else 0), channels)

    def share(self, total: int, what: str) -> int:
        """``total`` divided over the ranks.

        :raises UnsupportedModelError: if it does not divide.
        """
        if total % self.tp:
            raise uneven(what, total, self.tp)
        return total // self.tp


def uneven(what: str, total: int, tp: int) -> UnsupportedModelError:
    """The error for something that tensor parallelism cannot split."""
    works = [n for n in range(1, total + 1) if total % n == 0 and n <= 64]
    return UnsupportedModelError(
        f"{what} {total} cannot be split over tensor_parallel_size {tp}; sizes that divide it are "
        f"{', '.join(map(str, works))}",
        option="tensor_parallel_size",
        value=tp,
        expected=works,
    )


class Mamba1(NamedTuple):
    """Selective scan with a state per channel. With ``heads`` (Zamba) the same numbers, seen per head."""

    inner: int
    state_size: int
    kernel: int
    heads: int = 0
    kind: str = "mamba1"

    def shapes(self, rank: Rank) -> Shapes:
        """Convolution state and recurrent state."""
        inner = rank.share(self.inner, "mamba inner width")
        if self.heads:
            heads = rank.share(self.heads, "mamba heads")
            recurrent: tuple[int, ...] = (heads, inner // heads, self.state_size)
        else:
            recurrent = (inner, self.state_size)
        return (rank.conv(inner, self.kernel, speculative=False), ("recurrent", recurrent))


class Mamba2(NamedTuple):
    """State-space duality: a matrix state per head. ``groups`` share B and C; 0 means they skip the convolution."""

    inner: int
    heads: int
    head_dim: int
    state_size: int
    groups: int
    kernel: int
    kind: str = "mamba2"

    def shapes(self, rank: Rank) -> Shapes:
        """Convolution state over x, B and C, and the recurrent state."""
        _require_whole("mamba2 heads", self.heads, "n_groups", self.groups)
        channels = rank.share(self.inner, "mamba2 inner width") + 2 * self.groups_of(rank) * self.state_size
        heads = rank.share(self.heads, "mamba2 heads")
        return (rank.conv(channels, self.kernel), ("recurrent", (heads, self.head_dim, self.state_size)))

    def groups_of(self, rank: Rank) -> int:
        """Groups of this rank: a single group is replicated on every rank, several must divide."""
        if self.groups == 1:
            return 1
        if self.groups % rank.tp:
            raise UnsupportedModelError(
                f"mamba2 n_groups {self.groups} cannot be served with tensor_parallel_size {rank.tp}: the groups "
                f"must divide over the ranks or be 1",
                option="tensor_parallel_size",
                value=rank.tp,
                expected=[n for n in range(1, self.groups + 1) if self.groups % n == 0],
            )
        return self.groups // rank.tp


class GatedDeltaNet(NamedTuple):
    """Gated delta rule: a key x value matrix per value head (vLLM keeps it transposed)."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    kind: str = "gdn"

    def shapes(self, rank: Rank) -> Shapes:
        """Convolution state over q, k and v, and the recurrent state."""
        _require_whole("gated delta net value heads", self.value_heads, "linear_num_key_heads", self.key_heads)
        keys = rank.share(self.key_heads, "gated delta net key heads")
        values = rank.share(self.value_heads, "gated delta net value heads")
        channels = 2 * keys * self.key_dim + values * self.value_dim
        matrix = (self.key_dim, self.value_dim)
        if rank.engine == "vllm":
            matrix = (self.value_dim, self.key_dim)
        return (rank.conv(channels, self.kernel), ("recurrent", (values, *matrix)))


class KimiDelta(NamedTuple):
    """Kimi delta attention: a square matrix per head; q, k and v are convolved."""

    heads: int
    head_dim: int
    kernel: int
    kind: str = "kda"

    def shapes(self, rank: Rank) -> Shapes:
        """Convolution state over q, k and v, and the recurrent state."""
        heads = rank.share(self.heads, "KDA heads")
        conv = rank.conv(3 * heads * self.head_dim, self.kernel)
        return (conv, ("recurrent", (heads, self.head_dim, self.head_dim)))


class ShortConv(NamedTuple):
    """A gated short convolution: no recurrent state."""

    channels: int
    kernel: int
    kind: str = "shortconv"

    def shapes(self, rank: Rank) -> Shapes:
        """The convolution state."""
        channels = rank.share(self.channels, "short convolution channels")
        return (rank.conv(channels, self.kernel, speculative=False),)


class Lightning(NamedTuple):
    """Lightning attention: a square matrix per head, no convolution."""

    heads: int
    head_dim: int
    kind: str = "lightning"

    def shapes(self, rank: Rank) -> Shapes:
        """The recurrent state."""
        heads = rank.share(self.heads, "lightning attention heads")
        return (("recurrent", (heads, self.head_dim, self.head_dim)),)


class Zaya(NamedTuple):
    """Two stacked convolutions over q and k, and the delayed half of the values of the token before.

    ``columns`` is what both convolutions together look back; transformers keeps exactly these.
    """

    heads: int
    kv_heads: int
    head_dim: int
    columns: int
    kind: str = "zaya"

    def shapes(self, rank: Rank) -> Shapes:
        """The convolution state and the delayed value."""
        heads = rank.share(self.heads, "attention heads")
        kv_heads = rank.share(self.kv_heads, "key-value heads")
        conv = (heads + kv_heads) * self.head_dim
        shape = (conv, self.columns) if rank.engine == "transformers" else (self.columns, conv)
        return (("conv", shape), ("recurrent", (kv_heads * self.head_dim // 2,)))


Mixer = Mamba1 | Mamba2 | GatedDeltaNet | KimiDelta | ShortConv | Lightning | Zaya


def _require_whole(what: str, heads: int, field: str, groups: int) -> None:
    """Every group serves as many heads; no groups (0) serve none.

    :raises UnsupportedModelError: with both numbers.
    """
    if groups and heads % groups:
        raise UnsupportedModelError(
            f"{heads} {what} do not divide over {field} {groups}: every group serves as many heads",
            option=field,
            value=groups,
            expected=[n for n in range(1, heads + 1) if heads % n == 0],
        )
