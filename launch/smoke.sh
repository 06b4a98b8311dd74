#!/usr/bin/env bash
# A smoke run: the first five steps of a training, on the CPU, through `accelerate launch`; for CI, and before GPUs are paid for.
#
#   launch/smoke.sh --model_name_or_path MODEL --train_file train.tsv --validation_file dev.tsv --output_dir /tmp/smoke
#   RANKS=2 launch/smoke.sh ...        # the same on two processes; give it another --output_dir
#
# Takes the words of bertdist/train.py, which win over those that stand here. It ends with exit code 0 only if the run finished.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
ranks=${RANKS:-1} config=cpu
if ((ranks > 1)); then config=cpu_x2; fi
ACCELERATE_USE_CPU=true exec accelerate launch --config_file "$here/accelerate_configs/$config.yaml" --num_processes "$ranks" \
  "$here/bertdist/train.py" --use_cpu --max_train_steps 5 --log_every "1 steps" "$@"
