# Sourced by run.sh and test.sh: `ensure_environment KIND` sets VENV to a finished virtual environment.
#
#   light   the package and its plot extra: what `sglang-ext compare` needs
#   full    light, SGLang, TileLang and the test tools: what serves and what is tested are one environment
#
# One environment per kind and Python lives in the cache folder, named by a hash of its requirements. A finished one holds
# the file `complete`, written last: an interrupted build is never taken for an environment. Old ones are deleted before
# a new one is built, since a full one takes 11 GB.

CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/sglang-ext
PYTHON=${PYTHON:-python3}

fail() { echo "error: $*" >&2; exit 1; }

# The lines of pyproject.toml that decide what is installed.
requirements_of_project() {
  sed -n '/^requires = /p; /^requires-python/p; /^dependencies = \[/,/^\]/p; /^\[project.optional-dependencies\]/,/^\[project\.e/p' \
    pyproject.toml
}

pip_quiet() { # pip_quiet LOG ARGUMENTS...: the log stays in the cache folder, a failure shows its end
  local log=$1; shift
  # No pip cache: it would keep the same gigabytes a second time.
  "$VENV/bin/python" -m pip install --no-cache-dir --disable-pip-version-check --progress-bar off "$@" >>"$log" 2>&1 && return
  echo "--- end of $log" >&2
  { grep -v "^Location .* is ignored" "$log" || true; } | tail -n 30 >&2 # pip may have been ended without a word
  fail "pip could not install the $KIND environment (log: $log)"
}

# Read to its end: under pipefail `grep -q` would make a failure of the signal that its early exit sends to nvidia-smi.
has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep GPU >/dev/null; }

build_environment() {
  local log=$CACHE/build-$KIND.log started=$SECONDS old
  for old in "$CACHE/venv-$KIND-$PYTHON_VERSION-"*; do rm -rf "$old"; done
  echo "building the $KIND environment in $VENV (minutes; log: $log)"
  : >"$log"
  "$PYTHON" -m venv "$VENV" >>"$log" 2>&1 || fail "$PYTHON cannot make a virtual environment (log: $log)"
  pip_quiet "$log" "setuptools>=77" wheel
  if [ "$KIND" = light ] && ! has_gpu; then
    # A plain `torch` brings several GB of CUDA libraries. Where the package index offers this release's CPU build, under
    # its own local version, take that; where it does not, the ordinary build follows with the package itself.
    "$VENV/bin/python" -m pip install --no-cache-dir --disable-pip-version-check --progress-bar off "torch==2.13.0+cpu" \
      >>"$log" 2>&1 || echo "no CPU build of torch offered for Python $PYTHON_VERSION: installing the ordinary one (several GB)"
  fi
  case $KIND in
    light) pip_quiet "$log" -e ".[plot]" ;;
    full)
      # SGLang's own pins first: together with our open bound on torch, pip 23 starts at a newer torch, downloads its CUDA
      # libraries, and does not find the way back.
      pip_quiet "$log" "$(sed -n 's/^sglang = \["\(.*\)"\]$/\1/p' pyproject.toml)"
      pip_quiet "$log" -e ".[test]" ;;
    *) fail "unknown environment '$KIND'; known: light, full" ;;
  esac
  echo "built in $((SECONDS - started)) s, $(du -sh "$VENV" | cut -f1)"
}

# The environment is shared by all checkouts of this user; its editable install must be this one's.
link_checkout() {
  local state; state="$PWD $(sha256sum pyproject.toml | cut -c1-16)"
  [ -f "$VENV/checkout" ] && [ "$(cat "$VENV/checkout")" = "$state" ] && return
  rm -f "$VENV/checkout" # pip removes the old link first: interrupted, there is none
  pip_quiet "$CACHE/build-$KIND.log" --no-deps --no-build-isolation -e .
  echo "$state" >"$VENV/checkout"
}

ensure_environment() { # ensure_environment KIND [fresh]
  KIND=$1
  command -v "$PYTHON" >/dev/null || fail "$PYTHON not found; set PYTHON to a Python of at least 3.10"
  PYTHON_VERSION=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "Python $PYTHON_VERSION is too old; 3.10 or newer is needed"
  local gpu=; [ "$KIND" = light ] && has_gpu && gpu=gpu # decides which torch is installed
  local key; key=$({ requirements_of_project; "$PYTHON" -VV; echo "$gpu"; } | sha256sum | cut -c1-12)
  VENV=$CACHE/venv-$KIND-$PYTHON_VERSION-$key
  mkdir -p "$CACHE"
  exec 9>"$CACHE/lock-$KIND"
  if command -v flock >/dev/null && ! flock -n 9; then
    echo "another run is building or linking the $KIND environment; waiting"
    flock 9
  fi
  [ "${2:-}" = fresh ] && rm -f "$VENV/complete"
  if [ ! -f "$VENV/complete" ]; then
    build_environment 9>&-
    touch "$VENV/complete"
  fi
  link_checkout 9>&-
  exec 9>&-
  # This checkout comes first even if another one is linked while we run.
  export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
  export PATH=$VENV/bin:$PATH
}
