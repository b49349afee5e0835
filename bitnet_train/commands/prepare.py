"""``command=prepare``: corpus -> tokenizer -> token shards, once."""

from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bitnet_train.commands.console import make_console
from bitnet_train.config import Config
from bitnet_train.data.config import DataConfig
from bitnet_train.data.corpus import open_corpus, remarks
from bitnet_train.data.describe import describe
from bitnet_train.data.images.sources import load_images
from bitnet_train.data.prepare import prepare, prepared, shard_folder
from bitnet_train.data.shards import Manifest, verify_shards
from bitnet_train.data.tokenizer import load_tokenizer

MEGABYTE = 1_000_000


def run(cfg: Config) -> int:
    """Make the shards of ``cfg.text``, or verify those that exist (``data.rebuild=true`` makes them again)."""
    console = make_console()
    if cfg.on_images:
        return _load_images(cfg, console)
    folder, manifest = ensure_prepared(cfg, console)
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


def ensure_prepared(cfg: Config, console: Console) -> tuple[Path, Manifest]:
    """The shard folder of ``cfg.text`` and its manifest, prepared now if need be."""
    root = Path(cfg.paths.data)
    if not cfg.text.rebuild:
        manifest = prepared(cfg.text, root)
        if manifest is not None:
            return shard_folder(cfg.text, root), manifest
    return shard_folder(cfg.text, root), _prepare(cfg.text, root, console)


def _prepare(cfg: DataConfig, root: Path, console: Console) -> Manifest:
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.fields[done]}"), TimeElapsedColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("reading", total=None, done="")

        def progress(stage: str, done: int) -> None:
            bar.update(task, description=stage, done=f"{done / MEGABYTE:,.1f} MB")

        if not console.is_terminal:
            console.print(f"preparing {cfg.corpus.name}: tokenizer, then token shards")
        for remark in remarks(open_corpus(cfg.corpus)):
            console.print(remark, markup=False)
        return prepare(cfg, root, progress)
