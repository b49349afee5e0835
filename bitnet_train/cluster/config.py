"""What a recipe asks of a SLURM cluster: the ``cluster`` part of the configuration."""

import re
from dataclasses import dataclass, field
from enum import Enum

from bitnet_train.errors import ConfigError


class ContainerEngine(Enum):
    """What runs ``cluster.container``."""

    apptainer = "apptainer"
    enroot = "enroot"


@dataclass
class ClusterConfig:
    # What a job of command=submit does: train, or another command (prepare, evaluate, export, ...).
    command: str = "train"
    # Nodes of a training job; null for trainer.num_nodes. Other commands run on one.
    nodes: int | None = None
    # GPUs per node, each with a process of its own in training; null for one per process, none with
    # trainer.accelerator=cpu.
    gpus_per_node: int | None = None
    # CPU cores per process, for the loaders and for what is computed on CPUs; null for the partition's default.
    cpus_per_task: int | None = 8
    # Memory per node, such as 64G; null for the partition's default, '0' for all of the node's.
    memory: str | None = None
    # Longest time of one start of the job, as HH:MM:SS or D-HH:MM:SS (in a recipe with quotes); it may go on after it.
    time: str = "24:00:00"
    # The partition (queue) that the job waits in; null for the cluster's default, as for the next two.
    partition: str | None = None
    # The account that it is charged to.
    account: str | None = None
    # Its quality of service.
    qos: str | None = None
    # Features that the nodes must have, such as a100 or 'a100|h100'.
    constraint: str | None = None
    # Container image that the job runs in: a file, or what the engine can fetch; null for none.
    container: str | None = None
    # What runs the container: apptainer, or enroot through SLURM's pyxis plugin.
    container_engine: ContainerEngine = ContainerEngine.apptainer
    # Folders that the container sees beside the one that the job was submitted from: FOLDER or FOLDER:AS.
    container_mounts: list[str] = field(default_factory=list)
    # The Python of the job; null for the one that runs command=submit, or in a container for its python3.
    python: str | None = None
    # Environment modules that are loaded first.
    modules: list[str] = field(default_factory=list)
    # Lines of shell that run after them, such as 'source ~/venv/bin/activate'.
    setup: list[str] = field(default_factory=list)
    # Tasks of a job array; with cluster.command=prepare each makes its part of the shards. null for a single job.
    array: int | None = None
    # Seconds before the time limit at which SLURM sends USR1: enough for a step, a validation and a checkpoint. SLURM
    # sends it up to a minute early.
    signal_lead: int = 120
    # A run saves and stops by itself so many seconds before the end of the job (SLURM_JOB_END_TIME), for schedulers
    # that send nothing; never in the first half of the time. null to wait for a signal.
    stop_before_end: float | None = 60.0
    # How often a job that was stopped early (by a signal or its time limit) puts itself back into the queue.
    max_requeues: int = 100
    # Further options of sbatch, such as --exclusive or --mail-type=END.
    sbatch: list[str] = field(default_factory=list)


# key -> what its value must be like, and in words.
PATTERNS = {
    "partition": (r"[\w.,@+-]+", "letters, digits and _ . , @ + -"),
    "account": (r"[\w.@+-]+", "letters, digits and _ . @ + -"),
    "qos": (r"[\w.,@+-]+", "letters, digits and _ . , @ + -"),
    "constraint": (r"[\w.,:=&|*()\[\]+-]+", "names of features joined by & | , * ( ) [ ]"),
    "memory": (r"\d+[KMGT]?", "a number with K, M, G or T, such as 64G"),
    "container": (r"[\w./~:@#+][\w./~:@#+= -]*", "a path or an image's name"),
    "python": (r"[\w./~+][\w./~+ -]*", "a path, or a name such as python3"),
}
LISTED = {
    "container_mounts": (r"/[\w./+=@ -]*(:/[\w./+=@ -]*)?", "absolute folders, /data or /data:/inside"),
    "modules": (r"[\w.+][\w./+-]*", "names such as cuda/12.4"),
    "setup": (r"[^\x00-\x1f\x7f]*\S[^\x00-\x1f\x7f]*", "lines of shell, one each"),
    "sbatch": (r"--[a-z][a-z-]*(=[^\x00-\x20\x7f'\"`$;\\]+)?", "options such as --exclusive or --mail-type=END"),
}
# Options of sbatch that other keys set.
SET_BY = {
    "nodes": "nodes", "ntasks-per-node": "gpus_per_node", "ntasks": "gpus_per_node", "gpus-per-node": "gpus_per_node",
    "cpus-per-task": "cpus_per_task", "mem": "memory", "time": "time", "partition": "partition", "account": "account",
    "qos": "qos", "constraint": "constraint", "signal": "signal_lead", "array": "array", "requeue": "max_requeues",
}  # fmt: skip
# Options of sbatch that must be what the job needs.
FIXED = ("job-name", "chdir", "output", "error", "open-mode", "no-requeue", "wrap")
LEAST = {"nodes": 1, "gpus_per_node": 0, "cpus_per_task": 1, "array": 1, "signal_lead": 1, "max_requeues": 0}


def check_cluster(cfg: ClusterConfig, commands: list[str]) -> None:
    """Raises ConfigError for what SLURM, or the shell that runs its scripts, would misunderstand.

    ``commands`` are what a job can do.
    """
    if cfg.command not in commands:
        raise ConfigError(
            f"cluster.command={cfg.command} is nothing that a job does: use one of {', '.join(commands)}."
        )
    for name, least in LEAST.items():
        value = getattr(cfg, name)
        if value is not None and value < least:
            raise ConfigError(f"cluster.{name} is {value}; it must be at least {least}.")
    if cfg.stop_before_end is not None and not 0 <= cfg.stop_before_end < float("inf"):
        raise ConfigError(f"cluster.stop_before_end is {cfg.stop_before_end}; it must be at least 0, or null.")
    for name, (pattern, words) in PATTERNS.items():
        value = getattr(cfg, name)
        if value is not None and re.fullmatch(pattern, value) is None:
            raise ConfigError(f"cluster.{name}={value!r} is not usable in a job: it must be {words}.")
    for name, (pattern, words) in LISTED.items():
        for value in getattr(cfg, name):
            if re.fullmatch(pattern, value) is None:
                raise ConfigError(f"cluster.{name} holds {value!r}, and must hold {words}.")
    if cfg.container_mounts and cfg.container is None:
        raise ConfigError("cluster.container_mounts does nothing without cluster.container.")
    if cfg.array is not None and cfg.command != "prepare":
        raise ConfigError(f"cluster.array is for cluster.command=prepare, not {cfg.command}: leave it out.")
    _check_options(cfg)
    limit = seconds(cfg.time)
    if cfg.signal_lead >= limit:
        raise ConfigError(
            f"cluster.signal_lead={cfg.signal_lead} seconds are not less than cluster.time={cfg.time}: the job "
            "would be stopped as soon as it starts."
        )


def _check_options(cfg: ClusterConfig) -> None:
    for line in cfg.sbatch:
        option = line.removeprefix("--").partition("=")[0]
        if option in SET_BY:
            raise ConfigError(f"cluster.sbatch holds {line}: set cluster.{SET_BY[option]} instead.")
        if option in FIXED:
            raise ConfigError(f"cluster.sbatch holds {line}, which the job sets for itself: leave it out.")


def seconds(time: str) -> int:
    """The length of a time limit, D-HH:MM:SS, HH:MM:SS or D-HH:MM. Raises ConfigError for what is none.

    SLURM also knows a plain number (minutes) and MM:SS; the first is what YAML makes of 24:00:00 without quotes, the
    second is easily taken for hours and minutes.
    """
    found = re.fullmatch(r"(?:(\d{1,3})-)?(\d{1,3}):([0-5]\d)(?::([0-5]\d))?", time)
    total = 0
    if found is not None and (found[1] or found[4]):
        days, hours, minutes, rest = (int(part or 0) for part in found.groups())
        total = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    if total <= 0:
        raise ConfigError(
            f"cluster.time={time} is no time limit: write HH:MM:SS or D-HH:MM:SS (in a recipe with quotes: "
            'time: "24:00:00").'
        )
    return total
