#!/usr/bin/env bash
# cli.sh SIZE: times infer/upscale.py, cold, warm and in eight bits, and the phases of the first picture.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec timeout -k 15 $((END + 30)) python3 bench/lease/command_line.py "$1"
