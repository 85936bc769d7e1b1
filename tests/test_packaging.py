"""pyproject.toml says the same as the tree: packages, data, versions."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOT_PACKAGED = {"tests", "docs", "build", "dist"}


def project(folder: Path = ROOT) -> dict:
    return tomllib.loads((folder / "pyproject.toml").read_text())


def folders_with_code() -> set[str]:
    """Every folder of the tree that is a package, by its dotted name."""
    found = {"makeready"}
    for init in ROOT.rglob("__init__.py"):
        parts = init.parent.relative_to(ROOT).parts
        hidden = any(part.startswith(".") or part in NOT_PACKAGED for part in parts)
        if parts and not hidden and parts[:2] != ("plugins", "wheels"):
            found.add(".".join(("makeready", *parts)))
    return found


def test_every_package_of_the_tree_is_listed():
    assert set(project()["tool"]["setuptools"]["packages"]) == folders_with_code()


def test_package_data_is_there():
    for package, patterns in project()["tool"]["setuptools"]["package-data"].items():
        folder = ROOT.joinpath(*package.split(".")[1:])
        for pattern in patterns:
            assert list(folder.glob(pattern)), f"{package}: no file matches {pattern}"


def test_development_pins_lie_inside_the_package_s_own_ranges():
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.M))
    extras = project()["project"]["optional-dependencies"]
    for need in (*project()["project"]["dependencies"], *extras["engine"], *extras["triton"], *extras["dev"]):
        name, _, lowest = need.partition(";")[0].partition(">=")
        if name != "pip":
            assert name in pins, f"{name} is not pinned in constraints.txt"
            assert as_numbers(pins[name]) >= as_numbers(lowest or "0")
    oldest = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints-oldest.txt").read_text(), re.M))
    assert f"transformers>={oldest['transformers'].removesuffix('.0')}" in extras["engine"]


def test_plugin_wheels_take_this_version_of_the_package():
    version = project()["project"]["version"]
    for wheel in ("makeready-cuda", "makeready-xpu"):
        described = project(ROOT / "plugins" / "wheels" / wheel)["project"]
        assert described["name"] == wheel
        need = next(need for need in described["dependencies"] if need.startswith("makeready"))
        lowest, highest = re.search(r">=([\d.]+),<([\d.]+)", need).groups()
        assert as_numbers(lowest) <= as_numbers(version) < as_numbers(highest)
        (name,) = described["entry-points"]["makeready"]
        assert f"makeready-platform-{name}" in described["keywords"]
        assert wheel == f"makeready-{name}"


def as_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
