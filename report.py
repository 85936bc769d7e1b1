"""Plans, doctor reports and errors as text for people. Takes the JSON-ready dicts that ``--json`` prints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .device import format_bytes


def plan_summary(plan: Mapping[str, Any]) -> RenderableType:
    """A plan at a glance: what was chosen, the groups of layers, what fits."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column()
    for name, value in _headline(plan):
        facts.add_row(name, value)
    parts: list[RenderableType] = [facts, Text(), _groups(plan)]
    capacity = plan.get("capacity")
    if capacity:
        parts += [Text(), _capacity(capacity)]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in plan.get("warnings", ())]
    return Group(*parts)


def reasons(plan: Mapping[str, Any]) -> RenderableType:
    """Every decision's reason, and every refusal, in the order in which they were made."""
    lines: list[RenderableType] = [Text("why", style="bold")]
    lines += [_bullet(reason) for reason in plan.get("reasons", ())]
    refusals = plan.get("refusals", ())
    if refusals:
        lines += [Text("refused", style="bold")]
        lines += [_bullet(_refusal_sentence(refusal)) for refusal in refusals]
    return Group(*lines)


def print_to(console: Console, *parts: RenderableType) -> None:
    """Print each part; soft-wrapped, so that piped output keeps its lines whole."""
    for part in parts:
        console.print(part, soft_wrap=not console.is_terminal)


def _bullet(sentence: str) -> RenderableType:
    return Padding(Text(f"- {sentence}"), (0, 0, 0, 2), expand=False)


def _refusal_sentence(refusal: Any) -> str:
    if isinstance(refusal, Mapping):
        return f"{refusal.get('backend')}: {'; '.join(map(str, refusal.get('reasons', ())))}"
    return str(refusal)


def _headline(plan: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    tp = plan["tensor_parallel_size"]
    yield "model", f"{plan['model']} ({plan['model_type']}, {plan['dtype']})"
    ranks = f", {tp} ranks of tensor parallelism" if tp > 1 else ""
    yield "platform", f"{plan['platform']}{ranks}"
    yield "attention", _backends_of_layers(plan["layers"])
    kernel = ", ".join(f"{name} {size}" for name, size in plan["kernel_block_sizes"].items())
    yield "block size", f"{plan['block_size']} tokens" + (f" (kernel block: {kernel})" if kernel else "")
    if plan["attention_page_bytes"]:
        per_token = plan["attention_bytes_per_token"]
        yield (
            "attention page",
            f"{format_bytes(plan['attention_page_bytes'])} a layer ({per_token} bytes a token)",
        )
    if plan["state_raw_bytes"]:
        padding = plan["mamba_padding_pct"]
        padded = f", padded by {padding:.2f} %" if padding else ""
        yield "state page", f"{format_bytes(plan['state_page_bytes'])} a layer{padded}"
        kept = plan["mamba_cache_mode"]
        every = f" every {plan['mamba_block_size']} tokens" if kept != "none" else ", one per request"
        yield "states kept", f"{kept}{every}"
    yield "bytes per block", format_bytes(plan["pool_bytes_per_block"])


def _backends_of_layers(layers: Sequence[Mapping[str, Any]]) -> str:
    by_backend: dict[str, list[int]] = {}
    for layer in layers:
        if layer.get("backend"):
            by_backend.setdefault(str(layer["backend"]), []).append(int(layer["layer"]))
    if not by_backend:
        return "no attention layers"
    return "; ".join(f"{name} on layers {_ranges(ids)}" for name, ids in by_backend.items())


def _ranges(ids: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    runs: list[list[int]] = []
    for number in sorted(set(ids)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _groups(plan: Mapping[str, Any]) -> RenderableType:
    table = Table(title="groups of layers that share a block table", title_justify="left", box=None)
    for column, justify in (
        ("group", "right"), ("kind", "left"), ("layers", "left"), ("block", "right"), ("page", "right")
    ):  # fmt: skip
        table.add_column(column, justify=justify, style=None)  # type: ignore[arg-type]
    for group in plan["groups"]:
        table.add_row(
            str(group["index"]),
            str(group["kind"]),
            _ranges(group["layers"]),
            f"{group['block_size']} tokens",
            format_bytes(group["page_bytes"]),
        )
    return table


def _capacity(capacity: Mapping[str, Any]) -> RenderableType:
    table = Table(title="what fits", title_justify="left", box=None, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("cache", f"{format_bytes(capacity['memory_bytes'])}, {capacity['num_blocks']} blocks")
    table.add_row("tokens in one request, at most", str(capacity["max_tokens"]))
    table.add_row("least that a request holds", format_bytes(capacity["floor_bytes_per_request"]))
    for length, count in capacity["concurrency"].items():
        table.add_row(f"requests of {length} tokens at the same time", str(count))
    return table
