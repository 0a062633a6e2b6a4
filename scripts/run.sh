#!/usr/bin/env bash
# Set up and run the main job. One command, any machine with Python.
#
#   scripts/run.sh MODEL_PATH [arguments of `sglang-ext serve`...]   with a CUDA GPU: installs SGLang and serves the model
#   scripts/run.sh [arguments of `sglang-ext compare`...]            otherwise: compares the modes
set -euo pipefail
called_from=$PWD
cd "$(dirname "$0")/.."
source scripts/environment.sh

case ${1:-} in
  -h | --help) sed -n '2,5s/^# \{0,1\}//p' scripts/run.sh; exit 0 ;;
  "" | -*)
    ensure_environment light
    cd "$called_from" # files in the arguments are the caller's
    exec sglang-ext compare "$@" ;;
esac
has_gpu || fail "a model path was given, but no CUDA GPU is visible (nvidia-smi lists none); without arguments this compares the modes"
ensure_environment full
model=$1; shift
cd "$called_from"
exec sglang-ext serve --model-path "$model" "$@"
