#!/usr/bin/env bash
# run.sh SIZE [JOB ...]: times both networks and the training step, ours and PyTorch's.
# SIZE: full, or tiny to rehearse on a CPU. JOB: names in jobs.py; default: all.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec timeout -k 15 $((END + 30)) python3 bench/lease/coordinator.py "$@"
