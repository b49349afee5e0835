"""``command=train``: prepare the data if need be, claim the run folder, train or continue, say what came of it."""

import re
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console

from bitnet_train.commands.console import loudly, make_console
from bitnet_train.commands.prepare import ensure_prepared
from bitnet_train.config import Config, to_plain, to_yaml
from bitnet_train.data.images.sources import load_images
from bitnet_train.data.mixture import chats
from bitnet_train.data.prepare import split_text
from bitnet_train.data.tokenizer import TextTokenizer
from bitnet_train.errors import ConfigError
from bitnet_train.evaluation.compression import compressed_bits_per_byte
from bitnet_train.export.rules import no_export
from bitnet_train.interrupts import interrupts_wait
from bitnet_train.nn.config import initial_source
from bitnet_train.nn.layout import block_count
from bitnet_train.quant.progress import moved_back
from bitnet_train.quant.spec import build_spec
from bitnet_train.ranks import Ranks, this_process
from bitnet_train.reporting.run_page import REPORT_FILE, write_run_page
from bitnet_train.storage import local_copy
from bitnet_train.training.config import processes
from bitnet_train.training.distributed.checks import check_started
from bitnet_train.training.losses.config import DistillationLoss
from bitnet_train.training.run_folder import RunFolder, SilentRunFolder
from bitnet_train.validation import check_continuation, validate


def run(cfg: Config) -> int:
    """Train; the same command again continues. Returns 0, or 130 or 143 when a signal stopped the run after saving.

    Starts the processes of this machine first where there must be several and nothing else has started them.
    """
    ranks = this_process()
    if cfg.trainer.devices == "auto":
        from bitnet_train.training.device import available_devices

        cfg.trainer.devices = ranks.local_world if ranks.world > 1 else available_devices(cfg)
    if ranks.world == 1 and processes(cfg.trainer) == 1:
        return _train(cfg, ranks)
    validate(cfg)  # with the number of processes
    check_started(cfg, ranks)
    if ranks.world == 1:
        from bitnet_train.training.distributed.launch import launch

        return launch(to_plain(cfg), processes(cfg.trainer))

    from bitnet_train.training.device import choose_device
    from bitnet_train.training.distributed import group

    group.join(ranks, choose_device(cfg) == "cuda")
    with group.failing_together():
        group.agree(None)  # who failed before says so now
        code = _train(cfg, ranks)
    group.leave()
    return code


def _train(cfg: Config, ranks: Ranks) -> int:
    console = make_console()
    assert cfg.run_name is not None
    folder = (RunFolder if ranks.first else SilentRunFolder)(Path(cfg.paths.runs) / cfg.run_name)
    try:
        return _run(cfg, folder, ranks, console)
    finally:
        folder.unlock()


def _run(cfg: Config, folder: RunFolder, ranks: Ranks, console: Console) -> int:
    assert cfg.run_name is not None
    fork = _in_turn(ranks, lambda: _claim(cfg, folder, ranks, console))
    own = _from_first(ranks, lambda: folder.good_checkpoint(loudly(console)))
    obstacle = None if cfg.on_images else no_export(cfg.export, cfg.decoder, build_spec(cfg.quant))
    if obstacle is not None:
        console.print(f"warning: {obstacle}", markup=False)
    outcome = (_on_images if cfg.on_images else _on_text)(cfg, folder, own, fork, ranks, console)
    if not ranks.first:
        return int(outcome.exit_code)
    if outcome.exit_code:
        where = f"stopped at step {outcome.step}, saved in {folder.checkpoints}"
        if not outcome.saved:
            where = (
                f"stopped at step {outcome.step}, which is not worth saving; checkpoints are in {folder.checkpoints}"
            )
        console.print(f"{where}; the same command continues the run")
        return outcome.exit_code
    if folder.metrics_file.is_file():
        try:
            write_run_page(cfg, folder, cfg.run_name)
        except OSError as error:
            console.print(f"{folder.path / REPORT_FILE} is not written: {error.strerror}", markup=False)
    after = "evaluate" if cfg.on_images or obstacle is not None else "export"
    if outcome.validation is not None:
        console.print(_result(cfg, outcome.validation))
    console.print(f"run folder: {folder.path}; next: python -m bitnet_train command={after} run={folder.path}")
    return 0


def _claim(cfg: Config, folder: RunFolder, ranks: Ranks, console: Console) -> Path | None:
    """Lock the run folder for this configuration, which must be the one it was started with; what the run forks."""
    fork = _fork_source(cfg, folder)
    folder.lock(loudly(console))
    if ranks.first and cfg.checkpoint.mirror is not None and folder.last_checkpoint is None:
        from bitnet_train.training.callbacks.mirror import restore

        assert cfg.run_name is not None
        goes_back = cfg.guard.rollback_after is not None
        restore(cfg.checkpoint.mirror, cfg.run_name, folder, goes_back, console)
    saved = folder.saved_config()
    if saved is not None:
        with interrupts_wait():
            check_continuation(saved, cfg, folder.config_file)
        _check_same_fork(saved, cfg, folder)
    if fork is not None and folder.last_checkpoint is None and initial_source(cfg.init) is not None:
        raise ConfigError("resume.from and init.from are two starts of one run: leave one of them out.")
    return fork


def _in_turn(ranks: Ranks, action: Any) -> Any:
    """``action()`` in the first process, then in the others; a failure of one is a failure of all."""
    if ranks.world == 1:
        return action()
    from bitnet_train.training.distributed.group import in_turn

    return in_turn(action)


def _from_first(ranks: Ranks, action: Any) -> Any:
    """What ``action()`` gives in the first process, in all of them."""
    if ranks.world == 1:
        return action()
    from bitnet_train.training.distributed.group import from_first

    return from_first(action)


def _on_text(
    cfg: Config, folder: RunFolder, own: Path | None, fork: Path | None, ranks: Ranks, console: Console
) -> Any:
    """Train a language model; the outcome."""
    assert cfg.run_name is not None
    initial = cache(lambda: _initial_weights(cfg))

    def prepare_run() -> Any:
        # Weights that do not fit are found before anything is prepared, and so is a teacher that does not.
        teacher = _teacher(cfg)
        weights = initial() if own is None and fork is None else None
        if not ranks.first:
            cfg.text.rebuild = False

        def accept(tokenizer: TextTokenizer) -> None:
            if weights is not None:
                from bitnet_train.export.initial import check_same_tokenizer

                check_same_tokenizer(str(initial_source(cfg.init)), weights.tokenizer, tokenizer)
            if teacher is not None:
                from bitnet_train.training.teachers.source import check_tokenizer

                check_tokenizer(teacher, tokenizer)

        shards, manifest = ensure_prepared(cfg, console, accept)

        from bitnet_train.training.run import check_start

        start = own or fork
        # Before this configuration becomes the folder's.
        first = check_start(start, cfg, manifest.fingerprint) if start is not None else 0
        if first == 0 and start is not None and start == fork:
            raise ConfigError(f"resume.from={cfg.resume['from']} has not trained a step: use init.from= instead.")
        _check_goes_on(cfg, own, first)
        if first == 0 and start is not None and cfg.trainer.max_steps > 0:
            start = None  # a run that has only saved its initial weights makes them again
            initial()
        _say_moved(cfg, folder, first, console)
        with interrupts_wait():
            folder.save_config(to_yaml(cfg))
        return shards, manifest, start, first

    shards, manifest, start, first = _in_turn(ranks, prepare_run)

    from bitnet_train.training.run import train

    return train(cfg, folder, cfg.run_name, shards, manifest, start, first, fork, initial, console)


def _on_images(
    cfg: Config, folder: RunFolder, own: Path | None, fork: Path | None, ranks: Ranks, console: Console
) -> Any:
    """Train an image classifier; the outcome."""
    assert cfg.run_name is not None

    def prepare_run() -> Any:
        splits = load_images(cfg.images)

        from bitnet_train.training.run import check_start

        start = own or fork
        first = check_start(start, cfg, splits.fingerprint) if start is not None else 0
        _check_goes_on(cfg, own, first)
        _say_moved(cfg, folder, first, console)
        with interrupts_wait():
            folder.save_config(to_yaml(cfg))
        return splits, start, first

    splits, start, first = _in_turn(ranks, prepare_run)

    from bitnet_train.training.vision.run import train_classifier

    return train_classifier(cfg, folder, cfg.run_name, splits, start, first, fork, console)


def _check_goes_on(cfg: Config, own: Path | None, first: int) -> None:
    """Raises ConfigError for a fork that has nothing left to train."""
    if own is None and first and first >= cfg.trainer.max_steps:
        raise ConfigError(
            f"resume.from={cfg.resume['from']} is at step {first}, and trainer.max_steps={cfg.trainer.max_steps} "
            "leaves nothing to train: raise trainer.max_steps, or start from its weights alone with init.from=."
        )


def _say_moved(cfg: Config, folder: RunFolder, first: int, console: Console) -> None:
    """One line when another trainer.max_steps takes the quantisation of a continued run back."""
    saved = folder.saved_config()
    before = int(saved["trainer"]["max_steps"]) if saved is not None else 0
    if first == 0 or before == cfg.trainer.max_steps or not before:
        return
    total, blocks = cfg.trainer.max_steps, block_count(cfg.model)
    sentence = moved_back(cfg.quant.progressive, build_spec(cfg.quant), first, before, total, blocks)
    if sentence is not None:
        console.print(f"warning: {sentence}", markup=False)


def _result(cfg: Config, result: Any) -> str:
    """What came out, in one line."""
    figure = f"[bold]{result.figure}[/bold]"
    if cfg.on_images:
        return f"{figure} on {result.images:,} held-out images"
    beside, masked = "", bool(chats(cfg.text.corpus))
    if cfg.text.validation_tokens is None and not masked:
        others = compressed_bits_per_byte(split_text(cfg.text, "val").encode())
        beside = f" ({', '.join(f'{name}: {bits:.2f}' for name, bits in others.items())} on the same text)"
    return f"{figure} on {result.bytes:,} held-out bytes{' that are learnt' if masked else ''}{beside}"


def _initial_weights(cfg: Config) -> Any:
    source = initial_source(cfg.init)
    if source is None:
        return None
    from bitnet_train.export.initial import read_initial

    initial = read_initial(source, cfg.decoder, build_spec(cfg.quant))
    if cfg.init.sub_norms is not None and not initial.lacks_sub_norms:
        raise ConfigError(f"init.from={source} brings its own sub-norms: leave init.sub_norms out.")
    return initial


def _teacher(cfg: Config) -> Any:
    """What ``loss.teacher`` names, where anything is learnt from it."""
    if not isinstance(cfg.loss, DistillationLoss) or cfg.trainer.max_steps == 0:
        return None
    from bitnet_train.training.teachers.source import find_teacher

    return find_teacher(cfg)


def _check_same_fork(saved: dict[str, Any], cfg: Config, folder: RunFolder) -> None:
    """Raises ConfigError when ``resume.from`` would be ignored, because the run has checkpoints of its own."""
    before, now = (saved.get("resume") or {}).get("from"), cfg.resume["from"]
    if folder.last_checkpoint is not None and now is not None and now != before:
        raise ConfigError(
            f"{folder.path} has checkpoints of its own and goes on from its last one, so resume.from={now} would do "
            "nothing: leave it out, or fork into a new run with run_name=NAME."
        )


def _fork_source(cfg: Config, folder: RunFolder) -> Path | None:
    """The checkpoint that ``resume.from=RUN[@STEP]`` names. Raises ConfigError if it is missing or our own."""
    source = cfg.resume["from"]
    if source is None:
        return None
    run_folder, _, step = local_copy(str(source), "resume.from").partition("@")
    if Path(run_folder).resolve() == folder.path.resolve():
        raise ConfigError(f"resume.from={source} is this run's own folder: give the fork a run_name of its own.")
    checkpoints = RunFolder(Path(run_folder)).checkpoints
    if step and not re.fullmatch(r"\d+", step):
        raise ConfigError(f"resume.from={source}: the part after @ must be a step number.")
    path = checkpoints / (f"step-{int(step):08d}.ckpt" if step else "last.ckpt")
    if not path.exists():
        there = ", ".join(str(int(p.stem[5:])) for p in sorted(checkpoints.glob("step-*.ckpt"))) or "none"
        raise ConfigError(f"resume.from={source}: {path} does not exist; steps saved there: {there}.")
    return path
