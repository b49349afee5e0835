"""Says which steps the guard skipped, and asks for a return to the last checkpoint."""

from pathlib import Path

import lightning as L
import torch
from rich.console import Console
from torch import Tensor

from bitnet_train.errors import DivergedError
from bitnet_train.training.callbacks.step import StepCallback, due, flush_loggers
from bitnet_train.training.guard.rule import REMEMBERED, Guard, describe
from bitnet_train.training.module import TrainingModule
from bitnet_train.training.poison import batch_of, note, sentence
from bitnet_train.training.run_folder import RunFolder


class LateReader:
    """Reads a number from the device one call late, so that the host waits for a step that is long done."""

    def __init__(self, value: int) -> None:
        self._value = value
        self._copies: list[tuple[Tensor, torch.cuda.Event]] = []

    def read(self, tensor: Tensor) -> int:
        """The value of the ``tensor`` that the last call got (of the first call: the constructor's)."""
        if not tensor.is_cuda:
            before, self._value = self._value, int(tensor)
            return before
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        copy.copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._copies.append((copy, event))
        if len(self._copies) == 1:
            return self._value
        done, event = self._copies.pop(0)
        event.synchronize()
        return int(done)


class GuardWatch(StepCallback):
    """Prints the steps that were skipped since the last logged step, and stops a run that must go back.

    ``reason`` is set, and training stopped, when ``guard.rollback_after`` steps in a row were skipped. That is read one
    step late (at the last step at once), on every device, so that the GPU never waits and the step is the same
    everywhere.

    Raises DivergedError (exit code 3) at a logged step when a run that never goes back skipped ``guard.window`` steps
    in a row.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.reason: str | None = None
        self._said = 0
        self._in_a_row = LateReader(0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        guard = pl_module.guard
        if isinstance(guard, Guard):
            self._said, self._in_a_row = int(guard.skipped), LateReader(int(guard.in_a_row))

    def on_step_end(self, trainer: L.Trainer, module: TrainingModule, step: int) -> None:
        guard, cfg = module.guard, module.cfg.trainer
        if guard is None:
            return
        if guard.cfg.rollback_after is not None:
            in_a_row = self._in_a_row.read(guard.in_a_row)
            if step == cfg.max_steps:
                in_a_row = max(in_a_row, int(guard.in_a_row))
            if in_a_row >= guard.cfg.rollback_after:
                self._say(trainer, guard, step)
                self.reason = describe(guard.recent_steps(step - 1 - in_a_row))
                guard.going_back = True
                trainer.should_stop = True
        if step == 1 or due(step, cfg.log_every, cfg.max_steps):
            self._say(trainer, guard, step)
            self._give_up(trainer, guard, step)

    def _say(self, trainer: L.Trainer, guard: Guard, step: int) -> None:
        total = int(guard.skipped)
        new, self._said = total - self._said, total
        if new:
            steps = guard.recent_steps()[-min(new, REMEMBERED) :]
            more = f"the last {REMEMBERED} of {new}: " if new > REMEMBERED else ""
            file = RunFolder(Path(trainer.default_root_dir)).divergence_file
            for bad in steps:
                batch = batch_of(trainer.datamodule, bad.step)  # type: ignore[attr-defined]
                note(file, "skipped", bad.step, bad.loss, bad.norm, batch)
            self.console.print(
                f"guard: skipped {more}{describe(steps)}; {total} of {step} steps so far; the last read "
                f"{sentence(batch, file)}",
                markup=False,
            )

    def _give_up(self, trainer: L.Trainer, guard: Guard, step: int) -> None:
        in_a_row = int(guard.in_a_row)
        if guard.cfg.rollback_after is not None or in_a_row < guard.cfg.window:
            return
        flush_loggers(trainer)
        raise DivergedError(
            f"Stopped at step {step}: the guard skipped the last {in_a_row} steps, among them "
            f"{describe(guard.recent_steps(step - in_a_row))}. Start again, or fork from a checkpoint of before "
            "(resume.from=RUN@STEP), with a lower optimizer.lr, harder clipping or a larger guard.outlier_sigma, or "
            "with guard.rollback_after to leave the bad samples out."
        )
