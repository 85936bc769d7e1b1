"""``makeready plan --compare``: the same model planned in several ways, side by side, refusals included."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .config import ALIASES, EngineConfig
from .device import format_bytes, parse_bytes
from .errors import ConfigError, MakereadyError, did_you_mean
from .platforms.memory_use import mix_waste, request_memory, request_mixes
from .platforms.plan import Plan
from .plugins.manager import load_plugins
from .startup import plan

SWITCH = {"true": True, "yes": True, "1": True, "on": True, "false": False, "no": False, "0": False, "off": False}
SIZES = ("memory_bytes", "device_memory_bytes")
MOST_VARIANTS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way of planning, and what came of it."""

    options: Mapping[str, Any]
    """The options that differ between variants."""
    plan: Plan | None
    error: MakereadyError | None
    """Why there is no plan."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the options, and the plan or the error."""
        made = {"plan": self.plan.to_dict()} if self.plan else {}
        failed = {"error": self.error.to_dict()} if self.error else {}
        return {"options": dict(self.options), **made, **failed}


def parse_axes(texts: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """``["platform=cuda,xpu", "block-size=64,none"]`` as option names and values; ``none`` leaves an option out.

    A value that is itself a list has plus signs: ``kv-cache-dtype-skip-layers=none,0+5``.

    :raises ConfigError: for a text without ``=``, an unknown option, one that comes twice, a value that is no number,
        or too many variants.
    """
    axes: dict[str, tuple[Any, ...]] = {}
    known = _option_types()
    for text in texts:
        name, equals, values = text.partition("=")
        option = name.strip().lstrip("-").replace("-", "_")
        option = ALIASES.get(option, option)
        if not equals or not values:
            raise ConfigError(
                f"--compare {text!r} is not OPTION=VALUE,VALUE, such as platform=cuda,xpu or tp=1,2,4",
                option="--compare",
                value=text,
                expected="for example platform=cuda,xpu or tp=1,2,4",
            )
        if option not in known:
            names = [name.replace("_", "-") for name in known]
            hint = did_you_mean(option.replace("_", "-"), names)
            raise ConfigError(
                f"--compare {text!r} names no option of plan{hint}; `makeready plan --help` has all of them",
                option="--compare",
                value=text,
                expected=sorted(names),
            )
        if option in axes:
            raise ConfigError(
                f"--compare {text!r}: {option.replace('_', '-')} is compared twice; list all its values in one",
                option="--compare",
                value=text,
                expected="each option once",
            )
        axes[option] = tuple(_value(option, known[option], value.strip()) for value in values.split(","))
    count = 1
    for values_of in axes.values():
        count *= len(values_of)
    if count > MOST_VARIANTS:
        raise ConfigError(
            f"--compare asks for {count} plans; {MOST_VARIANTS} at most fit a table",
            option="--compare",
            value=count,
            expected=f"<= {MOST_VARIANTS}",
        )
    return axes


def compare(model: Any, options: Mapping[str, Any], axes: Mapping[str, Sequence[Any]]) -> list[Variant]:
    """Every combination of the axes' values, planned with ``options`` besides; a refusal is a result as well."""
    plugins = load_plugins()
    variants = []
    for values in product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        given = {name: value for name, value in {**options, **chosen}.items() if value is not None}
        try:
            variants.append(Variant(options=chosen, plan=plan(model, plugins=plugins, **given), error=None))
        except MakereadyError as error:
            variants.append(Variant(options=chosen, plan=None, error=error))
    return variants


def comparison_table(variants: Sequence[Variant]) -> RenderableType:
    """A row per variant; below, why the refused ones are refused."""
    table = Table(box=None, pad_edge=False, title="plans side by side", title_justify="left")
    for name in variants[0].options:
        table.add_column(name.replace("_", "-"), style="bold")
    for column in ("block", "bytes a block", "floor", "4096-token request", "waste of it", "waste, mixed lengths"):
        table.add_column(column, justify="right")
    lengths = sorted({n for v in variants if v.plan and v.plan.capacity for n in v.plan.capacity.concurrency})
    for length in lengths:
        table.add_column(f"x {length}", justify="right")
    for variant in variants:
        options = ["-" if value is None else str(value) for value in variant.options.values()]
        if variant.plan is None:
            table.add_row(*options, *["-"] * (6 + len(lengths)))
            continue
        longest = variant.plan.max_model_len
        one, four = request_memory(variant.plan, 1), request_memory(variant.plan, 4096)
        counts = variant.plan.capacity.concurrency if variant.plan.capacity else {}
        table.add_row(
            *options,
            str(variant.plan.block_size),
            format_bytes(variant.plan.strategy.shape.block_bytes),
            format_bytes(one.total_bytes),
            format_bytes(four.total_bytes) if longest >= four.tokens else "-",
            f"{four.waste:.2%}" if longest >= four.tokens else "-",
            f"{mix_waste(variant.plan, request_mixes(longest)['512 lognormal']):.2%}",
            *(str(counts.get(length, "-")) for length in lengths),
        )
    return Group(table, *_refusals(variants))


def _refusals(variants: Sequence[Variant]) -> list[RenderableType]:
    lines: list[RenderableType] = []
    for variant in variants:
        if variant.error is not None:
            options = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in variant.options.items())
            lines += [Text(f"\n{options}: {variant.error}", style="yellow")]
    return lines


def _option_types() -> dict[str, str]:
    """Options that a plan takes, and the type of each, as its annotation says."""
    records = [type(getattr(EngineConfig(), part.name)) for part in fields(EngineConfig)]
    found = {setting.name: str(setting.type) for record in records for setting in fields(record)}
    return {"engine": "str", **{name: kind for name, kind in found.items() if name not in ("model", "seed")}}


def _value(option: str, kind: str, text: str) -> Any:
    if text == "none" and ("None" in kind or kind.startswith("tuple")):
        return None
    if option in SIZES:
        return parse_bytes(text, option=option)
    if kind.startswith("tuple"):
        return tuple(_number(option, int, part) for part in text.split("+"))
    if "bool" in kind:
        if text.lower() not in SWITCH:
            raise _unreadable(option, text, "true or false")
        return SWITCH[text.lower()]
    if "int" in kind or "float" in kind:
        return _number(option, float if "float" in kind else int, text)
    return text


def _number(option: str, read: Callable[[str], float], text: str) -> float:
    try:
        return read(text)
    except ValueError:
        raise _unreadable(option, text, "a number") from None


def _unreadable(option: str, text: str, expected: str) -> ConfigError:
    name = option.replace("_", "-")
    return ConfigError(f"--compare {name}={text} is not {expected}", option=name, value=text, expected=expected)
