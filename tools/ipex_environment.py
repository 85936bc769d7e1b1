"""Make a virtual environment in which Intel Extension for PyTorch runs on a CPU: ``ipex_environment.py FOLDER``.

IPEX 2.8.0 is built against torch 2.8 and refuses every other. PyPI's only torch 2.8.0 for Linux is the CUDA build,
whose libraries link cuBLAS, cuDNN, NCCL and more: gigabytes that a CPU never calls. They are needed to *load*, not
to run. So two small ones are installed for real (cudart and CUPTI, which ``libtorch_cpu.so`` itself links) and the
others are replaced by empty libraries that this file makes with gcc: each defines the symbols that torch leaves
undefined, under their version tags, as functions that return 1 (for CUDA libraries: an error).

Needs gcc, readelf and nm; fetches about 950 MB; takes 2.3 GB in FOLDER.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

WITHOUT_DEPENDENCIES = (
    "torch==2.8.0",
    "intel-extension-for-pytorch==2.8.0",
    "nvidia-cuda-runtime-cu12==12.8.90",
    "nvidia-cuda-cupti-cu12==12.8.90",
)
TORCH_NEEDS = ("filelock", "typing-extensions", "sympy", "networkx", "jinja2", "fsspec", "numpy")
IPEX_NEEDS = ("psutil", "packaging")
TEST_TOOLS = ("pluggy", "rich", "click", "pytest", "hypothesis", "safetensors")
ENGINE = ("transformers==5.17.0",)


@dataclass(frozen=True)
class Symbol:
    """A name that a library leaves to others, and the version tag under which it looks for it (may be empty)."""

    name: str
    version: str


def output_of(*command: str | Path) -> str:
    """What a command prints; its failure is ours."""
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def needed_by(library: Path) -> list[str]:
    """The sonames that ``library`` links."""
    return re.findall(r"\(NEEDED\).*\[(.+?)\]", output_of("readelf", "-d", library))


def undefined_in(library: Path) -> set[Symbol]:
    """The functions that ``library`` expects elsewhere; weak ones may stay missing and are left out."""
    found = set()
    for line in output_of("nm", "-D", "--undefined-only", "--with-symbol-versions", library).splitlines():
        kind, symbol = line.split()[-2:]
        name, _, version = symbol.partition("@")
        if kind == "U":
            found.add(Symbol(name, version.lstrip("@")))
    return found


def defined_in(library: Path) -> set[str]:
    """The names that ``library`` offers to others."""
    lines = output_of("nm", "-D", "--defined-only", library).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines}


def plan_stubs(libraries: list[Path], present: Iterable[Path]) -> dict[str, set[Symbol]]:
    """Soname -> symbols, for every CUDA library that ``libraries`` link and that is not among ``present``.

    A symbol whose version tag is a soname belongs there. One without a tag may come from any library that its user
    links: it goes to the first stub that this user links, for the loader searches them all.
    """
    present = [*libraries, *present]
    here = {path.name for path in present}
    offered = set[str]().union(*(defined_in(path) for path in present))
    stubs: dict[str, set[Symbol]] = {}
    for library in libraries:
        missing = [name for name in needed_by(library) if name.startswith(("libcu", "libnccl")) and name not in here]
        for soname in missing:
            stubs.setdefault(soname, set())
        for symbol in undefined_in(library) if missing else ():
            if symbol.version in stubs:
                stubs[symbol.version].add(symbol)
            elif not symbol.version and symbol.name not in offered and not symbol.name.startswith("_"):
                stubs[missing[0]].add(symbol)
                offered.add(symbol.name)
    return stubs


def build_stub(soname: str, symbols: set[Symbol], folder: Path) -> Path:
    """An empty shared library ``folder/soname`` that defines ``symbols``."""
    tagged = sorted(symbol.name for symbol in symbols if symbol.version)
    target = folder / soname
    with tempfile.TemporaryDirectory() as scratch:
        source, script = Path(scratch) / "stub.c", Path(scratch) / "stub.map"
        source.write_text("".join(f"int {symbol.name}(void) {{ return 1; }}\n" for symbol in symbols))
        options = []
        if tagged:
            script.write_text(f"{soname} {{ global: {' '.join(f'{name};' for name in tagged)} }};\n")
            options = [f"-Wl,--version-script={script}"]
        subprocess.run(
            ["gcc", "-shared", "-fPIC", "-w", "-fno-builtin", "-o", str(target), str(source),
             f"-Wl,-soname,{soname}", *options],
            check=True,
        )  # fmt: skip
    return target


def make_stubs(site_packages: Path) -> list[Path]:
    """The missing CUDA libraries of the torch in ``site_packages``, made beside it (its rpath looks there last)."""
    libraries = sorted((site_packages / "torch/lib").glob("*.so"))
    real = sorted((site_packages / "nvidia").glob("*/lib/*.so*"))
    stubs = plan_stubs(libraries, real)
    return [build_stub(soname, symbols, site_packages / "torch/lib") for soname, symbols in sorted(stubs.items())]


def install(python: Path, *requirements: str, options: tuple[str, ...] = ()) -> None:
    """``pip install`` in the environment of ``python``."""
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *options, *requirements], check=True)


def make_environment(folder: Path, *, wheels: Path | None = None, engine: bool = True) -> Path:
    """The environment's interpreter, once torch and IPEX import in it.

    :param wheels: a folder to look for wheels in before the package index.
    """
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin/python"
    local = ("--find-links", str(wheels)) if wheels else ()
    install(python, *WITHOUT_DEPENDENCIES, options=("--no-deps", *local))
    install(python, *TORCH_NEEDS, *IPEX_NEEDS, *TEST_TOOLS, options=local)
    if engine:
        install(python, *ENGINE, options=local)
    site_packages = sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
    for stub in make_stubs(Path(site_packages)):
        print(f"made {stub.name}, {stub.stat().st_size} bytes")
    check = "import torch, intel_extension_for_pytorch as ipex; print(torch.__version__, ipex.__version__)"
    subprocess.run([str(python), "-c", check], check=True)
    return python


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("folder", type=Path, help="where the environment goes")
    parser.add_argument("--wheels", type=Path, help="folder with wheels that were fetched before")
    parser.add_argument("--no-engine", action="store_true", help="leave transformers out")
    options = parser.parse_args()
    python = make_environment(options.folder, wheels=options.wheels, engine=not options.no_engine)
    print(f"{python} -m pytest tests/test_flash_ipex.py")


if __name__ == "__main__":
    main()
