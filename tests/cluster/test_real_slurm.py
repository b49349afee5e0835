"""Against a real slurmctld (slurm/one_machine.sh starts one): jobs, signals, time limits, sweeps.

All jobs are the same run under other names, so that each must end with the losses of the one that nothing disturbed.
"""

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.composing import write
from tests.training.conftest import SETTINGS, Workspace

pytestmark = pytest.mark.slurm
STEPS = 240
PATIENCE = 600.0


class Cluster(Workspace):
    """A workspace whose runs can be jobs."""

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "bitnet_train", "--config-dir", "mine", "+recipe=job", *arguments]

    def write_recipe(self) -> None:
        """The workspace's settings as a recipe of the user's own, ``job``."""
        settings = OmegaConf.create({"defaults": ["tiny", {"override /data": "files"}, "_self_"]})
        for line in (*SETTINGS[2:], "samples.every_steps=null", "trainer.validate_every=40", "cluster.cpus_per_task=1",
                     f"trainer.max_steps={STEPS}", "trainer.accelerator=cpu", "checkpoint.every_steps=12",
                     f"data.corpus.path={self.folder}/corpus"):  # fmt: skip
            settings.merge_with_dotlist([line])
        write(self.folder / "mine", job=OmegaConf.to_yaml(settings))

    def submit(self, name: str, slow: float, *arguments: str) -> str:
        """Make a run a job, with ``slow`` seconds more for each step; the job's id."""
        python = self.folder / "slowly"
        python.write_text(f'#!/bin/bash\nexec {sys.executable} {Path(__file__).parent}/slowly.py "$@"\n')
        python.chmod(0o755)
        more = (f"run_name={name}", f"cluster.python={python}", f"cluster.setup=['export SLOW={slow}']")
        code, output = self.run(*more, *arguments, "command=submit", "submit=true")
        assert code == 0, output
        found = re.search(r"submitted: job (\d+); it prints to (\S+)", output)
        assert found is not None, output
        return found[1]

    def log(self, name: str) -> str:
        files = list((self.folder / "runs" / name).glob("slurm-*.out"))
        return files[0].read_text() if files else ""

    def wait(self, condition: Callable[[], object], of: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"{of}\n{squeue()}\n{self.log(of)}"
            time.sleep(0.1)

    def wait_for_step(self, name: str, step: int) -> None:
        checkpoint = self.folder / "runs" / name / "checkpoints" / f"step-{step:08d}.ckpt"
        self.wait(checkpoint.exists, name)

    def wait_for_end(self, name: str, job: str) -> str:
        """The state that a job ended in."""
        self.wait(lambda: state(job) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), name)
        return state(job)


def squeue() -> str:
    return subprocess.run(["squeue", "--states=all"], capture_output=True, text=True).stdout


def state(job: str) -> str:
    done = subprocess.run(["squeue", "-h", "-t", "all", "-j", job, "-o", "%T"], capture_output=True, text=True)
    return done.stdout.strip()


def send(job: str, number: signal.Signals) -> None:
    subprocess.run(["scancel", f"--signal={number.name.removeprefix('SIG')}", job], check=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """With a finished run ``whole``, and ``limit``, a job that its time does not suffice for."""
    if shutil.which("sbatch") is None or subprocess.run(["scontrol", "ping"], capture_output=True).returncode != 0:
        pytest.fail("there is no SLURM here: slurm/one_machine.sh starts one")
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    (made.folder / "corpus").mkdir()
    for i in range(40):
        lines = [f"line {j} of text {i}: {'abc' * (j % 5)} the quick brown fox {i * j}\n" for j in range(30)]
        (made.folder / "corpus" / f"{i:02d}.txt").write_text("".join(lines))
    made.write_recipe()
    code, output = made.run("command=prepare")
    assert code == 0, output
    made.limit = made.submit(  # type: ignore[attr-defined]
        "limit", 0.25, "cluster.time=00:01:00", "cluster.signal_lead=1", "cluster.stop_before_end=5"
    )
    code, output = made.run("run_name=whole")
    assert code == 0, output
    yield made
    for line in subprocess.run(["squeue", "-h", "-o", "%i %Z"], capture_output=True, text=True).stdout.splitlines():
        if line.split(None, 1)[1].startswith(str(made.folder)):
            subprocess.run(["scancel", line.split()[0]], check=False)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=["usr1", "term"])
def test_a_job_that_is_signalled_requeues_itself_and_ends_as_the_undisturbed_run(
    cluster: Cluster, number: signal.Signals
) -> None:
    name = number.name
    job = cluster.submit(name, 0.02)
    cluster.wait_for_step(name, 12)
    send(job, number)
    assert cluster.wait_for_end(name, job) == "COMPLETED", cluster.log(name)
    log = cluster.log(name)
    stopped = re.search(r"stopped at step (\d+), saved in", log)
    assert stopped is not None, log
    assert 12 <= int(stopped[1]) < STEPS
    assert f"SLURM job {job} goes back into the queue (restart 1 of at most 100)." in log
    assert f"steps {stopped[1]} to {STEPS}" in log
    assert "Traceback" not in log
    assert cluster.losses(name) == cluster.losses("whole")


def test_a_cancelled_job_saves_and_stays_cancelled(cluster: Cluster) -> None:
    job = cluster.submit("cancelled", 0.1)
    cluster.wait_for_step("cancelled", 12)
    subprocess.run(["scancel", job], check=True)
    assert cluster.wait_for_end("cancelled", job) == "CANCELLED"
    log = cluster.log("cancelled")
    assert f"SLURM job {job} was cancelled and is not requeued." in log
    stopped = re.search(r"stopped at step (\d+), saved in", log)
    assert stopped is not None, log
    assert (cluster.folder / f"runs/cancelled/checkpoints/step-{int(stopped[1]):08d}.ckpt").exists()


def test_a_job_without_restarts_left_ends_with_143(cluster: Cluster) -> None:
    job = cluster.submit("once", 0.1, "cluster.max_requeues=0")
    cluster.wait_for_step("once", 12)
    send(job, signal.SIGUSR1)
    assert cluster.wait_for_end("once", job) == "FAILED"
    assert "cluster.max_requeues=0 restarts are used" in cluster.log("once")
    described = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout
    assert "ExitCode=143:0" in described


def test_a_sweep_runs_as_jobs_and_is_ranked(cluster: Cluster) -> None:
    process = cluster.start(
        "-m", "hydra/launcher=slurm", "optimizer.lr=1e-3,4e-3", "model.heads=2,3", "model.kv_heads=1",
        "trainer.max_steps=120",
    )  # fmt: skip
    name = "optimizer.lr=4e-3+model.heads=2+model.kv_heads=1"
    folder = cluster.folder / "runs" / "job"
    cluster.wait(lambda: list(folder.glob(".submitit/*_2")) or process.poll() is not None, "job")
    assert process.poll() is None, process.communicate()
    (task,) = (path.name for path in folder.glob(".submitit/*_2"))
    cluster.wait_for_step(f"job/{name}", 12)
    send(task, signal.SIGUSR1)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2, output
    for lr in ("1e-3", "4e-3"):
        failed = f"optimizer.lr={lr} model.heads=3 model.kv_heads=1"
        assert re.search(rf"{re.escape(failed)}.*: model\.heads=3 does not divide model\.hidden=32", output), output
    assert "Traceback" not in output
    table = output[output.index("Ranked by bits per byte (lower is better)") :]
    rows = re.findall(r"^(\d)\s+(\S+)\s+([\d.]+)\s+[\d.]+\s+120 ", table, re.M)
    assert [row[0] for row in rows] == ["1", "2"]
    assert [float(row[2]) for row in rows] == sorted(float(row[2]) for row in rows)
    assert name in {row[1] for row in rows}
    assert f"written: {folder.relative_to(cluster.folder)}/report.html" in output
    log = (folder / ".submitit" / task / f"{task}_0_log.out").read_text()
    assert f"SLURM job {task} goes back into the queue (restart 1 of at most 100)." in log
    # The same sweep here, one run after the other, finds nothing left to train and ranks them alike.
    code, again = cluster.run("-m", "optimizer.lr=1e-3,4e-3", "model.heads=2", "model.kv_heads=1",
                              "trainer.max_steps=120")  # fmt: skip
    assert code == 0, again
    assert again.count("nothing left to train") == 2
    assert re.findall(r"^(\d)\s+(\S+)\s+([\d.]+)\s+[\d.]+\s+120 ", again, re.M) == rows


def test_two_tasks_of_srun_train_together(cluster: Cluster) -> None:
    same = ("trainer.max_steps=20", "schedule=constant", "optimizer.lr=1e-3", "trainer.precision=32-true",
            "trainer.micro_batch=2")  # fmt: skip
    job = cluster.submit("two", 0, "trainer.devices=2", *same)
    assert cluster.wait_for_end("two", job) == "COMPLETED", cluster.log("two")
    code, output = cluster.run("run_name=one", *same)
    assert code == 0, output
    for ours, single in zip(cluster.rows("two"), cluster.rows("one"), strict=True):
        assert float(ours["train/loss"]) == pytest.approx(float(single["train/loss"]), rel=1e-3), ours["step"]


def test_a_job_that_reaches_its_time_limit_saves_requeues_and_finishes(cluster: Cluster) -> None:
    assert cluster.wait_for_end("limit", cluster.limit) == "COMPLETED", cluster.log("limit")  # type: ignore[attr-defined]
    log = cluster.log("limit")
    stops = [int(step) for step in re.findall(r"stopped at step (\d+), saved in", log)]
    assert stops, log
    assert stops == sorted(stops)
    assert f"steps {stops[-1]} to {STEPS}" in log
    assert cluster.losses("limit") == cluster.losses("whole")
