"""The progress bar: loss, throughput, share of the device's peak, time left; plain lines where there is no terminal."""

import time

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bitnet_train.training.callbacks.metrics import TrainingMetrics
from bitnet_train.training.callbacks.step import StepCallback
from bitnet_train.training.callbacks.validation import Validation
from bitnet_train.training.module import PretrainingModule

SECONDS_BETWEEN_LINES = 15.0


class TrainingProgress(StepCallback):
    """Shows the figures of :class:`TrainingMetrics` and :class:`Validation`."""

    def __init__(self, console: Console, metrics: TrainingMetrics, validation: Validation) -> None:
        self.console, self.metrics, self.validation = console, metrics, validation
        self._bar: Progress | None = None
        self._shown: object = None
        self._line_at = 0.0
        self._start = (0, 0.0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        assert isinstance(pl_module, PretrainingModule)
        self._start = (trainer.global_step, time.monotonic())
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

    def on_step_end(self, trainer: L.Trainer, module: PretrainingModule, step: int) -> None:
        total = module.cfg.trainer.max_steps
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, figures=self._figures())
        if self.validation.result is not None and self.validation.result is not self._shown:
            self._shown = self.validation.result
            self.console.print(
                f"step {step:>6}/{total}  validation loss {self._shown.loss:.4f}  "
                f"[bold]{self._shown.bits_per_byte:.4f} bits per byte[/bold]{self._by_corpus()}"
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
        parts = [f"loss {row['train/loss']:.4f}", f"{row['tokens_per_second']:,.0f} tokens/s"]
        if "model_flops_share" in row:
            parts.append(f"{row['model_flops_share']:.1%} of peak")
        if self.validation.result is not None:
            parts.append(f"val {self.validation.result.bits_per_byte:.3f} bpb")
        return "  ".join(parts)

    def _by_corpus(self) -> str:
        found = self.validation.by_corpus
        return f" ({', '.join(f'{name} {loss.bits_per_byte:.4f}' for name, loss in found.items())})" if found else ""

    def _left(self, step: int, total: int) -> str:
        done, seconds = step - self._start[0], time.monotonic() - self._start[1]
        left = int(seconds / max(done, 1) * (total - step))
        return f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
