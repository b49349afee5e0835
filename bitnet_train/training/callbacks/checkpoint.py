"""Checkpoints by steps and by time, written so that a crash at any moment leaves the last good one whole."""

import contextlib
import errno
import io
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO

from bitnet_train.durable import reason, replace_durably, sync_folder
from bitnet_train.errors import ConfigError
from bitnet_train.nn.decoder import Decoder
from bitnet_train.training.callbacks.step import StepCallback, TrainingClock, due
from bitnet_train.training.distributed import group
from bitnet_train.training.distributed.checkpoint_files import read_outline
from bitnet_train.training.guard.rule import Guard
from bitnet_train.training.module import TrainingModule
from bitnet_train.training.run_folder import LAST

# What a disk says that has no room left.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Checkpoints(StepCallback):
    """Saves ``step-XXXXXXXX.ckpt`` and points ``last.ckpt`` to it; keeps the newest ``checkpoint.keep``.

    A file is written under another name, synced and renamed, and so is the folder; the archive that ``torch.save``
    writes holds a checksum of each of its records, which whoever reads it compares. Metrics of the steps before are on
    disk by then. A state whose loss or gradient norm is not finite is not saved.

    A run with a guard goes back to checkpoints of ``checkpoint.every_steps`` alone, the last of which is kept beside
    the newest. Such a one is not saved while the guard skips steps: the first step that is applied is saved in its
    place. ``start`` is the checkpoint that training begins from, and ``fork`` that of another run with which this one
    began, if any, which was its first good state.
    """

    def __init__(self, clock: TrainingClock, folder: Path, start: Path | None = None, fork: Path | None = None) -> None:
        self.clock, self.folder, self.start, self.fork = clock, folder, start, fork
        self.saved_step = -1
        self.good_step = 0
        self._said_gone = False
        self._saved_at = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.folder.mkdir(parents=True, exist_ok=True)
        for partial in self.folder.glob("*.partial"):
            remove(partial)
        trainer.strategy.checkpoint_io = WholeFile()
        self.remember_good(trainer, pl_module)
        self._saved_at = time.monotonic()

    def remember_good(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Read once what the guard's state says, so that no step waits for the device."""
        guard = module.guard
        if isinstance(guard, Guard):
            good = int(guard.good_step)
            if self.start is not None and self.start.parent != self.folder:
                guard.good_step.fill_(trainer.global_step)
            elif not group.from_first(lambda: self._is_there(good)):
                # As after a restore from elsewhere. What the run starts from is there.
                guard.good_step.fill_(trainer.global_step)
                if group.first():
                    print(
                        f"WARNING: the checkpoint of step {good}, to which the guard would go back, is gone: step "
                        f"{trainer.global_step} takes its place",
                        flush=True,
                    )
            self.good_step = int(guard.good_step)

    def _is_there(self, step: int) -> bool:
        """Whether the run can go back to a step."""
        if step == 0 or step_path(self.folder, step).exists():
            return True
        try:
            return self.fork is not None and int(read_outline(self.fork)[0]["global_step"]) == step
        except Exception:  # whatever a file may hold that is no checkpoint any more
            return False

    def begin(self, trainer: L.Trainer) -> None:
        """What every process does at the start, also one that writes nothing."""
        self._seen, self._saved_at = trainer.global_step, time.monotonic()

    def saved(self, step: int) -> None:
        """Remember that the state after ``step`` is saved, or will be."""
        self.saved_step, self._saved_at = step, time.monotonic()

    def on_step_end(self, trainer: L.Trainer, module: TrainingModule, step: int) -> None:
        cfg, guard = module.cfg.checkpoint, module.guard
        overdue = self.overdue(cfg.every_minutes)
        last = step == module.cfg.trainer.max_steps
        scheduled = due(step, cfg.every_steps, last=0)
        if guard is not None and cfg.every_steps is not None:
            # Also when it was due before and steps have been skipped since.
            if step - step % cfg.every_steps > self.good_step and not guard.skipped_last() and worth_keeping(module):
                self.good_step = step
                guard.good_step.fill_(step)
                scheduled = True
            else:
                scheduled = False
        if overdue or scheduled or last:
            self.save(trainer, module, step)

    def overdue(self, minutes: float | None) -> bool:
        """Whether the last save was so many minutes ago; None: never."""
        return minutes is not None and time.monotonic() - self._saved_at >= minutes * 60

    def save(self, trainer: L.Trainer, module: TrainingModule, step: int) -> bool:
        """Save the state after ``step`` unless that is done already; False when the state is not worth keeping.

        Raises ConfigError, with all that was saved before in its place, when the disk does not take it.
        """
        if step == self.saved_step:
            return True
        if not worth_keeping(module):
            return False
        path = self.folder / f"step-{step:08d}.ckpt"
        partial = path.with_suffix(".partial")
        with self.clock.paused():
            self.check_and_log(trainer, step)
            try:
                trainer.save_checkpoint(partial)
                replace_durably(partial, path)
                point_last_to(path)
                prune(self.folder, path, module.cfg.checkpoint.keep, self.good_step)
            except OSError as error:
                with contextlib.suppress(OSError):
                    partial.unlink()
                raise ConfigError(self.not_saved(step, error)) from None
        self.saved_step, self._saved_at = step, time.monotonic()
        return True

    def check_and_log(self, trainer: L.Trainer, step: int) -> None:
        """What comes before a checkpoint: nothing is saved that was trained on changed data, or without its metrics.

        Raises ConfigError, which says where to go on.
        """
        self._check_data(trainer)
        try:
            for logger in trainer.loggers:
                logger.save()
        except OSError as error:
            raise ConfigError(self.not_saved(step, error)) from None

    def _check_data(self, trainer: L.Trainer) -> None:
        check = getattr(trainer.datamodule, "check_unchanged", None)  # type: ignore[attr-defined]
        gone = [] if check is None else check()
        if gone and not self._said_gone:
            self._said_gone = True
            print(
                f"WARNING: the token shard {gone[0]} is gone{f', and {len(gone) - 1} more' if gone[1:] else ''}: the "
                "run goes on with what it has open; restore it",
                flush=True,
            )

    def not_saved(self, step: int, error: OSError) -> str:
        """The sentence for a disk that does not take the checkpoint of ``step``."""
        there = sorted(self.folder.glob("step-*.ckpt"))
        before = f"{there[-1]} is intact, and the same command goes on from it" if there else "nothing was saved before"
        what = "lower checkpoint.keep or free space" if error.errno in FULL else "make the folder writable"
        if error.errno is None:  # a library's own words
            what = "free space or make the folder writable"
        return f"The checkpoint of step {step} cannot be written to {self.folder} ({reason(error)}): {what}; {before}."


class WholeFile(TorchCheckpointIO):
    """Writes a checkpoint straight to its file.

    Lightning's own goes through a copy in memory and a temporary file elsewhere, which a kill leaves behind. Raises
    OSError when the disk does not take it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_archive(checkpoint, Path(path))


def write_archive(content: dict[str, Any], path: Path) -> None:
    """``torch.save`` to ``path``; raises OSError when the disk does not take it."""
    stream = _Remembering(path)
    try:
        with stream:
            torch.save(content, stream)
    except RuntimeError:
        # torch's writer says "unexpected pos" and the like for a failed write.
        if stream.error is not None:
            raise stream.error from None
        raise


class _Remembering(io.FileIO):
    """A file to write that keeps the first error, which torch's archive writer swallows."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w")
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """All of ``data``: a disk that is nearly full takes a part."""
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view):
                done += super().write(view[done:]) or 0
        except OSError as error:
            self.error = self.error or error
            raise
        return done


def prune(folder: Path, newest: Path, keep: int, good_step: int = 0) -> None:
    """Leave ``newest``, which was just written, the ``keep`` - 1 before it, and that of ``good_step``.

    What lies there of later steps, broken files or those of a branch that was left, goes first.
    """
    good = step_path(folder, good_step)
    there = sorted(folder.glob("step-*.ckpt"))
    for old in [*(p for p in there if p > newest), *(p for p in there if p <= newest)][: max(0, len(there) - keep)]:
        if old not in (newest, good):
            remove(old)


def step_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step-{step:08d}.ckpt"


def forget_later(folder: Path, step: int) -> None:
    """Remove what was saved after ``step``, which the run goes back to, so that last.ckpt is that one."""
    good = step_path(folder, step)
    if good.is_dir():
        point_last_to_folder(good)
    elif good.exists():
        point_last_to(good)
    else:
        remove(folder / LAST)
    for later in folder.glob("step-*.ckpt"):
        if later > good:
            remove(later)


def remove(path: Path) -> None:
    """Delete a checkpoint, a file or a folder of shards, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def save_untrained(folder: Path, decoder: Decoder, fingerprint: str) -> None:
    """Save a decoder before its first step as ``step-00000000.ckpt``, to be exported; a run starts anew from it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "step-00000000.ckpt"
    partial = path.with_suffix(".partial")
    state = {f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}
    content = {"state_dict": state, "global_step": 0, "ShardDataModule": {"fingerprint": fingerprint}}
    write_archive(content, partial)
    replace_durably(partial, path)
    point_last_to(path)


def point_last_to(path: Path) -> None:
    """Make last.ckpt beside ``path`` the same file, in one atomic rename; a copy where hard links do not work."""
    last, partial = path.with_name(LAST), path.with_name("last.partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(path, partial)
    except OSError:
        shutil.copyfile(path, partial)
    replace_durably(partial, last)


def point_last_to_folder(path: Path) -> None:
    """Make last.ckpt beside ``path`` a link to it, in one atomic rename."""
    last, partial = path.with_name(LAST), path.with_name("last.partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(path.name)
    partial.replace(last)
    sync_folder(last.parent)


def worth_keeping(module: TrainingModule) -> bool:
    """Whether the run may go on from the state after the step at hand."""
    guard = module.guard
    if guard is not None and guard.going_back:
        return False
    # Of a skipped step, the weights are those of the last step that was applied.
    return (guard is not None and guard.skipped_last()) or _finite(module)


def _finite(module: TrainingModule) -> bool:
    figures = [module.step_loss, module.clip_result.norm if module.clip_result else None]
    before = module.first_bad is not None and int(module.first_bad) >= 0
    return not before and all(math.isfinite(float(f)) for f in figures if isinstance(f, torch.Tensor))
