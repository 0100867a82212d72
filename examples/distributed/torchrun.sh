#!/usr/bin/env bash
# One computer, a process for each of its cards.
#   GPUS=2 bash examples/distributed/torchrun.sh [--learning_rate 2e-5 ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
exec torchrun --standalone --nproc-per-node "${GPUS:-2}" \
  -m chunkft sft --config "${CONFIG:-$PWD/sft-70b.yaml}" "$@"
