#!/usr/bin/env bash
# Install Convoy into an NGC PyTorch image while it is built: slurm/container/install.sh PROJECT
#
# torch, triton, numpy and what is compiled against them stay the image's own; everything else has the versions of constraints.txt. What the
# image brings of Transformer Engine and Apex is kept where megatron-core 0.16.1 accepts it, and replaced where not.
set -euo pipefail
case ${1:-} in -h|--help) sed -n '2,/^set /{/^#/!q;s/^# \{0,1\}//;p}' "$0"; exit 0 ;; "") echo "which PROJECT? see $0 --help" >&2; exit 2 ;; esac
project=$1
TE=${TE:-2.11.0}                                          # megatron-core 0.16.1: >=2.9,<2.12
APEX=${APEX:-10417aceddd7d5d05d7cbf7b0fc2daad1105f8b4}    # NVIDIA/apex has few releases: a commit; never the apex of PyPI
export PIP_CONSTRAINT= PIP_NO_CACHE_DIR=1                 # the image's own constraint file would hold back our pins
pins=$(mktemp)
grep -vE '^(torch|triton|numpy|setuptools|ruff|pytest|pytest-[a-z]+|execnet|iniconfig|pluggy)==' "$project/constraints.txt" > "$pins"

# --no-deps: the image's torch calls itself 2.11.0a0, which pip holds for older than 2.11 and would replace
python -m pip install --no-deps --requirement "$pins"
python -m pip install --no-deps "$project"

check() { (cd "$project" && python slurm/container/check.py "$@"); }
if ! check engine; then
  major=$(python -c 'import torch; print(torch.version.cuda.split(".")[0])')
  python -m pip install --no-build-isolation "transformer-engine[pytorch,core_cu$major]==$TE"
fi
if ! check apex; then
  python -m pip uninstall --yes apex
  NVCC_APPEND_FLAGS="--threads 4" python -m pip install --no-build-isolation --no-deps \
    --config-settings "--build-option=--cpp_ext --cuda_ext" "apex @ git+https://github.com/NVIDIA/apex.git@$APEX"
fi
check all
