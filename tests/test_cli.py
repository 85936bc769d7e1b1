"""The command line: what people type, what they get, and what bad input tells them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from makeready.cli import launch as launch_command
from makeready.cli import main
from makeready.cli import plan as plan_command
from makeready.config import AttentionConfig, EngineConfig
from makeready.startup import BUNDLED_MODEL

NANO = "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``makeready ARGUMENTS``."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


def config_file(folder: Path, text: str) -> str:
    file = folder / "config.json"
    file.write_text(text)
    return str(file)


def test_plan_shows_block_size_groups_and_capacity(capsys):
    code, out, _ = run(capsys, "plan", NANO, "--platform", "xpu", "--memory", "40GiB", "--explain")
    assert code == 0
    for expected in ("2112 tokens", "flash on layers 5, 12, 19, 26, 33, 42", "padded by 1.34 %", "40.00 GiB", "why"):
        assert expected in out


def test_plan_json_is_the_dict_of_the_python_call(capsys):
    from makeready import plan

    code, out, _ = run(capsys, "plan", NANO, "--platform", "cuda", "--tp", "4", "--kv-cache-dtype", "fp8", "--json")
    assert code == 0
    expected = plan(NANO, platform="cuda", tensor_parallel_size=4, kv_cache_dtype="fp8").to_dict()
    assert json.loads(out) == json.loads(json.dumps(expected))


def unwrapped(text):
    """What a terminal of any width shows, on one line."""
    return " ".join(text.split())


def test_a_plan_says_whose_cache_it_is_and_how_to_plan_what_launch_allocates(capsys):
    said = unwrapped(run(capsys, "plan", NANO, "--platform", "cuda")[1])
    assert "vllm; launch and prepare allocate for transformers: plan that with --engine transformers" in said
    said = unwrapped(run(capsys, "plan", NANO, "--platform", "cuda", "--engine", "transformers")[1])
    assert "transformers, what launch and prepare allocate" in said


def test_plan_takes_a_dict_a_file_and_a_directory_alike(capsys):
    from makeready import plan

    content = json.loads((BUNDLED_MODEL / "config.json").read_text())
    block_sizes = {
        plan(source, platform="cuda").block_size
        for source in (content, BUNDLED_MODEL, str(BUNDLED_MODEL), str(BUNDLED_MODEL / "config.json"))
    }
    assert len(block_sizes) == 1


def test_list_prints_every_preset(capsys):
    code, out, _ = run(capsys, "plan", "--list", "--json")
    assert code == 0
    assert NANO in json.loads(out)["presets"]


def test_doctor_names_every_platform_and_what_is_not_installed(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    for expected in ("cpu", "cuda", "pip install ./plugins/wheels/makeready-xpu", "intel-extension-for-pytorch"):
        assert expected in unwrapped(out)


def test_help_teaches_with_examples(capsys):
    for command in ((), ("plan",), ("launch",), ("doctor",)):
        code, out, _ = run(capsys, *command, "--help")
        assert code == 0
        assert "Usage: makeready" in out
    assert "makeready launch ./checkpoint" in run(capsys, "launch", "--help")[1]


def test_every_setting_is_an_option():
    offered = {option.name for command in (plan_command, launch_command) for option in command.params}
    records = [type(getattr(EngineConfig(), part.name)) for part in fields(EngineConfig)]
    assert {setting.name for record in records for setting in fields(record)} <= offered
    shared = {option.name for option in plan_command.params} & {option.name for option in launch_command.params}
    assert {setting.name for setting in fields(AttentionConfig)} <= shared


def test_help_of_flex_tiles_says_what_they_take(capsys):
    for command in ("plan", "launch"):
        said = " ".join(run(capsys, command, "--help")[1].split())
        assert "--flex-attn-block-m INTEGER" in said
        assert "power of two from 16" in said
        assert "--memory-fraction FLOAT" in said
        assert "[default: 0.9]" in said


def test_flex_tiles_and_batch_invariance_from_the_command_line(capsys):
    tiles = ("--flex-attn-block-m", "32", "--flex-attn-kv-block-size", "32", "--flex-attn-block-n", "16")
    code, out, _ = run(capsys, "plan", NANO, "--platform", "cuda", "--backend", "flex", *tiles, "--json")
    assert code == 0
    assert json.loads(out)["kernel_block_sizes"] == {"flex": 32}
    code, out, _ = run(capsys, "plan", NANO, "--platform", "xpu", "--batch-invariant", "--provider", "xpu-kernels")
    assert code == 2


BAD = [
    (("plan", NANO, "--platform", "cuda", "--flex-attn-block-n", "8"), ("flex_attn_block_n 8", "at least 16")),
    (("plan", NANO, "--platform", "cuda", "--memory-fraction", "2"), ("memory_fraction 2", "up to 1")),
    # arguments, and what the sentence must name: the option or file, the value, what would be right
    (("plan", "nvidia/Nemotron-H-4B-Base", "--platform", "cuda"), ("Nemotron-H-4B-Base-8K",)),
    (("plan", "/nowhere/config.json", "--platform", "cuda"), ("/nowhere/config.json",)),
    (("plan", NANO), ("platform", "cpu, cuda, xpu")),
    (("plan", NANO, "--platform", "tpu"), ("tpu", "cpu, cuda, xpu")),
    (("plan", NANO, "--platform", "xpu", "--backend", "flesh"), ("flesh", "flash", "flex", "reference")),
    (("plan", NANO, "--platform", "xpu", "--block-size", "2100"), ("2100", "2112", "flash")),
    (("plan", NANO, "--platform", "cuda", "--block-size", "0"), ("block_size", "0", "above zero")),
    (("plan", NANO, "--platform", "cuda", "--mamba-block-size", "256"), ("mamba_block_size 256", "none", "align")),
    (
        ("plan", NANO, "--platform", "xpu", "--mamba-cache-mode", "align", "--mamba-block-size", "256"),
        ("mamba_block_size 256", "2112"),
    ),
    (("plan", NANO, "--platform", "cuda", "--memory", "1MiB"), ("1.00 MiB", "at least")),
    (("plan", NANO, "--platform", "cuda", "--memory", "40"), ("--memory '40'", "40 bytes", "40GiB", "40B")),
    (("plan", NANO, "--platform", "cuda", "--device-memory", "80"), ("--device-memory '80'", "80GiB")),
    (("plan", NANO, "--compare", "memory=40,80"), ("memory_bytes '40'", "40GiB")),
    (("plan", NANO, "--platform", "cuda", "--memory", "much"), ("--memory", "much", "80GiB")),
    (("plan", NANO, "--platform", "cuda", "--kv-cache-dtype", "int3"), ("kv_cache_dtype", "int3", "fp8")),
    (("plan", NANO, "--platform", "cuda", "--engine", "sglang"), ("engine", "sglang", "transformers")),
    (("plan", NANO, "--platform", "cuda", "--max-model-len", "999999999"), ("999999999", "131072")),
    (("plan", NANO, "--platform", "cuda", "--kv-cache-dtype", "fp8e4m3"), ("did you mean fp8_e4m3",)),
    (("plan", NANO, "--platform", "cuda", "--blok-size", "16"), ("--blok-size", "--block-size")),
    (("plan", NANO, "--compare", "plattform=cuda,xpu"), ("plattform", "did you mean platform", "--help")),
    (("plan", NANO, "--compare", "platform"), ("OPTION=VALUE", "platform=cuda,xpu")),
    (("plan", NANO, "--platform", "cuda", "--memory", "1e400"), ("--memory '1e400'", "not a size")),
    (("plan", NANO, "--platform", "cuda", "--memory", "1e308GiB"), ("--memory '1e308GiB'", "not a size")),
    (("plan", ".", "--platform", "cuda"), ("the folder /", "has no config.json")),
    (("launch", "/nowhere"), ("/nowhere",)),
    (("launch", "--platform", "xpu"), ("xpu", "pip install ./plugins/wheels/makeready-xpu")),
    (("launch", "--platform", "tpu"), ("tpu", "cpu")),
    (("launch", "--backend", "flesh"), ("flesh", "reference")),
    (("launch", "--block-size", "100", "--backend", "flex"), ("100", "flex")),
    (("launch", "--num-blocks", "2"), ("num_blocks 2", "at least")),
    (("launch", "--max-new-tokens", "0"), ("max_new_tokens", "0")),
    (("launch", "--backend", "reference", "--max-model-len", "16", "--prompt", "class " * 40), ("16",)),
    (("launch", "--packed-steps", "off"), ("--packed-steps is a switch", "'off'", "write --no-packed-steps")),
    (("launch", "./checkpoint", "--cuda-graphs", "off"), ("--cuda-graphs", "write --no-cuda-graphs")),
    (("launch", "--async-scheduling=on"), ("--async-scheduling is a switch", "write --async-scheduling")),
    (("launch", "--no-compile-layers", "true"), ("--no-compile-layers is a switch", "write --compile-layers")),
    (("launch", "--mamba-cache-mode", "align"), ("mamba_cache_mode 'align'", "use 'none'")),
    (("launch", "--mixer-backend", "reference", "--no-packed-steps"), ("'reference'", "--no-packed-steps", "leave")),
    (("launch", "--compile-layers", "--no-packed-steps"), ("--compile-layers", "--no-packed-steps", "leave one")),
    (("launch", "--cuda-graphs", "--platform", "cpu"), ("--cuda-graphs", "needs a CUDA device", "on cpu")),
    (("launch", "--cuda-graphs", "--no-packed-steps", "--platform", "cpu"), ("needs a CUDA device", "on cpu")),
    (("plan", NANO, "--platform", "cuda", "--batch-invariant", "off"), ("--batch-invariant", "leave it out")),
    (("launch", "--backend", "reference", "--prompt", ""), ("prompt", "empty")),
]


@pytest.mark.parametrize(("arguments", "named"), BAD, ids=[" ".join(arguments)[:60] for arguments, _ in BAD])
def test_bad_input_is_a_sentence_and_exit_code_2(capsys, arguments, named):
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert "Traceback" not in err
    assert not out or "--max-model-len" in arguments
    for part in named:
        assert part in err


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", ("config.json",)),
        ("[]", ("config.json",)),
        ("{}", ("config.json", "model_type")),
        ('{"model_type": ["llama"]}', ("config.json", "model_type is ['llama']", "a family's name")),
        ('{"model_type": "nemotron_i"}', ("nemotron_i", "nemotron_h")),
        ('{"model_type": "recurrent_gemma"}', ("recurrent_gemma", "state")),
        ('{"model_type": "llama", "num_hidden_layers": 2}', ("config.json", "num_attention_heads")),
    ],
)
def test_a_broken_config_names_the_file_and_the_field(capsys, tmp_path, text, named):
    code, _, err = run(capsys, "plan", config_file(tmp_path, text), "--platform", "cuda")
    assert code == 2
    for part in named:
        assert part in err


@pytest.mark.parametrize("text", ["42949672960", "40GiB", "40 gib", "42949672960B", "40960MiB", "4294967296e1"])
def test_memory_in_units_and_bytes(capsys, text):
    code, out, _ = run(capsys, "plan", NANO, "--platform", "cuda", "--memory", text, "--json")
    assert code == 0
    assert any("40.00 GiB for the cache" in reason for reason in json.loads(out)["reasons"])


def test_json_errors_are_json(capsys):
    code, out, err = run(capsys, "plan", NANO, "--platform", "tpu", "--json")
    assert code == 2
    assert json.loads(out)["error"] == "PlatformError"
    assert json.loads(out)["value"] == "tpu"
    assert err.startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("plan", NANO, "--platfrom", "cuda"), "--platfrom"),
        (("plan", NANO, "--tp", "two"), "--tensor-parallel-size"),
        (("plan",), None),
        (("launch", "a", "b"), None),
    ],
)
def test_json_of_a_wrong_command_line_is_json(capsys, arguments, option):
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 2
    said = json.loads(out)
    assert (said["error"], said["option"]) == ("ConfigError", option)
    assert said["message"] in err
    assert "Usage: makeready" in err


def test_launch_generates_the_same_text_piped_and_as_json(capsys):
    arguments = ("launch", "--platform", "cpu", "--backend", "reference", "--max-new-tokens", "12")
    arguments += ("--prompt", "The import statement")
    code, out, _ = run(capsys, *arguments, "--dtype", "float32")
    assert code == 0
    assert "block size" in out
    assert "loading: weights" in out
    assert " occurs within a block" in out
    code, out, _ = run(capsys, *arguments, "--dtype", "float32", "--json")
    assert code == 0
    result = json.loads(out)
    assert result["completions"][0]["text"].startswith(" occurs within a block")
    assert result["plan"]["platform"] == "cpu"
    assert result["plan"]["allocated_bytes"] == result["plan"]["num_blocks"] * result["plan"]["pool_bytes_per_block"]


def test_several_prompts_under_few_blocks_are_all_answered(capsys):
    arguments = ["launch", "--platform", "cpu", "--backend", "reference", "--num-blocks", "14"]
    arguments += ["--max-new-tokens", "20", "--json"]
    for prompt in ("A function definition", "The import statement", "If the object is", "A generator function"):
        arguments += ["--prompt", prompt]
    code, out, _ = run(capsys, *arguments, "--dtype", "float32")
    assert code == 0
    assert [len(done["token_ids"]) for done in json.loads(out)["completions"]] == [20] * 4


def test_planning_imports_neither_torch_nor_transformers():
    code = (
        "import sys, makeready; makeready.plan(sys.argv[1], platform='xpu').explain();"
        "print([name for name in ('torch', 'transformers', 'numpy', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, NANO], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("cold-start", "--runs", "0"), ("--runs", "'0'", "above zero")),
        (("mixers", "--repeats", "-1"), ("--repeats", "'-1'", "above zero")),
        (("waste", "--out", "/nowhere/waste.json"), ("--out", "/nowhere", "does not exist")),
        (("attention",), ("take minutes", "--small", "--device cpu")),
        (("launch",), ("falcon-h1-7b", "hours on a cpu", "--shape falcon-h1-tiny")),
        (("launch", "--shape", "falcon-h1-tiny", "--case", "0,1,1"), ("--case '0,1,1'", "above zero", "8,128,64")),
    ],
)
def test_bad_input_of_benchmarks_is_a_sentence_and_exit_code_2(capsys, monkeypatch, arguments, named):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, err = run(capsys, "bench", *arguments)
    assert code == 2
    assert "Traceback" not in err
    for part in named:
        assert part in err
