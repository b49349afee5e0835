"""The progress bar: loss, throughput, share of the device's peak, time left; plain lines where there is no terminal."""

import time
from typing import Protocol

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bitnet_train.training.callbacks.metrics import TrainingMetrics
from bitnet_train.training.callbacks.step import StepCallback
from bitnet_train.training.config import step_size
from bitnet_train.training.module import TrainingModule

SECONDS_BETWEEN_LINES = 15.0


class Validated(Protocol):
    """What a validation found."""

    @property
    def loss(self) -> float: ...
    @property
    def figure(self) -> str: ...
    @property
    def short(self) -> str: ...


class Validates(Protocol):
    """A callback that validates; ``result`` is the last result, ``parts`` what it is made of, in words."""

    @property
    def result(self) -> Validated | None: ...
    @property
    def parts(self) -> str: ...


class TrainingProgress(StepCallback):
    """Shows the figures of :class:`TrainingMetrics` and the validation."""

    def __init__(self, console: Console, metrics: TrainingMetrics, validation: Validates) -> None:
        self.console, self.metrics, self.validation = console, metrics, validation
        self.unit = "tokens"
        self._bar: Progress | None = None
        self._shown: Validated | None = None
        self._line_at = 0.0
        self._start = (0, 0.0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        assert isinstance(pl_module, TrainingModule)
        self._start = (trainer.global_step, time.monotonic())
        self.unit = step_size(pl_module.cfg).unit
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._bar.add_task(
                "train", total=pl_module.cfg.trainer.max_steps, completed=trainer.global_step, figures=""
            )
            self._bar.start()

    def on_step_end(self, trainer: L.Trainer, module: TrainingModule, step: int) -> None:
        total = module.cfg.trainer.max_steps
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, figures=self._figures())
        if self.validation.result is not None and self.validation.result is not self._shown:
            self._shown = self.validation.result
            self.console.print(
                f"step {step:>6}/{total}  validation loss {self._shown.loss:.4f}  "
                f"[bold]{self._shown.figure}[/bold]{self.validation.parts}"
            )
        elif self._bar is None and self.metrics.row and time.monotonic() - self._line_at > SECONDS_BETWEEN_LINES:
            self._line_at = time.monotonic()
            self.console.print(f"step {step:>6}/{total}  {self._figures()}  {self._left(step, total)}")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _figures(self) -> str:
        row = self.metrics.row
        if not row:
            return "starting"
        parts = [f"loss {row['train/loss']:.4f}", f"{row[f'{self.unit}_per_second']:,.0f} {self.unit}/s"]
        if "model_flops_share" in row:
            parts.append(f"{row['model_flops_share']:.1%} of peak")
        if self.validation.result is not None:
            parts.append(f"val {self.validation.result.short}")
        return "  ".join(parts)

    def _left(self, step: int, total: int) -> str:
        done, seconds = step - self._start[0], time.monotonic() - self._start[1]
        left = int(seconds / max(done, 1) * (total - step))
        return f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
