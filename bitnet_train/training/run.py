"""A training run from configuration to finished folder: build, continue or start, fit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import lightning as L
import torch
from rich.console import Console

from bitnet_train.data.chat_template import check_documents_apart
from bitnet_train.data.config import MixtureCorpus
from bitnet_train.data.mixture import stages
from bitnet_train.data.shards import Manifest, verify_shards
from bitnet_train.data.tokenizer import load_tokenizer
from bitnet_train.errors import ConfigError
from bitnet_train.export.initial import InitialWeights, check_same_tokenizer, fill_weights
from bitnet_train.kernels.backend import choose_backend
from bitnet_train.nn.config import initial_source
from bitnet_train.nn.init import build_decoder
from bitnet_train.nn.layout import learned_scales, parameter_table
from bitnet_train.planning.flops import device_peak, training_flops_per_token
from bitnet_train.quant.spec import build_spec
from bitnet_train.training.callbacks.checkpoint import save_untrained
from bitnet_train.training.callbacks.guard import GuardWatch
from bitnet_train.training.callbacks.metrics import TrainingMetrics
from bitnet_train.training.callbacks.mirror import mirrors
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
from bitnet_train.training.distributed import group
from bitnet_train.training.distributed.checkpoint_files import read_outline
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
from bitnet_train.training.micro_batch import find_micro_batch
from bitnet_train.training.module import PretrainingModule
from bitnet_train.training.out_of_memory import is_out_of_memory, training_advice
from bitnet_train.training.provenance import collect_provenance
from bitnet_train.training.run_folder import RunFolder, check_checkpoint
from bitnet_train.training.sub_norms import insert_sub_norms
from bitnet_train.training.teachers.resume import check_same_teacher
from bitnet_train.training.teachers.teacher import load_teacher
from bitnet_train.training.telemetry.layers import LayerTelemetry, cut_layers


def check_start(path: Path, cfg: RunConfig, data_fingerprint: str) -> int:
    """The optimizer step of the checkpoint that a run starts from.

    Raises ConfigError when it cannot be read, is of another model, or was trained on other data than those with
    ``data_fingerprint``.
    """
    # What the Lightning modules are called in a checkpoint.
    network, data = ("classifier", "ImageDataModule") if cfg.on_images else ("decoder", "ShardDataModule")
    try:
        check_checkpoint(path)
        content, saved = read_outline(path)
        step, fingerprint = int(content["global_step"]), content[data]["fingerprint"]
    except Exception as error:
        why = str(error) if type(error) is ValueError else type(error).__name__
        raise ConfigError(f"The checkpoint {path} cannot be read ({why}): choose an older one (RUN@STEP).") from None
    wanted = {f"{network}.{p.name}": p.shape for p in parameter_table(cfg.model)}
    wanted |= {f"{network}.{n}": shape for n, shape in learned_scales(cfg.model, build_spec(cfg.quant)).items()}
    saved = {name: shape for name, shape in saved.items() if name.startswith(f"{network}.")}
    wrong = next((name for name in {**wanted, **saved} if wanted.get(name) != saved.get(name)), None)
    if wrong is not None:
        raise ConfigError(
            f"The checkpoint {path} is of another model: {wrong.removeprefix(f'{network}.')} is "
            f"{saved.get(wrong, 'missing')} there and {wanted.get(wrong, 'missing')} in model=."
        )
    if fingerprint != data_fingerprint:
        what = "images" if cfg.on_images else "token shards"
        raise ConfigError(
            f"The checkpoint {path} was trained on other {what} (their fingerprint differs): restore the data it "
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
    fork: Path | None,
    initial: Callable[[], InitialWeights | None],
    console: Console,
) -> TrainingOutcome:
    """Train ``cfg`` in ``folder`` on prepared ``shards``, from checkpoint ``start`` (of step ``first``, by
    :func:`check_start`), from the weights of ``init.from``, or from new ones. ``fork`` is the checkpoint of another run
    that this one began with, if any.

    Steps already done are not done again: metrics and samples past the checkpoint are cut, and the run goes on
    bit for bit as if it had never stopped. Where the guard has the run go back to a checkpoint, everything is made
    again from that, as in a new process. Raises ConfigError for input that does not fit and DivergedError when the
    loss stops being a number or the run has gone back too often.
    """
    return until_it_need_not_go_back(
        lambda path, step: _train_from(cfg, folder, run_name, shards, manifest, path, step, fork, initial, console),
        folder,
        start,
        first,
        fork,
    )


def _train_from(
    cfg: RunConfig,
    folder: RunFolder,
    run_name: str,
    shards: Path,
    manifest: Manifest,
    start: Path | None,
    first: int,
    fork: Path | None,
    initial_weights: Callable[[], InitialWeights | None],
    console: Console,
) -> TrainingOutcome:
    """Train until the end, a signal, or a return to the last checkpoint, which is in divergence.jsonl by then."""
    checked = verify_shards(shards, manifest, cfg.text.verify)
    entry = manifest.splits["train"]
    learnt = f" ({entry['learnt']:,} of them learnt)" if "learnt" in entry else ""
    console.print(f"data: {entry['tokens']:,} training tokens{learnt} in {shards}; checked {checked}", markup=False)
    if first >= cfg.trainer.max_steps and (first or start is not None):
        console.print(f"already at step {first} of {cfg.trainer.max_steps}: nothing left to train")
        return TrainingOutcome(first, None, 0)

    tokenizer = load_tokenizer(shards)
    if cfg.text.attend_within_documents and learnt:
        check_documents_apart(tokenizer)
    choices = choose(cfg)
    kernels = choose_backend(choices.device, cfg.kernels.backend)
    decoder = build_decoder(cfg.decoder, build_spec(cfg.quant), cfg.init, cfg.seed, kernels.backend)
    initial = initial_weights() if start is None else None
    if initial is not None:
        check_same_tokenizer(str(initial_source(cfg.init)), initial.tokenizer, tokenizer)
        console.print(f"init: {initial.description}", markup=False)
        if initial.lacks_sub_norms:
            initial, sentence = insert_sub_norms(cfg, initial, shards, manifest, tokenizer, choices.device)
            console.print(sentence, markup=False)
        fill_weights(decoder, initial.masters)
    decoder.checkpoint_activations(cfg.trainer.activation_checkpointing)
    quantisation = Quantisation(cfg, decoder)
    remembered = describe(decoder, choices, kernels, console)
    quantisation.set(first)
    remembered |= {"data_fingerprint": manifest.fingerprint, "from_step": first}

    if group.first():
        tokenizer.save(folder.tokenizer)  # The run outlives its shards.
    if cfg.evaluate.every_steps is not None:
        from bitnet_train.evaluation.lm_eval_model import check_harness

        check_harness(cfg.evaluate, load=True)
    if cfg.trainer.max_steps == 0:
        if group.first():
            save_untrained(folder.checkpoints, decoder, manifest.fingerprint)
        folder.add_provenance(collect_provenance({**choices.as_dict(), **remembered}))
        return TrainingOutcome(0, None, 0)
    teacher = load_teacher(cfg, choices.device, choices.precision, kernels.backend, tokenizer)
    if teacher is not None:
        if start is not None and start.parent == folder.checkpoints:
            check_same_teacher(start, teacher.identity)
        console.print(f"teacher: {teacher.description}", markup=False)
        remembered["teacher"] = teacher.identity
    fill_no_memory()
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
        cfg = replace(cfg, trainer=replace(cfg.trainer, micro_batch=group.smallest(found.size)))
    plan = batch_plan(cfg.trainer, cfg.text.sequence_length)
    mixed = stages(cfg.text, cfg.trainer.max_steps) if isinstance(cfg.text.corpus, MixtureCorpus) else None
    rollbacks = group.from_first(lambda: cut_rollbacks(folder.divergence_file, first))
    data = ShardDataModule(cfg.text, shards, manifest, plan, cfg.seed, mixed, resume_point(rollbacks, first))
    for line in data.mixture():
        console.print(line, markup=False)
    early = f" after a warm-up of {plan.warmup_text(cfg.text.sequence_length)}" if plan.warmup else ""
    console.print(
        f"run: {folder.path}, steps {first} to {cfg.trainer.max_steps} of {cfg.trainer.batch_tokens:,} tokens "
        f"({plan.words} sequences of {cfg.text.sequence_length}){early}, "
        f"{data.epochs(cfg.trainer.max_steps)}",
        markup=False,
    )
    module = PretrainingModule(cfg, decoder, tokenizer.bos_id, choices.compile, teacher)
    loggers = build_loggers(cfg, folder, run_name, first, console)
    if group.first():
        cut_layers(folder.layers_file, first)
        cut_samples(folder.samples_file, first)
        cut_evaluations(folder.evaluations_file, first)
    remembered["micro_batch"] = plan.micro_batch
    folder.add_provenance(collect_provenance({**choices.as_dict(), **remembered}))

    clock = TrainingClock()
    peak = device_peak(torch.cuda.get_device_name()) if choices.device == "cuda" else None
    metrics = TrainingMetrics(clock, training_flops_per_token(cfg.decoder, cfg.text.sequence_length), peak)
    validation = Validation(clock, data, tokenizer.byte_lengths())
    checkpoints = build_checkpoints(cfg, clock, folder.checkpoints, start, fork)
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
        *mirrors(cfg.checkpoint.mirror, run_name, checkpoints, folder, cfg.checkpoint.keep, console),
        # Behind the checkpoint: what other people's tasks may raise costs no step.
        Tasks(clock, tokenizer, folder.evaluations_file),
        stop,
        quantisation,
        Watchdog(folder.path, cfg.trainer.hang_timeout),
    ]
    trainer = build_trainer(cfg, choices, plan, loggers, callbacks, folder)
    try:
        fit(trainer, module, data, start)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        done = checkpoints.saved_step if checkpoints.saved_step >= 0 else first
        saved = f"{folder.last_checkpoint} (step {done})" if folder.last_checkpoint is not None else None
        learning = decoder.training
        step = trainer.global_step + learning
        raise ConfigError(training_advice(plan, cfg.text.sequence_length, step, saved, learning)) from None
    ending = Ending(trainer.global_step, checkpoints, stop, guard)
    return conclude(ending, validation.result, data, rollbacks, cfg.guard.max_rollbacks, folder, console)
