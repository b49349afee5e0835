"""The SLURM job that this process runs in: how long it may run, and putting it back into the queue."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from bitnet_train import signals

PREEMPTED = 143
# Set by scripts that put their own job back, because a container lacks scontrol.
BY_SCRIPT = "BITNET_TRAIN_REQUEUE_BY_SCRIPT"


class Requeued(SystemExit):
    """SLURM takes this job back; the process ends with 143."""

    def __init__(self) -> None:
        super().__init__(PREEMPTED)


def stop_time(before_end: float | None, environment: Mapping[str, str] = os.environ) -> float | None:
    """Unix time from which a run saves and stops; None outside a SLURM job whose end is known.

    ``before_end`` seconds before the end of the job, but never in the first half of its time.
    """
    end = _seconds(environment.get("SLURM_JOB_END_TIME"))
    if before_end is None or end is None:
        return None
    start = _seconds(environment.get("SLURM_JOB_START_TIME"))
    return end - before_end if start is None else max(end - before_end, (start + end) / 2)


def _seconds(text: str | None) -> float | None:
    return float(text) if text is not None and text.isdigit() else None


@dataclass(frozen=True)
class Requeue:
    """Whether a job that was stopped early goes back into the queue, and one sentence about it."""

    job: str | None
    sentence: str = ""


def plan_requeue(
    max_requeues: int, environment: Mapping[str, str] = os.environ, described: str | None = None
) -> Requeue:
    """What to do in this process: only rank 0 of a SLURM batch job that has restarts left requeues it.

    ``described`` is what ``scontrol show job`` says, by default asked for. A job that was cancelled stays so.
    """
    rank = environment.get("RANK", environment.get("SLURM_PROCID", "0"))  # torchrun's or srun's
    if "SLURM_JOB_ID" not in environment or rank != "0":
        return Requeue(None)
    if environment.get(BY_SCRIPT):
        return Requeue(None, "The batch script puts the job back into the queue.")
    job = environment["SLURM_JOB_ID"]
    if environment.get("SLURM_ARRAY_TASK_ID"):
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    # A job that is not put back is lost, so that a count that cannot be read is none.
    count = environment.get("SLURM_RESTART_COUNT") or "0"
    known = count.isascii() and count.isdigit()
    restarts = int(count) if known else 0
    if restarts >= max_requeues:
        return Requeue(None, f"SLURM job {job} is not requeued: cluster.max_requeues={max_requeues} restarts are used.")
    if described is None:
        described = _describe(job)
    if described is None:
        return Requeue(None, f"SLURM job {job} is not requeued: scontrol does not answer here.")
    fields = dict(word.split("=", 1) for word in described.split() if "=" in word)
    if fields.get("BatchFlag") == "0":
        return Requeue(None)  # someone's terminal
    ended = fields.get("JobState") not in ("RUNNING", "SUSPENDED", "PREEMPTED")
    if ended and fields.get("Reason") != "TimeLimit":
        return Requeue(None, f"SLURM job {job} was cancelled and is not requeued.")
    which = f"restart {restarts + 1} of at most {max_requeues}"
    if not known:
        which += f"; warning: SLURM_RESTART_COUNT={count} is no number, so that restarts cannot be counted"
    return Requeue(job, f"SLURM job {job} goes back into the queue ({which}).")


def _describe(job: str) -> str | None:
    if shutil.which("scontrol") is None:
        return None
    done = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None


def requeue(job: str) -> str:
    """Put ``job``, which this process belongs to, back into the queue; raises :class:`Requeued`, or says why not."""
    signals.ignore()  # SLURM now terminates the job, this process included
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if done.returncode == 0:
        raise Requeued
    reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
    return f"SLURM does not requeue job {job}: {reason}"
