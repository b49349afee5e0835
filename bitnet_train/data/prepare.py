"""Corpus -> tokenizer -> token shards, done once and found again by a fingerprint of what they are made from."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from bitnet_train.data.config import DataConfig, PretrainedTokenizer
from bitnet_train.data.corpus import Corpus, Document, open_corpus
from bitnet_train.data.shards import MANIFEST, TOKENIZER_FILE, Manifest, ShardWriter, load_manifest, tokenizer_digest
from bitnet_train.data.tokenizer import TextTokenizer, build_tokenizer
from bitnet_train.errors import ConfigError

FORMAT_VERSION = 1
BATCH_BYTES = 4 << 20

# Called with (stage, bytes done); the command draws a progress bar from it.
Progress = Callable[[str, int], None]


def _no_progress(stage: str, done: int) -> None:
    del stage, done


def source_settings(cfg: DataConfig) -> dict[str, object]:
    """The settings that decide the content of the shards."""
    return {
        "format": FORMAT_VERSION,
        "corpus": asdict(cfg.corpus),
        "tokenizer": asdict(cfg.tokenizer),
        "shard_tokens": cfg.shard_tokens,
    }


def shard_folder(cfg: DataConfig, root: Path) -> Path:
    """Where the shards of ``cfg`` lie: ``<root>/<corpus>-<tokenizer>-<digest of the settings>``."""
    digest = hashlib.sha256(json.dumps(source_settings(cfg), sort_keys=True).encode()).hexdigest()[:10]
    return root / f"{cfg.corpus.name}-{cfg.tokenizer.name}{cfg.tokenizer.vocab_size}-{digest}"


def _identity(cfg: DataConfig, corpus: Corpus) -> dict[str, str]:
    """What the shards depend on beside the settings: the text, and a local tokenizer's file."""
    identity = corpus.identity()
    if isinstance(cfg.tokenizer, PretrainedTokenizer):
        source = Path(cfg.tokenizer.source).expanduser()
        file = source / TOKENIZER_FILE if source.is_dir() else source
        if file.is_file():
            identity["tokenizer"] = tokenizer_digest(file)
    return identity


def prepared(cfg: DataConfig, root: Path) -> Manifest | None:
    """The manifest of shards that were made from these settings and this text, or None when there are none yet.

    Raises ConfigError when shards exist but the text has changed since, and when the manifest was edited.
    """
    folder = shard_folder(cfg, root)
    if not (folder / MANIFEST).is_file():
        return None
    manifest = load_manifest(folder)
    current = _identity(cfg, open_corpus(cfg.corpus))
    if manifest.source["identity"] != current:
        raise ConfigError(
            f"The text of data.corpus={cfg.corpus.name} (or the tokenizer's file) has changed since {folder} "
            "was prepared: prepare again with command=prepare data.rebuild=true."
        )
    return manifest


def prepare(cfg: DataConfig, root: Path, progress: Progress = _no_progress) -> Manifest:
    """Make the token shards of ``cfg`` under ``root`` and return their manifest.

    The folder appears whole or not at all: everything is written beside it and renamed at the end, so that an
    interrupted preparation leaves nothing that a training would read.
    """
    corpus = open_corpus(cfg.corpus)
    folder = shard_folder(cfg, root)
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    root.mkdir(parents=True, exist_ok=True)
    for stale in (*root.glob(f"{folder.name}.partial-*"), *root.glob(f"{folder.name}.replaced-*")):
        if not _alive(int(stale.name.rpartition("-")[2])):
            shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir()
    try:
        manifest = _write(cfg, corpus, partial, progress)
        replaced = folder.with_name(f"{folder.name}.replaced-{os.getpid()}")
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _alive(pid: int) -> bool:
    """Whether another process with this id runs (in a container, a killed predecessor often had the id of this one)."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _write(cfg: DataConfig, corpus: Corpus, folder: Path, progress: Progress) -> Manifest:
    identity = _identity(cfg, corpus)
    tokenizer = build_tokenizer(cfg.tokenizer, _training_texts(corpus, progress))
    if tokenizer.vocab_size > cfg.tokenizer.vocab_size:
        raise ConfigError(
            f"The tokenizer has {tokenizer.vocab_size} ids, more than "
            f"data.tokenizer.vocab_size={cfg.tokenizer.vocab_size}."
        )
    tokenizer.save(folder)
    writers = {split: ShardWriter(folder, split, tokenizer.vocab_size, cfg.shard_tokens) for split in ("train", "val")}
    done = 0
    for documents in _batches(corpus.documents()):
        texts = [document.text for document in documents]
        for document, ids in zip(documents, tokenizer.encode_batch(texts), strict=True):
            size = len(document.text.encode())
            writers["val" if document.validation else "train"].add([tokenizer.bos_id, *ids], size)
            done += size
        progress("tokenising", done)
    source = {
        **source_settings(cfg),
        "identity": identity,
        "tokenizer_digest": tokenizer_digest(folder / TOKENIZER_FILE),
    }
    manifest = Manifest(FORMAT_VERSION, source, {split: writer.finish() for split, writer in writers.items()})
    for split, name in (("train", "training"), ("val", "validation")):
        if manifest.splits[split]["tokens"] < 2:
            raise ConfigError(
                f"data.corpus={cfg.corpus.name} gives no {name} documents: add text, or set "
                "data.corpus.validation_path."
            )
    manifest.save(folder)
    return manifest


def _training_texts(corpus: Corpus, progress: Progress) -> Iterator[str]:
    done = 0
    for document in corpus.documents():
        if not document.validation:
            yield document.text
            done += len(document.text)
            progress("training the tokenizer", done)


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def split_text(cfg: DataConfig, split: str) -> str:
    """The raw text of a split, documents one after the other (what gzip and xz are given to compare with)."""
    wanted = split == "val"
    return "".join(d.text for d in open_corpus(cfg.corpus).documents() if d.validation is wanted)


__all__ = ["TextTokenizer", "prepare", "prepared", "shard_folder", "split_text"]
