"""Training metrics: a row every ``trainer.log_every`` steps, to every logger."""

import math
from pathlib import Path
from typing import Any

import lightning as L

from bitnet_train.errors import DivergedError
from bitnet_train.training.callbacks.step import StepCallback, TrainingClock, due, flush_loggers
from bitnet_train.training.config import consumed_by, step_size
from bitnet_train.training.module import TrainingModule
from bitnet_train.training.poison import batch_of, note, sentence
from bitnet_train.training.rates import rates
from bitnet_train.training.run_folder import RunFolder


class TrainingMetrics(StepCallback):
    """Writes loss, rates, gradient norm, throughput and code statistics of the step at hand.

    Args:
        clock: counts training time.
        flops_per_unit: of a forward and backward, per token or image; with ``peak_flops`` (of the device, or None)
            gives the share of it.

    Raises DivergedError (exit code 3) when the loss or the gradient norm of a logged step is not finite, unless the
    guard skipped that step.
    """

    def __init__(self, clock: TrainingClock, flops_per_unit: float, peak_flops: float | None) -> None:
        self.clock, self.flops_per_unit, self.peak_flops = clock, flops_per_unit, peak_flops
        self.row: dict[str, float] = {}
        self._last_seconds, self._last_step = 0.0, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._last_seconds, self._last_step = self.clock.seconds(), trainer.global_step

    def _due(self, module: TrainingModule, step: int) -> bool:
        return step == 1 or due(step, module.cfg.trainer.log_every, module.cfg.trainer.max_steps)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        if self._due(pl_module, trainer.global_step + 1):
            pl_module.code_cache.measure_next()

    def on_step_end(self, trainer: L.Trainer, module: TrainingModule, step: int) -> None:
        if not self._due(module, step):
            return
        assert module.step_loss is not None
        assert module.clip_result is not None
        at = rates(module.cfg, step - 1)
        loss, norm = float(module.step_loss), float(module.clip_result.norm)
        now = self.clock.seconds()
        unit, done = step_size(module.cfg).unit, consumed_by(module.cfg, step)
        rate = (done - consumed_by(module.cfg, self._last_step)) / max(now - self._last_seconds, 1e-9)
        self._last_seconds, self._last_step = now, step
        self.row = {
            unit: done,
            "train/loss": loss,
            **{name: float(value) for name, value in module.step_parts.items()},
            "lr": at.lr,
            "weight_decay": at.weight_decay,
            "grad_norm": norm,
            "clip_threshold": float(module.clip_result.threshold),
            "grad_norm_clipped": float(module.clip_result.clipped),
            f"{unit}_per_second": round(rate, 1),
            "elapsed_seconds": round(now, 2),
        }
        if module.guard is not None:
            self.row["skipped"] = int(module.guard.skipped)
        if self.peak_flops:
            self.row["model_flops_share"] = rate * self.flops_per_unit / self.peak_flops
        statistics = module.code_cache.statistics if module.code_cache else None
        if statistics is not None:
            self.row |= {"codes/zeros": statistics.zero_share(), "codes/flips": statistics.flip_rate()}
        for logger in trainer.loggers:
            logger.log_metrics(self.row, step)
        bad = -1 if module.first_bad is None else int(module.first_bad)
        if bad < 0:
            return
        flush_loggers(trainer)
        file = RunFolder(Path(trainer.default_root_dir)).divergence_file
        batch = batch_of(trainer.datamodule, bad)  # type: ignore[attr-defined]
        note(file, "non_finite", bad, loss if bad == step else math.nan, norm if bad == step else math.nan, batch)
        since = "" if bad == step else f", and first were not finite in step {bad}"
        raise DivergedError(
            f"Stopped at step {step}: the loss is {loss:g} and the gradient norm {norm:g}{since}. Step {bad} read "
            f"{sentence(batch, file)}. The last checkpoint is intact; lower optimizer.lr, lengthen schedule.warmup or "
            "clip harder, and start a new run; or let guard.skip_non_finite=true skip such steps."
        )
