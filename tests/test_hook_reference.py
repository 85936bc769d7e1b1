"""The hook reference and the hooks say the same."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from makeready.platforms.provider import STAGES
from makeready.plugins import hookspecs
from makeready.plugins.records import DISABLE_VARIABLE
from makeready.plugins.verification import HOOK_NAMES

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = (ROOT / "docs" / "reference" / "hooks.md").read_text()


@pytest.mark.parametrize("hook", HOOK_NAMES)
def test_every_hook_is_in_the_reference_with_its_signature(hook):
    signature = inspect.signature(getattr(hookspecs, hook))
    written = f"## `{hook}{signature}`".replace("'", "")
    assert written in REFERENCE
    assert f"| `{hook}` |" in REFERENCE


def test_the_reference_has_no_hook_that_is_not_there():
    headings = {line.split("`")[1].split("(")[0] for line in REFERENCE.splitlines() if line.startswith("## `")}
    assert headings == set(HOOK_NAMES)


def test_the_setting_and_the_stages_are_documented():
    assert DISABLE_VARIABLE in REFERENCE
    guide = (ROOT / "docs" / "vendor_guide.md").read_text()
    assert all(f"`{stage}`" in guide for stage in STAGES)
