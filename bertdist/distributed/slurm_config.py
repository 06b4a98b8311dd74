"""Settings of `bertdist slurm submit`, `status` and `doctor`, without torch."""

from dataclasses import dataclass

from bertdist.core.config import Section, setting

PROGRAM = "bertdist slurm"
ABOUT = """Training, prediction and sweeps as jobs of SLURM.

  bertdist slurm submit --nodes 2 --gpus_per_node 8 --time 04:00:00 \\
      train --config run.yaml --output_dir out
  bertdist slurm status out
  bertdist slurm doctor --folder /shared/me

  bertdist slurm submit    Check a command, write its job, and submit it.
  bertdist slurm status    Jobs and runs: state, step, score, time left.
  bertdist slurm doctor    In a job: check ranks, GPUs, network and folder.

bertdist slurm ACTION --help lists the flags of each."""

SUBMIT_ABOUT = """Submit train, predict or sweep as a job. Its flags and files are checked \
first; then the job is written into OUTPUT_DIR/slurm/ (of predict: into OUTPUT.slurm/) and given \
to sbatch: config.yaml with every setting, job.slurm, and job.json with versions, commit and \
options.

  bertdist slurm submit --nodes 2 --gpus_per_node 8 --cpus_per_task 64 \\
      --time 04:00:00 train --config run.yaml --output_dir out
  bertdist slurm submit --array 0-7 --gpus_per_node 1 \\
      sweep --config run.yaml --try warmup_ratio=0..0.2 --output_dir sweep
  bertdist slurm submit --dry_run train --config run.yaml --output_dir out

Flags of the job stand before the command, flags of the command after it. The job has this \
environment, this Python and this folder. It saves and is requeued at its time limit and when it \
is preempted (launch/train.slurm); the same command resumes a run that has ended."""

STATUS_ABOUT = """Show jobs of SLURM and what their runs have done.

  bertdist slurm status              all your jobs of bertdist in the queue
  bertdist slurm status out out2     these runs
  bertdist slurm status runs         all runs in a folder

The state of a job is that of SLURM, while it knows the job; the rest is read from the run."""

DOCTOR_ABOUT = """Check, inside a job, what training on several nodes needs: tasks, GPUs and \
CPUs of each node, the port of the first node, clocks, versions, a shared folder and the \
bandwidth of the all-reduce. Exit code 1 where something is wrong, with what to change.

  salloc --nodes 2 --ntasks-per-node 1 --gpus-per-node 8
  bertdist slurm doctor --folder /shared/me         # srun with the job's tasks
  srun bertdist slurm doctor --folder /shared/me    # with options of your own

The scripts in launch/ expect one task per node, which starts a process per GPU; where srun \
itself starts the ranks, give --tasks_per_node. NPROC_PER_NODE, MAIN_PROCESS_IP, \
MAIN_PROCESS_PORT and OMP_NUM_THREADS are read as launch/train.slurm reads them."""


@dataclass(frozen=True, kw_only=True)
class SubmitConfig(Section):
    """A job."""

    _argument_group_name = "slurm submit"

    nodes: int = setting(1, "Nodes of the job.", brief="Nodes, default 1")
    gpus_per_node: str | None = setting(
        None,
        "GPUs of each node, such as 8 or a100:4; one process each. Default: none, on the CPU.",
        brief="GPUs of each node, such as 8 or a100:4",
    )
    cpus_per_task: int | None = setting(
        None,
        "CPU cores of each node: of all its processes together. Default: 8.",
        brief="CPU cores of each node, default 8",
    )
    nproc_per_node: int | None = setting(
        None, "Processes of each node (NPROC_PER_NODE). Default: one per GPU, else one."
    )
    time: str | None = setting(
        None,
        "Time limit as sbatch has it: minutes, H:M:S, D-H or D-H:M:S. Default: 04:00:00.",
        brief="Time limit, default 04:00:00",
    )
    partition: str | None = setting(None, "Partition (queue).", brief="Partition (queue)")
    account: str | None = setting(None, "Account that is charged.", brief="Account")
    array: str | None = setting(
        None,
        "Of sweep: the tasks of a job array, which share its trials: 0-7, or 0-31%8 for eight at a "
        "time.",
        brief="Of sweep: the tasks that share its trials, 0-7",
    )
    job_name: str | None = setting(None, "Name of the job. Default: the name of the folder.")
    max_restarts: int | None = setting(
        None,
        "How often SLURM may start the job again (MAX_RESTARTS): after its time limit, preemption, "
        "and a lost rank or node. A job that makes no progress is not. Default: 100.",
        brief="How often it may be restarted, default 100",
    )
    sbatch: str | None = setting(
        None,
        'Further options of sbatch, as one text: --sbatch "--qos=high --constraint=a100". They win '
        "over those of the script.",
        brief='More options: --sbatch "--qos=high"',
    )
    setup: str | None = setting(
        None,
        "Lines of shell that the job runs first, such as 'module load cuda/12.4'. Default: none; "
        "the job has this environment.",
        brief="Shell lines to run first: 'module load cuda'",
    )
    dry_run: bool = setting(
        False,
        "Write the job and show its script; submit nothing.",
        brief="Write and show the job, submit nothing",
    )


@dataclass(frozen=True, kw_only=True)
class StatusConfig(Section):
    """What to show."""

    _argument_group_name = "slurm status"

    folders: list[str] | None = setting(
        None,
        "Folders of runs and sweeps, or folders that hold some. They may also stand first, without "
        "the name of the flag. Default: those of your jobs in the queue.",
        brief="Folders of runs, or folders that hold some",
    )


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(Section):
    """What to check."""

    _argument_group_name = "slurm doctor"

    folder: str = setting(
        ".",
        "Folder to check: the one that --output_dir will be in. Default: the current folder.",
        brief="Shared folder to check, default this one",
    )
    tasks_per_node: int = setting(
        1,
        "Tasks of SLURM that a node should have: 1 for the scripts in launch/, the number of its "
        "GPUs where srun starts every rank itself.",
        brief="Tasks a node should have, default 1",
    )
    bandwidth: bool = setting(
        True,
        "Measure an all-reduce of 100 MB between all processes; it imports torch. --bandwidth no "
        "leaves it out.",
        brief="Measure the all-reduce; --bandwidth no: do not",
    )
    wait: float = setting(
        30.0,
        "Seconds to wait for an answer of another task, in each check; those that do not answer "
        "are named.",
        brief="Seconds to wait for other tasks, default 30",
    )
