#!/usr/bin/env bash
# On the machine, from anywhere: bash benchmarks/first_light_run.sh OUT [OPTION of benchmarks.first_light ...]
#
# Installs what that Python lacks from .first-light/ (`make first-light-pack` filled it) into a folder of its own, then runs
# benchmarks.first_light, whose exit code is this one's. What it unpacks, compiles and caches stays in $TMPDIR/first-light:
# a second run finds it. For other programs of this checkout: export PYTHONPATH=$TMPDIR/first-light/site:CHECKOUT
set -euo pipefail
if [ $# -lt 1 ] || [ "${1#-}" != "$1" ]; then
  echo "usage: bash benchmarks/first_light_run.sh OUT [OPTION of benchmarks.first_light ...]" >&2
  exit 2
fi
out=$(realpath -m -- "$1")
shift
cd "$(dirname "$0")/.."
scratch=${TMPDIR:-/tmp}/first-light

python3 -m benchmarks.first_light_pack install "$scratch/site"

export PYTHONPATH="$scratch/site:$PWD${PYTHONPATH:+:$PYTHONPATH}"
export XLA_PYTHON_CLIENT_PREALLOCATE=false # several processes share the GPU
export JAX_COMPILATION_CACHE_DIR="$scratch/xla"
export GQA_JAX_CACHE="${GQA_JAX_CACHE:-$scratch/cache}"
exec python3 -m benchmarks.first_light --out "$out" "$@"
