"""``command=prepare``: corpus -> tokenizer -> token shards, once."""

import os
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bitnet_train.commands.console import make_console
from bitnet_train.config import Config
from bitnet_train.data.config import DataConfig, PrepareConfig
from bitnet_train.data.corpus import open_corpus, remarks
from bitnet_train.data.describe import describe
from bitnet_train.data.images.sources import load_images
from bitnet_train.data.parallel import prepare_in_parts, work_folder
from bitnet_train.data.prepare import Accept, accept_any, prepare, prepared, shard_folder
from bitnet_train.data.shards import Manifest, verify_shards
from bitnet_train.data.tokenizer import load_tokenizer
from bitnet_train.errors import ConfigError

MEGABYTE = 1_000_000


def run(cfg: Config) -> int:
    """Make the shards of ``cfg.text``, or verify those that exist (``data.rebuild=true`` makes them again)."""
    console = make_console()
    if cfg.on_images:
        return _load_images(cfg, console)
    part, parts = place_among_parts(cfg.text.prepare)
    root, folder = Path(cfg.paths.data), shard_folder(cfg.text, Path(cfg.paths.data))
    found = None if cfg.text.rebuild else prepared(cfg.text, root)
    manifest = found or _prepare(cfg.text, root, console, part, parts)
    if manifest is None:
        console.print(
            f"part {part} of {parts} is done; whoever finishes last puts the shards together, or command=prepare once "
            f"more without parts: {work_folder(cfg.text, root)}"
        )
        return 0
    console.print(f"data: {describe(cfg.text, cfg.trainer.max_steps)}", markup=False)
    for split, entry in manifest.splits.items():
        learnt = f", {entry['learnt']:,} of them learnt" if "learnt" in entry else ""
        console.print(
            f"{split}: {entry['documents']:,} documents, {entry['bytes']:,} bytes, {entry['tokens']:,} tokens{learnt} "
            f"({entry['bytes'] / max(1, entry['tokens']):.2f} bytes per token) in {len(entry['shards'])} shard(s)"
        )
    checked = verify_shards(folder, manifest, cfg.text.verify)
    load_tokenizer(folder)
    console.print(f"shards: {folder}; checked {checked}; fingerprint {manifest.fingerprint[:16]}")
    return 0


def _load_images(cfg: Config, console: Console) -> int:
    """Images are read by ``datasets``, which keeps what it downloads; there is nothing else to prepare."""
    splits = load_images(cfg.images)
    for name, part in (("training", splits.train), ("validation", splits.validation), ("test", splits.test)):
        console.print(f"{name}: {len(part):,} images in {len(set(part.labels.tolist()))} classes")
    console.print(f"images: {cfg.images.source.name}; fingerprint {splits.fingerprint[:16]}", markup=False)
    return 0


def ensure_prepared(cfg: Config, console: Console, accept: Accept = accept_any) -> tuple[Path, Manifest]:
    """The shard folder of ``cfg.text`` and its manifest, prepared now if need be.

    ``accept`` raises ConfigError for a tokenizer that the run cannot use, before anything is tokenised with it; that of
    shards that are there already is the training's to check.
    """
    root = Path(cfg.paths.data)
    folder = shard_folder(cfg.text, root)
    manifest = None if cfg.text.rebuild else prepared(cfg.text, root)
    if manifest is not None:
        return folder, manifest
    manifest = _prepare(cfg.text, root, console, accept=accept)
    assert manifest is not None  # nobody else has a part in it
    return folder, manifest


def place_among_parts(cfg: PrepareConfig) -> tuple[int, int]:
    """(number of this job, jobs) that share the work: as configured, else the place in a SLURM array, else (0, 1).

    Raises ConfigError when only one of the two can be known.
    """
    part, parts = cfg.part, cfg.parts
    if os.environ.get("SLURM_ARRAY_TASK_COUNT"):
        numbers = (os.environ.get(f"SLURM_ARRAY_TASK_{name}", "") for name in ("COUNT", "ID", "MIN", "STEP"))
        try:
            count, task, first, step = (
                int(number or default) for number, default in zip(numbers, (0, 0, 0, 1), strict=True)
            )
        except ValueError:
            raise ConfigError("SLURM_ARRAY_TASK_COUNT, _ID, _MIN or _STEP is no number: set data.prepare.part and "
                              "data.prepare.parts.") from None  # fmt: skip
        parts = count if parts is None else parts
        part = (task - first) // max(1, step) if part is None else part
    part, parts = part or 0, parts or 1
    if not 0 <= part < parts:
        raise ConfigError(f"This job would be part {part} of {parts}: set data.prepare.part and data.prepare.parts.")
    return part, parts


def _prepare(
    cfg: DataConfig, root: Path, console: Console, part: int = 0, parts: int = 1, accept: Accept = accept_any
) -> Manifest | None:
    processes = cfg.prepare.processes
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.fields[done]}"), TimeElapsedColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("reading", total=None, done="")

        def progress(stage: str, done: int) -> None:
            bar.update(task, description=stage, done=f"{done / MEGABYTE:,.1f} MB")

        share = f", part {part} of {parts}" if parts > 1 else ""
        share += f", {processes} processes" if processes > 1 else ""
        if not console.is_terminal:
            console.print(f"preparing {cfg.corpus.name}: tokenizer, then token shards{share}")
        for remark in remarks(open_corpus(cfg.corpus)):
            console.print(remark, markup=False)
        if parts == 1 and processes == 1 and not work_folder(cfg, root).is_dir():
            return prepare(cfg, root, progress, accept)
        return prepare_in_parts(cfg, root, part, parts, progress, accept)
