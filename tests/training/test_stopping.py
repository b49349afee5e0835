"""Signals outside of steps, stops that all ranks agree on, and the end of a job's time."""

import multiprocessing
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.conftest import InProcess, Workspace


def interrupt_when(workspace: Workspace, process: subprocess.Popen[str], pattern: str, number: int) -> str:
    """Send ``number`` to a command and all its children once a file like ``pattern`` exists; what it printed."""
    workspace._wait(lambda: any(workspace.folder.glob(pattern)) or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    os.killpg(process.pid, number)
    return process.communicate(timeout=180)[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_while_data_are_prepared_leaves_nothing_half_done(workspace: Workspace, number: int) -> None:
    for i in range(40, 3000):  # enough for some seconds
        (workspace.folder / "corpus" / f"{i}.txt").write_text(f"the quick brown fox {i} jumps over {i * i} dogs\n" * 60)
    output = interrupt_when(workspace, process := workspace.start("run_name=a"), "data/*partial*", number)
    assert process.returncode == 143, output
    assert output.strip().endswith("Terminated; nothing was changed since the last save.")
    assert "Traceback" not in output
    assert list((workspace.folder / "data").iterdir()) == []
    assert not (workspace.folder / "runs/a/checkpoints").exists()


@pytest.mark.parametrize("command", ["evaluate", "export", "generate"])
def test_a_signal_stops_other_commands(workspace: Workspace, command: str) -> None:
    assert workspace.run("run_name=a", "trainer.max_steps=2", "model.context=100100")[0] == 0
    (workspace.folder / "long.txt").write_text("the quick brown fox\n" * 200_000)
    long = {"evaluate": ["evaluate.text=long.txt"], "export": ["export.verify_tokens=1000000"],
            "generate": ["generate.prompt=line", "generate.max_new_tokens=100000",
                         "generate.temperature=0"]}  # fmt: skip
    process = workspace.start(f"command={command}", "run=runs/a", *long[command])
    time.sleep(4)  # long enough to have begun; it would go on for minutes
    assert process.poll() is None, process.communicate()
    os.killpg(process.pid, signal.SIGUSR1)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 143, output
    assert "Traceback" not in output
    assert list((workspace.folder / "runs/a").glob("export/*/*.partial")) == []
    assert workspace.run("command=evaluate", "run=runs/a")[0] == 0


def test_a_run_stops_by_itself_before_its_job_ends(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 50))
    here = InProcess(workspace.folder)
    code, output = here.run("run_name=a", "trainer.max_steps=20")
    assert code == 143
    assert "stopped at step 1, saved in" in output
    code, output = here.run("run_name=a", "trainer.max_steps=20", "cluster.stop_before_end=1")
    assert code == 0, output
    assert "steps 1 to 20" in output
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    assert here.run("run_name=b", "trainer.max_steps=20")[0] == 0
    assert here.losses("a") == here.losses("b")


def test_the_name_that_wandb_gets_is_the_same_after_a_requeue(workspace: Workspace) -> None:
    """Its id is the run's name, which a job that goes back into the queue keeps."""
    pytest.importorskip("wandb")
    here = InProcess(workspace.folder)
    for steps in (2, 4):
        settings = ("logger=wandb", "logger.offline=true", "schedule=constant")
        code, output = here.run("run_name=sweep/seed=1", f"trainer.max_steps={steps}", *settings)
        assert code == 0, output
    runs = sorted((workspace.folder / "runs/sweep/seed=1/wandb").glob("offline-run-*"))
    assert len(runs) == 2
    assert {run.name.split("-", 3)[3] for run in runs} == {"sweep-seed=1"}


def _rank(rank: int, rendezvous: str, results: Any) -> None:
    from bitnet_train.training.callbacks.stop import Agreement

    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=3)
    agreement = Agreement()
    # Rank 1 hears TERM in its third step, rank 2 USR1 in its fourth.
    heard = {1: (2, signal.SIGTERM), 2: (3, signal.SIGUSR1)}.get(rank, (99, 0))
    seen = []
    for step in range(6):
        seen.append(agreement.exchange(int(heard[1]) if step >= heard[0] else 0))
        if seen[-1]:
            break
    results.put((rank, seen))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_all_ranks_stop_at_the_same_step(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, str(tmp_path / "meet"), results)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    seen = dict(results.get(timeout=300) for _ in ranks)
    for rank in ranks:
        rank.join(timeout=120)
        assert rank.exitcode == 0
    assert seen == {rank: [0, 0, 0, int(signal.SIGTERM)] for rank in range(3)}
