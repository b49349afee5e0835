"""Checkpoints of several processes: a file from DDP; from FSDP2 a folder of shards, written while training goes on."""

import contextlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from bitnet_train.durable import sync_file, sync_folder, write_atomically
from bitnet_train.errors import ConfigError
from bitnet_train.training.callbacks.checkpoint import (
    Checkpoints,
    point_last_to_folder,
    prune,
    remove,
    worth_keeping,
    write_archive,
)
from bitnet_train.training.callbacks.step import TrainingClock
from bitnet_train.training.config import RunConfig, processes
from bitnet_train.training.device import sharded
from bitnet_train.training.distributed import group
from bitnet_train.training.distributed.checkpoint_files import REST, digest_files, take_apart
from bitnet_train.training.module import TrainingModule


def build_checkpoints(
    cfg: RunConfig, clock: TrainingClock, folder: Path, start: Path | None = None, fork: Path | None = None
) -> Checkpoints:
    """The callback that saves, for as many processes and the strategy that ``cfg`` says."""
    if processes(cfg.trainer) == 1:
        return Checkpoints(clock, folder, start, fork)
    return (ShardedCheckpoints if sharded(cfg) else ReplicatedCheckpoints)(clock, folder, start, fork)


class ElsewhereError(Exception):
    """Another process could not write its part of a checkpoint."""


class ReplicatedCheckpoints(Checkpoints):
    """One file, written by the first process; the others have the same state and go on."""

    def overdue(self, minutes: float | None) -> bool:
        return bool(minutes is not None and group.largest(int(super().overdue(minutes)))[0])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if group.first():
            super().on_train_start(trainer, pl_module)
        else:
            self.begin(trainer)
            self.remember_good(trainer, pl_module)

    def save(self, trainer: L.Trainer, module: TrainingModule, step: int) -> bool:
        if group.first():
            return super().save(trainer, module, step)
        if step != self.saved_step:
            if not worth_keeping(module):
                return False
            self.saved(step)
        return True


class ShardedCheckpoints(ReplicatedCheckpoints):
    """A folder, to which every process writes its shards in a thread of its own from a copy on the CPU.

    The step waits for the copy alone, and for the checkpoint before when that is still being written. The folder gets
    its name, and last.ckpt points to it, when all processes have written and synced everything.
    """

    def __init__(self, clock: TrainingClock, folder: Path, start: Path | None = None, fork: Path | None = None) -> None:
        super().__init__(clock, folder, start, fork)
        self._hosts: dist.ProcessGroup | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # Its own, because its collectives run beside those of the step.
        self._hosts = group.new_host_group()
        self._thread = ThreadPoolExecutor(1, "checkpoint")

    def save(self, trainer: L.Trainer, module: TrainingModule, step: int) -> bool:
        """Begin to save; see :meth:`Checkpoints.save`. All raise ConfigError together, also for the save before."""
        if step == self.saved_step:
            return True
        if not worth_keeping(module):
            return False
        assert self._thread is not None
        with self.clock.paused():
            self.wait()
            group.from_first(lambda: self.check_and_log(trainer, step))
            rest, tensors = take_apart(trainer._checkpoint_connector.dump_checkpoint(False))
            copies = {name: _copy(tensor) for name, tensor in tensors.items()}
        path = self.folder / f"step-{step:08d}.ckpt"
        self._writing = self._thread.submit(self._write, path, rest, copies, module.cfg.checkpoint.keep, self.good_step)
        self.saved(step)
        if step == module.cfg.trainer.max_steps:
            self.wait()
        return True

    def wait(self) -> None:
        """Until the last checkpoint is complete. Raises ConfigError when it could not be written."""
        writing, self._writing = self._writing, None
        error: ConfigError | None = None
        if writing is not None:
            try:
                writing.result()
            except ElsewhereError:  # which the other process says
                pass
            except Exception as failure:
                of_disk = failure if isinstance(failure, OSError) else OSError(_first_line(failure))
                error = ConfigError(self.not_saved(self.saved_step, of_disk))
            group.agree(error)

    def _write(self, path: Path, rest: dict[str, Any], tensors: dict[str, Tensor], keep: int, good: int) -> None:
        """In the thread. Raises what failed here, and ElsewhereError when that was in another process alone."""
        partial = path.with_suffix(".partial")

        def make() -> None:
            if group.first():
                partial.mkdir(parents=True, exist_ok=True)

        def write() -> None:
            # Raises in every process when one of them fails.
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(partial), process_group=self._hosts)
            digests = digest_files(partial, group.rank())
            write_atomically(partial / f"files-{group.rank()}.json", json.dumps(digests))

        try:
            # None goes on, to wait for the others, before all have done their part.
            self._together(make)
            self._together(write)
            if group.first():
                write_archive(rest, partial / REST)
                sync_file(partial / REST)
                sync_folder(partial)
                put_folder(partial, path)
                point_last_to_folder(path)
                prune(self.folder, path, keep, good)
        except Exception:
            if group.first():
                with contextlib.suppress(OSError):
                    remove(partial)
            raise

    def _together(self, action: Callable[[], None]) -> None:
        """Do ``action``, and tell each other whether it failed. In the thread."""
        failure: Exception | None = None
        try:
            action()
        except dcp.api.CheckpointException as error:
            causes = [cause for cause, _ in error.failures.values()]
            failure = next((one for one in causes if isinstance(one, OSError)), OSError(_first_line(causes[0])))
        except Exception as error:
            failure = error
        failed = torch.tensor(int(failure is not None))
        dist.all_reduce(failed, dist.ReduceOp.MAX, group=self._hosts)
        if failure is not None:
            raise failure
        if int(failed):
            raise ElsewhereError

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            self.wait()
            thread.shutdown()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        # The others may be gone, and with them the collectives of the thread: what it has begun stays incomplete.
        thread, self._thread = self._thread, None
        if thread is not None:
            with contextlib.suppress(Exception):
                if self._writing is not None and isinstance(exception, KeyboardInterrupt):
                    self._writing.result(timeout=60)
            thread.shutdown(wait=False, cancel_futures=True)


def put_folder(partial: Path, path: Path) -> None:
    """Give a complete folder its name. What had it, a broken checkpoint or one of a branch that was left, goes."""
    if path.exists():
        old = path.with_name(f"{path.stem}.old.partial")
        path.rename(old)
        partial.rename(path)
        sync_folder(path.parent)
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    else:
        partial.rename(path)
        sync_folder(path.parent)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _copy(tensor: Tensor) -> Tensor:
    """A copy on the CPU of a tensor, or of this process's shard of one, that training does not change."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().to("cpu", copy=True)
    local = tensor.to_local().detach().to("cpu", copy=True)
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
