"""Plans random models with random kernels and settings, both page strategies, and checks every answer.

``python tests/check_random_decisions.py [COUNT [SEED]]``, 200,000 by default; prints how many were planned and how many
refused, and ends with exit code 1 at the first wrong answer.
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from math import lcm

from makeready.attention_backends.interface import Capabilities
from makeready.cache.block_size import AtLeastPage, Divides, MultipleOf, OneOf
from makeready.cache.specs import AttentionSpec, LayerSpec, MambaSpec, StateTensor
from makeready.cache.subdivision import state_offsets
from makeready.config import LAYOUTS, EngineConfig
from makeready.errors import BlockSizeError, CapacityError
from makeready.hybrid.model_specs import ModelSpec
from makeready.platforms.cpu import CPU
from makeready.platforms.cuda import CUDA
from makeready.platforms.plan import Plan
from makeready.platforms.planning import plan_model
from makeready.platforms.xpu import XPU

PLATFORMS = (CPU, CUDA, XPU)
KINDS = ("mamba1", "mamba2", "gdn", "kda", "shortconv", "lightning")
REFUSED = ("block_size", "mamba_block_size", "page_strategy", "kv_cache_dtype", "kv_cache_dtype_skip_layers")
CHUNK = 5000
Case = tuple[ModelSpec, object, list[Capabilities], dict[str, object]]


def random_kernels(source: random.Random, index: int) -> Capabilities:
    sizes = [(), (), (16, 32, 64), (64,), (32, 64)]
    return Capabilities(
        name=f"backend{index}",
        dtypes=frozenset(),
        kv_cache_dtypes=frozenset(),
        kernel_block_multiple=source.choice((1, 8, 16, 32, 48, 64)),
        kernel_block_sizes=source.choice(sizes),
        exact_block_sizes=(source.choice((16, 64, 128, 1024)),) if source.random() < 0.03 else (),
        layouts=source.choice((LAYOUTS, LAYOUTS, ("NHD",), ("HND", "cross_layer_HND"))),
    )


def random_attention(source: random.Random) -> AttentionSpec:
    width = source.choice((16, 64, 80, 128, 256))
    return AttentionSpec(
        num_query_heads=8,
        num_kv_heads=source.choice((1, 2, 4, 8)),
        head_size=width,
        head_size_v=source.choice((width, width, 64)),
        dtype=source.choice(("bfloat16", "bfloat16", "fp8_e4m3", "float32")),
    )


def random_state(source: random.Random) -> MambaSpec:
    shape = (source.randint(1, 9000), source.choice((2, 3, 4)))
    conv = StateTensor(name="conv", shape=shape, dtype=source.choice(("bfloat16", "float32")))
    recurrent = StateTensor(
        name="recurrent", shape=(source.choice((8, 33, 128)), source.choice((16, 64, 128)), 64), dtype="float32"
    )
    states = (conv,) if source.random() < 0.3 else (conv, recurrent)
    return MambaSpec(kind=source.choice(KINDS), states=states)


def random_case(source: random.Random) -> Case:
    """A hybrid model of up to 36 layers, a platform, a kernel per kind of attention layer, and settings."""
    kinds = [random_attention(source) for _ in range(source.choice((1, 1, 1, 2)))]
    stored = "bfloat16"
    if source.random() < 0.1:  # some layers keep the model's dtype
        stored = source.choice(("fp8_e4m3", "nvfp4", "int8_per_token_head"))
        window = source.choice((None, None, 512))
        kinds = [replace(kinds[0], dtype=stored, sliding_window=window), replace(kinds[0], dtype="bfloat16")]
    states = [random_state(source) for _ in range(source.choice((1, 1, 2)))]
    attention = [spec for spec in kinds for _ in range(source.randint(1, 8))]
    kept = [spec for spec in states for _ in range(source.randint(1, 10))]
    layers = tuple(LayerSpec(layer=index, spec=spec) for index, spec in enumerate((*attention, *kept)))
    model = ModelSpec(
        name="random", model_type="random", engine=source.choice(("vllm", "transformers")), dtype="bfloat16",
        kv_cache_dtype=stored, tensor_parallel_size=1, num_layers=len(layers), max_model_len=8192, layers=layers,
    )  # fmt: skip
    mode = source.choice(("none", "none", "align", "all"))
    options: dict[str, object] = {"mamba_cache_mode": mode}
    if source.random() < 0.15:
        options["block_size"] = source.choice((16, 48, 64, 128, 1040, 4096))
    if mode != "none" and source.random() < 0.3:
        options["mamba_block_size"] = source.choice((64, 96, 1024, 4096, 8192))
    kernels = [random_kernels(source, index) for index in range(source.choice((1, 1, 2)))]
    return model, source.choice(PLATFORMS), kernels, options


def plan_case(case: Case, strategy: str, *, backwards: bool = False) -> Plan:
    model, platform, kernels, options = case
    specs = list(dict.fromkeys(layer.spec for layer in model.attention_layers))
    by_layer = {x.layer: kernels[specs.index(x.spec) % len(kernels)] for x in model.attention_layers}
    if backwards:
        by_layer = dict(reversed(by_layer.items()))
    config = EngineConfig.from_options(page_strategy=strategy, **options)
    return plan_model(model, platform, by_layer, config)  # type: ignore[arg-type]


def check_plan(case: Case, plan: Plan) -> Iterator[str]:
    """What is wrong with a plan, in words."""
    model, _, _, options = case
    decision, shape = plan.decision, plan.strategy.shape
    size = decision.block_size
    for rule in decision.constraints:
        if not rule.accepts(size):
            yield f"{rule} refuses {size}"
    if "block_size" in options and size != options["block_size"]:
        yield f"the user's block {options['block_size']} became {size}"
    if "mamba_block_size" in options and decision.mamba_block_size != options["mamba_block_size"]:
        yield f"the user's mamba_block_size {options['mamba_block_size']} became {decision.mamba_block_size}"
    grown = bool(decision.block_sizes)  # in vLLM's phase 3, after which states stay where phase 2 put them
    if decision.mamba_cache_mode != "none" and not grown and decision.mamba_block_size % size:  # type: ignore[operator]
        yield f"states are kept every {decision.mamba_block_size} tokens, no whole number of blocks of {size}"
    for name, kernel in decision.kernel_block_sizes.items():
        if size % kernel:
            yield f"{name} indexes {kernel} tokens of a block of {size}"
    grouped = Counter(layer for group in plan.groups for layer in group.layers)
    if grouped != Counter(model.layers):
        yield "a layer is in no group, or in two"
    yield from (check_unified if plan.strategy.name == "unified" else check_subdivided)(plan, options)
    if not 0 <= plan.strategy.waste_estimate < 1:
        yield f"waste {plan.strategy.waste_estimate}"
    if shape.block_bytes != plan.pool_bytes_per_block:
        yield f"blocks of {shape.block_bytes} and of {plan.pool_bytes_per_block} bytes"


def check_unified(plan: Plan, options: dict[str, object]) -> Iterator[str]:
    decision = plan.decision
    for layer in plan.layers:
        if layer.page_bytes > plan.page_bytes:
            yield f"layer {layer.layer} needs {layer.page_bytes} of a page of {plan.page_bytes}"
    for group in plan.groups:
        tokens = group.block_size
        if not group.is_state and any(x.spec.page_size_bytes(tokens) > plan.page_bytes for x in group.layers):  # type: ignore[union-attr]
            yield f"a block of {tokens} tokens of {group.layers[0]} is more than a page of {plan.page_bytes}"
    if decision.block_sizes:
        return
    finite = any(isinstance(rule, (OneOf, Divides)) for rule in decision.constraints)
    if "block_size" in options or finite or decision.block_size == decision.phase1_block_size:
        return
    step = lcm(decision.phase1_block_size, *(rule.n for rule in decision.constraints if isinstance(rule, MultipleOf)))
    smaller = decision.block_size - step
    pages = [rule for rule in decision.constraints if isinstance(rule, AtLeastPage)]
    if smaller >= decision.phase1_block_size and all(rule.accepts(smaller) for rule in (*decision.constraints, *pages)):
        yield f"a block of {smaller} would do, one step of {step} below {decision.block_size}"


def check_subdivided(plan: Plan, options: dict[str, object]) -> Iterator[str]:
    decision, shape = plan.decision, plan.strategy.shape
    filled = blocks = 0
    for group in plan.groups:
        if group.is_state:
            used = state_offsets(group.layers)[-1][0]
            if used > shape.state_page_bytes:
                yield f"states of {used} bytes in a state page of {shape.state_page_bytes}"
            if shape.state_page_blocks > 1 and used <= (shape.state_page_blocks - 1) * shape.block_bytes:
                yield f"states of {used} bytes need one block less than {shape.state_page_blocks}"
            for tensor in (tensor for layer in group.layers for tensor in layer.spec.states):  # type: ignore[union-attr]
                if shape.state_page_bytes % (tensor.size_bytes // max(1, _elements(tensor))):
                    yield f"a stride of {shape.state_page_bytes} bytes for {tensor.dtype}"
            continue
        pages = [layer.spec.page_size_bytes(decision.block_size) for layer in group.layers]  # type: ignore[union-attr]
        if sum(pages) > shape.block_bytes or shape.block_bytes % pages[0]:
            yield f"pages of {pages} in a block of {shape.block_bytes}"
        filled, blocks = filled + sum(pages), blocks + shape.block_bytes
    if 8 * filled < 7 * blocks:
        yield f"blocks of {shape.block_bytes} bytes, {blocks} in all, are filled by {filled} only"
    if min(shape.state_page_blocks, shape.states_per_block) != 1:
        yield f"{shape}"
    if any(isinstance(rule, AtLeastPage) for rule in decision.constraints):
        yield "a block has to hold a state"
    if "block_size" not in options and not any(isinstance(rule, OneOf) for rule in decision.constraints):
        most = lcm(decision.phase1_block_size, *(r.n for r in decision.constraints if isinstance(r, MultipleOf)))
        if decision.block_size > most:
            yield f"a block of {decision.block_size} tokens, where kernels like {decision.phase1_block_size}"


def _elements(tensor: StateTensor) -> int:
    count = 1
    for size in tensor.shape:
        count *= size
    return count


def check_case(case: Case, number: int) -> tuple[str, list[str]]:
    """What came out, and everything that is wrong with it."""
    strategy = ("unified", "subdivided", "auto")[number % 3]
    try:
        plan = plan_case(case, strategy)
    except (BlockSizeError, CapacityError) as error:
        refused = f"{strategy} refused, {error.option}"
        faults = [] if error.option in REFUSED else [error.message]
        return refused, faults
    faults = list(check_plan(case, plan))
    if number % 10 == 0:
        if plan_case(case, strategy) != plan:
            faults.append("planned twice, two answers")
        backwards = plan_case(replace_kernels(case), strategy, backwards=True)
        if (backwards.decision.block_size, backwards.strategy) != (plan.decision.block_size, plan.strategy):
            faults.append("the order of backends matters")
    if strategy == "auto":
        faults += check_auto(case, plan)
    return f"{strategy} planned, {plan.strategy.name}", faults


def replace_kernels(case: Case) -> Case:
    """The same case, with everything that has an order turned round."""
    model, platform, kernels, options = case
    return replace(model), platform, kernels, dict(reversed(options.items()))


def check_auto(case: Case, plan: Plan) -> list[str]:
    """Auto takes what the engine has and what wastes least."""
    if case[0].engine == "vllm":
        return [] if plan.strategy.name == "unified" else ["engine vllm got subdivided pages"]
    try:
        other = plan_case(case, "unified" if plan.strategy.name == "subdivided" else "subdivided")
    except (BlockSizeError, CapacityError):
        return []
    if plan.strategy.waste_estimate > other.strategy.waste_estimate + 0.001:
        found, possible = plan.strategy.waste_estimate, other.strategy.waste_estimate
        return [f"{plan.strategy.name} wastes {found}, {possible} is possible"]
    return []


def check(count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Outcomes of ``count`` random cases, and the faults of the first wrong one."""
    source = random.Random(seed)
    outcomes: Counter[str] = Counter()
    for number in range(count):
        case = random_case(source)
        outcome, faults = check_case(case, number)
        outcomes[outcome] += 1
        if faults:
            return outcomes, [f"case {number} of seed {seed}: {case}", *faults]
    return outcomes, []


def main(arguments: list[str]) -> int:
    numbers = [int(argument) for argument in arguments]
    count, seed = (*numbers, *(200_000, 20)[len(numbers) :])
    start = time.perf_counter()
    chunks = [(min(CHUNK, count - first), seed + first) for first in range(0, count, CHUNK)]
    outcomes: Counter[str] = Counter()
    faults: list[str] = []
    with ProcessPoolExecutor() as workers:
        for found, wrong in workers.map(check, *zip(*chunks, strict=True)):
            outcomes += found
            faults += wrong
    for outcome, times in sorted(outcomes.items()):
        print(f"{outcome}: {times}")
    print("\n".join(faults) or f"{count} random decisions are right, in {time.perf_counter() - start:.1f} s")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
