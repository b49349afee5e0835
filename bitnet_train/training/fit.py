"""What the training runs of all models have in common: Lightning's trainer, the loggers, and how a run ends."""

import gc
import logging
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.loggers.logger import Logger
from rich.console import Console

from bitnet_train.evaluation.bits_per_byte import TextLoss
from bitnet_train.evaluation.classification import ImageLoss
from bitnet_train.kernels.backend import BackendChoice
from bitnet_train.nn.audit import audit
from bitnet_train.nn.decoder import Decoder
from bitnet_train.nn.vision.base import Classifier
from bitnet_train.training.batch_warmup import BatchPlan
from bitnet_train.training.callbacks.checkpoint import Checkpoints, step_path
from bitnet_train.training.callbacks.guard import GuardWatch
from bitnet_train.training.callbacks.stop import StopOnSignal
from bitnet_train.training.config import RunConfig
from bitnet_train.training.device import Choices
from bitnet_train.training.distributed import group
from bitnet_train.training.distributed.strategy import several_processes
from bitnet_train.training.faults import in_one_sentence
from bitnet_train.training.guard.events import Rollback, go_back
from bitnet_train.training.loggers.config import WandbLogger
from bitnet_train.training.loggers.metrics_csv import MetricsCsv
from bitnet_train.training.module import TrainingModule
from bitnet_train.training.run_folder import RunFolder

# What Lightning and our own callback handle.
HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class TrainingOutcome:
    """How a run ended: the steps done, the last validation, 0 or the exit code of the signal that stopped it, whether
    the last step is saved, and the step of the checkpoint that the run has to go back to, if any."""

    step: int
    validation: TextLoss | ImageLoss | None
    exit_code: int
    saved: bool = True
    back_to: int | None = None


def until_it_need_not_go_back(
    attempt: Callable[[Path | None, int], TrainingOutcome],
    folder: RunFolder,
    start: Path | None,
    first: int,
    fork: Path | None,
) -> TrainingOutcome:
    """``attempt(start, first)``, and again from a good checkpoint as often as the guard wants the run to go back.

    Each attempt makes everything anew from its checkpoint (of step ``first``; None: from the initial weights), which is
    the run's own or ``fork``, the one of another run that it began with.
    """
    while True:
        outcome = attempt(start, first)
        if outcome.back_to is None:
            return outcome
        first = outcome.back_to
        own = step_path(folder.checkpoints, first)
        start = None if first == 0 else own if own.exists() else fork
        gc.collect()  # before the next model is made: Lightning's objects refer to each other
        torch.compiler.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class CountsSamples(Protocol):
    """A data module that knows the samples of every step."""

    def samples_before(self, step: int) -> int:
        """Training samples before optimizer step ``step`` (from 0)."""


@dataclass(frozen=True)
class Ending:
    """Where training stopped: the last step, and the callbacks that decide what follows."""

    step: int
    checkpoints: Checkpoints
    stop: StopOnSignal
    guard: GuardWatch


def conclude(
    ending: Ending,
    result: TextLoss | ImageLoss | None,
    data: CountsSamples,
    rollbacks: list[Rollback],
    allowed: int,
    folder: RunFolder,
    console: Console,
) -> TrainingOutcome:
    """The outcome of a run that stopped by itself or by a signal; a return to a checkpoint is written down.

    ``result`` is the last validation's, ``rollbacks`` those before, of ``allowed``. Raises DivergedError when the guard
    wants one more.
    """
    step, checkpoints = ending.step, ending.checkpoints
    good = checkpoints.good_step
    if ending.guard.reason is None or ending.stop.exit_code:
        return TrainingOutcome(step, result, ending.stop.exit_code, checkpoints.saved_step == step)
    consumed = data.samples_before(step)
    rollback = Rollback(step, good, consumed, consumed - data.samples_before(good), f"skipped {ending.guard.reason}")
    group.from_first(lambda: go_back(rollback, rollbacks, allowed, folder, console))
    return TrainingOutcome(step, None, 0, False, good)


def describe(
    network: Decoder | Classifier, choices: Choices, kernels: BackendChoice, console: Console
) -> dict[str, Any]:
    """Say what the model is and how it is computed, and return that for provenance.json."""
    counts = audit(network)
    console.print(f"model: {counts.sentence()}")
    for line in (*choices.sentences(), f"kernels: {kernels.backend.name} ({kernels.reason})"):
        console.print(line, markup=False)
    remembered: dict[str, Any] = {"kernels": kernels.backend.name}
    if counts.quantised_linears:
        dx, dw = network.spec.gradient.resolve("bf16" if choices.precision == "bf16-mixed" else "fp32")
        console.print(f"gradients: dX in {dx}, dW in {dw} (quant.gradient)", markup=False)
        remembered["gradients"] = {"dx": dx, "dw": dw}
    return remembered


def fill_no_memory() -> None:
    """Leave fresh memory as it is in PyTorch's deterministic mode, which fills it for debugging."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def build_trainer(
    cfg: RunConfig,
    choices: Choices,
    plan: BatchPlan,
    loggers: list[Logger],
    callbacks: list[L.Callback],
    folder: RunFolder,
) -> L.Trainer:
    """Lightning's trainer for one run."""
    with _quiet_lightning():
        return L.Trainer(
            # On a CPU a continued run is the same bit for bit. Compiled code would add the embedding's gradients up in
            # whatever order its threads arrive in; PyTorch's deterministic mode does not.
            deterministic=choices.device == "cpu",
            accelerator=choices.device,
            **several_processes(cfg),
            precision=choices.precision,  # type: ignore[arg-type]
            max_steps=cfg.trainer.max_steps,
            max_epochs=-1,
            accumulate_grad_batches=plan.accumulation,
            use_distributed_sampler=False,
            logger=loggers,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder.path,
        )


def fit(trainer: L.Trainer, module: TrainingModule, data: L.LightningDataModule, start: Path | None) -> None:
    """Train from the checkpoint ``start``, or from the beginning. Raises KeyboardInterrupt for a second Ctrl-C."""
    with _quiet_lightning(), _own_signals():
        try:
            trainer.fit(module, datamodule=data, ckpt_path=start, weights_only=True)
        except SystemExit as error:  # what Lightning makes of Ctrl-C
            if isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            raise
        except Exception as error:
            said = in_one_sentence(error, RunFolder(Path(trainer.default_root_dir)), trainer.global_step + 1)
            if said is None:
                raise
            raise said from None


def build_loggers(cfg: RunConfig, folder: RunFolder, run_name: str, first: int, console: Console) -> list[Logger]:
    """metrics.csv, its rows past step ``first`` cut, and what ``cfg.logger`` adds; the first process has them."""
    if not group.first():
        return []
    metrics_csv = MetricsCsv(folder.metrics_file, lambda line: console.print(line, markup=False))
    metrics_csv.cut(first)
    if not isinstance(cfg.logger, WandbLogger):
        return [metrics_csv]
    from bitnet_train.training.loggers.wandb import build_wandb

    wandb_logger, where = build_wandb(cfg.logger, run_name, folder.path, _plain(cfg))
    console.print(where, markup=False)
    return [metrics_csv, wandb_logger]


def _plain(cfg: RunConfig) -> dict[str, Any]:
    return {k: v for k, v in asdict(cfg).items() if k != "logger"}


@contextmanager
def _own_signals() -> Iterator[None]:
    """Signals do afterwards what they did before: a handler of Lightning's that stayed would swallow a SIGTERM, and
    keep the trainer and all that it holds in memory."""
    before = {number: signal.getsignal(number) for number in HANDLED}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Lightning's banners and its warnings about things that are so on purpose stay out of the run's output."""
    names = (
        "lightning.pytorch",
        "lightning.fabric",
        "lightning.pytorch.utilities.rank_zero",
        "lightning.pytorch.accelerators.cuda",
    )
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers.*",
            ".*resuming from a checkpoint that ended before the epoch ended.*",
            ".*no `val_dataloader`.*",
            ".*You defined a `validation_step`.*",
            ".*isinstance.treespec, LeafSpec.*",
            ".*GPU available but not used.*",
            ".*The `srun` command is available.*",
            ".*`broadcast_buffers` is deprecated.*",  # the new name does not exist in older versions
        ):
            warnings.filterwarnings("ignore", message=message)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
