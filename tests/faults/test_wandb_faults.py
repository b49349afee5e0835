"""W&B that cannot be reached, has no disk, or breaks: a run goes on and says so."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers.logger import Logger

from bitnet_train.training.loggers import wandb as ours
from bitnet_train.training.loggers.config import WandbLogger
from bitnet_train.training.loggers.wandb import Tolerant
from tests.faults.conftest import Disk, Place

pytest.importorskip("wandb")
COMMAND = ("trainer.max_steps=6", "samples.every_steps=null", "run_name=a", "logger=wandb")


# wandb keeps a service process and threads: commands run in processes of their own.
CHILD = """
import os, shutil, sys
from pathlib import Path
from bitnet_train.__main__ import answer
from bitnet_train.training.loggers import wandb as ours
from bitnet_train.training.module import PretrainingModule
ours.INIT_TIMEOUT = 3.0
filler = sys.argv[1]
plain = PretrainingModule.training_step
def training_step(module, batch, index):
    if filler != "none" and module.global_step == 2:
        try:
            with open(filler, "wb", buffering=0) as stream:
                while True:
                    stream.write(b"x" * 4096)
        except OSError:
            pass
    return plain(module, batch, index)
PretrainingModule.training_step = training_step
sys.exit(answer(sys.argv[2:]))
"""


def trained(place: Place, environment: dict[str, str], filler: str, *arguments: str) -> str:
    """The output of a run that must end well."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    clean |= {"HOME": str(place.folder), "NETRC": str(place.folder / "netrc"), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", CHILD, filler, *place.command(*COMMAND, *arguments)[3:]]
    done = subprocess.run(command, cwd=place.folder, env=clean, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["step"] for row in place.rows("a")] == [str(i) for i in range(1, 7)]
    return done.stdout


def test_without_the_network_a_run_is_kept_offline(place: Place) -> None:
    key = "0123456789" * 4
    output = trained(place, {"WANDB_API_KEY": key, "WANDB_BASE_URL": "http://127.0.0.1:9"}, "none", "data.workers=1")
    assert "W&B: offline, because W&B cannot be reached (" in output
    assert "upload later with: wandb sync runs/a/wandb/offline-run-*" in output
    files = list((place.folder / "runs/a/wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 1
    assert files[0].stat().st_size > 0
    for path in (place.folder / "runs").rglob("*"):
        assert not path.is_file() or key.encode() not in path.read_bytes(), path


def test_a_full_disk_of_wandb_costs_no_step(place: Place, disk: Disk) -> None:
    # All but the checkpoints and metrics.csv are on the disk that fills.
    run = place.folder / "runs/a"
    for name in ("checkpoints", "metrics.csv"):
        (place.folder / name).mkdir() if name == "checkpoints" else (place.folder / name).touch()
    (disk.folder / "a").mkdir()
    run.parent.mkdir()
    run.symlink_to(disk.folder / "a")
    for name in ("checkpoints", "metrics.csv"):
        (run / name).symlink_to(place.folder / name)
    output = trained(place, {}, str(disk.filler))
    assert output.count("warning: W&B: its disk is full, so metrics from here on may be missing there") == 1


class Breaking(Logger):
    """A logger that raises at everything."""

    name, version = "x", ""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        raise RuntimeError("the service died\nand more")

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        raise BrokenPipeError("gone")

    def save(self) -> None:
        raise OSError(28, "No space left on device")


def test_whatever_wandb_raises_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    logger = Tolerant(Breaking(), tmp_path, said.append)
    for _ in range(3):
        logger.log_hyperparams({})
        logger.log_metrics({"a": 1.0}, 1)
        logger.save()
        logger.finalize("success")
    assert said == ["warning: W&B: it fails (gone); training goes on, and metrics.csv has everything"]


def test_where_wandb_cannot_even_start_it_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lightning.pytorch.loggers as loggers

    class Never(Logger):
        name, version = "x", ""

        def __init__(self, **_: Any) -> None:
            super().__init__()

        @property
        def experiment(self) -> Any:
            raise OSError(30, "Read-only file system")

        def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...
        def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None: ...

    monkeypatch.setattr(loggers, "WandbLogger", Never)
    logger, line = ours.build_wandb(WandbLogger(), "a", tmp_path, {})
    assert line == "warning: W&B is left out: [Errno 30] Read-only file system"
    logger.log_metrics({"a": 1.0}, 1)
