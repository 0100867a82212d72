#!/usr/bin/env bash
# The same by accelerate, for those who have its configuration already: its processes are what is
# taken of it, while --shard, not its FSDP, says who holds which weights.
#   GPUS=2 bash examples/distributed/accelerate.sh [--learning_rate 2e-5 ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
exec accelerate launch --config_file "${ACCELERATE:-$PWD/accelerate.yaml}" \
  --num_processes "${GPUS:-2}" --module chunkft sft --config "${CONFIG:-$PWD/sft-70b.yaml}" "$@"
