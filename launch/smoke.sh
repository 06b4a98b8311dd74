#!/usr/bin/env bash
# A smoke test: the first five training steps, on the CPU, through `accelerate launch`.
#
#   launch/smoke.sh --model_name_or_path MODEL --train_file train.tsv --output_dir /tmp/smoke
#   RANKS=2 launch/smoke.sh ...                    # the same on two processes; another --output_dir
#   "$(python -m bertdist info launch)/smoke.sh" ...    # with an installed bertdist
#
# Takes the flags of bertdist.train, which override those below. Exit code 0 only if the run finished.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) # the repository, or the installed package
ranks=${RANKS:-1} config=cpu program=(-m bertdist.train)
if ((ranks > 1)); then config=cpu_x2; fi
if [[ -e $root/bertdist/train.py ]]; then program=("$root/bertdist/train.py"); fi
ACCELERATE_USE_CPU=true exec accelerate launch --num_processes "$ranks" \
  --config_file "$root/accelerate_configs/$config.yaml" \
  "${program[@]}" --use_cpu --max_train_steps 5 --log_every "1 steps" "$@"
