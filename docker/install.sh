#!/usr/bin/env bash
# Build step of the image: installs the package found in SOURCE into the image's Python, and TileLang where it is missing.
#
#   install.sh SOURCE
#
# Nothing else is installed or upgraded: SGLang's image brings the rest, in the versions SGLang was tested with.
set -euo pipefail

fail() { echo "install.sh: error: $*" >&2; exit 1; }

source=${1:?usage: install.sh SOURCE}
[ -f "$source/pyproject.toml" ] || fail "SOURCE=$source holds no pyproject.toml"
python=${PYTHON:-python3}
# The image's Python is the distribution's: it refuses pip without the first of these.
export PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1

installed() { "$python" -c 'import importlib.metadata as m, sys; print(m.version(sys.argv[1]))' "$1" 2>/dev/null; }

pinned=$(sed -n 's/^gpu = \["\(tilelang==[^"]*\)"\]$/\1/p' "$source/pyproject.toml")
[ -n "$pinned" ] || fail "the gpu extra of $source/pyproject.toml pins no TileLang"
if ! found=$(installed tilelang); then
  "$python" -m pip install --no-cache-dir "$pinned"
elif [ "tilelang==$found" != "$pinned" ]; then
  echo "install.sh: this image has TileLang $found, the kernels were written with $pinned" >&2
fi
# From a copy: setuptools leaves its build folders in the source, which is a layer of the image.
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -R "$source"/{pyproject.toml,README.md,LICENSE,indexer_kernels,sglang_ext} "$copy"
"$python" -m pip install --no-cache-dir --no-deps "$copy"

"$python" - <<'CHECK'
import importlib.metadata as metadata
import sys

shown, missing = [], []
for name in ("sglang", "torch", "numpy", "tqdm", "tilelang", "triton", "sglang-ext"):
    try:
        shown.append(f"{name} {metadata.version(name)}")
    except metadata.PackageNotFoundError:
        missing.append(name)
if missing:
    sys.exit(f"install.sh: error: not in this image: {', '.join(missing)}")
if not any(entry.name == "sglang_ext" for entry in metadata.entry_points(group="sglang.srt.plugins")):
    sys.exit("install.sh: error: SGLang would not find the plugin: its entry point is missing")
print("installed:", ", ".join(shown))
CHECK
