"""The finished plan: a frozen record that explains itself and turns into JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..cache.capacity import Capacity, Holding, PoolShape
from ..cache.specs import LayerGroup, MambaSpec
from ..device import format_bytes
from ..hybrid.model_specs import ModelSpec
from ..hybrid.page_alignment import largest_state
from .decision import BlockSizeDecision
from .memory_use import requests_dict
from .page_strategies import PageStrategy
from .sizes import Sizes
from .stages import StagePlan


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedLayer:
    """One thing that a layer stores, and who reads it."""

    layer: int
    kind: str
    backend: str | None
    """The attention backend; ``None`` for a state layer."""
    page_bytes: int
    """What the layer fills of its page, in bytes."""
    kv_cache_dtype: str | None
    """Dtype of its K and V; ``None`` for a state layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that was decided for a model on a platform, with reasons. Sizes are per rank.

    With pipeline stages, ``groups``, ``slots_per_block``, ``pool_bytes_per_block`` and ``strategy`` are those of the
    tightest stage (its waste estimate is that of all stages), and each number of ``capacity`` is that of the stage
    where it is tightest; :attr:`stages` has all. ``capacity`` is that of one replica.
    """

    model: ModelSpec
    platform: str
    decision: BlockSizeDecision
    strategy: PageStrategy
    groups: tuple[LayerGroup, ...]
    layers: tuple[PlannedLayer, ...]
    slots_per_block: int
    pool_bytes_per_block: int
    max_model_len: int
    """Longest request that is served, in tokens."""
    capacity: Capacity | None
    """Of one replica; ``None`` where no memory budget is known."""
    stages: tuple[StagePlan, ...]
    """Pipeline stages, first to last; one without pipeline parallelism."""
    tightest_stage: int
    """Index of the stage that serves least."""
    replicas: int
    """Data parallel replicas; each serves its own requests."""
    sizes: Sizes
    """The five sizes that must be told apart."""
    holding: Holding
    """How long blocks of a live request are kept."""
    reasons: tuple[str, ...]
    refusals: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def block_size(self) -> int:
        """Tokens of one block of an attention group."""
        return self.decision.block_size

    @property
    def shape(self) -> PoolShape:
        """How states and attention share the pool of the tightest stage."""
        return self.strategy.shape

    @property
    def total_ranks(self) -> int:
        """Devices of all replicas: tensor x pipeline x data parallel sizes."""
        return self.model.tensor_parallel_size * len(self.stages) * self.replicas

    @property
    def total_concurrency(self) -> Mapping[int, int]:
        """Requests that all replicas serve at the same time, per length in tokens; empty where it is not known."""
        counts = self.capacity.concurrency if self.capacity is not None else {}
        return {length: self.replicas * count for length, count in counts.items()}

    @property
    def page_bytes(self) -> int:
        """The one page size of the pool, in bytes."""
        return self.decision.page_bytes

    @property
    def mamba_padding_pct(self) -> float | None:
        """Padding of the largest state, in percent of its raw bytes; ``None`` without states."""
        raw = self.decision.state_raw_bytes
        return round(100 * (self.decision.state_page_bytes - raw) / raw, 6) if raw else None

    def to_dict(self) -> dict[str, object]:
        """The plan as JSON-ready values. Keys stay; new ones may come."""
        model, decision = self.model, self.decision
        return {
            "model": model.name,
            "model_type": model.model_type,
            "platform": self.platform,
            "engine": model.engine,
            "dtype": model.dtype,
            "kv_cache_dtype": model.kv_cache_dtype,
            "tensor_parallel_size": model.tensor_parallel_size,
            "pipeline_parallel_size": len(self.stages),
            "data_parallel_size": self.replicas,
            "replicas": self.replicas,
            "total_ranks": self.total_ranks,
            "max_model_len": self.max_model_len,
            "block_size": decision.block_size,
            "phase1_block_size": decision.phase1_block_size,
            "kernel_block_sizes": dict(decision.kernel_block_sizes),
            "attention_page_bytes": decision.attention_page_bytes,
            "attention_bytes_per_token": decision.attention_bytes_per_token,
            "state_raw_bytes": decision.state_raw_bytes,
            "state_page_bytes": decision.state_page_bytes,
            "mamba_page_size_padded": decision.mamba_page_size_padded,
            "mamba_padding_pct": self.mamba_padding_pct,
            "mamba_block_size": decision.mamba_block_size,
            "mamba_cache_mode": decision.mamba_cache_mode,
            "page_bytes": decision.page_bytes,
            **self.strategy.to_dict(),
            "pages_equal": self._pages_equal(),
            "slots_per_block": self.slots_per_block,
            "pool_bytes_per_block": self.pool_bytes_per_block,
            "sizes": self.sizes.to_dict(),
            "groups": self.stages[self.tightest_stage].group_dicts(),
            "layers": [
                {
                    "layer": x.layer,
                    "kind": x.kind,
                    "backend": x.backend,
                    "page_bytes": x.page_bytes,
                    "kv_cache_dtype": x.kv_cache_dtype,
                }
                for x in self.layers
            ],
            "states": _states(model),
            "capacity": self.capacity.to_dict() if self.capacity else None,
            "total_concurrency": {str(length): count for length, count in self.total_concurrency.items()},
            "tightest_stage": self.tightest_stage,
            "stages": [stage.to_dict() for stage in self.stages],
            "requests": requests_dict(self, self.max_model_len),
            "constraints": [f"{rule.owner}: {rule.describe()}" for rule in decision.constraints],
            "reasons": list(self.reasons),
            "refusals": list(self.refusals),
            "warnings": list(self.warnings),
        }

    def explain(self) -> str:
        """The plan for people, several lines: the numbers, then every reason."""
        model, decision = self.model, self.decision
        lines = [
            f"{model.name} ({model.model_type}) on {self.platform}, engine {model.engine}, {model.dtype}, "
            f"KV {model.kv_cache_dtype}, tensor parallel {model.tensor_parallel_size}"
            f"{self._ranks_words()}",
            f"  block size      {decision.block_size} tokens{self._kernel_words()}",
            f"  page            {format_bytes(self.page_bytes)} ({self.page_bytes} bytes)",
        ]
        if self.strategy.name == "subdivided":
            lines.append(f"  states          {self.strategy.describe()}, mode {decision.mamba_cache_mode}")
        elif self.mamba_padding_pct is not None:
            lines.append(
                f"  state           {format_bytes(decision.state_raw_bytes)} raw, padded by "
                f"{self.mamba_padding_pct:.2f} %, mode {decision.mamba_cache_mode}"
            )
        lines.append(
            f"  block id        {format_bytes(self.pool_bytes_per_block)}: {self.slots_per_block} pages, "
            f"for one of {len(self.groups)} groups"
        )
        lines += [f"    group {g.index}       {len(g.layers)} x {g.kind}, {g.block_size} tokens" for g in self.groups]
        lines += self._stage_lines()
        lines += self._capacity_lines()
        for title, sentences in (("why", self.reasons), ("refused", self.refusals), ("mind", self.warnings)):
            if sentences:
                lines.append(f"{title}:")
                lines += [f"  - {sentence}" for sentence in sentences]
        return "\n".join(lines)

    def _ranks_words(self) -> str:
        if self.total_ranks == self.model.tensor_parallel_size:
            return ""
        return f", {len(self.stages)} pipeline stages, {self.replicas} replicas: {self.total_ranks} ranks"

    def _stage_lines(self) -> list[str]:
        if len(self.stages) == 1:
            return []
        return [
            f"  {stage.name}: {len(stage.groups)} groups, {format_bytes(stage.pool_bytes_per_block)} a block id"
            + (f", {stage.capacity.num_blocks} blocks" if stage.capacity else "")
            + (", the tightest" if stage.index == self.tightest_stage else "")
            for stage in self.stages
        ]

    def _kernel_words(self) -> str:
        sizes = ", ".join(f"{name} {size}" for name, size in self.decision.kernel_block_sizes.items())
        return f" (kernel blocks: {sizes})" if sizes else ""

    def _capacity_lines(self) -> list[str]:
        if self.capacity is None:
            return ["  capacity        unknown: no memory budget was given and the device's memory is not known"]
        capacity = self.capacity
        counts = ", ".join(f"{count} of {length}" for length, count in capacity.concurrency.items())
        return [
            f"  capacity        {capacity.num_blocks} blocks in {format_bytes(capacity.memory_bytes)}; longest request "
            f"{capacity.max_tokens} tokens",
            f"  at one time     {counts} tokens",
            f"  floor           {format_bytes(capacity.floor_bytes_per_request)} for the shortest request",
        ]

    def _pages_equal(self) -> bool | None:
        """True if attention and state pages have one size; ``None`` if the model has only one of the two."""
        if not self.model.is_hybrid:
            return None
        return self.decision.attention_page_bytes == self.decision.state_page_bytes


def _states(model: ModelSpec) -> list[dict[str, object]]:
    """Tensors of the largest state."""
    largest = largest_state(layer.spec for layer in model.layers if isinstance(layer.spec, MambaSpec))
    if largest is None:
        return []
    return [{"name": tensor.name, "shape": list(tensor.shape), "dtype": tensor.dtype} for tensor in largest.states]
