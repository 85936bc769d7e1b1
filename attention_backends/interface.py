"""What an attention backend declares, and what it does once it is built.

The first half (:class:`Capabilities`, :class:`AttentionBackend`) is data and policy and never imports torch: it
serves ``plan`` on machines without the device. The second half (:class:`AttentionImpl`) is what
:meth:`AttentionBackend.build` returns on the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from ..cache.specs import AttentionSpec
from ..config import AttentionConfig
from ..device import DeviceFacts
from ..errors import BackendError
from .workspace import StepLimits, Workspace

if TYPE_CHECKING:
    import torch

    from .metadata import StepMetadata


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a backend can do on one kind of device. Everything that it does not declare, it cannot do."""

    name: str
    dtypes: frozenset[str]
    """Dtypes of queries and outputs."""
    kv_cache_dtypes: frozenset[str]
    """Dtypes of K and V in the cache."""
    owner: str = ""
    """Whose rules these are, in sentences about block sizes; empty for the backend's own."""
    same_kv_dtype: bool = False
    """True if K and V must be stored in the queries' dtype."""
    kernel_block_multiple: int = 1
    """A kernel block is a multiple of this many tokens."""
    kernel_block_sizes: tuple[int, ...] = ()
    """If not empty, the kernel knows only these kernel blocks; a block is a multiple of one of them."""
    exact_block_sizes: tuple[int, ...] = ()
    """If not empty, the block itself must be one of these: the kernel cannot split it."""
    head_sizes: tuple[int, ...] = ()
    """If not empty, the only head sizes; else any multiple of ``head_size_multiple`` up to ``max_head_size``."""
    head_size_multiple: int = 1
    max_head_size: int = 1 << 30
    layouts: tuple[str, ...] = ("NHD",)
    """Physical orders of the cache that the kernels can read, best first."""
    is_ssm: bool = False
    """True for a state mixer: it constrains state pages, not attention blocks."""
    batch_invariant: bool = False
    sliding_window: bool = False
    soft_cap: bool = False
    sinks: bool = False
    encoder_only: bool = False
    mla: bool = False
    mla_only: bool = False
    """True for kernels that know latent attention and nothing else."""
    reads_unwritten_slots: bool = False
    """True if a kernel touches the unwritten tail of a block it visits: blocks are cleared at hand-out."""
    max_view_elements: int | None = None
    """Elements of one layer's K or V view that the kernel can address; ``None`` for 64-bit addressing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Whether software is here and loads: a value, never an exception."""

    available: bool
    reason: str
    """A sentence: what was found, or what is missing and how to get it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRequest:
    """What one attention layer asks of a backend."""

    layer: int
    spec: AttentionSpec
    dtype: str
    """Dtype of queries and outputs."""
    soft_cap: float | None = None
    sinks: bool = False
    encoder_only: bool = False
    batch_invariant: bool = False
    """True if its output may not depend on what else is in the batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderFacts:
    """One library that could bring a backend's kernels."""

    name: str
    """What the user writes after ``--provider``."""
    available: bool
    reason: str
    """A sentence: what was found, or what is missing and how to get it."""
    constraints: str
    """What its kernels take, in a sentence."""

    def to_dict(self) -> dict[str, object]:
        """The provider as JSON-ready values."""
        return {
            "name": self.name,
            "available": self.available,
            "reason": self.reason,
            "constraints": self.constraints,
        }


class AttentionBackend(ABC):
    """A way to compute attention. Stateless: what it decides follows from its arguments."""

    name: str
    last_choice: bool = False
    """True if automatic choice tries it after all others: kernels of few devices."""

    @abstractmethod
    def capabilities(self, device: DeviceFacts) -> Capabilities:
        """What this backend can do on ``device``; no probing, no torch."""

    def configured(self, config: AttentionConfig, device: DeviceFacts) -> AttentionBackend:
        """This backend as the user's settings make it: what they narrow, its capabilities say from then on.

        :raises BackendError: for a setting that nothing on ``device`` can follow.
        """
        return self

    def for_engine(self, engine: str) -> AttentionBackend:
        """This backend as ``engine`` calls it, where that makes a difference."""
        return self

    def declared_refusals(self, request: LayerRequest, device: DeviceFacts) -> tuple[str, ...]:
        """What a layer asks that is never served on ``device`` and that :meth:`capabilities` has no word for.

        No probing: a plan asks it, and so refuses what a build would.
        """
        return ()

    def refusals(self, request: LayerRequest, device: DeviceFacts) -> tuple[str, ...]:
        """What a layer asks that nothing installed here can serve, beyond :meth:`capabilities`; may probe."""
        return ()

    def providers_on(self, device: DeviceFacts) -> tuple[ProviderFacts, ...]:
        """The libraries that could bring this backend's kernels on ``device``, best first; probes them."""
        return ()

    def get_preferred_block_size(self, device: DeviceFacts, default: int) -> int:
        """The smallest block size, in tokens, that this backend would choose, from the platform's ``default``."""
        multiple = self.capabilities(device).kernel_block_multiple
        return -(-default // multiple) * multiple

    def workspace(self, request: LayerRequest, device: DeviceFacts, limits: StepLimits) -> Workspace:
        """What the kernels of such layers take beside the cache, at most; a memory budget leaves room for it."""
        return Workspace()

    @abstractmethod
    def probe(self, device: DeviceFacts) -> Probe:
        """Whether what this backend needs is installed and loads. Never raises."""

    @abstractmethod
    def build(self, request: BuildRequest) -> AttentionImpl:
        """The backend ready to run; imports torch.

        :raises BackendError: when the request is outside :meth:`capabilities`.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """What :meth:`AttentionBackend.build` gets: one build serves all layers that share these facts."""

    device: DeviceFacts
    spec: AttentionSpec
    dtype: str
    block_size: int
    """Tokens of a block, as block tables count them."""
    kernel_block_size: int
    """Tokens of what the kernel indexes; divides ``block_size``."""
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    config: AttentionConfig
    soft_cap: float | None = None
    sinks: bool = False
    encoder_only: bool = False
    layout: str | None = None
    """Physical order of the pages, one of ``config.LAYOUTS``; ``None`` where it is not decided."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """Numbers of one layer that the model's attention call carries."""

    scale: float
    causal: bool = True
    sliding_window: int | None = None
    """Keys that a query sees, itself included; ``None`` for all."""
    soft_cap: float | None = None
    sinks: torch.Tensor | None = None
    """One logit per query head, shape (num_query_heads,)."""
    mask_mod: Callable[..., torch.Tensor] | None = None
    """Flex only: ``mask_mod(request, head, query, key) -> bool``, of positions in the request's own sequence and of
    the request's place in the step; narrows what ``causal`` and ``sliding_window`` leave. See ``flex.mods``."""
    score_mod: Callable[..., torch.Tensor] | None = None
    """Flex only: ``score_mod(score, request, head, query, key) -> score``, after scaling and soft cap."""
    alibi_slopes: torch.Tensor | None = None
    """Slope of each query head, shape (num_query_heads,): times key position minus query position, on every score."""
    key_scale: float = 1.0
    """What the stored keys are multiplied with."""
    value_scale: float = 1.0
    """What the stored values are multiplied with."""

    def refuse_own_masks(self, backend: str) -> None:
        """For a backend that cannot follow them.

        :raises BackendError: if there is a mask or a score modifier of the user's own.
        """
        for name, value in (("mask_mod", self.mask_mod), ("score_mod", self.score_mod)):
            if value is not None:
                raise BackendError(
                    f"{backend} has no masks or scores of the user's own; flex follows {name}",
                    option=name,
                    value=value,
                    expected="backend flex",
                )

    def refuse_beyond_scale(self, backend: str) -> None:
        """For kernels of causal attention that know a scale and nothing else.

        :raises BackendError: for the first number that would change attention in another way.
        """
        for known in fields(self):
            value = getattr(self, known.name)
            if known.name != "scale" and value is not known.default and value != known.default:
                raise BackendError(
                    f"{backend} attends causally with a scale and nothing else, and the call has {known.name}",
                    option=known.name,
                    value=value,
                    expected=known.default,
                )


class AttentionImpl(ABC):
    """A built backend. Shapes: T tokens of B requests packed in order, Hq query heads, Hk kv heads, D, Dv."""

    name: str
    capturable: bool = False
    """True if a captured step's :meth:`prepare` and :meth:`forward` may run inside a device graph: they read the
    step's tensors, choose shapes from its host bounds alone, and never wait for the device."""
    captures_ragged: bool = False
    """The same for captured steps with ``num_ragged`` requests of any length."""
    attends_latents: bool = False
    """True if :meth:`forward_latent` is there."""
    reads_unwritten_slots: bool = False
    """True if the kernels touch the unwritten tail of a block they visit: blocks are cleared at hand-out."""

    @abstractmethod
    def prepare(self, step: StepMetadata) -> Any:
        """Per-step metadata that every layer of the group shares; called once per step, or once per capture."""

    @abstractmethod
    def forward(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        metadata: Any,
        call: AttentionCall,
    ) -> torch.Tensor:
        """Attention of the step's queries over the paged cache.

        :param query: (T, Hq, D).
        :param key_cache: strided view (num_blocks, block_size, Hk, D), last axis contiguous.
        :param value_cache: strided view (num_blocks, block_size, Hk, Dv), last axis contiguous.
        :param metadata: what :meth:`prepare` returned for this step.
        :return: (T, Hq, Dv), contiguous.
        """

    @abstractmethod
    def forward_gathered(
        self,
        query: torch.Tensor,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        step: StepMetadata,
        call: AttentionCall,
    ) -> torch.Tensor:
        """The same over K and V that were gathered per request, for models that expand a stored latent (MLA).

        :param query: (T, Hq, D).
        :param keys: per request (seq_len, Hk, D).
        :param values: per request (seq_len, Hk, Dv).
        :return: (T, Hq, Dv), contiguous.
        """

    def forward_latent(
        self,
        query: torch.Tensor,
        latent_cache: torch.Tensor,
        rope_cache: torch.Tensor,
        metadata: Any,
        call: AttentionCall,
    ) -> torch.Tensor:
        """Causal attention over stored latents themselves (MLA), which all query heads share.

        A key is a latent and its rotary part, a value the latent.

        :param query: (T, Hq, R + P): what multiplies the latent, then what multiplies the rotary part.
        :param latent_cache: strided view (num_blocks, block_size, 1, R).
        :param rope_cache: strided view (num_blocks, block_size, 1, P).
        :param metadata: what :meth:`prepare` returned for this step.
        :return: (T, Hq, R), contiguous.
        :raises BackendError: unless ``attends_latents``.
        """
        raise BackendError(
            f"{self.name} attends over what a model expands latents to, not over the latents",
            option="backend",
            value=self.name,
            expected="a backend with attends_latents",
        )
