# What train.slurm, predict.slurm and sweep.slurm share: they source this file. It is not a job by itself.
#
#   source launch/slurm_job.sh     # runs $SETUP; gives say, python and these functions:
#   find_program train             # sets configs and program: of a clone, else of the installed package
#   run_processes "$@"             # one `accelerate launch` per node, until it ends; sets code and signal
#   requeue "$again"               # requeues the job and exits with 0, or says why it does not
#
# Sets job, attempt and nodes. See train.slurm for the environment variables.

say() { echo "launch: $(date '+%F %T') $*"; }

# USR1: the time limit is near, or a manual requeue. TERM: cancelled, or out of time.
signal=''
trap 'signal=${signal:-USR1}' USR1
trap 'signal=TERM' TERM

if [[ ${SETUP:-} ]]; then
  set +u # conda reads variables that are not set
  eval "$SETUP"
  code=$?
  set +e +o pipefail -u
  if ((code)); then say "SETUP ended with exit code $code: $SETUP"; exit 1; fi
fi
# The user's words, with quotes as in a shell: `apptainer exec --nv image.sif`; `--container-image=image.sqsh`.
if ! eval "container=(${CONTAINER:-}) srun_options=(${SRUN_OPTIONS:-})"; then
  say "bash cannot read CONTAINER or SRUN_OPTIONS: ${CONTAINER:-} ${SRUN_OPTIONS:-}"
  exit 1
fi
python() { # as the ranks have it
  if [[ ${SRUN_OPTIONS:-} ]]; then
    srun --overlap --nodes=1 --ntasks=1 "${srun_options[@]}" "${container[@]}" python "$@"
  else
    command "${container[@]}" python "$@"
  fi
}

if [[ ! ${SLURM_JOB_ID:-} ]]; then say "this is a job of SLURM: sbatch launch/train.slurm ..."; exit 1; fi
# A job that another one submitted has that one's variables too, where SLURM does not set its own: none of
# these is used. SLURM_EXPORT_ENV is also that of `sbatch --export=NONE`, and srun would obey it.
export SLURM_EXPORT_ENV=ALL
if [[ ${SLURM_CPU_BIND_LIST:-} ]]; then unset "${!SLURM_CPU_BIND@}"; fi # of a step: cores of its node
job=$SLURM_JOB_ID nodes=$SLURM_JOB_NUM_NODES
known=$(SLURM_TIME_FORMAT=standard scontrol --oneliner show job "$job" | grep "^JobId=$job ")
attempt=${SLURM_RESTART_COUNT:-0}
if [[ $known =~ \ Restarts=([0-9]+) ]]; then attempt=${BASH_REMATCH[1]}; fi
# SLURM before 23.02 does not export the job's end time. Processes stop a while before it.
if [[ $known =~ \ EndTime=([0-9][^ ]+) ]]; then
  SLURM_JOB_END_TIME=$(date -d "${BASH_REMATCH[1]}" +%s) && export SLURM_JOB_END_TIME
fi
# One task of a job array has the array's own id, which stands for all of its tasks.
if [[ $job == "${SLURM_ARRAY_JOB_ID:-}" ]]; then job+=_$SLURM_ARRAY_TASK_ID; fi

if [[ ! ${OMP_NUM_THREADS:-} ]]; then unset OMP_NUM_THREADS; fi
for name in MAX_RESTARTS NPROC_PER_NODE MAIN_PROCESS_PORT OMP_NUM_THREADS; do
  if [[ $name == MAX_RESTARTS ]]; then least=0; else least=1; fi
  if [[ ${!name-1} != @(0|[1-9]*([0-9])) ]] || ((${!name-1} < least)); then
    say "$name is '${!name}'; expected a whole number, $least or more."
    exit 1
  fi
done
# Also where SLURM has variables for several, of `sbatch --ntasks-per-node 4`.
one_per_node=(--nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1)
max_restarts=${MAX_RESTARTS:-100}
if ((attempt > max_restarts)); then # SLURM requeues after a lost node by itself
  say "restarted $attempt times, more than MAX_RESTARTS: ended; continue with the same sbatch command."
  exit 1
fi

# In a clone, its files; elsewhere, those of the installed package.
find_program() { # train or predict
  configs=accelerate_configs program=("bertdist/$1.py")
  if [[ ! -e bertdist/$1.py ]]; then
    configs=$(python -m bertdist info accelerate_configs) program=(-m "bertdist.$1")
    [[ $configs ]] || { say "bertdist is not installed, and $PWD is not its repository."; exit 1; }
  fi
}

run_processes() {
  local cpus=${SLURM_CPUS_PER_TASK:-1} gpus=${SLURM_GPUS_ON_NODE:-0} first device per_node config several
  first=${MAIN_PROCESS_IP:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
  if ((gpus > 0)); then
    device=GPU per_node=${NPROC_PER_NODE:-$gpus} config=gpu several=multi_node
  else
    device=CPU per_node=${NPROC_PER_NODE:-1} config=cpu several=cpu_x2
    export ACCELERATE_USE_CPU=true
  fi
  local ranks=$((nodes * per_node)) threads=$((cpus / per_node))
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
  # Not port 29500, which two jobs on one node would share; another one per attempt, since the last
  # may still be closing.
  local port=${MAIN_PROCESS_PORT:-$((20000 + (SLURM_JOB_ID + 131 * attempt) % 10000))}
  # torchrun writes the output of each process to a file, and to this log with its node and number.
  # SLURMD_NODENAME is expanded in the task.
  local logs=() log_dir=${LOG_DIR:-bertdist-$SLURM_JOB_ID}
  if ((ranks > 1)); then
    config=$several
    logs=('--tee 3 --role "$SLURMD_NODENAME." --log_dir "$LOG_DIR/$SLURMD_NODENAME"')
    export LOG_DIR=$log_dir/attempt_$attempt
  fi

  # SLURM's signals reach every process of a step. The ranks stop together
  # (bertdist/distributed/preemption.py). The launchers must outlive them, so they ignore USR1 and
  # TERM, and torchrun, which would kill its ranks 30 s after a TERM, does not handle TERM.
  # --machine_rank is expanded in the task: in this shell SLURM_PROCID is 0 for all.
  export PET_SIGNALS_TO_HANDLE=SIGINT
  # --quiet: no traceback of accelerate's own where its process has ended with an error.
  local task="trap '' USR1 TERM; exec ${container[*]@Q} accelerate launch --quiet --machine_rank \"\$SLURM_PROCID\" ${logs[*]} \"\$@\""

  say "job $job, attempt $attempt: $nodes node(s) from $first x $per_node $device process(es) x $OMP_NUM_THREADS thread(s)${1:+; $1}."
  if ((ranks > 1)); then
    [[ ${CONTAINER:-}${SRUN_OPTIONS:-} ]] || mkdir -p -- "$LOG_DIR" || exit 1 # else it is a folder in there
    say "output of each process: $LOG_DIR/"
  fi
  shift
  code=1
  if [[ $signal ]]; then say "$signal came before the start."; return; fi
  # --wait: 60 s after one node's launcher has ended, SLURM ends the others.
  srun "${one_per_node[@]}" --cpus-per-task="$cpus" --kill-on-bad-exit=0 --wait=60 "${srun_options[@]}" \
    bash -c "$task" task --config_file "$configs/$config.yaml" --num_machines "$nodes" --num_processes "$ranks" \
    --main_process_ip "$first" --main_process_port "$port" "${program[@]}" "$@" &
  local srun=$!

  while kill -0 "$srun" 2>/dev/null; do
    if [[ $signal ]]; then
      scancel --signal=USR1 "$job" 2>/dev/null # repeated: a starting rank ignores it
      sleep 2
    else
      wait "$srun" # a trap interrupts it
    fi
  done
  wait "$srun"
  code=$?
}

# SLURM sends a preemption's TERM to the step only, and gives the job a PreemptTime.
preempted() { [[ $(scontrol show job "$job") == *PreemptTime=[0-9]* ]]; }

requeue() { # AGAIN: what to do by hand
  if ((attempt >= max_restarts)); then
    say "restarted $attempt times (MAX_RESTARTS): not requeued; $1."
    return
  fi
  say "requeueing: restart $((attempt + 1)) of at most $max_restarts."
  if (trap '' TERM && scontrol requeue "$job"); then exit 0; fi # SLURM's TERM may come before its answer
  say "could not be requeued; $1."
}
