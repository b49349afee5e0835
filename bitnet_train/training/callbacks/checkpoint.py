"""Checkpoints by steps and by time, written so that a crash at any moment leaves the last good one whole."""

import contextlib
import math
import os
import shutil
import time
from pathlib import Path

import lightning as L
import torch

from bitnet_train.nn.decoder import Decoder
from bitnet_train.training.callbacks.step import StepCallback, TrainingClock, due
from bitnet_train.training.module import TrainingModule
from bitnet_train.training.run_folder import LAST


class Checkpoints(StepCallback):
    """Saves ``step-XXXXXXXX.ckpt`` and points ``last.ckpt`` to it; keeps the newest ``checkpoint.keep``.

    A file is written under another name, synced and renamed. Metrics of the steps before are on disk by then. A state
    whose loss or gradient norm is not finite is not saved, and none while the guard skips steps, which a rollback would
    come back to: the first step that is applied is saved in its place (or the last of the run).
    """

    def __init__(self, clock: TrainingClock, folder: Path) -> None:
        self.clock, self.folder = clock, folder
        self.saved_step = -1
        self._owed = False
        self._saved_at = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.folder.mkdir(parents=True, exist_ok=True)
        for partial in self.folder.glob("*.partial"):
            partial.unlink()
        self._saved_at = time.monotonic()

    def on_step_end(self, trainer: L.Trainer, module: TrainingModule, step: int) -> None:
        cfg = module.cfg.checkpoint
        overdue = self.overdue(cfg.every_minutes)
        last = step == module.cfg.trainer.max_steps
        if overdue or due(step, cfg.every_steps, module.cfg.trainer.max_steps) or last or self._owed:
            self._owed = not self.save(trainer, module, step, last) and module.guard is not None

    def overdue(self, minutes: float | None) -> bool:
        """Whether the last save was so many minutes ago; None: never."""
        return minutes is not None and time.monotonic() - self._saved_at >= minutes * 60

    def save(self, trainer: L.Trainer, module: TrainingModule, step: int, last: bool = False) -> bool:
        """Save the state after ``step``, the ``last`` of the run or not, unless that is done already; False when the
        state is not worth keeping."""
        if step == self.saved_step:
            return True
        if not _worth_keeping(module, last):
            return False
        with self.clock.paused():
            for logger in trainer.loggers:
                logger.save()
            path = self.folder / f"step-{step:08d}.ckpt"
            partial = path.with_suffix(".partial")
            trainer.save_checkpoint(partial)
            _sync(partial)
            partial.replace(path)
            point_last_to(path)
            self._prune(module.cfg.checkpoint.keep)
        self.saved_step, self._saved_at = step, time.monotonic()
        return True

    def _prune(self, keep: int) -> None:
        for old in sorted(self.folder.glob("step-*.ckpt"))[:-keep]:
            old.unlink()


def save_untrained(folder: Path, decoder: Decoder, fingerprint: str) -> None:
    """Save a decoder before its first step as ``step-00000000.ckpt``, to be exported; a run starts anew from it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "step-00000000.ckpt"
    partial = path.with_suffix(".partial")
    state = {f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}
    torch.save({"state_dict": state, "global_step": 0, "ShardDataModule": {"fingerprint": fingerprint}}, partial)
    _sync(partial)
    partial.replace(path)
    point_last_to(path)


def point_last_to(path: Path) -> None:
    """Make last.ckpt beside ``path`` the same file, in one atomic rename; a copy where hard links do not work."""
    last, partial = path.with_name(LAST), path.with_name("last.partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(path, partial)
    except OSError:
        shutil.copyfile(path, partial)
        _sync(partial)
    partial.replace(last)


def _worth_keeping(module: TrainingModule, last: bool) -> bool:
    guard = module.guard
    if guard is not None and guard.skipped_last():
        # The weights are those of the last step that was applied; at the end nothing can come back to them.
        return last and not guard.going_back
    return _finite(module) and not (guard is not None and guard.going_back)


def _finite(module: TrainingModule) -> bool:
    figures = [module.step_loss, module.clip_result.norm if module.clip_result else None]
    return all(math.isfinite(float(f)) for f in figures if isinstance(f, torch.Tensor))


def _sync(path: Path) -> None:
    with path.open("rb") as stream, contextlib.suppress(OSError):
        os.fsync(stream.fileno())
