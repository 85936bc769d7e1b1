#!/usr/bin/env bash
# Builds a wheel from the committed tree alone, installs it into an empty environment without torch, and uses it
# from outside the repository.   tests/wheel_check.sh PYTHON
set -euo pipefail

python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

mkdir "$work/tree" "$work/elsewhere"
git -C "$root" archive HEAD | tar -x -C "$work/tree"
"$python" -m pip wheel -qq --no-build-isolation --no-deps --wheel-dir "$work/dist" "$work/tree"
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq "$work"/dist/makeready-*.whl

cd "$work/elsewhere"
"$work/venv/bin/python" - <<'CHECK'
from importlib import metadata
from importlib.util import find_spec

assert find_spec("torch") is None, "the base installation must not bring torch"
files = [str(file) for file in metadata.files("makeready")]
outside = [name for name in files if name.split("/")[0] not in ("makeready", "..") and "makeready-" not in name]
assert not outside, f"files outside the package: {outside}"
assert not [name for name in files if "/tests/" in name or "/wheels/" in name], "tests or plugin wheels were packed"
for needed in ("makeready/engines/transformers/tiny_hybrid/config.json", "makeready/hybrid/presets.json"):
    assert needed in files, f"{needed} is not in the wheel"
CHECK
makeready=$work/venv/bin/makeready
"$makeready" --version
"$makeready" doctor
"$makeready" bench --help
"$makeready" bench cold-start --runs 1
"$makeready" plan "$("$work/venv/bin/python" -c 'import makeready; print(makeready.__path__[0])')/engines/transformers/tiny_hybrid" --platform xpu
echo "the wheel works in an empty environment"
