"""``-m``: the ranking at its end, and what ``hydra/launcher=slurm`` makes of the settings. (On a real SLURM:
tests/cluster/test_real_slurm.py.)"""

import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from bitnet_train import slurm_launch, sweeps
from bitnet_train.__main__ import answer
from bitnet_train.errors import ConfigError
from bitnet_train.sweeps import Result, SweptJob, as_typed
from tests.composing import CATALOGUE, compose_config, compose_node, fresh_recipes

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    monkeypatch.chdir(tmp_path)

    def execute(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = answer(list(arguments))
        out = capsys.readouterr()
        return code, out.out, out.err

    with fresh_recipes():
        yield execute


DIGITS = ("+recipe=digits_mlp", "trainer.max_steps=2", "trainer.validate_every=1", "checkpoint.every_steps=null",
          "telemetry.every_steps=null")  # fmt: skip


@pytest.mark.parametrize("launcher", [(), ("hydra/launcher=basic",)], ids=["own", "hydra's"])
@pytest.mark.usefixtures("one_thread")
def test_a_sweep_ends_with_its_ranked_table_and_page(run: Run, tmp_path: Path, launcher: tuple[str, ...]) -> None:
    code, out, err = run("-m", *launcher, *DIGITS, "optimizer.lr=1e-9,3e-3", "model.layers=4,0")
    assert code == 2
    assert sorted(line.split(": ")[1].split()[-2:] for line in err.splitlines()) == [
        [f"optimizer.lr={lr}", "model.layers=0"] for lr in ("1e-9", "3e-3")
    ]
    table = out[out.index("Ranked by accuracy (higher is better)") :].splitlines()
    rows = [line.split() for line in table[2:4]]
    assert [row[:2] for row in rows] == [
        ["1", "optimizer.lr=3e-3+model.layers=4"], ["2", "optimizer.lr=1e-9+model.layers=4"]
    ]  # fmt: skip
    assert "written: runs/digits_mlp/report.html" in out
    assert "optimizer.lr=3e-3+model.layers=4" in (tmp_path / "runs/digits_mlp/report.html").read_text()


@pytest.mark.usefixtures("one_thread")
def test_a_sweep_over_recipes_has_a_table_and_no_page(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("-m", *DIGITS[1:], "+recipe=digits_mlp,digits_vit")
    assert code == 0
    assert "Ranked by accuracy" in out
    assert not list(tmp_path.rglob("sweep.html")) + list((tmp_path / "runs").glob("*.html"))


def test_settings_are_named_as_they_were_typed() -> None:
    assert as_typed(["+recipe=tiny", "optimizer.lr=1e-3,3e-3", "seed=range(1,3)", "a.b=[1,2],[3]", "x='a b'"]) == {
        "+recipe=tiny": "+recipe=tiny", "optimizer.lr=0.001": "optimizer.lr=1e-3",
        "optimizer.lr=0.003": "optimizer.lr=3e-3", "seed=1": "seed=1", "seed=2": "seed=2", "a.b=[1,2]": "a.b=[1,2]",
        "a.b=[3]": "a.b=[3]", "x='a b'": "x='a b'",
    }  # fmt: skip


def test_what_is_sent_to_a_job_leaves_the_results_behind() -> None:
    job = SweptJob({"seed"}, CATALOGUE, {"seed=1": "seed=1"}, [Result(2)])
    sent = pickle.loads(pickle.dumps(job))
    assert (sent.swept, sent.typed, sent.results) == (job.swept, job.typed, [])
    assert sent.catalogue.recipes == CATALOGUE.recipes


def test_without_submitit_it_is_one_sentence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "find_spec", lambda _: None)
    code, out, err = run("-m", "hydra/launcher=slurm", "+recipe=tiny", "seed=1,2")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert 'needs hydra-submitit-launcher: install it with pip install "bitnet-train[slurm]"' in err


def test_without_slurm_it_is_one_sentence(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = run("-m", "hydra/launcher=slurm", "+recipe=tiny", "seed=1,2")
    assert (code, err.count("\n")) == (2, 1), err
    assert "hydra/launcher=slurm cannot submit the jobs:" in err


def test_a_typo_stops_the_sweep_before_anything_is_submitted(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    code, _, err = run("-m", "hydra/launcher=slurm", "+recipe=tiny", "optimizer.lrr=1,2")
    assert (code, err.count("\n")) == (2, 1)
    assert "optimizer.lrr is not a configuration key" in err
    assert not (tmp_path / "runs").exists()


def resources(*overrides: str, **launcher: Any) -> dict[str, Any]:
    config = OmegaConf.to_object(compose_node("+recipe=tiny", *overrides))
    return slurm_launch.resources(config, launcher)


def test_jobs_take_what_the_cluster_settings_say() -> None:
    found = resources(
        "cluster.time=01:30:30", "cluster.memory=64G", "cluster.modules=[cuda]", "cluster.setup=['export X=1']",
        "cluster.sbatch=['--exclusive','--mail-type=END']",
    )  # fmt: skip
    assert found == {
        "timeout_min": 91, "nodes": 1, "tasks_per_node": 1, "gpus_per_node": 1,
        "setup": ["module load cuda", "export X=1"],
        "additional_parameters": {"requeue": True, "mem": "64G", "exclusive": True, "mail-type": "END"},
    }  # fmt: skip
    assert "gpus_per_node" not in resources("trainer.accelerator=cpu")
    assert "requeue" not in resources("cluster.max_requeues=0")["additional_parameters"]


def test_what_is_set_for_the_launcher_wins() -> None:
    found = resources("cluster.memory=64G", timeout_min=5, mem_gb=3, gpus_per_node=2, setup=["true"],
                      additional_parameters={"comment": "x"})  # fmt: skip
    assert found["timeout_min"] == 5
    assert "gpus_per_node" not in found
    assert found["setup"] == ["true"]
    assert found["additional_parameters"] == {"requeue": True, "comment": "x"}


@pytest.mark.parametrize(
    ("overrides", "launcher", "sentence"),
    [
        (["cluster.container=/x.sif"], {}, "goes on in this Python and not in cluster.container"),
        (["cluster.python=python"], {}, "goes on in this Python and not in cluster.python"),
        ([], {"nodes": 2}, "hydra.launcher.nodes=2: set cluster.nodes"),
    ],
)
def test_what_a_launcher_cannot_do_is_refused(overrides: list[str], launcher: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        resources(*overrides, **launcher)


class FakeJob:
    """A job of submitit that leaves ``result`` in its file, or nothing."""

    def __init__(self, folder: Path, number: int, result: Any) -> None:
        self.job_id = f"7_{number}"
        file = folder / f"{number}.pkl"
        if result is not None:
            file.write_bytes(pickle.dumps(result))
        self.paths = SimpleNamespace(result_pickle=file, stdout=folder / f"{number}.out")

    def task(self, number: int) -> "FakeJob":
        assert number == 0
        return self


def test_every_job_is_waited_for_whatever_becomes_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setattr(slurm_launch, "INTERVAL", 0.001)
    monkeypatch.setattr(slurm_launch, "PATIENCE", 0.01)
    good, failed = JobReturn(), JobReturn()
    good.status, good.return_value = JobStatus.COMPLETED, Result(0, "", "runs/a")
    failed.status, failed.return_value = JobStatus.FAILED, ValueError("no")
    jobs = [FakeJob(tmp_path, n, r) for n, r in enumerate(
        [None, ("success", good), ("error", "Traceback\nMemoryError: all"), ("success", failed), None]
    )]  # fmt: skip
    looks = iter([{"7_0": "RUNNING"}, None, {"7_0": "PENDING", "7_4": "COMPLETING"}])
    monkeypatch.setattr(slurm_launch, "queue_states", lambda _: next(looks, {"7_4": "OUT_OF_MEMORY"}))
    heard: list[Result] = []
    returns = slurm_launch.wait_for_all(jobs, [f"seed={n}" for n in range(5)], heard.append)
    ended = [one.return_value for one in returns]
    assert [one.code for one in ended] == [1, 0, 1, 1, 1]
    assert "seed=0: its SLURM job 7_0 ended without a result (gone)" in ended[0].sentence
    assert ended[1].folder == "runs/a"
    assert "seed=2: MemoryError: all; it prints to" in ended[2].sentence
    assert "seed=3: ValueError('no')" in ended[3].sentence
    assert "ended without a result (out_of_memory)" in ended[4].sentence
    assert {id(one) for one in heard} == {id(one) for one in ended}


def test_the_states_of_jobs_come_from_squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "squeue"
    program.write_text('#!/bin/bash\necho "7_0 RUNNING"\necho "7_1 FAILED"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert slurm_launch.queue_states({"7"}) == {"7_0": "RUNNING", "7_1": "FAILED"}
    program.write_text('#!/bin/bash\necho "slurm_load_jobs error: Invalid job id specified" >&2\nexit 1\n')
    assert slurm_launch.queue_states({"7"}) == {}
    program.write_text('#!/bin/bash\necho "Unable to contact slurm controller" >&2\nexit 1\n')
    assert slurm_launch.queue_states({"7"}) is None
    assert compose_config("+recipe=tiny").cluster.max_requeues == 100
