"""Real faults: a disk that is full, rights that are missing, hooks between the steps of a run."""

import contextlib
import csv
import ctypes
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet_train.training.module import TrainingModule
from tests.pages import no_pages
from tests.training.conftest import InProcess, workspace, write_corpus

__all__ = ["no_pages", "workspace"]
DISK = 6 << 20
RUN = ("trainer.max_steps=9", "samples.every_steps=2", "telemetry.every_steps=2")
# What must be the same bit for bit, by step, and the samples.
Figures = tuple[dict[str, tuple[str, ...]], str]
COLUMNS = ("train/loss", "val/loss", "val/bits_per_byte", "lr", "grad_norm", "clip_threshold", "codes/zeros")


def figures(run: Path) -> Figures:
    """Of the run in a folder."""
    with (run / "metrics.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len({row["step"] for row in rows}) == len(rows)
    return {row["step"]: tuple(row[c] for c in COLUMNS) for row in rows}, (run / "samples.md").read_text()


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Figures:
    """The figures of the run RUN that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    write_corpus(folder)
    code, output = InProcess(folder).run(*RUN, "run_name=a")
    assert code == 0, output
    return figures(folder / "runs/a")


class Place(InProcess):
    """Runs in this process; ``at_step[n]`` is called before step n + 1 (each once)."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.at_step: dict[int, Callable[[], Any]] = {}

    def refused(self, *arguments: str) -> str:
        """The sentence of a command that must end with exit code 2 and without a traceback."""
        code, output = self.run(*arguments)
        assert code == 2, output
        assert "Traceback" not in output
        last = output.strip().splitlines()[-1]
        assert last.startswith("bitnet_train: ")
        return last

    def done(self, *arguments: str) -> str:
        """The output of a command that must succeed."""
        code, output = self.run(*arguments)
        assert code == 0, output
        return output


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    write_corpus(tmp_path)
    made = Place(tmp_path)
    plain = TrainingModule.training_step

    def training_step(module: TrainingModule, batch: Any, batch_idx: int) -> torch.Tensor:
        action = made.at_step.pop(module.global_step, None)
        if action is not None:
            action()
        return plain(module, batch, batch_idx)

    monkeypatch.setattr(TrainingModule, "training_step", training_step)
    return made


class Disk:
    """A small disk of its own, or, where nothing can be mounted, files that cannot grow."""

    def __init__(self, folder: Path, mounted: bool) -> None:
        self.folder, self.mounted = folder, mounted
        self.filler = folder / "filler"
        self.limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, leave: int = 0) -> None:
        """No room but ``leave`` bytes."""
        if not self.mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max(1, leave), self.limit[1]))
            return
        with contextlib.suppress(OSError), self.filler.open("wb", buffering=0) as stream:
            while True:
                stream.write(b"x" * 4096)
        size = self.filler.stat().st_size
        with self.filler.open("r+b") as stream:
            stream.truncate(max(0, size - leave))

    def free(self) -> None:
        """Room again."""
        if self.mounted:
            self.filler.unlink(missing_ok=True)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, self.limit)


@pytest.fixture
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = getattr(request, "param", "tmpfs") == "tmpfs"
    if mounted:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("only root can mount a tmpfs")
    made = Disk(folder, mounted)
    try:
        yield made
    finally:
        made.free()
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def without_root_rights() -> Iterator[None]:
    """Inside, the modes of files count for root too (CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH are put away)."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    before = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == 0
    after = (ctypes.c_uint32 * 6)(*before)
    after[0] &= ~0b110
    assert libc.capset(header, after) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0
