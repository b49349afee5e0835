"""The text of an sbatch script: a pure function of what the job is."""

import re
import shlex
from dataclasses import dataclass

from bitnet_train.cluster.config import ClusterConfig, ContainerEngine
from bitnet_train.cluster.job import BY_SCRIPT, PREEMPTED
from bitnet_train.cluster.layout import Layout
from bitnet_train.errors import ConfigError


@dataclass(frozen=True)
class Job:
    """What a job runs and where it leaves what it prints."""

    name: str
    # The arguments of python -m bitnet_train.
    arguments: tuple[str, ...]
    layout: Layout
    # SLURM's pattern of the log file.
    log: str
    # The folder that it runs in; None for the one that it is submitted from.
    folder: str | None = None
    # Interpreter on the nodes, where cluster.python does not say another.
    python: str = "python3"
    # Comment lines at the top.
    remarks: tuple[str, ...] = ()


# Where MASTER_ADDR and MASTER_PORT come from; ports below 20000 belong to others.
RENDEZVOUS = """\
# Where the processes meet.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT"""
# The environment of every job. SLURM before 23.02 does not tell a job when it ends.
ENVIRONMENT = """\
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
if [ -z "${SLURM_JOB_END_TIME:-}" ]; then
  SLURM_JOB_START_TIME=$(date -d "$(squeue -h -j "$SLURM_JOB_ID" -o %S)" +%s || true)
  SLURM_JOB_END_TIME=$(date -d "$(squeue -h -j "$SLURM_JOB_ID" -o %e)" +%s || true)
  export SLURM_JOB_START_TIME SLURM_JOB_END_TIME
fi"""


def render(cfg: ClusterConfig, job: Job) -> str:
    """The script. Raises ConfigError for names and folders that cannot stand in one."""
    parts = [
        "#!/bin/bash",
        *(f"# {line}" for line in job.remarks),
        *_options(cfg, job),
        "",
        "set -eo pipefail",
        *setup_lines(cfg),
    ]
    if job.layout.nodes * job.layout.tasks_per_node > 1:
        parts += ["", RENDEZVOUS]
    parts += ["", ENVIRONMENT]
    if cfg.container is not None:
        parts.append(f"export {BY_SCRIPT}=1  # there is no scontrol in the container")
    parts += ["", "status=0", _command(cfg, job), "", *_requeue(cfg), "exit $status", ""]
    text = "\n".join(parts)
    if any(ord(letter) < 32 and letter != "\n" for letter in text):
        raise ConfigError(f"The job {job.name} cannot be written as a script: a setting holds a control character.")
    return text


def setup_lines(cfg: ClusterConfig) -> list[str]:
    """What the shell of a job does first."""
    return [*(f"module load {shlex.quote(name)}" for name in cfg.modules), *cfg.setup]


def _options(cfg: ClusterConfig, job: Job) -> list[str]:
    layout = job.layout
    options: dict[str, object] = {
        "job-name": job.name,
        "nodes": layout.nodes,
        "ntasks-per-node": layout.tasks_per_node,
        "gpus-per-node": layout.gpus_per_node or None,
        "cpus-per-task": cfg.cpus_per_task,
        "mem": cfg.memory,
        "time": cfg.time,
        "partition": cfg.partition,
        "account": cfg.account,
        "qos": cfg.qos,
        "constraint": cfg.constraint,
        "array": None if cfg.array is None else f"0-{cfg.array - 1}",
        "chdir": None if job.folder is None else job.folder,
        "output": job.log,
        "open-mode": "append",
        "signal": f"USR1@{cfg.signal_lead}",
    }
    lines = [f"#SBATCH --{key}={_word(value, key)}" for key, value in options.items() if value is not None]
    lines.append("#SBATCH --requeue" if cfg.max_requeues else "#SBATCH --no-requeue")
    return [*lines, *(f"#SBATCH {option}" for option in cfg.sbatch)]


def _word(value: object, key: str) -> str:
    """As shlex.quote, for sbatch, which knows quotes but no shell."""
    text = str(value)
    if set(text) & set("\n\\") or {"'", '"'} <= set(text):
        raise ConfigError(
            f"sbatch cannot take --{key}={text!r}: choose a folder or a name without quotes, backslashes and newlines."
        )
    if re.fullmatch(r"[\w@%+=:,./-]+", text):
        return text
    return f'"{text}"' if "'" in text else f"'{text}'"


def _command(cfg: ClusterConfig, job: Job) -> str:
    """``srun [container] python -m bitnet_train ...``, one argument of the user's a line."""
    srun = ["srun"]
    if cfg.cpus_per_task is not None:
        srun.append(f"--cpus-per-task={cfg.cpus_per_task}")  # srun does not take it over from sbatch
    if job.layout.nodes * job.layout.tasks_per_node > 1:
        srun.append("--kill-on-bad-exit=1")
    python = cfg.python or job.python
    if cfg.container is not None:
        python = cfg.python or "python3"
    program = [python, "-m", "bitnet_train"]
    lines = [srun + program] if cfg.container is None else [srun, _container(cfg, job.layout), program]
    every = [" ".join(map(_shell, words)) for words in lines] + [*map(shlex.quote, job.arguments)]
    return " \\\n  ".join(every) + " || status=$?"


def _shell(word: str) -> str:
    # "$PWD" and "$HOME" are the variables that these words hold; a leading ~ is left to the shell.
    if "$PWD" in word or "$HOME" in word:
        return f'"{word}"'
    if word.startswith("~/"):
        return "~/" + shlex.quote(word[2:])
    return shlex.quote(word)


def _container(cfg: ClusterConfig, layout: Layout) -> list[str]:
    if cfg.container is None:
        return []
    mounts = ["$PWD", *cfg.container_mounts]
    # A shell knows ~ only at the beginning of a word.
    image = re.sub("^~(?=/)", "$HOME", cfg.container)
    if cfg.container_engine is ContainerEngine.apptainer:
        binds = [word for mount in mounts for word in ("--bind", mount)]
        nv = ["--nv"] if layout.gpus_per_node else []
        return ["apptainer", "exec", *nv, *binds, "--pwd", "$PWD", image]
    pairs = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in mounts)
    return [f"--container-image={image}", f"--container-mounts={pairs}", "--container-workdir=$PWD"]


def _requeue(cfg: ClusterConfig) -> list[str]:
    """Lines that put the job back where Python cannot: in a container, or stopped before it could listen."""
    if not cfg.max_requeues:
        return []
    codes = "138|140" if cfg.container is None else f"{PREEMPTED}|138|140"
    why = "A signal came before Python listened (128 + USR1 or USR2)"
    why += "." if cfg.container is None else ", or the run saved and stopped for one."
    return [
        f"# {why}",
        "case $status in",
        f'  {codes}) [ "${{SLURM_RESTART_COUNT:-0}}" -ge {cfg.max_requeues} ] || scontrol requeue "$SLURM_JOB_ID" ;;',
        "esac",
    ]
