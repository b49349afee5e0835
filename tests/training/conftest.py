"""A workspace with a small corpus and a model that trains in a second, driven through the command line."""

import csv
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from bitnet_train.__main__ import answer
from tests.pages import no_pages, pages

__all__ = ["no_pages", "pages"]

# Small enough for a second of training; every part of a real run is in it.
SETTINGS = (
    "+recipe=tiny",
    "data=files",
    "data.tokenizer.vocab_size=320",
    "data.sequence_length=32",
    "data.corpus.validation_every=10",
    "model.hidden=32",
    "model.layers=2",
    "model.heads=2",
    "model.kv_heads=2",
    "model.ffn=64",
    "optimizer=adamw",
    "optimizer.lr=4e-3",
    "trainer.batch_tokens=256",
    "trainer.compile=false",
    "trainer.log_every=1",
    "trainer.validate_every=5",
    "samples.every_steps=5",
    "samples.max_new_tokens=8",
    "checkpoint.every_steps=3",
)


class Workspace:
    """A folder with a corpus, in which commands run as processes of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # One thread: a model this small only waits for a second one, and much longer when the machine is busy.
        self.threads = "1"

    def command(self, *arguments: str) -> list[str]:
        """A command on the workspace's recipe; commands on a finished run take that run's settings."""
        on_a_run = any(argument.startswith("run=") for argument in arguments)
        recipe = () if on_a_run else (*SETTINGS, f"data.corpus.path={self.folder}/corpus")
        return [sys.executable, "-m", "bitnet_train", *recipe, *arguments]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
        return subprocess.Popen(
            self.command(*arguments),
            cwd=self.folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a process group of its own, as a terminal gives it
            env={**environment, "OMP_NUM_THREADS": self.threads},
        )

    def run(self, *arguments: str) -> tuple[int, str]:
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=480)
        return process.returncode, output

    def rows(self, run: str) -> list[dict[str, str]]:
        with (self.folder / "runs" / run / "metrics.csv").open(newline="") as stream:
            return list(csv.DictReader(stream))

    def losses(self, run: str) -> dict[str, tuple[str, ...]]:
        """What must be the same bit for bit, by step."""
        columns = (
            "train/loss",
            "val/loss",
            "val/bits_per_byte",
            "lr",
            "grad_norm",
            "clip_threshold",
            "codes/flips",
            "codes/zeros",
        )
        rows = self.rows(run)
        assert len({row["step"] for row in rows}) == len(rows)
        return {row["step"]: tuple(row[column] for column in columns) for row in rows}

    def signal_at(
        self, process: subprocess.Popen[str], run: str, step: int, number: signal.Signals, group: bool = False
    ) -> str:
        """Send a signal (to the whole process group) once the checkpoint of ``step`` lies there; what was printed."""
        checkpoint = self.folder / "runs" / run / "checkpoints" / f"step-{step:08d}.ckpt"
        self._wait(lambda: checkpoint.exists() or process.poll() is not None)
        (os.killpg if group else os.kill)(process.pid, number)
        return process.communicate(timeout=480)[0]

    @staticmethod
    def _wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 480
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.005)


class InProcess(Workspace):
    """A workspace whose ``run`` stays in the test's own process, which saves the five seconds that importing Lightning
    takes; what a run sets for the whole process is put back. ``start`` makes a process nevertheless."""

    def run(self, *arguments: str) -> tuple[int, str]:
        before, threads, output = Path.cwd(), torch.get_num_threads(), io.StringIO()
        os.chdir(self.folder)
        torch.set_num_threads(int(self.threads))
        try:
            with redirect_stdout(output), redirect_stderr(output):
                code = answer(self.command(*arguments)[3:])
        finally:
            os.chdir(before)
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(False)
        return code, output.getvalue()


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    write_corpus(tmp_path)
    return InProcess(tmp_path)


def write_corpus(folder: Path) -> None:
    """40 small texts in ``folder/corpus``."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for i in range(40):
        lines = [f"line {j} of text {i}: {'abc' * (j % 5)} the quick brown fox {i * j}\n" for j in range(30)]
        (corpus / f"{i:02d}.txt").write_text("".join(lines))
