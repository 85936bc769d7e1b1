"""The README's commands and examples run as they are written, and the reference page says what the settings are."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

from makeready import plan
from makeready.cli import main
from makeready.config import EngineConfig
from makeready.plugins.manager import load_plugins
from makeready.startup import BUNDLED_MODEL

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", *(f"docs/{name}.md" for name in ("engine_guide", "planning", "cache", "flash", "flex", "mixers")))


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.S)


def commands() -> list[str]:
    scripts = [text for page in PAGES for text in blocks(page, "sh")]
    lines = [line.split("  #")[0].strip() for text in scripts for line in text.splitlines()]
    return [line for line in lines if line.startswith("makeready ")]


@pytest.fixture
def user_folder(tmp_path, monkeypatch):
    """A folder where the pages' checkpoint paths exist."""
    for name in ("my-checkpoint", "path/to/checkpoint"):
        link = tmp_path / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(BUNDLED_MODEL)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", commands())
def test_commands_run(command, user_folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(shlex.split(command)[1:])
    assert stopped.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize(("page", "number"), [(page, i) for page in PAGES for i in range(len(blocks(page, "python")))])
def test_examples_run(page, number, user_folder, capsys):
    code = blocks(page, "python")[number]
    exec(compile(code, f"{page} example {number}", "exec"), {"__name__": "example"})


def test_the_vendor_guide_s_wheel_works_as_written(tmp_path, monkeypatch):
    """Its two modules, for a torch_acme that lists one device."""
    package = tmp_path / "makeready_acme"
    package.mkdir()
    for name, code in zip(("policy", "plugin"), blocks("docs/vendor_guide.md", "python"), strict=True):
        (package / f"{name}.py").write_text(code)
    (package / "__init__.py").touch()
    (tmp_path / "torch_acme.py").write_text("def device_count():\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    plugin = import_module("makeready_acme.plugin")
    plugins = load_plugins(entry_points=(), extra=[("acme", plugin)])
    assert plugins.problems == ()
    found = plugin.probe()
    assert (found.available, found.reason, found.devices[0].name) == (True, "1 Acme devices", "Acme One")
    decided = plan("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", platform="acme", plugins=plugins)
    assert decided.block_size % 128 == 0
    assert any("mamba2 on acme" in reason for reason in decided.reasons)


def test_make_targets_of_the_readme_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    lines = [line for text in blocks("README.md", "sh") for line in text.splitlines()]
    named = [line.split()[1] for line in lines if line.startswith("make ")]
    assert {"launch", "test"} <= set(named) <= set(targets)


def test_every_setting_is_in_the_reference_with_its_default_and_words():
    page = (ROOT / "docs/reference/settings.md").read_text()
    for part in fields(EngineConfig):
        for setting in fields(type(getattr(EngineConfig(), part.name))):
            unit, doc = setting.metadata["unit"], setting.metadata["doc"]
            row = f"| `{setting.name}` | `{setting.default!r}` | {unit} | {doc} |"
            assert row in page, f"run tools/write_settings_page.py: {row}"


def test_every_key_of_a_plan_is_in_the_reference():
    page = (ROOT / "docs/reference/plan.md").read_text()
    made = plan("Qwen/Qwen3-Next-80B-A3B-Instruct", platform="cuda", memory_bytes=2**36, pipeline_parallel_size=2)
    assert [key for key in made.to_dict() if f"`{key}`" not in page] == []
