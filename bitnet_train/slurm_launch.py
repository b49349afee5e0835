"""A sweep as an array of SLURM jobs, through submitit: what ``hydra/launcher=slurm`` does."""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides

from bitnet_train.cluster.config import ClusterConfig, seconds
from bitnet_train.cluster.layout import job_layout
from bitnet_train.cluster.render import setup_lines
from bitnet_train.errors import ConfigError

# A job in one of these states, or one that squeue does not know any more (UNKNOWN), will write no result.
ENDED = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "REVOKED", "TIMEOUT",
    "UNKNOWN",
)  # fmt: skip
# Seconds between two looks at the queue, and those that a file may need to show up on a shared file system.
INTERVAL = 2.0
PATIENCE = 15.0


def launch(launcher: Any, job_overrides: Sequence[Sequence[str]], first: int) -> Sequence[JobReturn]:
    """Submit a job for each of ``job_overrides`` and wait for all; the task function's ``ended`` hears how each ended.

    ``launcher`` is hydra-submitit-launcher's, set up. Raises ConfigError where there is no SLURM, or it refuses.
    """
    import submitit

    config = launcher.config
    folder = Path(str(config.hydra.sweep.dir))
    folder.mkdir(parents=True, exist_ok=True)
    own = {"submitit_folder", "max_num_timeout"}
    params = {key: value for key, value in launcher.params.items() if key not in own}
    params |= resources(config, params)
    common = {"timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes", "name",
              "stderr_to_stdout"}  # fmt: skip
    try:
        executor = submitit.AutoExecutor(launcher.params["submitit_folder"], cluster="slurm")
        executor.update_parameters(**{key if key in common else f"slurm_{key}": v for key, v in params.items()})
        states = [Singleton.get_state() for _ in job_overrides]
        numbers = list(range(first, first + len(job_overrides)))
        jobs = executor.map_array(
            launcher, list(map(list, job_overrides)), ["hydra.sweep.dir"] * len(numbers), numbers,
            [f"job_id_for_{number}" for number in numbers], states,
        )  # fmt: skip
    except (RuntimeError, submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(f"hydra/launcher=slurm cannot submit the jobs: {reason}.") from None
    named = [" ".join(filter_overrides(overrides)) for overrides in job_overrides]
    whole = jobs[0].job_id.partition("_")[0]
    print(f"sweep: {len(jobs)} jobs submitted as SLURM job {whole}; they print to {jobs[0].paths.folder.parent}")
    sys.stdout.flush()
    try:
        return wait_for_all(jobs, named, launcher.task_function.ended)
    except KeyboardInterrupt:
        print(
            f"bitnet_train: the jobs go on: squeue shows them, scancel {whole} ends them, and command=report "
            f"run={folder} ranks what there is.",
            file=sys.stderr,
        )
        raise


def resources(config: Any, params: dict[str, Any]) -> dict[str, Any]:
    """What the jobs need by ``cluster.*`` and ``trainer.*``, in submitit's words; ``params`` that are set win."""
    cluster: ClusterConfig = config.cluster
    layout = job_layout(cluster, config.trainer, config.trainer.accelerator.value, config.command.value)
    if layout.settings:
        wanted = " ".join(layout.settings)
        raise ConfigError(f"The jobs of this sweep train with several processes: add {wanted} to the command line.")
    if cluster.container is not None or cluster.python is not None:
        key = "container" if cluster.container is not None else "python"
        raise ConfigError(f"hydra/launcher=slurm goes on in this Python and not in cluster.{key}: make the jobs of the "
                          "sweep with -m command=submit submit=true.")  # fmt: skip
    for name, count in (("nodes", layout.nodes), ("tasks_per_node", layout.tasks_per_node)):
        if params.get(name) not in (None, 1, count):
            raise ConfigError(f"hydra.launcher.{name}={params[name]}: set cluster.nodes and trainer.devices instead.")
    more: dict[str, Any] = {}
    if cluster.max_requeues:
        more["requeue"] = True
    if cluster.memory is not None and params.get("mem_gb") is None:
        more["mem"] = cluster.memory
    for line in cluster.sbatch:
        option, _, value = line.removeprefix("--").partition("=")
        more[option] = value or True
    found = {
        "timeout_min": params.get("timeout_min") or -(-seconds(cluster.time) // 60),
        "nodes": layout.nodes,
        "tasks_per_node": layout.tasks_per_node,
        "additional_parameters": more | (params.get("additional_parameters") or {}),
        "setup": [*setup_lines(cluster), *(params.get("setup") or [])],
    }
    if params.get("gpus_per_node") is None and layout.gpus_per_node:
        found["gpus_per_node"] = layout.gpus_per_node
    return found


def wait_for_all(jobs: Sequence[Any], named: Sequence[str], ended: Callable[[Any], None]) -> list[JobReturn]:
    """Wait until every job has left a result or cannot leave one any more; ``ended`` hears of each as it comes."""
    from bitnet_train.sweeps import Result

    returns: dict[int, JobReturn] = {}
    gone: dict[int, float] = {}
    while len(returns) < len(jobs):
        states = queue_states({job.job_id.partition("_")[0] for job in jobs})
        for number, job in enumerate(jobs):
            if number in returns:
                continue
            result = _result(job)
            if result is None:
                if states is None or states.get(job.job_id, "UNKNOWN") not in ENDED:
                    gone.pop(number, None)
                    continue
                if time.monotonic() - gone.setdefault(number, time.monotonic()) < PATIENCE:
                    continue
                state = (states or {}).get(job.job_id, "UNKNOWN").lower().replace("unknown", "gone")
                result = Result(1, f"{named[number]}: its SLURM job {job.job_id} ended without a result ({state}); it "
                                   f"prints to {job.paths.stdout}")  # fmt: skip
            elif isinstance(result, str):
                result = Result(1, f"{named[number]}: {result}; it prints to {job.paths.stdout}")
            ended(result)
            returns[number] = JobReturn(status=JobStatus.COMPLETED, _return_value=result)
        if len(returns) < len(jobs):
            time.sleep(INTERVAL)
    return [returns[number] for number in range(len(jobs))]


def _result(job: Any) -> Any:
    """What a job left: a Result, the last line of an error, or None."""
    paths = job.task(0).paths
    if not paths.result_pickle.exists():
        return None
    from submitit.core.utils import pickle_load

    outcome, value = pickle_load(paths.result_pickle)
    if outcome == "success" and value.status is JobStatus.COMPLETED:
        return value.return_value
    text = value if outcome == "error" else repr(value._return_value)
    return str(text).strip().splitlines()[-1]


def queue_states(jobs: set[str]) -> dict[str, str] | None:
    """Job id (ARRAY_TASK in arrays) -> state of the jobs that SLURM knows; None when it does not answer.

    squeue and not sacct, which needs a database that not every cluster has.
    """
    found: dict[str, str] = {}
    for job in jobs:
        command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={job}", "--format=%i %T"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            if "Invalid job id" not in done.stderr:
                return None
            continue
        found |= dict(line.split(None, 1) for line in done.stdout.splitlines() if line.strip())
    return {job: state.strip() for job, state in found.items()}
