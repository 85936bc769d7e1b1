"""``makeready plan --plot FILE``: where a request's memory goes, drawn. Needs matplotlib (the extra ``plot``)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from .errors import ConfigError
from .platforms.memory_use import RequestMemory, request_memory
from .platforms.plan import Plan

LENGTHS = (16, 128, 512, 2048, 4096, 8192, 32768)
"""Tokens of the requests that are drawn, those that the plan serves."""
PARTS = (
    ("kv_bytes", "K and V of its tokens", "#2563a8"),
    ("state_bytes", "states", "#3f9b5f"),
    ("tail_bytes", "slots without a token yet", "#f0c05a"),
    ("padding_bytes", "padding", "#d1495b"),
)
FORMATS = (".png", ".svg", ".pdf")


def plot_plan(plan: Plan, file: str | Path) -> Path:
    """Draw what requests of several lengths take: shares on the left, bytes on the right.

    :raises ConfigError: if matplotlib is not installed, or the file's ending or folder is not one to write to.
    """
    target = Path(file)
    _check(target)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lengths = [length for length in LENGTHS if length <= plan.max_model_len] or [plan.max_model_len]
    taken = [request_memory(plan, length) for length in lengths]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    shares, sizes = figure.subplots(1, 2)
    places = range(len(lengths))
    _stack(shares, places, taken, relative=True)
    _stack(sizes, places, taken, relative=False)
    for axes, title in ((shares, "share of what a request takes"), (sizes, "what a request takes, on one rank")):
        axes.set_xticks(list(places), [str(length) for length in lengths])
        axes.set_xlabel("tokens of the request")
        axes.set_title(title)
        axes.spines[["top", "right"]].set_visible(False)
    shares.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    sizes.set_ylabel("MiB")
    figure.suptitle(
        f"{plan.model.name} on {plan.platform}: {plan.strategy.name} pages, blocks of {plan.block_size} tokens"
    )
    handles, labels = shares.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(PARTS), frameon=False)
    try:
        figure.savefig(target, dpi=140)
    except OSError as error:
        raise ConfigError(
            f"--plot {target} cannot be written: {error.strerror}", option="--plot", value=str(target)
        ) from error
    return target


def _stack(axes: object, places: range, taken: list[RequestMemory], *, relative: bool) -> None:
    """One stacked bar per request."""
    bottom = [0.0] * len(taken)
    for part, label, colour in PARTS:
        heights = [getattr(one, part) / (one.total_bytes if relative else 2**20) for one in taken]
        axes.bar(places, heights, bottom=bottom, label=label, color=colour, width=0.7)  # type: ignore[attr-defined]
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]


def _check(target: Path) -> None:
    if target.suffix not in FORMATS:
        raise ConfigError(
            f"--plot {target} has no ending that can be drawn; use {', '.join(FORMATS)}",
            option="--plot",
            value=str(target),
            expected=list(FORMATS),
        )
    if not target.parent.is_dir():
        raise ConfigError(
            f"--plot {target}: the folder {target.parent} does not exist",
            option="--plot",
            value=str(target),
            expected="a folder that exists",
        )
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "--plot needs matplotlib, which is not installed: pip install 'makeready[plot]'",
            option="--plot",
            value=str(target),
            expected="pip install 'makeready[plot]'",
        )
