"""Writes docs/reference/settings.md from the settings records: `python tools/write_settings_page.py`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from makeready.config import EngineConfig

HEAD = """# Settings

Every setting of `EngineConfig`, by part. The same names are options of `makeready.plan`, `prepare` and `launch` in
Python, and with dashes of the command line, which `makeready plan --help` and `makeready launch --help` list (in short:
`--tp`, `--pp`, `--dp`, `--memory`, `--device-memory`, `--provider`). What is on or off is a switch there, without a
value: `--batch-invariant`, and `--packed-steps` or `--no-packed-steps` (so, too, `compile-layers`, `cuda-graphs` and
`async-scheduling`), where leaving both out lets the engine choose. `None` and `auto` mean that makeready chooses and
says why; only `plan` has to be told its platform. This page is written by `tools/write_settings_page.py`.
"""


def page() -> str:
    """The page's text."""
    lines = [HEAD]
    for part in fields(EngineConfig):
        record = type(getattr(EngineConfig(), part.name))
        lines += [f"\n## {part.name}\n", record.__doc__ or "", ""]
        lines += ["| setting | default | unit | what it is |", "|---|---|---|---|"]
        lines += [
            f"| `{setting.name}` | `{setting.default!r}` | {setting.metadata['unit']} | {setting.metadata['doc']} |"
            for setting in fields(record)
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    target = Path(__file__).parent.parent / "docs" / "reference" / "settings.md"
    target.write_text(page())
    print(f"wrote {target}")
