"""Kills at random moments, each followed by the same command: nothing is lost, and the end is that of a calm run.

The moments are drawn from a seed; what each hits depends on the machine's speed, the outcome must not.
"""

import contextlib
import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet_train.durable import check_archive
from tests.training.conftest import SETTINGS, write_corpus

STEPS = 24
TRAIN = (
    *SETTINGS, f"trainer.max_steps={STEPS}", "trainer.validate_every=4", "samples.every_steps=6",
    "checkpoint.every_steps=2", "telemetry.every_steps=5", "checkpoint.keep=2", "paths.data=data", "run_name=a",
)  # fmt: skip
EXPORT = ("command=export", "run=runs/a", "export.formats=[packed,hf-master]", "export.verify_tokens=64")
TIMES = ("tokens_per_second", "model_flops_share", "elapsed_seconds")
KILLS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# Exit codes that a stopped command may end with: killed; Ctrl-C and SIGTERM before or behind the first step.
STOPPED = {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, 130, 143}


class Zygote:
    """The process that commands are forked from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outputs = 0
        clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.torture.zygote"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**clean, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[2],
        )  # fmt: skip

    def run(
        self, *command: str, kill: signal.Signals | None = None, after: float = 0.0, suicide: Any = None
    ) -> tuple[int, str]:
        """The exit code (minus the signal for a killed one) and the output; ``kill`` is sent ``after`` seconds."""
        self.outputs += 1
        output = self.folder / f"output-{self.outputs}.txt"
        request = {"command": command, "output": str(output), "folder": str(self.folder), "suicide": suicide}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        pid = self._answer()["pid"]
        if kill is not None:
            time.sleep(after)
            # A process that is gone cannot be hit: it stays a zombie until the zygote has waited for it.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, kill)
        code = self._answer()["status"]
        return code, output.read_text(errors="replace") if output.exists() else ""

    def _answer(self) -> dict[str, int]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the zygote died"
        answer: dict[str, int] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


@dataclass
class Tally:
    """What was done to the run and what came of it."""

    injected: Counter[str] = field(default_factory=Counter)
    hit: Counter[str] = field(default_factory=Counter)

    def sentence(self) -> str:
        parts = ", ".join(f"{name} {self.hit[name]} of {count}" for name, count in sorted(self.injected.items()))
        total = sum(self.injected.values())
        return f"torture: survived {total} of {total} faults ({sum(self.hit.values())} hit a live process: {parts})"


class Torture:
    """A run that is killed again and again."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random, self.tally = folder, random.Random(seed), Tally()
        write_corpus(folder)
        self.zygote = Zygote(folder)
        self.train = (*TRAIN, f"data.corpus.path={folder}/corpus")
        self.best = 0

    def calm(self) -> float:
        """The undisturbed run and its exports; the seconds that the training took."""
        self._must(*self.train, "run_name=calm")
        begin = time.monotonic()
        self._must(*self.train, "run_name=calm2")
        seconds = time.monotonic() - begin
        self._must(*(line.replace("runs/a", "runs/calm") for line in EXPORT))
        return seconds

    def _must(self, *command: str) -> str:
        code, output = self.zygote.run(*command)
        assert code == 0, output
        return output

    def kill(self, what: str, seconds: float, *command: str) -> None:
        """Run ``command`` and disturb it once, anywhere in its ``seconds``."""
        self.tally.injected[what] += 1
        if what == "write":
            suicide = {"at": self.random.randint(1, 90), "share": self.random.random()}
            code, output = self.zygote.run(*command, suicide=suicide)
        else:
            number = self.random.choice(KILLS)
            code, output = self.zygote.run(*command, kill=number, after=self.random.uniform(0.02, 1.1 * seconds))
        assert code in STOPPED | {0}, (code, output)
        assert "Traceback" not in output, output
        self.tally.hit[what] += code != 0
        self.look(output)

    def look(self, output: str) -> None:
        """Whatever happened, the last good checkpoint is there and nothing went back."""
        folder = self.folder / "runs/a/checkpoints"
        if not folder.is_dir():
            assert self.best == 0, output
            return
        steps = sorted(folder.glob("step-*.ckpt"))
        whole = [path for path in steps if _is_whole(path)]
        assert whole == steps, "a checkpoint under its own name is always whole"
        newest = max((int(path.stem[5:]) for path in whole), default=0)
        assert newest >= self.best, f"went back from step {self.best} to {newest}: {output}"
        self.best = newest
        # Killed before pruning, one more may lie there.
        assert len(steps) <= 3
        if (folder / "last.ckpt").exists():
            assert _is_whole(folder / "last.ckpt")

    def anew(self) -> None:
        """Forget the run (its shards stay): a short one has room for few kills only."""
        (self.folder / "runs/a").rename(self.folder / f"runs/done-{self.zygote.outputs}")
        self.best = 0

    def check_end(self) -> None:
        """The same command once more comes to the calm run's end, bit for bit."""
        output = self._must(*self.train)
        self.look(output)
        assert self.best == STEPS
        run, calm = self.folder / "runs/a", self.folder / "runs/calm"
        assert _rows(run / "metrics.csv") == _rows(calm / "metrics.csv")
        for name in ("samples.md", "layers.csv"):
            assert (run / name).read_text() == (calm / name).read_text()
        assert _same(_load(run), _load(calm))
        left = [p.name for p in (run / "checkpoints").iterdir()]
        assert sorted(left) == ["last.ckpt", f"step-{STEPS - 2:08d}.ckpt", f"step-{STEPS:08d}.ckpt"]
        assert not list(run.glob(".*.partial"))

    def check_exports(self) -> None:
        """The exports are those of the calm run, and nothing half-written is left."""
        self._must(*EXPORT)
        run, calm = self.folder / "runs/a/export", self.folder / "runs/calm/export"
        assert sorted(p.name for p in run.iterdir()) == ["hf-master", "packed"]
        for name in ("packed/model.safetensors", "hf-master/model.safetensors"):
            assert (run / name).read_bytes() == (calm / name).read_bytes()

    def check_data(self) -> None:
        """One folder of shards, whole."""
        assert len(list((self.folder / "data").iterdir())) == 1
        self._must(*self.train, "command=prepare")


def _is_whole(path: Path) -> bool:
    try:
        check_archive(path)
    except ValueError:
        return False
    return True


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(stream)]


def _load(run: Path) -> Any:
    content = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    return {key: content[key] for key in ("state_dict", "optimizer_states", "ShardDataModule", "global_step")}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return set(one) == set(other) and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def torture(folder: Path, prepares: int, trainings: int, writes: int, exports: int, seed: int = 5) -> str:
    """So many kills of each kind; the figure of survived faults."""
    place = Torture(folder, seed)
    try:
        seconds = place.calm()
        for _ in range(prepares):
            place.kill("prepare", 0.6, *place.train, "command=prepare", "data.rebuild=true")
        place.check_data()
        todo = ["training"] * trainings + ["write"] * writes
        place.random.shuffle(todo)
        for what in todo:
            if place.best == STEPS:
                place.check_end()
                place.anew()
            # Most of a start is composing and building: the moments lie in the whole of it.
            place.kill(what, seconds, *place.train)
        place.check_end()
        for _ in range(exports):
            place.kill("export", 2.5, *EXPORT)
        place.check_exports()
    finally:
        place.zygote.close()
    return place.tally.sentence()


def test_six_kills(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = torture(tmp_path, prepares=1, trainings=2, writes=2, exports=1)
    with capsys.disabled():
        print(f"\n{said}")
    assert said.startswith("torture: survived 6 of 6 faults")


@pytest.mark.slow
def test_fifty_kills(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = torture(tmp_path, prepares=8, trainings=16, writes=18, exports=8)
    with capsys.disabled():
        print(f"\n{said}")
    assert said.startswith("torture: survived 50 of 50 faults")
