"""Copies of checkpoints elsewhere (``checkpoint.mirror``), made while training goes on."""

import queue
import threading
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console

from bitnet_train.errors import ConfigError
from bitnet_train.storage import (
    CHECKPOINTS,
    Remote,
    complete_steps,
    fetch_run,
    put_checkpoint,
    reason,
    remove_checkpoint,
)
from bitnet_train.training.callbacks.checkpoint import Checkpoints
from bitnet_train.training.callbacks.step import StepCallback
from bitnet_train.training.module import TrainingModule
from bitnet_train.training.run_folder import RunFolder

# How long the end of a run waits for its last copy.
LAST_COPY_SECONDS = 600.0


class Mirror(StepCallback):
    """Copies what :class:`Checkpoints` has saved to ``<checkpoint.mirror>/<run_name>``, in a thread of its own.

    A checkpoint there is whole when its marker, with size and digest, is there; ``checkpoint.keep`` of them stay, and
    the one to which a guard would go back. A copy that is overtaken by the next checkpoint before it began is left out.
    What fails is said and never stops the run: the next checkpoint is another attempt.
    """

    def __init__(self, checkpoints: Checkpoints, folder: RunFolder, url: str, keep: int, console: Console) -> None:
        self.checkpoints, self.folder, self.keep, self.console = checkpoints, folder, keep, console
        self.remote = Remote(url)
        self.copied_step = -1
        self._seen_step = -1
        self._waiting: queue.Queue[tuple[int, Any] | None] = queue.Queue()
        self._thread: threading.Thread | None = None

    def on_step_end(self, trainer: L.Trainer, module: TrainingModule, step: int) -> None:
        self._note(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Copy what was saved last, as on a signal, and wait for it."""
        self._note(trainer)
        if self._thread is None:
            return
        self._waiting.put(None)
        self._thread.join(LAST_COPY_SECONDS)
        if self._thread.is_alive():
            self._say(f"takes longer than {LAST_COPY_SECONDS:.0f} s: the copy of step {self._seen_step} is given up")
        self._thread = None

    def _note(self, trainer: L.Trainer) -> None:
        step = self.checkpoints.saved_step
        path = self.checkpoints.folder / f"step-{step:08d}.ckpt"
        # A folder of shards appears when all processes have written theirs, some steps later.
        if step == self._seen_step or step < 0 or not trainer.is_global_zero or not path.exists():
            return
        self._seen_step = step
        # A file is opened now: pruning may remove its name while it is copied. Of shards there may be too many.
        source = path if path.is_dir() else path.open("rb")
        while not self._waiting.empty():
            try:
                overtaken = self._waiting.get_nowait()
            except queue.Empty:
                break
            if overtaken is not None:
                _close(overtaken[1])
                self._say(f"is slower than checkpoints are saved: step {overtaken[0]} is not copied")
        self._waiting.put((step, source))
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="checkpoint.mirror", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while (job := self._waiting.get()) is not None:
            step, source = job
            try:
                self._copy(step, source)
                self.copied_step = step
            except FileNotFoundError:  # of a folder of shards
                self._say(f"is slower than checkpoints are saved: step {step} is not copied")
            except OSError as error:
                self._say(f"cannot be written: {reason(error)}. Step {step} is only in {self.checkpoints.folder}")
            finally:
                _close(source)

    def _copy(self, step: int, source: Any) -> None:
        for path in sorted(self.folder.path.rglob("*")):
            relative = path.relative_to(self.folder.path).as_posix()
            if path.is_file() and not relative.startswith((f"{CHECKPOINTS}/", "export/", ".")):
                with path.open("rb") as small:
                    self.remote.put(small, relative)
        put_checkpoint(self.remote, step, source)
        for old in list(complete_steps(self.remote, self.remote.files()))[self.keep :]:
            if old < step and old != self.checkpoints.good_step:
                remove_checkpoint(self.remote, old)

    def _say(self, what: str) -> None:
        self.console.print(f"warning: checkpoint.mirror={self.remote.url} {what}; training goes on", markup=False)


def _close(source: Any) -> None:
    if not isinstance(source, Path):
        source.close()


def mirror_url(mirror: str, run_name: str) -> str:
    """Where a run is mirrored."""
    return f"{mirror.rstrip('/')}/{run_name}"


def mirrors(
    mirror: str | None, run_name: str, checkpoints: Checkpoints, folder: RunFolder, keep: int, console: Console
) -> list[L.Callback]:
    """The callback for ``checkpoint.mirror``, or none."""
    return [] if mirror is None else [Mirror(checkpoints, folder, mirror_url(mirror, run_name), keep, console)]


def restore(mirror: str, run_name: str, folder: RunFolder, older: bool, console: Console) -> None:
    """Fill a run folder without checkpoints from its mirror, if that has any, with all of them or the newest alone.

    Raises ConfigError when the mirror cannot be read: the run might be there, and would begin again.
    """
    remote = Remote(mirror_url(mirror, run_name))
    try:
        step, remarks = fetch_run(remote, folder.path, older=older)
    except OSError as error:
        raise ConfigError(
            f"checkpoint.mirror={mirror} cannot be read ({reason(error)}), and {folder.path} has no checkpoint to go "
            "on from: try again later, or leave checkpoint.mirror out to begin."
        ) from None
    for remark in remarks:
        console.print(f"warning: {remark}", markup=False)
    if step is not None:
        console.print(f"restored from {remote.url}: step {step}", markup=False)
