"""Ends a run that hangs, with the stacks of all processes, and one whose other processes have failed."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L

from bitnet_train.durable import reason
from bitnet_train.training.callbacks.step import StepCallback
from bitnet_train.training.distributed import group
from bitnet_train.training.distributed.launch import LOST
from bitnet_train.training.module import TrainingModule

# The exit code of a run that was ended because no step did.
HUNG = 5
# Seconds between two looks at the clock and at what the others say.
LOOK_EVERY = 1.0
# Seconds that the others have to write their stacks, or to end by themselves when one has failed.
GRACE = 10.0


class Watchdog(StepCallback):
    """A thread beside training. When no step has ended for ``minutes`` (validation, texts and saving included), every
    process writes the stacks of its threads to ``folder``/hang-rankR.txt (to the standard error where that cannot be),
    the first one says so, and all end with exit code 5, also where writing never returns. The first step may take three
    times as long: compilers and caches are cold.

    Whatever ``minutes`` is, a process ends with the others when one of them has failed: on a GPU it would wait for them
    in a collective.

    Args:
        folder: of the run.
        minutes: None for any time.
        end: ends the process at once.
    """

    def __init__(self, folder: Path, minutes: float | None, end: Callable[[int], Any] = os._exit) -> None:
        self.folder, self.minutes, self.end = folder, minutes, end
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._step, self._since, self._first = 0, time.monotonic(), True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.start(trainer.global_step)

    def start(self, step: int) -> None:
        """Begin to watch, after ``step`` steps."""
        self._step, self._since, self._first = step, time.monotonic(), True
        if self.minutes is not None or group.world() > 1:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def on_step_end(self, trainer: L.Trainer, module: TrainingModule, step: int) -> None:
        self.beat(step)

    def beat(self, step: int) -> None:
        """A step has ended."""
        self._step, self._since, self._first = step, time.monotonic(), False

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.stop()

    def stop(self) -> None:
        """Watch no longer."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _watch(self) -> None:
        failed_since: float | None = None
        while not self._stop.wait(LOOK_EVERY):
            allowed = None if self.minutes is None else self.minutes * 60 * (3 if self._first else 1)
            late = allowed is not None and time.monotonic() - self._since > allowed
            if late or group.told("hang") is not None:
                self._hung()
                return
            failure = group.announced()
            if failure is None:
                continue
            failed_since = failed_since or time.monotonic()
            # The main thread finds out by itself where a broken connection is an error.
            if time.monotonic() - failed_since > GRACE:
                if failure[1] != LOST:  # else the launcher says it
                    self._say(failure[0])
                self.end(failure[1])
                return

    def _hung(self) -> None:
        # Whatever made the run hang, a dead file server for one, may stop this thread at any of the lines that follow.
        last_resort = threading.Timer(2 * GRACE, self.end, (HUNG,))
        last_resort.daemon = True
        last_resort.start()
        group.tell("hang", str(group.rank()))
        self._say(
            f"Stopped: no step has ended for {self.minutes:g} minutes after step {self._step} (trainer.hang_timeout). "
            f"What every process was doing is in {self.folder}/hang-rank*.txt; the last checkpoint is intact, and the "
            "same command goes on from it."
        )
        self._write_stacks()
        if group.world() > 1:
            time.sleep(GRACE)  # a process that ends takes the others' connections with it
        self.end(HUNG)
        last_resort.cancel()

    def _write_stacks(self) -> None:
        path = self.folder / f"hang-rank{group.rank()}.txt"
        title = f"process {group.rank()} of {group.world()}, after step {self._step}"
        try:
            with path.open("w") as stream:
                stream.write(f"{title}\n\n")
                stream.flush()
                faulthandler.dump_traceback(stream, all_threads=True)
        except OSError as error:
            with contextlib.suppress(OSError, ValueError):
                print(f"{path} cannot be written ({reason(error)}): {title}", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)

    def _say(self, sentence: str) -> None:
        if group.first():
            with contextlib.suppress(OSError, ValueError):  # nobody can read it
                print(f"bitnet_train: {sentence}", file=sys.stderr, flush=True)
