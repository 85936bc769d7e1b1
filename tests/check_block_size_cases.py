"""Runs block-size cases (what vLLM 0.33.0's planning code answered) through makeready's planner and compares.

``python tests/check_block_size_cases.py FILE`` (plain JSON or gzip). Prints differences by tag, the named rules by
which makeready differs on purpose with how often each applied, and last ``N of M agree``. Exit code 0 if all agree.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from makeready.attention_backends.interface import Capabilities
from makeready.cache.block_size import Constraint
from makeready.config import KV_CACHE_DTYPES, EngineConfig
from makeready.errors import BlockSizeError, ConfigError, MakereadyError
from makeready.hybrid.model_specs import ModelSpec, read_model
from makeready.hybrid.presets import is_preset, preset
from makeready.platforms.cpu import CPU
from makeready.platforms.cuda import CUDA
from makeready.platforms.interface import Platform
from makeready.platforms.plan import Plan
from makeready.platforms.planning import plan_model
from makeready.platforms.xpu import XPU

Case = Mapping[str, Any]
PLATFORMS: Mapping[str, Platform] = {"cpu": CPU, "cuda": CUDA, "xpu": XPU}
KINDS = {"attn": ("attention", "mla"), "swa": ("sliding",)}
"""Group kinds of the cases and what makeready calls them, where that differs."""
STATES = ("mamba1", "mamba2", "gdn", "kda", "shortconv", "lightning")
EXACT = ("CPU_MLA",)
"""Backends whose list of kernel blocks means the block itself."""

USER_REFUSED = "user block_size refused instead of replaced, nearest sizes right"
MAMBA_RESPECTED = "user mamba_block_size respected instead of overwritten"
MAMBA_REFUSED = "user mamba_block_size refused instead of overwritten, nearest values right"
PAGES_EQUAL = "state page padded to the attention page that grew on xpu, where vLLM leaves it short"
SSM_DTYPE_UNUSED = "mamba_ssm_cache_dtype refused where vLLM ignores it"
BOTH_REFUSE = "refused by both"


@dataclass
class Report:
    """What came out of a run."""

    total: int = 0
    rules: Counter[str] = field(default_factory=Counter)
    differences: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def agree(self) -> int:
        """Cases without a difference."""
        return self.total - sum(map(len, self.differences.values()))


def load_cases(path: str | Path) -> list[Case]:
    """The cases of a file, plain or gzipped."""
    data = Path(path).read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    loaded = json.loads(data)
    cases: list[Case] = loaded["cases"] if isinstance(loaded, dict) else loaded
    return cases


def check_cases(cases: Sequence[Case]) -> Report:
    """Plan every case and compare."""
    report = Report(total=len(cases))
    for case in cases:
        try:
            rule, differences = check_case(case)
        except MakereadyError as error:
            rule, differences = None, [f"{type(error).__name__}: {error}"]
        if rule:
            report.rules[rule] += 1
        if differences:
            report.differences[case["tag"]].append(f"{case['id']} {_title(case)}: {'; '.join(differences)}")
    return report


def check_case(case: Case) -> tuple[str | None, list[str]]:
    """The rule by which a case agrees although answers differ, and what differs without such a rule."""
    settings = case["input"]
    try:
        plan = plan_case(case)
    except (BlockSizeError, ConfigError) as error:
        if case["error"]:
            return BOTH_REFUSE, []
        if settings["user_block_size"] is not None and error.option == "block_size":
            return USER_REFUSED, user_refusal_faults(case, error)
        if settings["user_mamba_block_size"] is not None and error.option == "mamba_block_size":
            return MAMBA_REFUSED, mamba_refusal_faults(case, error)
        if settings["mamba_ssm_cache_dtype"] != "auto" and error.option == "mamba_ssm_cache_dtype":
            return SSM_DTYPE_UNUSED, unused_dtype_faults(case, error)
        return None, [f"refused: {error}"]
    if case["error"]:
        return None, [f"planned block {plan.decision.block_size} where vLLM refuses: {case['error']}"]
    differences = dict(compare(plan, case["output"]))
    if settings["user_mamba_block_size"] is not None and settings["mamba_cache_mode"] == "align":
        return MAMBA_RESPECTED, respected_faults(case, plan)
    if case["output"].get("pages_equal") is False:
        return PAGES_EQUAL, unequal_page_faults(plan, differences)
    return None, [f"{name} {ours} != {theirs}" for name, (ours, theirs) in differences.items()]


def plan_case(case: Case, *, user_block: bool = True, user_mamba: bool = True) -> Plan:
    """makeready's plan of a case, with or without the user's sizes."""
    settings = case["input"]
    model = model_of(case)
    backend = capabilities_of(case)
    mode = settings["mamba_cache_mode"] or "none"
    config = EngineConfig.from_options(
        block_size=settings["user_block_size"] if user_block else None,
        mamba_block_size=settings["user_mamba_block_size"] if user_mamba else None,
        mamba_cache_mode=mode,
        max_model_len=settings["max_model_len"],
        tensor_parallel_size=settings["tp"],
        mamba_prefill_checkpoint_alignment=settings["mamba_prefill_checkpoint_alignment"],
    )
    return plan_model(
        model,
        PLATFORMS[settings["platform"]],
        {layer.layer: backend for layer in model.attention_layers},
        config,
    )


def model_of(case: Case) -> ModelSpec:
    """The model read from the case's own numbers; only its family comes from elsewhere."""
    settings, numbers = case["input"], dict(case["numbers"])
    counts = numbers.pop("layer_counts")
    config: dict[str, Any] = {
        **numbers,
        "model_type": family_of(settings["model"], numbers, counts),
        "torch_dtype": settings["model_dtype"],
        "max_position_embeddings": settings["max_model_len"],
        "layer_types": layer_words(counts),
    }
    config["num_hidden_layers"] = len(config["layer_types"])
    if "kda_num_heads" in numbers:
        config["linear_attn_config"] = {
            "num_heads": numbers["kda_num_heads"],
            "head_dim": numbers["kda_head_dim"],
            "short_conv_kernel_size": numbers["kda_conv"],
        }
    return read_model(
        config,
        engine="vllm",
        tensor_parallel_size=settings["tp"],
        kv_cache_dtype=settings["kv_cache_dtype"],
        mamba_cache_dtype=settings["mamba_cache_dtype"],
        mamba_ssm_cache_dtype=settings["mamba_ssm_cache_dtype"],
        num_speculative_tokens=settings["num_speculative_tokens"],
        name=settings["model"],
    )


def family_of(model: str, numbers: Mapping[str, Any], counts: Mapping[str, int]) -> str:
    """The model_type of a preset, or what the numbers look like."""
    if is_preset(model):
        return str(preset(model).config["model_type"])
    signs = (
        ("ssm_state_size", "nemotron_h"), ("mamba_ngroups", "zamba2"), ("mamba_d_ssm", "falcon_h1"),
        ("mamba_n_heads", "granitemoehybrid"), ("hidden_size_per_head", "plamo2"), ("kda_num_heads", "kimi_linear"),
        ("conv_L_cache", "lfm2"), ("mamba_ssm_dtype", "qwen3_5_text"), ("linear_num_key_heads", "qwen3_next"),
        ("mamba_d_state", "jamba"), ("kv_lora_rank", "deepseek_v3"), ("sliding_window", "gemma3_text"),
    )  # fmt: skip
    if counts.get("lightning"):
        return "minimax_text_01"
    return next((family for sign, family in signs if sign in numbers), "llama")


def layer_words(counts: Mapping[str, int]) -> list[str]:
    """A layer list with these counts; a group plan does not depend on the order."""
    states = sum(counts.get(kind, 0) for kind in STATES)
    full, sliding = counts.get("attention", 0), counts.get("sliding_attention", 0)
    plain = counts.get("moe", 0) + counts.get("mlp", 0)
    if states and counts.get("mlp") == full and counts.get("mamba2") == states and full < states:
        return ["hybrid"] * full + ["linear_attention"] * (states - full)  # zamba2: the shared block has the MLP
    if states == full == plain:
        return ["hybrid"] * full  # falcon_h1: attention beside a state in every layer
    if plain == states + full + sliding:
        plain = 0  # every layer has its own MLP
    words = {"linear_attention": states, "full_attention": full, "sliding_attention": sliding, "mlp": plain}
    return [word for word, count in words.items() for _ in range(count)]


def capabilities_of(case: Case) -> Capabilities:
    """What the case says about its backend's kernel blocks, as a declaration."""
    settings = case["input"]
    multiple, sizes = 1, []
    for rule in settings["kernel_block_sizes"]:
        if isinstance(rule, int):
            sizes.append(rule)
        else:
            found = re.fullmatch(r"MultipleOf\((\d+)\)", rule)
            if found is None:
                raise ConfigError(f"case {case['id']} has an unknown kernel block rule {rule!r}")
            multiple = int(found.group(1))
    exact = settings["backend"] in EXACT
    return Capabilities(
        name=settings["backend"],
        dtypes=frozenset({settings["model_dtype"]}),
        kv_cache_dtypes=frozenset(KV_CACHE_DTYPES),
        kernel_block_multiple=multiple,
        kernel_block_sizes=() if exact else tuple(sizes),
        exact_block_sizes=tuple(sizes) if exact else (),
    )


def compare(plan: Plan, output: Mapping[str, Any]) -> Iterator[tuple[str, tuple[object, object]]]:
    """(name, (ours, theirs)) of every number that differs."""
    for name, ours in answers(plan).items():
        if name in output and ours != (theirs := output[name]):
            yield name, (ours, theirs)
    ours_kinds = [group.kind for group in plan.groups]
    theirs_kinds = output["group_kinds"]
    same = len(ours_kinds) == len(theirs_kinds) and all(
        kind in KINDS.get(theirs, (theirs,)) for kind, theirs in zip(ours_kinds, theirs_kinds, strict=True)
    )
    if not same:
        yield "group_kinds", (ours_kinds, theirs_kinds)


def answers(plan: Plan) -> dict[str, object]:
    """Our plan in the words of the cases."""
    decision = plan.decision
    attention = plan.model.attention_layers[0].spec
    found: dict[str, object] = {
        "block_size": decision.block_size,
        "attn_page_bytes": decision.attention_page_bytes,
        "attn_page_bytes_per_token": decision.attention_bytes_per_token,
        "num_groups": len(plan.groups),
        "group_layer_counts": [len(group.layers) for group in plan.groups],
        "group_page_bytes": [plan.page_bytes] * len(plan.groups),
        "group_block_sizes": [group.block_size for group in plan.groups],
        "pool_bytes_per_block": plan.pool_bytes_per_block,
        "num_kv_heads_per_rank": getattr(attention, "num_kv_heads"),  # noqa: B009
    }
    states = [layer.spec.states for layer in plan.model.layers if hasattr(layer.spec, "states")]
    if states:
        found |= {
            "mamba_state_shapes": [list(tensor.shape) for tensor in states[0]],
            "mamba_state_dtypes": [tensor.dtype for tensor in states[0]],
            "mamba_raw_page_bytes": decision.state_raw_bytes,
            "mamba_page_size_padded": decision.mamba_page_size_padded,
            "mamba_page_bytes": decision.state_page_bytes,
            "mamba_padding_pct": plan.mamba_padding_pct,
            "mamba_block_size": decision.mamba_block_size,
            "pages_equal": plan.to_dict()["pages_equal"],
        }
    return found


def accepted(constraints: Sequence[Constraint], size: int) -> bool:
    """True if every constraint accepts ``size``."""
    return all(rule.accepts(size) for rule in constraints)


def next_to(constraints: Sequence[Constraint], wanted: int, *, itself: bool = False) -> tuple[int, ...]:
    """The accepted sizes next to ``wanted``, found by trying one after the other."""
    below = next((n for n in range(wanted if itself else wanted - 1, 0, -1) if accepted(constraints, n)), None)
    above = next((n for n in range(wanted if itself else wanted + 1, 1 << 17) if accepted(constraints, n)), None)
    return tuple(size for size in (below, above) if size is not None)


def user_refusal_faults(case: Case, error: MakereadyError) -> list[str]:
    """Why a refusal of the user's block size is not right; empty if it is."""
    wanted = case["input"]["user_block_size"]
    free = plan_case(case, user_block=False)
    rules = free.decision.constraints
    if accepted(rules, wanted):
        return [f"block_size {wanted} suits every constraint but is refused: {error}"]
    sizes = next_to(rules, wanted)
    faults = []
    if error.expected != sizes:
        faults.append(f"nearest {error.expected} != {sizes}")
    if not all(str(number) in error.message for number in (wanted, *sizes)):
        faults.append(f"message lacks a number: {error}")
    for size in sizes:
        nearby = {**case, "input": {**case["input"], "user_block_size": size}}
        if plan_case(nearby).decision.block_size != size:
            faults.append(f"nearest {size} does not plan")
    return faults


def respected_faults(case: Case, plan: Plan) -> list[str]:
    """Why the user's mamba_block_size is not respected; empty if it is."""
    wanted, decision = case["input"]["user_mamba_block_size"], plan.decision
    free = plan_case(case, user_mamba=False)
    faults = []
    if decision.mamba_block_size != wanted or wanted % decision.block_size:
        faults.append(f"mamba_block_size {decision.mamba_block_size} with block {decision.block_size}, not {wanted}")
    if not accepted(free.decision.constraints, decision.block_size):
        faults.append(f"block {decision.block_size} does not suit the kernels and states")
    better = [n for n in range(free.decision.block_size, decision.block_size) if wanted % n == 0
              and n % free.decision.phase1_block_size == 0 and accepted(free.decision.constraints, n)]  # fmt: skip
    if better:
        faults.append(f"block {decision.block_size} where {better[0]} would do")
    return faults


def mamba_refusal_faults(case: Case, error: MakereadyError) -> list[str]:
    """Why a refusal of the user's mamba_block_size is not right; empty if it is."""
    wanted = case["input"]["user_mamba_block_size"]
    rules = plan_case(case, user_block=False, user_mamba=False).decision.constraints
    if any(wanted % size == 0 and accepted(rules, size) for size in range(1, wanted + 1)):
        return [f"a block that divides {wanted} suits every constraint, but it is refused: {error}"]
    values = next_to(rules, wanted, itself=True)
    if error.expected != values or not all(str(n) in error.message for n in (wanted, *values)):
        return [f"nearest {error.expected} != {values}: {error}"]
    return []


def unused_dtype_faults(case: Case, error: MakereadyError) -> list[str]:
    """The setting must have had no effect on vLLM's answer, and the message has to name it."""
    free = plan_case({**case, "input": {**case["input"], "mamba_ssm_cache_dtype": "auto"}})
    faults = [f"{name} {ours} != {theirs}" for name, (ours, theirs) in compare(free, case["output"])]
    if case["input"]["mamba_ssm_cache_dtype"] not in error.message:
        faults.append(f"message lacks the setting: {error}")
    return faults


def unequal_page_faults(plan: Plan, differences: dict[str, tuple[object, object]]) -> list[str]:
    """Only the padding may differ, and ours has to make the pages equal."""
    decision = plan.decision
    allowed = {"mamba_page_size_padded", "mamba_page_bytes", "mamba_padding_pct", "pages_equal"}
    faults = [f"{name} {ours} != {theirs}" for name, (ours, theirs) in differences.items() if name not in allowed]
    if decision.state_page_bytes != decision.attention_page_bytes:
        faults.append("pages differ")
    return faults


def _title(case: Case) -> str:
    settings = case["input"]
    return " ".join(
        str(settings[name]) for name in ("model", "platform", "backend", "tp", "kv_cache_dtype", "mamba_cache_mode")
    )


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        print("usage: check_block_size_cases.py FILE", file=sys.stderr)
        return 2
    report = check_cases(load_cases(arguments[0]))
    for tag, lines in sorted(report.differences.items()):
        print(f"{tag}: {len(lines)} differ")
        for line in lines[:10]:
            print(f"  {line}")
    for rule, count in sorted(report.rules.items()):
        print(f"rule: {rule}: {count}")
    print(f"{report.agree} of {report.total} agree")
    return 0 if report.agree == report.total else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
