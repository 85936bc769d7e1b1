"""The package and its plugin wheels, built, installed into an empty environment without torch, and used there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / "plugins" / "wheels"
BROKEN_PROJECT = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "makeready-acme"
version = "2.1"

[project.entry-points.makeready]
acme = "makeready_acme"

[tool.setuptools]
py-modules = ["makeready_acme"]
"""


class Environment:
    """A virtual environment that knows nothing of the one that runs the tests."""

    def __init__(self, folder: Path, wheelhouse: Path) -> None:
        self.folder, self.wheelhouse = folder, wheelhouse
        run(sys.executable, "-m", "venv", "--without-pip", folder)

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def install(self, *arguments: str) -> None:
        pip("--python", self.python, "install", "-qq", "--find-links", self.wheelhouse, *arguments)

    def makeready(self, *arguments: str) -> subprocess.CompletedProcess:
        """Run the command from outside of the repository, with an environment of its own."""
        return subprocess.run(
            [self.folder / "bin" / "makeready", *arguments],
            cwd=self.folder,
            env={"PATH": "/usr/bin:/bin", "HOME": str(self.folder)},
            capture_output=True,
            text=True,
            check=False,
        )

    def doctor(self) -> dict:
        done = self.makeready("doctor", "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


def run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def pip(*arguments: object) -> None:
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments)


def build(project: Path, wheelhouse: Path) -> None:
    pip("wheel", "-qq", "--no-build-isolation", "--no-deps", "--wheel-dir", wheelhouse, project)


def copy_of_tree(folder: Path) -> Path:
    """The repository's files, new ones too, without what was built or cached."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode != 0:  # a copy of the tree without its history
        built = shutil.ignore_patterns(".*", "build", "dist", "__pycache__", "*.egg-info")
        return shutil.copytree(ROOT, folder, ignore=built)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheelhouse(tmp_path_factory) -> Path:
    """Wheels of makeready, of both plugins, and of a vendor's plugin that does not import."""
    sources, built = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheelhouse")
    tree = copy_of_tree(sources / "tree")
    build(tree, built)
    for name in ("makeready-cuda", "makeready-xpu"):
        build(tree / "plugins" / "wheels" / name, built)
    broken = sources / "broken"
    broken.mkdir()
    (broken / "pyproject.toml").write_text(BROKEN_PROJECT)
    (broken / "makeready_acme.py").write_text("import acme_driver\n")
    build(broken, built)
    return built


@pytest.fixture(scope="module")
def environment(tmp_path_factory, wheelhouse) -> Environment:
    """makeready with its own dependencies, no torch, and the two plugin wheels."""
    made = Environment(tmp_path_factory.mktemp("environment") / "venv", wheelhouse)
    made.install("makeready")
    made.install("--no-index", "--no-deps", "makeready-cuda", "makeready-xpu")
    return made


@pytest.fixture
def with_broken_wheel(environment):
    environment.install("--no-index", "--no-deps", "makeready-acme")
    yield environment
    pip("--python", environment.python, "uninstall", "-qq", "--yes", "makeready-acme")


def test_both_platforms_are_seen_with_the_reason_why_they_cannot_run_here(environment):
    report = environment.doctor()
    assert report["problems"] == []
    assert report["software"]["torch"] is None
    seen = {platform["name"]: platform for platform in report["platforms"]}
    for name, device in (("cuda", "CUDA"), ("xpu", "XPU")):
        assert seen[name]["distribution"] == f"makeready-{name}"
        assert not seen[name]["available"]
        assert f"no {device} device: torch is not installed" in seen[name]["reason"]
    assert "intel-extension-for-pytorch (IPEX) is not installed" in seen["xpu"]["reason"]
    assert report["auto"] == "cpu"
    plugins = {plugin["name"]: plugin for plugin in report["plugins"]}
    assert plugins["cuda"]["distribution"] == "makeready-cuda"
    assert plugins["cpu"]["builtin"]


def test_a_platform_whose_device_is_not_there_is_refused_with_exit_code_2(environment):
    done = environment.makeready("launch", "--platform", "cuda")
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert "Traceback" not in done.stderr


def test_planning_needs_no_device(environment):
    model = environment.folder / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(LLAMA))
    for platform in ("cpu", "cuda", "xpu"):
        done = environment.makeready("plan", str(model), "--platform", platform, "--json")
        assert done.returncode == 0, done.stderr
        json.loads(done.stdout)


LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
    "vocab_size": 128,
    "intermediate_size": 128,
}


def test_a_broken_wheel_is_shown_by_name_with_its_exception(with_broken_wheel):
    report = with_broken_wheel.doctor()
    (problem,) = report["problems"]
    assert (problem["name"], problem["distribution"], problem["version"]) == ("acme", "makeready-acme", "2.1")
    assert problem["stage"] == "import"
    assert problem["exception"] == "ModuleNotFoundError: No module named 'acme_driver'"
    assert {"cpu", "cuda", "xpu"} <= {platform["name"] for platform in report["platforms"]}
    assert report["auto"] is None
    assert "No module named 'acme_driver'" in report["auto_reason"]


def test_asking_for_the_broken_wheel_s_platform_is_an_error(with_broken_wheel):
    done = with_broken_wheel.makeready("launch", "--platform", "acme")
    assert done.returncode == 2
    assert "makeready-acme 2.1" in done.stderr
    assert "No module named 'acme_driver'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_wheels_metadata_says_what_they_are(wheelhouse, environment):
    script = textwrap.dedent(
        """
        import json
        from importlib import metadata
        print(json.dumps({
            name: [metadata.metadata(name)["License-Expression"], metadata.requires(name),
                   [str(file) for file in metadata.files(name)]]
            for name in ("makeready", "makeready-cuda", "makeready-xpu")
        }))
        """
    )
    said = subprocess.run([environment.python, "-c", script], capture_output=True, text=True, check=True).stdout
    wheels = json.loads(said)
    assert {licence for licence, _, _ in wheels.values()} == {"Apache-2.0"}
    assert any("LICENSE" in file for file in wheels["makeready"][2])
    assert any(need.startswith("torch") for need in wheels["makeready-cuda"][1])
    assert any(need.startswith("intel-extension-for-pytorch") for need in wheels["makeready-xpu"][1])
    base = [need for need in wheels["makeready"][1] if "extra ==" not in need]
    assert sorted(need.split(">")[0] for need in base) == ["click", "pluggy", "rich"]
