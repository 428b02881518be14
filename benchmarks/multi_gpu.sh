#!/usr/bin/env bash
# benchmarks/multi_gpu.sh N [--tiny] [--out FOLDER] ...: checks and times N GPUs of this machine (benchmarks/multi_gpu.py --help).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
gpus=${1:?usage: benchmarks/multi_gpu.sh N [--tiny] [--out FOLDER]}
shift
export NCCL_NVLS_ENABLE=0 # NVLink multicast: a program that uses it can put a shared host's GPUs out of service
exec "${PYTHON:-python3}" benchmarks/multi_gpu.py --gpus "$gpus" "$@"
