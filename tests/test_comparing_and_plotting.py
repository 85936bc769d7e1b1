"""Plans side by side, what requests take of a plan, and the drawing of it."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from makeready import plan
from makeready.cache.group_pool import make_pool
from makeready.cli import main
from makeready.comparing import compare, comparison_table, parse_axes
from makeready.errors import ConfigError
from makeready.hybrid.presets import preset_names
from makeready.platforms.memory_use import mix_waste, request_memory, request_mixes
from makeready.plugins.manager import load_plugins

NANO = "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"
PLUGINS = load_plugins()


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


@pytest.mark.parametrize("strategy", ["unified", "subdivided"])
@pytest.mark.parametrize("name", preset_names())
def test_what_a_request_takes_is_what_the_pool_hands_out(name, strategy):
    made = plan(name, platform="cuda", backend="reference", plugins=PLUGINS)
    if strategy == "subdivided":
        if not made.model.is_hybrid:
            pytest.skip("one kind of page: nothing to subdivide")
        made = plan(name, platform="cuda", backend="reference", page_strategy=strategy, plugins=PLUGINS)
    for tokens in (1, 300, 4097):
        one = request_memory(made, tokens)
        assert min(one.kv_bytes, one.tail_bytes, one.state_bytes, one.padding_bytes) >= 0
        shape = made.strategy.shape
        states = sum(group.is_state for group in made.groups)
        blocks = sum(-(-tokens // group.block_size) for group in made.groups if not group.is_state)
        pool = make_pool(made.groups, shape, shape.least_blocks(states, blocks))
        free = pool.num_free
        for group in made.groups:
            pool.allocate(group.index, 1 if group.is_state else -(-tokens // group.block_size), "request")
        taken = (free - pool.num_free) * shape.block_bytes
        if shape.states_per_block == 1:
            assert one.total_bytes == taken
        assert mix_waste(made, [tokens]) == pytest.approx(1 - (one.kv_bytes + one.state_bytes) / taken)


def test_an_engine_that_frees_early_holds_less_of_a_sliding_window():
    full, early = (plan("openai/gpt-oss-20b", platform="cuda", free_out_of_window=early) for early in (False, True))
    far = 30000
    assert request_memory(early, far).total_bytes < 0.6 * request_memory(full, far).total_bytes
    assert request_memory(early, 100) == request_memory(full, 100)
    sliding = next(group for group in early.groups if group.kind == "sliding")
    covered = 128 - 1 + 512  # the window, and the tokens of one step
    assert early.holding.group_blocks(sliding, far) == -(-covered // 16) + 1
    assert mix_waste(early, [far]) == pytest.approx(request_memory(early, far).waste)


def test_mixes_are_those_that_waste_is_published_for():
    mixes = request_mixes()
    assert [len(lengths) for lengths in mixes.values()] == [64, 64, 16, 512]
    assert min(mixes["512 lognormal"]) >= 16
    assert max(mixes["512 lognormal"]) <= 32768
    made = plan(NANO, platform="cuda", page_strategy="subdivided")
    assert all(mix_waste(made, lengths) < 0.01 for lengths in mixes.values())


def test_nothing_is_shown_of_requests_that_are_not_served():
    short = request_mixes(700)
    assert list(short) == ["64 x 512", "512 lognormal"]
    assert max(short["512 lognormal"]) == 700
    requests = plan(NANO, platform="cuda", max_model_len=700).to_dict()["requests"]
    assert list(requests["mix_waste_pct"]) == list(short)
    assert [one["tokens"] for one in requests["memory"]] == [1, 512]
    (variant,) = compare(NANO, {"platform": "cuda", "max_model_len": 700}, {"tensor_parallel_size": (1,)})
    console = Console(width=200, record=True)
    console.print(comparison_table([variant]))
    row = next(line for line in console.export_text().splitlines() if line.startswith("1 "))
    assert row.split().count("-") == 2


def test_axes_take_names_as_the_command_line_has_them():
    assert parse_axes(["tp=1,2", "block-size=64,none", "platform=cuda,xpu", "memory=1GiB"]) == {
        "tensor_parallel_size": (1, 2), "block_size": (64, None), "platform": ("cuda", "xpu"), "memory_bytes": (2**30,),
    }  # fmt: skip


@pytest.mark.parametrize("text", ["platform", "platform=", "size=3", "tp=two"])
def test_a_broken_axis_says_what_would_be_right(text):
    with pytest.raises(ConfigError, match=r"--compare .*(OPTION=VALUE|no option of plan|not a number)"):
        parse_axes([text])


def test_axes_take_lists_switches_and_short_names():
    texts = ["kv-cache-dtype-skip-layers=none,5+12", "use-replayssm=yes,off", "pp=1,2", "provider=none,fa3"]
    assert parse_axes(texts) == {
        "kv_cache_dtype_skip_layers": (None, (5, 12)), "use_replayssm": (True, False),
        "pipeline_parallel_size": (1, 2), "flash_provider": (None, "fa3"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["use-replayssm=ture"], "use-replayssm=ture is not true or false"),
        (["kv-cache-dtype-skip-layers=a"], "kv-cache-dtype-skip-layers=a is not a number"),
        (["tp=1", "tp=2"], "tensor-parallel-size is compared twice"),
    ],
)
def test_what_an_axis_cannot_mean_is_refused(texts, said):
    with pytest.raises(ConfigError, match=said):
        parse_axes(texts)


def test_none_leaves_out_an_option_that_is_given_besides():
    first, second = compare(NANO, {"platform": "xpu", "block_size": 2176}, parse_axes(["block-size=none,2176"]))
    assert first.plan is not None
    assert second.plan is not None
    assert (first.plan.block_size, second.plan.block_size) == (2112, 2176)


def test_too_many_variants_are_refused():
    with pytest.raises(ConfigError, match="asks for 81 plans; 64 at most"):
        parse_axes(["tp=1,2,3,4,5,6,7,8,9", "block-size=1,2,3,4,5,6,7,8,9"])


def test_every_combination_is_planned_and_refusals_are_kept():
    variants = compare(NANO, {"platform": "xpu"}, parse_axes(["block-size=none,2100", "tp=1,2"]))
    assert [(v.options["block_size"], v.options["tensor_parallel_size"]) for v in variants] == [
        (None, 1), (None, 2), (2100, 1), (2100, 2),
    ]  # fmt: skip
    assert [v.plan is None for v in variants] == [False, False, True, True]
    assert "2112" in str(variants[2].error)


def test_compare_prints_a_table_and_json(capsys):
    given = ("plan", NANO, "--platform", "cuda", "--memory", "40GiB")
    arguments = (*given, "--compare", "page-strategy=unified,subdivided")
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert "2096" in out
    assert "x 512" in out
    code, out, _ = run(capsys, *arguments, "--json")
    assert [variant["plan"]["block_size"] for variant in json.loads(out)["variants"]] == [2096, 16]


def test_all_variants_refused_is_an_error(capsys):
    code, _, err = run(capsys, "plan", NANO, "--platform", "xpu", "--compare", "block-size=100,200")
    assert code == 2
    assert "2112" in err


def test_a_plan_is_drawn(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    target = tmp_path / "plan.png"
    code, out, _ = run(capsys, "plan", NANO, "--platform", "cuda", "--plot", str(target))
    assert code == 0
    assert str(target) in out.replace("\n", "")
    assert target.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert target.stat().st_size > 10_000


@pytest.mark.parametrize(("file", "named"), [("plan.doc", ".png, .svg, .pdf"), ("nowhere/plan.png", "does not exist")])
def test_a_file_that_cannot_be_drawn_is_refused(capsys, tmp_path, file, named):
    code, _, err = run(capsys, "plan", NANO, "--platform", "cuda", "--plot", str(tmp_path / file))
    assert code == 2
    assert named in err
