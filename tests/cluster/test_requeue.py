"""When a job puts itself back into the queue, and when a run stops for the end of its time."""

import pytest

from bitnet_train.cluster.job import BY_SCRIPT, plan_requeue, stop_time

JOB = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}
RUNNING = "JobId=7 JobName=x JobState=RUNNING Reason=None BatchFlag=1 Requeue=1"


@pytest.mark.parametrize(
    ("environment", "described", "job", "sentence"),
    [
        ({}, RUNNING, None, ""),
        (JOB, RUNNING, "7", "SLURM job 7 goes back into the queue (restart 1 of at most 3)."),
        (JOB | {"SLURM_RESTART_COUNT": "2"}, RUNNING, "7", "restart 3 of at most 3"),
        (JOB | {"SLURM_RESTART_COUNT": "3"}, RUNNING, None, "cluster.max_requeues=3 restarts are used"),
        # A job that is not put back is lost.
        (JOB | {"SLURM_RESTART_COUNT": "x"}, RUNNING, "7", "warning: SLURM_RESTART_COUNT=x is no number"),
        (JOB | {"SLURM_PROCID": "1"}, RUNNING, None, ""),
        (JOB | {"RANK": "1"}, RUNNING, None, ""),
        (JOB | {BY_SCRIPT: "1"}, RUNNING, None, "The batch script puts the job back"),
        (JOB | {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}, RUNNING, "5_2", "SLURM job 5_2 goes back"),
        (JOB, RUNNING.replace("RUNNING Reason=None", "COMPLETING Reason=None"), None, "was cancelled"),
        (JOB, RUNNING.replace("RUNNING Reason=None", "COMPLETING Reason=TimeLimit"), "7", "goes back"),
        (JOB, RUNNING.replace("BatchFlag=1", "BatchFlag=0"), None, ""),
    ],
)
def test_the_plan(environment: dict[str, str], described: str, job: str | None, sentence: str) -> None:
    plan = plan_requeue(3, environment, described)
    assert plan.job == job
    assert sentence in plan.sentence
    assert bool(sentence) == bool(plan.sentence)


def test_a_machine_without_scontrol_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert plan_requeue(3, JOB).sentence == "SLURM job 7 is not requeued: scontrol does not answer here."


@pytest.mark.parametrize(
    ("before", "environment", "expected"),
    [
        (60, {}, None),
        (None, {"SLURM_JOB_END_TIME": "1000"}, None),
        (60, {"SLURM_JOB_END_TIME": ""}, None),
        (60, {"SLURM_JOB_END_TIME": "1000"}, 940),
        (60, {"SLURM_JOB_END_TIME": "1000", "SLURM_JOB_START_TIME": "0"}, 940),
        (60, {"SLURM_JOB_END_TIME": "1000", "SLURM_JOB_START_TIME": "900"}, 950),
    ],
)
def test_the_time_to_stop(before: float | None, environment: dict[str, str], expected: float | None) -> None:
    assert stop_time(before, environment) == expected
