"""Counts what the cache of every hybrid preset wastes on four request mixes, with both page strategies.

``makeready bench waste`` prints a table, ``--markdown`` the page docs/waste.md, ``--json`` every number.
All come from blocks that makeready's own pool really handed out; no memory is allocated and nothing is written.

Waste is (allocated - needed) / allocated over a snapshot of live requests. Needed: length x attention layers x bytes
per token and layer, and the raw bytes of every state. Allocated: every byte that the requests make unusable for others.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from makeready.attention_backends.interface import Capabilities
from makeready.benchmarks.harness import out_file, run_main
from makeready.cache.capacity import Holding, PoolShape
from makeready.cache.group_pool import GroupPool, make_pool
from makeready.cache.specs import AttentionSpec, LayerGroup, MambaSpec
from makeready.cache.subdivided_pool import SubdividedPool
from makeready.config import DTYPES, LAYOUTS, EngineConfig
from makeready.hybrid.model_specs import ModelSpec, read_model
from makeready.hybrid.presets import preset_names
from makeready.platforms.cuda import CUDA
from makeready.platforms.plan import Plan
from makeready.platforms.planning import plan_model

KERNELS = Capabilities(
    name="16-token kernels",
    dtypes=frozenset(DTYPES),
    kv_cache_dtypes=frozenset(DTYPES),
    kernel_block_multiple=16,
    layouts=LAYOUTS,
    sliding_window=True,
    mla=True,
)
STRATEGIES = ("unified", "subdivided", "auto")


@dataclass(frozen=True)
class Waste:
    """Of one model, strategy and mix."""

    needed_bytes: int
    allocated_bytes: int
    carved_bytes: int
    """Free blocks of carved pages: other requests' attention can take them, other requests' states cannot."""

    @property
    def percent(self) -> float:
        return 100 * (self.allocated_bytes - self.needed_bytes) / self.allocated_bytes

    @property
    def strict_percent(self) -> float:
        """The same as if nobody could use the free blocks of carved pages."""
        taken = self.allocated_bytes + self.carved_bytes
        return 100 * (taken - self.needed_bytes) / taken


def mixes() -> dict[str, tuple[int, ...]]:
    """Request lengths, in tokens."""
    source = random.Random(5)
    lognormal = (round(math.exp(math.log(700) + source.gauss(0, 1))) for _ in range(512))
    return {
        "a": (512,) * 64,
        "b": (4096,) * 64,
        "c": (32768,) * 16,
        "d": tuple(max(16, min(32768, length)) for length in lognormal),
    }


def hybrid_presets() -> list[ModelSpec]:
    """Every preset with attention and states: one rank, bf16, states as vLLM keeps them."""
    models = (read_model(name, engine="vllm", dtype="bfloat16") for name in preset_names())
    return [model for model in models if model.is_hybrid]


def plan_for(model: ModelSpec, strategy: str) -> Plan:
    """Planned without a memory budget; lengths beyond the model's are planned all the same."""
    config = EngineConfig.from_options(page_strategy=strategy)
    backends = {layer.layer: KERNELS for layer in model.attention_layers}
    return plan_model(model, CUDA, backends, config)


def hand_out(groups: Sequence[LayerGroup], shape: PoolShape, lengths: Sequence[int]) -> GroupPool:
    """A pool that has handed out what requests of ``lengths`` need, one after the other."""
    holding = Holding()
    needs = [{g.index: holding.group_blocks(g, length) for g in groups} for length in lengths]
    states = sum(need[g.index] for need in needs for g in groups if g.is_state)
    blocks = sum(need[g.index] for need in needs for g in groups if not g.is_state)
    # Twice what is needed, so that whole pages are carved: in a pool that just fits, everything fits.
    pool = make_pool(groups, shape, 2 * shape.least_blocks(states, blocks))
    for number, need in enumerate(needs):
        for group, count in need.items():
            pool.allocate(group, count, f"request-{number}")
    return pool


def needed_bytes(model: ModelSpec, lengths: Sequence[int]) -> int:
    """What the requests store, without any rounding."""
    per_token = sum(x.spec.bytes_per_token for x in model.layers if isinstance(x.spec, AttentionSpec))
    states = sum(x.spec.state_bytes for x in model.layers if isinstance(x.spec, MambaSpec))
    return sum(lengths) * per_token + len(lengths) * states


def count(model: ModelSpec, plan: Plan, lengths: Sequence[int]) -> Waste:
    """Hand out and count."""
    pool = hand_out(plan.groups, plan.strategy.shape, lengths)
    carved = pool.num_free_in_carved_pages if isinstance(pool, SubdividedPool) else 0
    size = plan.strategy.shape.block_bytes
    return Waste(needed_bytes(model, lengths), (pool.capacity - pool.num_free) * size, carved * size)


def count_model(model: ModelSpec) -> dict[str, dict[str, Waste]]:
    """Per strategy and mix; auto is what makeready takes where the engine has both strategies."""
    plans = {name: plan_for(model, name) for name in ("unified", "subdivided")}
    found = {name: {mix: count(model, plan, n) for mix, n in mixes().items()} for name, plan in plans.items()}
    found["auto"] = found[auto_choice(model)]
    return found


def auto_choice(model: ModelSpec) -> str:
    """What ``auto`` takes: asked for an engine that has both strategies, with the same states."""
    return plan_for(replace(model, engine="transformers"), "auto").strategy.name


def summary(
    results: Mapping[str, Mapping[str, Mapping[str, Waste]]], of: Callable[[Waste], float] = lambda w: w.percent
) -> dict[str, dict[str, tuple[float, float]]]:
    """Per strategy and mix: median and maximum over the models, in percent."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for strategy in STRATEGIES:
        for mix in mixes():
            percents = [of(model[strategy][mix]) for model in results.values()]
            found.setdefault(strategy, {})[mix] = median(percents), max(percents)
    return found


def to_json(results: Mapping[str, Mapping[str, Mapping[str, Waste]]]) -> str:
    """Waste in percent per model, strategy and mix, and the summary."""
    models = {
        name: {
            strategy: {mix: round(waste.percent, 4) for mix, waste in found.items()} for strategy, found in of.items()
        }
        for name, of in results.items()
    }
    both = {"as_defined": summary(results), "strict": summary(results, lambda waste: waste.strict_percent)}
    rounded = {
        kind: {
            strategy: {mix: {"median": round(mid, 4), "max": round(most, 4)} for mix, (mid, most) in found.items()}
            for strategy, found in totals.items()
        }
        for kind, totals in both.items()
    }
    return json.dumps({"unit": "percent", "models": models, "summary": rounded}, indent=1)


def rows(results: Mapping[str, Mapping[str, Mapping[str, Waste]]]) -> list[list[str]]:
    """A line per model: unified and subdivided for every mix."""
    return [
        [name, *(f"{found[strategy][mix].percent:.2f}" for mix in mixes() for strategy in ("unified", "subdivided"))]
        for name, found in results.items()
    ]


def summary_rows(results: Mapping[str, Mapping[str, Mapping[str, Waste]]]) -> list[list[str]]:
    """A line per strategy: median / maximum for every mix."""
    totals = [(name, found) for name, found in summary(results).items()]
    totals.append(("auto, strict", summary(results, lambda waste: waste.strict_percent)["auto"]))
    return [[name, *(f"{mid:.2f} / {most:.2f}" for mid, most in found.values())] for name, found in totals]


MIXES = "a: 64 requests of 512 tokens; b: 64 of 4096; c: 16 of 32768; d: 512 of lognormal length around 700"
HEAD = ["median / maximum, %", *mixes()]
MODEL_HEAD = ["model", *(f"{mix} {name}" for mix in mixes() for name in ("unified", "subdivided"))]


def to_markdown(results: Mapping[str, Mapping[str, Mapping[str, Waste]]]) -> str:
    """The page docs/waste.md."""
    return f"""# What the cache wastes

This page is the output of `makeready bench waste --markdown`. It counts the blocks that makeready's own pool hands
out, for the {len(results)} hybrid presets on one rank, with K and V in bfloat16, states as vLLM keeps them, and kernels
that take blocks of any multiple of 16 tokens.

Waste is (allocated - needed) / allocated over a snapshot of live requests without shared prefixes. Needed is what the
requests store, without any rounding: length x attention layers x bytes per token and layer, and the raw bytes of every
state. Allocated is every byte that they make unusable for others: whole blocks, padding, empty layer slots of a group.

The mixes: {MIXES}, from 16 to 32768 tokens.

{_table(HEAD, summary_rows(results))}
`unified` is the strategy of vLLM: a block grows until its page holds a state. With `subdivided` pages a block stays as
small as kernels like it, and the states of a request take a run of blocks together. `auto` takes, for each model, the
one that wastes less, if the engine has both. `strict` also counts the free blocks of carved state pages as
waste: attention of any request can take them, but no state can until their page is whole again.

## Every model, %

{_table(MODEL_HEAD, rows(results))}"""


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    ruler = ["---", *("---:" for _ in head[1:])]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ruler, *lines))


def print_tables(results: Mapping[str, Mapping[str, Mapping[str, Waste]]]) -> None:
    """For people: every model, then the summary."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title, head, lines in (
        ("waste of unified and subdivided pages, %", MODEL_HEAD, rows(results)),
        (f"{len(results)} hybrid presets", HEAD, summary_rows(results)),
    ):
        table = Table(*head, title=title)
        for column in table.columns[1:]:
            column.justify = "right"
        for line in lines:
            table.add_row(*line)
        console.print(table)
    console.print(MIXES)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="makeready bench waste", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print every number")
    form.add_argument("--markdown", action="store_true", help="print the page docs/waste.md")
    parser.add_argument("--out", type=out_file, metavar="FILE", help="also write the JSON here")
    asked = parser.parse_args(arguments)
    results = {model.name: count_model(model) for model in hybrid_presets()}
    if asked.out is not None:
        asked.out.write_text(to_json(results) + "\n")
    if asked.json:
        print(to_json(results))
    elif asked.markdown:
        print(to_markdown(results), end="")
    else:
        print_tables(results)
    return 0


if __name__ == "__main__":
    run_main(main)
