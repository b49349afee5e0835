"""Decides which steps are skipped, and skips them without waiting for the device."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bitnet_train.training.guard.config import GuardConfig

# How many of the last skipped steps are remembered for messages.
REMEMBERED = 16


class SkippedStep(NamedTuple):
    """A step that was skipped (counted from 1), with what it was skipped for."""

    step: int
    loss: float
    norm: float


class Guard(nn.Module):
    """Judges every step by its loss and gradient norm; a module, so that what it remembers is saved.

    A step is skipped when one of the two is not finite (``skip_non_finite``), or when one lies more than
    ``outlier_sigma`` standard deviations above its mean over the last ``window`` steps that were applied, as in the
    SkipStepOptimizer of OLMo-core (github.com/allenai/OLMo-core, optim/skip_step_optimizer.py). Two things differ. The
    statistics there take skipped steps in, so that a long bad stretch becomes the norm. And there a sudden fall is an
    outlier too; ternary training has one by design, when a schedule lowers the learning rate.

    ``good_step`` is the last checkpoint that ``checkpoint.every_steps`` asked for: a function of the steps alone, so
    that an interrupted run, which saved when it was told to stop, goes back to the same place as one that was not.

    ``skipped`` counts all skipped steps, ``in_a_row`` those since the last step that was applied.
    """

    losses: Tensor
    norms: Tensor
    count: Tensor
    skipped: Tensor
    in_a_row: Tensor
    recent: Tensor
    good_step: Tensor

    def __init__(self, cfg: GuardConfig) -> None:
        super().__init__()
        self.cfg = cfg
        # Whether the run goes back to its last checkpoint after the step at hand, so that none must be saved.
        self.going_back = False
        self.register_buffer("losses", torch.zeros(cfg.window))
        self.register_buffer("norms", torch.zeros(cfg.window))
        # The step of the checkpoint that the run goes back to; 0: its initial weights.
        for name in ("count", "skipped", "in_a_row", "good_step"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        self.register_buffer("recent", torch.zeros(REMEMBERED, 3, dtype=torch.float64))

    @torch.no_grad()
    def judge(self, loss: Tensor, norm: Tensor, step: int) -> Tensor:
        """Whether to skip the optimizer step ``step`` (from 0), as a 0-d bool tensor; remembers the step.

        ``loss`` and ``norm`` (before clipping) are 0-d tensors on the guard's device.
        """
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        skip = ~finite if self.cfg.skip_non_finite else torch.zeros_like(finite)
        if self.cfg.outlier_sigma is not None:
            outlier = self._outlier(loss, self.losses) | self._outlier(norm, self.norms)
            skip = skip | (outlier & (self.count >= self.cfg.known_steps))
        applied = finite & ~skip
        slot = (self.count % self.cfg.window).reshape(1)
        for history, value in ((self.losses, loss), (self.norms, norm)):
            history.index_copy_(0, slot, torch.where(applied, value.float(), history[slot].squeeze()).reshape(1))
        self.count += applied
        slot = (self.skipped % REMEMBERED).reshape(1)
        row = torch.stack([torch.full_like(loss, step + 1, dtype=torch.float64), loss.double(), norm.double()])
        self.recent.index_copy_(0, slot, torch.where(skip, row, self.recent[slot].squeeze(0)).reshape(1, 3))
        self.skipped += skip
        self.in_a_row.copy_(torch.where(skip, self.in_a_row + 1, torch.zeros_like(self.in_a_row)))
        return skip

    def _outlier(self, value: Tensor, history: Tensor) -> Tensor:
        """Whether ``value`` lies too far above the steps known; the deviation is that of a sample (n - 1)."""
        assert self.cfg.outlier_sigma is not None
        known = torch.arange(self.cfg.window, device=history.device) < self.count
        number = self.count.clamp(max=self.cfg.window).double()
        past = history.double()
        mean = torch.where(known, past, 0.0).sum() / number
        variance = torch.where(known, (past - mean) ** 2, 0.0).sum() / (number - 1)
        return value.double() - mean > self.cfg.outlier_sigma * variance.sqrt()

    def skipped_last(self) -> bool:
        """Whether the last step was skipped. Waits for the device."""
        return int(self.in_a_row) > 0

    def recent_steps(self, after: int = 0) -> list[SkippedStep]:
        """The last skipped steps past step ``after``, ascending, at most REMEMBERED. Waits for the device."""
        rows = self.recent.tolist()
        return sorted(SkippedStep(int(step), loss, norm) for step, loss, norm in rows if step > after)


def build_guard(cfg: GuardConfig) -> Guard | None:
    """The guard of a configuration, or None when it skips nothing."""
    return Guard(cfg) if cfg.active else None


def skip_step(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """Make the next ``optimizer.step()`` do nothing where ``skip`` (0-d bool) is true.

    Fused optimizers of PyTorch read ``found_inf`` on the device, as they do for torch.amp's GradScaler: parameters,
    moments and step counters then stay as they are, bit for bit. For others the host must know: it waits for the device
    here, and takes the gradients away, without which PyTorch's optimizers leave a parameter and its state alone.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
    elif bool(skip):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


def describe(steps: list[SkippedStep]) -> str:
    """Which steps were skipped and what the last was skipped for, in words."""
    numbers = [s.step for s in steps]
    if len(numbers) > 1 and numbers[-1] - numbers[0] == len(numbers) - 1:
        which = f"steps {numbers[0]} to {numbers[-1]}"
    else:
        which = f"step{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
    last = steps[-1]
    finite = math.isfinite(last.loss) and math.isfinite(last.norm)
    why = "far above the steps before" if finite else "not finite"
    return f"{which} ({why}; the last had loss {last.loss:.4g} and gradient norm {last.norm:.4g})"
