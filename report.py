"""Plans, doctor reports and errors as text for people. Takes the JSON-ready dicts that ``--json`` prints."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from .attention_backends.selection import number_ranges
from .device import format_bytes

PIPED_WIDTH = 140


def plan_summary(plan: Mapping[str, Any]) -> RenderableType:
    """A plan at a glance: what was chosen, the groups of layers, what fits."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column()
    for name, value in _headline(plan):
        facts.add_row(name, value)
    parts: list[RenderableType] = [facts, Text(), _groups(plan)]
    if len(plan["stages"]) > 1:
        parts += [Text(), _stages(plan["stages"], plan["tightest_stage"])]
    capacity = plan.get("capacity")
    if capacity:
        parts += [Text(), _capacity(capacity, plan["replicas"])]
    if plan.get("requests"):
        parts += [Text(), _request_table(plan["requests"])]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in plan.get("warnings", ())]
    return Group(*parts)


def doctor_summary(report: Mapping[str, Any]) -> RenderableType:
    """What is installed, probed, chosen or refused, and why; what is broken comes first."""
    parts: list[RenderableType] = [
        Text(f"makeready {report['makeready']}, Python {report['python']}, {report['system']}"),
    ]
    for title, sentences in (
        ("plugins that are broken", [f"[{problem['stage']}] {problem['sentence']}" for problem in report["problems"]]),
        ("plugins left out by MAKEREADY_DISABLE_PLUGINS", report["disabled"]),
        ("mind", report["notes"]),
    ):
        if sentences:
            parts += [Text(), Text(title, style="bold red"), *map(_bullet, sentences)]
    parts += [Text(), Text("platforms  (* auto takes it, + usable, - not usable)", style="bold")]
    for platform in report["platforms"]:
        mark = "*" if platform["chosen"] else "+" if platform["available"] else "-"
        wheel = platform["distribution"] or "plans only"
        parts.append(Text(f"{mark} {platform['name']} ({wheel})", style="green" if platform["available"] else ""))
        parts.append(_bullet(platform["verdict"], " "))
        for backend in platform["backends"]:
            parts += _backend("backend", backend, here=platform["available"])
        for mixer in platform["mixers"]:
            parts += _backend("mixers", mixer, here=platform["available"])
    chosen = f"auto takes {report['auto']}" if report["auto"] else "auto takes no platform"
    parts += [Text(), Text(chosen, style="bold"), _bullet(report["auto_reason"])]
    software = ", ".join(f"{name} {version or 'not installed'}" for name, version in report["software"].items())
    return Group(*parts, Text(), Text("software", style="bold"), _bullet(software))


def _backend(what: str, backend: Mapping[str, Any], *, here: bool) -> Iterable[RenderableType]:
    """A backend, and under it whose kernels it could take, each with what they take."""
    usable = "+" if backend["available"] and here else "-"
    if not backend["providers"]:
        yield _bullet(f"{what} {backend['name']}: {backend['reason']}", usable)
        return
    yield _bullet(f"{what} {backend['name']}, whose kernels come from the first of these that can serve:", usable)
    for provider in backend["providers"]:
        mark = "+" if provider["available"] and here else "-"
        yield _bullet(f"{provider['name']}: {provider['reason']}", f"  {mark}")
        yield _bullet(provider["constraints"], "    ")


def reasons(plan: Mapping[str, Any]) -> RenderableType:
    """Every decision's reason, and every refusal, in the order in which they were made."""
    lines: list[RenderableType] = [Text("why", style="bold")]
    lines += [_bullet(reason) for reason in (*plan["reasons"], *plan.get("notes", ()))]
    refusals = plan.get("refusals", ())
    if refusals:
        lines += [Text("refused", style="bold")]
        lines += [_bullet(refusal) for refusal in refusals]
    return Group(*lines)


def make_console(*, quiet: bool = False) -> Console:
    """A console as wide as the terminal; output that is piped gets lines wide enough to read and to grep."""
    console = _console(quiet)
    wide_enough = console.is_terminal or "COLUMNS" in os.environ
    return console if wide_enough else _console(quiet, width=PIPED_WIDTH)


def _console(quiet: bool, width: int | None = None) -> Console:
    """Paths, prompts and generated text are shown as they are: ``[x]`` is no style and ``:key:`` no picture."""
    return Console(quiet=quiet, width=width, highlight=False, markup=False, emoji=False)


def _bullet(sentence: str, mark: str = "-") -> RenderableType:
    line = Table.grid(padding=(0, 1))
    line.add_row(Text(f"  {mark}"), Text(sentence))
    return line


def _headline(plan: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    yield "model", f"{plan['model']} ({plan['model_type']}, {plan['dtype']})"
    yield "platform", f"{plan['platform']}{_ranks(plan)}"
    yield "engine", _engine(plan["engine"])
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
        if plan["page_strategy"] == "subdivided":
            yield "state page", _state_page(plan)
        else:
            yield "state page", f"{format_bytes(plan['state_page_bytes'])} a layer{padded}"
        kept = plan["mamba_cache_mode"]
        every = f" every {plan['mamba_block_size']} tokens" if kept != "none" else ", one per request"
        yield "states kept", f"{kept}{every}"
    yield (
        "pages",
        f"{plan['page_strategy']}; {plan['waste_estimate_pct']:.2f} % waste at {plan['waste_estimate_tokens']} tokens",
    )
    yield "bytes per block", format_bytes(plan["pool_bytes_per_block"])


def _engine(engine: str) -> str:
    """Whose cache it is: a plan for vLLM has other pages and blocks than what ``launch`` allocates."""
    if engine == "transformers":
        return "transformers, what launch and prepare allocate"
    return f"{engine}; launch and prepare allocate for transformers: plan that with --engine transformers"


def _ranks(plan: Mapping[str, Any]) -> str:
    tp, pp, dp = (plan[f"{kind}_parallel_size"] for kind in ("tensor", "pipeline", "data"))
    said = [
        words
        for size, words in (
            (tp, f"{tp} ranks of tensor parallelism"),
            (pp, f"{pp} pipeline stages"),
            (dp, f"{dp} replicas"),
        )
        if size > 1
    ]
    total = f" ({plan['total_ranks']} ranks in all)" if len(said) > 1 else ""
    return "".join(f", {words}" for words in said) + total


def _stages(stages: Sequence[Mapping[str, Any]], tightest: int) -> RenderableType:
    table = Table(title="pipeline stages (what stands elsewhere is of the tightest)", title_justify="left", box=None)
    for column in ("stage", "layers", "groups", "bytes per block", "blocks", "longest request", "at one time"):
        table.add_column(column, justify="left" if column in ("layers", "groups", "at one time") else "right")
    for stage in stages:
        kinds: dict[str, list[int]] = {}
        for group in stage["groups"]:
            kinds.setdefault(str(group["kind"]), []).append(len(group["layers"]))
        stored = ", ".join(f"{sum(sizes)} {kind} in {len(sizes)}" for kind, sizes in kinds.items())
        fits = stage["capacity"]
        counts = ", ".join(f"{n} of {length}" for length, n in fits["concurrency"].items()) if fits else "-"
        table.add_row(
            f"{stage['index']}{' *' if stage['index'] == tightest else ''}",
            number_ranges(stage["layers"]),
            stored or "nothing stored",
            format_bytes(stage["pool_bytes_per_block"]),
            str(fits["num_blocks"]) if fits else "-",
            str(fits["max_tokens"]) if fits else "-",
            counts,
        )
    return table


def _state_page(plan: Mapping[str, Any]) -> str:
    """All states of a request, which take blocks of their own or a share of one."""
    taken, needed = plan["request_state_page_bytes"], plan["request_state_bytes"]
    blocks, sharing = plan["state_page_blocks"], plan["states_per_block"]
    where = f"{sharing} share a block" if sharing > 1 else f"{blocks} blocks"
    return f"{format_bytes(taken)} a request ({where}), padded by {100 * (taken - needed) / needed:.2f} %"


def _backends_of_layers(layers: Sequence[Mapping[str, Any]]) -> str:
    by_backend: dict[str, list[int]] = {}
    for layer in layers:
        if layer.get("backend"):
            by_backend.setdefault(str(layer["backend"]), []).append(int(layer["layer"]))
    if not by_backend:
        return "no attention layers"
    return "; ".join(f"{name} on layers {number_ranges(ids)}" for name, ids in by_backend.items())


def _groups(plan: Mapping[str, Any]) -> RenderableType:
    table = Table(title="groups of layers that share a block table", title_justify="left", box=None)
    for column, justify in (
        ("group", "right"), ("kind", "left"), ("layers", "left"), ("block", "right"), ("page", "right"),
        ("padding of a block", "right"),
    ):  # fmt: skip
        table.add_column(column, justify=justify, style=None)  # type: ignore[arg-type]
    for group in plan["groups"]:
        table.add_row(
            str(group["index"]),
            str(group["kind"]),
            number_ranges(group["layers"]),
            f"{group['block_size']} tokens",
            format_bytes(group["page_bytes"]),
            format_bytes(group["padding_bytes"]),
        )
    return table


def _request_table(requests: Mapping[str, Any]) -> RenderableType:
    """What one request takes by length, and what mixes of requests waste."""
    table = Table(title="what a request takes", title_justify="left", box=None)
    for column in ("tokens", "takes", "K and V", "states", "no token yet", "padding"):
        table.add_column(column, justify="right")
    for one in requests["memory"]:
        parts = ("total_bytes", "kv_bytes", "state_bytes", "tail_bytes", "padding_bytes")
        table.add_row(str(one["tokens"]), *(format_bytes(one[part]) for part in parts))
    mixes = ", ".join(f"{name}: {waste:.2f} %" for name, waste in requests["mix_waste_pct"].items())
    return Group(table, Text(f" waste of request mixes   {mixes}"))


def _capacity(capacity: Mapping[str, Any], replicas: int) -> RenderableType:
    """Of one replica, and for requests at the same time also of all."""
    table = Table(title="what fits", title_justify="left", box=None, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("cache", f"{format_bytes(capacity['memory_bytes'])}, {capacity['num_blocks']} blocks")
    table.add_row("tokens in one request, at most", str(capacity["max_tokens"]))
    table.add_row("least that a request holds", format_bytes(capacity["floor_bytes_per_request"]))

    def total(count: int) -> str:
        return f" x {replicas} replicas = {replicas * count}" if replicas > 1 else ""

    for length, count in capacity["concurrency"].items():
        table.add_row(f"requests of {length} tokens at the same time", f"{count}{total(count)}")
    return table
