"""A training run from configuration to finished folder: build, continue or start, fit."""

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers.logger import Logger
from rich.console import Console

from bitnet_train.data.config import MixtureCorpus
from bitnet_train.data.mixture import stages
from bitnet_train.data.shards import Manifest, verify_shards
from bitnet_train.data.tokenizer import load_tokenizer
from bitnet_train.errors import ConfigError
from bitnet_train.evaluation.bits_per_byte import TextLoss
from bitnet_train.export.initial import InitialWeights, check_same_tokenizer, fill_weights
from bitnet_train.kernels.backend import choose_backend
from bitnet_train.nn.audit import audit
from bitnet_train.nn.config import initial_source
from bitnet_train.nn.init import build_decoder
from bitnet_train.nn.layout import learned_scales, parameter_table
from bitnet_train.planning.flops import device_peak, training_flops_per_token
from bitnet_train.quant.spec import build_spec
from bitnet_train.training.callbacks.checkpoint import Checkpoints, save_untrained
from bitnet_train.training.callbacks.guard import GuardWatch
from bitnet_train.training.callbacks.metrics import TrainingMetrics
from bitnet_train.training.callbacks.progress import TrainingProgress
from bitnet_train.training.callbacks.quantisation import Quantisation
from bitnet_train.training.callbacks.samples import Samples, cut_samples
from bitnet_train.training.callbacks.step import TrainingClock
from bitnet_train.training.callbacks.stop import StopOnSignal
from bitnet_train.training.callbacks.tasks import Tasks, cut_evaluations
from bitnet_train.training.callbacks.validation import Validation
from bitnet_train.training.config import RunConfig, batch_plan
from bitnet_train.training.datamodule import ShardDataModule
from bitnet_train.training.device import choose
from bitnet_train.training.guard.events import Rollback, cut_rollbacks, go_back, resume_point
from bitnet_train.training.loggers.config import WandbLogger
from bitnet_train.training.loggers.metrics_csv import MetricsCsv
from bitnet_train.training.micro_batch import find_micro_batch
from bitnet_train.training.module import PretrainingModule
from bitnet_train.training.out_of_memory import is_out_of_memory, training_advice
from bitnet_train.training.provenance import collect_provenance
from bitnet_train.training.run_folder import RunFolder
from bitnet_train.training.sub_norms import insert_sub_norms
from bitnet_train.training.teachers.resume import check_same_teacher
from bitnet_train.training.teachers.teacher import load_teacher
from bitnet_train.training.telemetry.layers import LayerTelemetry, cut_layers


@dataclass(frozen=True)
class TrainingOutcome:
    """How a run ended: the steps done, the last validation, 0 or the exit code of the signal that stopped it, whether
    the last step is saved, and the step of the checkpoint that the run has to go back to, if any."""

    step: int
    validation: TextLoss | None
    exit_code: int
    saved: bool = True
    back_to: int | None = None


def check_start(path: Path, cfg: RunConfig, manifest: Manifest) -> int:
    """The optimizer step of the checkpoint that a run starts from.

    Raises ConfigError when it cannot be read, is of another model, or was trained on other token shards.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        step, fingerprint = int(content["global_step"]), content["ShardDataModule"]["fingerprint"]
        saved = {name: tuple(tensor.shape) for name, tensor in content["state_dict"].items()}
    except Exception as error:
        raise ConfigError(
            f"The checkpoint {path} cannot be read ({type(error).__name__}): remove it to go on from an older one."
        ) from None
    wanted = {f"decoder.{p.name}": p.shape for p in parameter_table(cfg.model)}
    wanted |= {f"decoder.{n}": shape for n, shape in learned_scales(cfg.model, build_spec(cfg.quant)).items()}
    saved = {name: shape for name, shape in saved.items() if name.startswith("decoder.")}
    wrong = next((name for name in {**wanted, **saved} if wanted.get(name) != saved.get(name)), None)
    if wrong is not None:
        raise ConfigError(
            f"The checkpoint {path} is of another model: {wrong.removeprefix('decoder.')} is "
            f"{saved.get(wrong, 'missing')} there and {wanted.get(wrong, 'missing')} in model=."
        )
    if fingerprint != manifest.fingerprint:
        raise ConfigError(
            f"The checkpoint {path} was trained on other token shards (their fingerprint differs): restore the data it "
            "was trained on, or start a new run with another run_name."
        )
    return step


def train(
    cfg: RunConfig,
    folder: RunFolder,
    run_name: str,
    shards: Path,
    manifest: Manifest,
    start: Path | None,
    first: int,
    initial: InitialWeights | None,
    console: Console,
) -> TrainingOutcome:
    """Train ``cfg`` in ``folder`` on prepared ``shards``, from checkpoint ``start`` (of step ``first``, by
    :func:`check_start`), from the weights of ``init.from``, or from new ones.

    Steps already done are not done again: metrics and samples past the checkpoint are cut, and the run goes on
    bit for bit as if it had never stopped. Where the guard has the run go back to its last checkpoint, everything is
    made again from that, as in a new process. Raises ConfigError for input that does not fit and DivergedError when the
    loss stops being a number or the run has gone back too often.
    """
    while True:
        outcome = _train_from(cfg, folder, run_name, shards, manifest, start, first, initial, console)
        if outcome.back_to is None:
            return outcome
        if outcome.back_to != first:
            start, first = folder.last_checkpoint, outcome.back_to
        gc.collect()  # before the next model is made: Lightning's objects refer to each other
        torch.compiler.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _train_from(
    cfg: RunConfig,
    folder: RunFolder,
    run_name: str,
    shards: Path,
    manifest: Manifest,
    start: Path | None,
    first: int,
    initial: InitialWeights | None,
    console: Console,
) -> TrainingOutcome:
    """Train until the end, a signal, or a return to the last checkpoint, which is in divergence.jsonl by then."""
    checked = verify_shards(shards, manifest, cfg.data.verify)
    entry = manifest.splits["train"]
    learnt = f" ({entry['learnt']:,} of them learnt)" if "learnt" in entry else ""
    console.print(f"data: {entry['tokens']:,} training tokens{learnt} in {shards}; checked {checked}", markup=False)
    if first >= cfg.trainer.max_steps and (first or start is not None):
        console.print(f"already at step {first} of {cfg.trainer.max_steps}: nothing left to train")
        return TrainingOutcome(first, None, 0)

    choices = choose(cfg)
    kernels = choose_backend(choices.device, cfg.kernels.backend)
    decoder = build_decoder(cfg.model, build_spec(cfg.quant), cfg.init, cfg.seed, kernels.backend)
    if initial is not None:
        check_same_tokenizer(str(initial_source(cfg.init)), initial.tokenizer, load_tokenizer(shards))
        console.print(f"init: {initial.description}", markup=False)
        if initial.lacks_sub_norms:
            initial, sentence = insert_sub_norms(cfg, initial, shards, manifest, load_tokenizer(shards), choices.device)
            console.print(sentence, markup=False)
        fill_weights(decoder, initial.masters)
    counts = audit(decoder)
    quantisation = Quantisation(cfg, decoder)
    quantisation.set(first)
    console.print(f"model: {counts.sentence()}")
    for line in (*choices.sentences(), f"kernels: {kernels.backend.name} ({kernels.reason})"):
        console.print(line, markup=False)
    remembered: dict[str, Any] = {
        "kernels": kernels.backend.name,
        "data_fingerprint": manifest.fingerprint,
        "from_step": first,
    }
    if counts.quantised_linears:
        dx, dw = decoder.spec.gradient.resolve("bf16" if choices.precision == "bf16-mixed" else "fp32")
        console.print(f"gradients: dX in {dx}, dW in {dw} (quant.gradient)", markup=False)
        remembered["gradients"] = {"dx": dx, "dw": dw}

    tokenizer = load_tokenizer(shards)
    tokenizer.save(folder.tokenizer)  # The run outlives its shards.
    if cfg.evaluate.every_steps is not None:
        from bitnet_train.evaluation.lm_eval_model import check_harness

        check_harness(cfg.evaluate, load=True)
    if cfg.trainer.max_steps == 0:
        save_untrained(folder.checkpoints, decoder, manifest.fingerprint)
        folder.add_provenance(collect_provenance({**choices.as_dict(), **remembered}))
        return TrainingOutcome(0, None, 0)
    teacher = load_teacher(cfg, choices.device, choices.precision, kernels.backend, tokenizer)
    if teacher is not None:
        if start is not None and start.parent == folder.checkpoints:
            check_same_teacher(start, teacher.identity)
        console.print(f"teacher: {teacher.description}", markup=False)
        remembered["teacher"] = teacher.identity
    # On a CPU a continued run is the same bit for bit. Compiled code would add the embedding's gradients up in whatever
    # order its threads arrive in; PyTorch's deterministic mode does not. (Filling fresh memory is for debugging.)
    deterministic = choices.device == "cpu"
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if cfg.trainer.micro_batch == "auto":
        with console.status("finding the largest micro-batch that fits"):
            found = find_micro_batch(
                cfg,
                decoder,
                choices,
                lambda compiled: PretrainingModule(cfg, decoder, tokenizer.bos_id, compiled, teacher),
            )
        console.print(found.sentence(), markup=False)
        remembered["micro_batch_search"] = found.as_dict()
        cfg = replace(cfg, trainer=replace(cfg.trainer, micro_batch=found.size))
    plan = batch_plan(cfg.trainer, cfg.data.sequence_length)
    mixed = stages(cfg.data, cfg.trainer.max_steps) if isinstance(cfg.data.corpus, MixtureCorpus) else None
    rollbacks = cut_rollbacks(folder.divergence_file, first)
    data = ShardDataModule(cfg.data, shards, manifest, plan, cfg.seed, mixed, resume_point(rollbacks, first))
    for line in data.mixture():
        console.print(line, markup=False)
    early = f" after a warm-up of {plan.warmup_text(cfg.data.sequence_length)}" if plan.warmup else ""
    console.print(
        f"run: {folder.path}, steps {first} to {cfg.trainer.max_steps} of {cfg.trainer.batch_tokens:,} tokens "
        f"({plan.accumulation} x {plan.micro_batch} sequences of {cfg.data.sequence_length}){early}, "
        f"{data.epochs(cfg.trainer.max_steps)}",
        markup=False,
    )
    module = PretrainingModule(cfg, decoder, tokenizer.bos_id, choices.compile, teacher)
    loggers = _loggers(cfg, folder, run_name, first, console)
    cut_layers(folder.layers_file, first)
    cut_samples(folder.samples_file, first)
    cut_evaluations(folder.evaluations_file, first)
    remembered["micro_batch"] = plan.micro_batch
    folder.add_provenance(collect_provenance({**choices.as_dict(), **remembered}))

    clock = TrainingClock()
    peak = device_peak(torch.cuda.get_device_name()) if choices.device == "cuda" else None
    metrics = TrainingMetrics(clock, training_flops_per_token(cfg.model, cfg.data.sequence_length), peak)
    validation = Validation(clock, data, tokenizer.byte_lengths())
    checkpoints = Checkpoints(clock, folder.checkpoints)
    stop = StopOnSignal(checkpoints)
    guard = GuardWatch(console)
    callbacks: list[L.Callback] = [
        metrics,
        validation,
        LayerTelemetry(clock, folder.layers_file, console),
        Samples(clock, tokenizer, folder.samples_file),
        TrainingProgress(console, metrics, validation),
        guard,  # before the checkpoint, which is not saved when the run goes back
        checkpoints,
        # Behind the checkpoint: what other people's tasks may raise costs no step.
        Tasks(clock, tokenizer, folder.evaluations_file),
        stop,
        quantisation,
    ]
    with _quiet_lightning():
        trainer = L.Trainer(
            deterministic=deterministic,
            accelerator=choices.device,
            devices=1,
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
        try:
            trainer.fit(module, datamodule=data, ckpt_path=start, weights_only=True)
        except SystemExit as error:  # what Lightning makes of Ctrl-C
            if isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            raise
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            done = checkpoints.saved_step if checkpoints.saved_step >= 0 else first
            saved = f"{folder.last_checkpoint} (step {done})" if folder.last_checkpoint is not None else None
            learning = decoder.training
            step = trainer.global_step + learning
            raise ConfigError(training_advice(plan, cfg.data.sequence_length, step, saved, learning)) from None
    step = trainer.global_step
    good = checkpoints.saved_step if checkpoints.saved_step >= 0 else first
    if guard.reason is None or stop.exit_code:
        return TrainingOutcome(step, validation.result, stop.exit_code, checkpoints.saved_step == step)
    left_out = (step - good) * plan.batch_sequences
    rollback = Rollback(step, good, data.state_dict()["consumed"], left_out, f"skipped {guard.reason}")
    go_back(rollback, rollbacks, cfg.guard.max_rollbacks, folder, console)
    return TrainingOutcome(step, None, 0, False, good)


def _loggers(cfg: RunConfig, folder: RunFolder, run_name: str, first: int, console: Console) -> list[Logger]:
    """metrics.csv, its rows past step ``first`` cut, and what ``cfg.logger`` adds."""
    metrics_csv = MetricsCsv(folder.metrics_file)
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
        ):
            warnings.filterwarnings("ignore", message=message)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
