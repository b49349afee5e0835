"""A training run of an image classifier, from configuration to finished folder."""

from pathlib import Path

import lightning as L
import torch
from rich.console import Console

from bitnet_train.data.images.sources import ImageSplits
from bitnet_train.errors import ConfigError
from bitnet_train.kernels.backend import choose_backend
from bitnet_train.nn.vision.model import build_classifier
from bitnet_train.planning.flops import device_peak, training_flops_per_image
from bitnet_train.quant.spec import build_spec
from bitnet_train.training.callbacks.guard import GuardWatch
from bitnet_train.training.callbacks.metrics import TrainingMetrics
from bitnet_train.training.callbacks.mirror import mirrors
from bitnet_train.training.callbacks.progress import TrainingProgress
from bitnet_train.training.callbacks.quantisation import Quantisation
from bitnet_train.training.callbacks.step import TrainingClock
from bitnet_train.training.callbacks.stop import StopOnSignal
from bitnet_train.training.config import RunConfig, step_plan
from bitnet_train.training.device import choose
from bitnet_train.training.distributed import group
from bitnet_train.training.distributed.checkpoints import build_checkpoints
from bitnet_train.training.distributed.watchdog import Watchdog
from bitnet_train.training.fit import (
    Ending,
    TrainingOutcome,
    build_loggers,
    build_trainer,
    conclude,
    describe,
    fill_no_memory,
    fit,
    until_it_need_not_go_back,
)
from bitnet_train.training.guard.events import cut_rollbacks, resume_point
from bitnet_train.training.out_of_memory import is_out_of_memory
from bitnet_train.training.provenance import collect_provenance
from bitnet_train.training.run_folder import RunFolder
from bitnet_train.training.telemetry.layers import LayerTelemetry, cut_layers
from bitnet_train.training.vision.datamodule import ImageDataModule
from bitnet_train.training.vision.module import ClassificationModule
from bitnet_train.training.vision.validation import ImageValidation


def train_classifier(
    cfg: RunConfig,
    folder: RunFolder,
    run_name: str,
    splits: ImageSplits,
    start: Path | None,
    first: int,
    fork: Path | None,
    console: Console,
) -> TrainingOutcome:
    """Train ``cfg`` in ``folder`` on ``splits``, from checkpoint ``start`` (of step ``first``) or from new weights.

    Everything else is as in :func:`bitnet_train.training.run.train`.
    """
    return until_it_need_not_go_back(
        lambda path, step: _train_from(cfg, folder, run_name, splits, path, step, fork, console),
        folder,
        start,
        first,
        fork,
    )


def _train_from(
    cfg: RunConfig,
    folder: RunFolder,
    run_name: str,
    splits: ImageSplits,
    start: Path | None,
    first: int,
    fork: Path | None,
    console: Console,
) -> TrainingOutcome:
    """Train until the end, a signal, or a return to the last checkpoint, which is in divergence.jsonl by then."""
    images, plan = cfg.images, step_plan(cfg)
    console.print(
        f"data: {images.source.name}, {len(splits.train):,} training and {len(splits.validation):,} validation images "
        f"of {images.image_size} x {images.image_size} x {images.channels}, {images.classes} classes",
        markup=False,
    )
    if first >= cfg.trainer.max_steps and (first or start is not None):
        console.print(f"already at step {first} of {cfg.trainer.max_steps}: nothing left to train")
        return TrainingOutcome(first, None, 0)

    choices = choose(cfg)
    kernels = choose_backend(choices.device, cfg.kernels.backend)
    classifier = build_classifier(cfg.classifier, build_spec(cfg.quant), cfg.init, cfg.seed, kernels.backend)
    quantisation = Quantisation(cfg, classifier)
    remembered = describe(classifier, choices, kernels, console)
    quantisation.set(first)
    rollbacks = group.from_first(lambda: cut_rollbacks(folder.divergence_file, first))
    data = ImageDataModule(images, splits, plan, cfg.seed, resume_point(rollbacks, first))
    epochs = cfg.trainer.max_steps * plan.batch_sequences / len(splits.train)
    console.print(
        f"run: {folder.path}, steps {first} to {cfg.trainer.max_steps} of {plan.batch_sequences:,} images "
        f"({plan.words}), {epochs:.2f} epochs",
        markup=False,
    )
    module = ClassificationModule(cfg, classifier, choices.compile)
    loggers = build_loggers(cfg, folder, run_name, first, console)
    if group.first():
        cut_layers(folder.layers_file, first)
    remembered |= {"data_fingerprint": data.fingerprint, "from_step": first, "micro_batch": plan.micro_batch}
    folder.add_provenance(collect_provenance({**choices.as_dict(), **remembered}))

    clock = TrainingClock()
    peak = device_peak(torch.cuda.get_device_name()) if choices.device == "cuda" else None
    metrics = TrainingMetrics(clock, training_flops_per_image(cfg.classifier), peak)
    validation = ImageValidation(clock, data)
    checkpoints = build_checkpoints(cfg, clock, folder.checkpoints, start, fork)
    stop = StopOnSignal(checkpoints)
    guard = GuardWatch(console)
    callbacks: list[L.Callback] = [
        metrics,
        validation,
        LayerTelemetry(clock, folder.layers_file, console),
        TrainingProgress(console, metrics, validation),
        guard,  # before the checkpoint, which is not saved when the run goes back
        checkpoints,
        *mirrors(cfg.checkpoint.mirror, run_name, checkpoints, folder, cfg.checkpoint.keep, console),
        stop,
        quantisation,
        Watchdog(folder.path, cfg.trainer.hang_timeout),
    ]
    fill_no_memory()
    trainer = build_trainer(cfg, choices, plan, loggers, callbacks, folder)
    try:
        fit(trainer, module, data, start)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        there = f"{folder.last_checkpoint} is intact" if folder.last_checkpoint else "nothing was saved yet"
        raise ConfigError(
            f"Out of memory in step {trainer.global_step + 1} with {plan.micro_batch} images at once: set "
            f"trainer.micro_batch to a smaller divisor of data.batch_size={plan.batch_sequences}, or choose a smaller "
            f"model; {there}."
        ) from None
    ending = Ending(trainer.global_step, checkpoints, stop, guard)
    return conclude(ending, validation.result, data, rollbacks, cfg.guard.max_rollbacks, folder, console)
