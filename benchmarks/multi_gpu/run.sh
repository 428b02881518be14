#!/usr/bin/env bash
# benchmarks/multi_gpu/run.sh N [--tiny] [--out FOLDER] ...: checks and times N GPUs of this machine (benchmarks/multi_gpu/suite.py --help).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
gpus=${1:?usage: benchmarks/multi_gpu/run.sh N [--tiny] [--out FOLDER] (or --help)}
case $gpus in -*) gpus=1 ;; *) shift ;; esac # --help
export NCCL_NVLS_ENABLE=0 # NVLink multicast: a program that uses it can put a shared host's GPUs out of service
python=${PYTHON:-python3}
torch=$("$python" -c 'import importlib.util; print(*importlib.util.find_spec("torch").submodule_search_locations)' 2>/dev/null) ||
    { echo "$python has no torch; set PYTHON, e.g. PYTHON=.venv/bin/python" >&2; exit 1; }
if ! compgen -G "$torch/__pycache__/*.pyc" >/dev/null; then # an image may come so: then each process, the compiler's too, takes 10 s longer
    export PYTHONPYCACHEPREFIX=${PYTHONPYCACHEPREFIX:-${TMPDIR:-/tmp}/convoy-pyc}
    unset PYTHONDONTWRITEBYTECODE
    "$python" -m compileall -q -j 0 "$torch" >/dev/null || true # also what no Python of this version can read
fi
exec "$python" benchmarks/multi_gpu/suite.py --gpus "$gpus" "$@"
