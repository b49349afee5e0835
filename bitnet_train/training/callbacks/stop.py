"""Ctrl-C, termination, the end of a job's time: finish the optimizer step, save, stop, say so in the exit code."""

import signal
import time
from contextlib import ExitStack

import lightning as L
import torch
import torch.distributed

from bitnet_train import signals
from bitnet_train.cluster.job import stop_time
from bitnet_train.training.callbacks.checkpoint import Checkpoints
from bitnet_train.training.callbacks.step import StepCallback
from bitnet_train.training.module import TrainingModule


class StopOnSignal(StepCallback):
    """The first SIGINT, SIGTERM, SIGUSR1 or SIGUSR2 asks for a stop after the step at hand; a second Ctrl-C stops at
    once, unsaved. So does any of them before the first step has ended, when there is nothing to save. The end of a
    SLURM job's time, less ``cluster.stop_before_end``, is as good as SIGTERM.

    ``exit_code`` is that of the signal once the run has stopped for it, otherwise 0.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.exit_code = 0
        self._deferring = ExitStack()
        self._stop_at: float | None = None
        self._agreement: Agreement | None = None
        self._listens = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        assert isinstance(pl_module, TrainingModule)
        self._stop_at = stop_time(pl_module.cfg.cluster.stop_before_end)
        self._agreement = Agreement() if trainer.world_size > 1 else None
        # After Lightning's connector has installed its own handlers, which would end with exit code 0.
        self._deferring.enter_context(signals.raising())
        self._listens = False

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._deferring.close()

    def on_step_end(self, trainer: L.Trainer, module: TrainingModule, step: int) -> None:
        if not self._listens:
            self._deferring.enter_context(signals.deferring())
            self._listens = True
        number = signals.requested() or 0
        if self._stop_at is not None and time.time() >= self._stop_at:
            number = signal.SIGTERM
        if self._agreement is not None:
            number = self._agreement.exchange(number)
        if not number:
            return
        self.checkpoints.save(trainer, module, step)
        self.exit_code = signals.EXIT_CODES[signal.Signals(number)]
        trainer.should_stop = True


class Agreement:
    """What any rank wants, known to all ranks at the same step: a signal does not reach all of them in the same one.

    The exchange of one step is looked at in the next, so that no rank waits for it; it runs on the CPU (gloo).
    """

    def __init__(self) -> None:
        self._group = torch.distributed.new_group(backend="gloo")
        self._wanted = torch.zeros(1, dtype=torch.int32)
        self._work: torch.distributed.Work | None = None

    def exchange(self, number: int) -> int:
        """The largest ``number`` that the ranks gave in the step before; every rank calls this at every step."""
        agreed = 0
        if self._work is not None:
            self._work.wait()
            agreed = int(self._wanted)
        self._wanted = torch.tensor([number], dtype=torch.int32)
        self._work = torch.distributed.all_reduce(
            self._wanted, torch.distributed.ReduceOp.MAX, self._group, async_op=True
        )
        return agreed
