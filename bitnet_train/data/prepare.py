"""Corpus -> tokenizer -> token shards, done once and found again by a fingerprint of what they are made from."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bitnet_train.data.chat import ChatSource, Conversation
from bitnet_train.data.chat_template import ChatEncoder
from bitnet_train.data.config import CorpusConfig, DataConfig, MixtureCorpus, PretrainedTokenizer
from bitnet_train.data.corpus import Corpus, MixtureSource, identity_since, open_corpus
from bitnet_train.data.document import Document
from bitnet_train.data.mixture import parts
from bitnet_train.data.shards import (
    MANIFEST,
    TOKENIZER_FILE,
    Manifest,
    ShardWriter,
    joined,
    load_manifest,
    tokenizer_digest,
)
from bitnet_train.data.tokenizer import TextTokenizer, build_tokenizer, local_source, read_special_tokens
from bitnet_train.durable import is_environment, reason, remove_leftovers, sync_file, sync_folder, working_name
from bitnet_train.errors import ConfigError

FORMAT_VERSION = 1
BATCH_BYTES = 4 << 20

# Called with (stage, bytes done); the command draws a progress bar from it.
Progress = Callable[[str, int], None]
# Called with the tokenizer before any text is tokenised with it; raises ConfigError when it is not what is wanted.
Accept = Callable[[TextTokenizer], None]


def no_progress(stage: str, done: int) -> None:
    del stage, done


def accept_any(tokenizer: TextTokenizer) -> None:
    del tokenizer


def source_settings(cfg: DataConfig) -> dict[str, object]:
    """The settings that decide the content of the shards."""
    return {
        "format": FORMAT_VERSION,
        "corpus": _corpus_settings(cfg.corpus),
        "tokenizer": asdict(cfg.tokenizer),
        "shard_tokens": cfg.shard_tokens,
    }


def _corpus_settings(cfg: CorpusConfig) -> dict[str, Any]:
    if not isinstance(cfg, MixtureCorpus):
        return asdict(cfg)
    # Other weights need no other shards.
    return {"name": cfg.name, "corpora": {name: asdict(part.corpus) for name, part in parts(cfg).items()}}


def shard_folder(cfg: DataConfig, root: Path) -> Path:
    """Where the shards of ``cfg`` lie: ``<root>/<corpus>-<tokenizer>-<digest of the settings>``."""
    digest = hashlib.sha256(json.dumps(source_settings(cfg), sort_keys=True).encode()).hexdigest()[:10]
    return root / f"{cfg.corpus.name}-{cfg.tokenizer.name}{cfg.tokenizer.vocab_size}-{digest}"


def identity_of(cfg: DataConfig, corpus: Corpus, recorded: dict[str, str] | None = None) -> dict[str, str]:
    """What the shards depend on beside the settings: the text, and a local tokenizer's file.

    ``recorded`` is that of shards made earlier, for corpora that are not asked again.
    """
    identity = corpus.identity() if recorded is None else identity_since(corpus, recorded)
    if isinstance(cfg.tokenizer, PretrainedTokenizer):
        source = local_source(cfg.tokenizer)
        file = None if source is None else source / TOKENIZER_FILE if source.is_dir() else source
        if file is not None and file.is_file():
            identity["tokenizer"] = tokenizer_digest(file)
            if None in (cfg.tokenizer.bos, cfg.tokenizer.eos):
                identity["special_tokens"] = json.dumps(read_special_tokens(file.parent), sort_keys=True)
    return identity


def prepared(cfg: DataConfig, root: Path) -> Manifest | None:
    """The manifest of shards that were made from these settings and this text, or None when there are none yet.

    Raises ConfigError when shards exist but the text has changed since, and when the manifest was edited.
    """
    folder = shard_folder(cfg, root)
    if not (folder / MANIFEST).is_file():
        return None
    manifest = load_manifest(folder)
    recorded = manifest.source["identity"]
    if recorded != identity_of(cfg, open_corpus(cfg.corpus), recorded):
        raise ConfigError(
            f"The text of data.corpus={cfg.corpus.name} (or the tokenizer's file) has changed since {folder} "
            "was prepared: prepare again with command=prepare data.rebuild=true."
        )
    return manifest


def prepare(cfg: DataConfig, root: Path, progress: Progress = no_progress, accept: Accept = accept_any) -> Manifest:
    """Make the token shards of ``cfg`` under ``root`` and return their manifest.

    The folder appears whole or not at all: everything is written beside it and renamed at the end, so that an
    interrupted preparation leaves nothing that a training would read. ``accept`` may refuse the tokenizer.
    """
    corpus = open_corpus(cfg.corpus)
    folder = shard_folder(cfg, root)
    partial, replaced = working_name(folder, "partial"), working_name(folder, "replaced")
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        partial.mkdir()
        manifest = _write(cfg, corpus, partial, progress, accept)
        for path in partial.iterdir():
            sync_file(path)
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
        sync_folder(root)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        # numpy has no error number for a write that the disk took half of.
        if not is_environment(error) and "written" not in str(error):
            raise
        raise ConfigError(
            f"The token shards {folder} cannot be written ({reason(error)}): free space or choose another paths.data; "
            "what was there before is as it was."
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def make_tokenizer(
    cfg: DataConfig, corpus: Corpus, progress: Progress = no_progress
) -> tuple[TextTokenizer, ChatEncoder | None]:
    """The tokenizer of ``cfg``, trained if it is of that kind, and beside conversations what encodes them."""
    tokenizer = build_tokenizer(cfg.tokenizer, _training_texts(corpus, progress))
    if tokenizer.vocab_size > cfg.tokenizer.vocab_size:
        raise ConfigError(
            f"The tokenizer has {tokenizer.vocab_size} ids, more than "
            f"data.tokenizer.vocab_size={cfg.tokenizer.vocab_size}."
        )
    chatting = [source for source in sources_of(corpus).values() if isinstance(source, ChatSource)]
    if not chatting:
        return tokenizer, None
    template = chatting[0].template or tokenizer.chat_template
    if template is None:
        raise ConfigError(
            f"The tokenizer {getattr(cfg.tokenizer, 'source', '')} has no chat template: set data.corpus.template."
        )
    tokenizer = replace(tokenizer, chat_template=template)
    return tokenizer, ChatEncoder(tokenizer, template)


def sources_of(corpus: Corpus) -> dict[str, Corpus]:
    """The corpora of a mixture by name; a single one under an empty name."""
    return corpus.sources if isinstance(corpus, MixtureSource) else {"": corpus}


def _write(cfg: DataConfig, corpus: Corpus, folder: Path, progress: Progress, accept: Accept) -> Manifest:
    identity = identity_of(cfg, corpus)
    tokenizer, chat = make_tokenizer(cfg, corpus, progress)
    accept(tokenizer)
    if isinstance(corpus, MixtureSource):
        streams = {f"/{name}": corpus.documents_of(name) for name in corpus.sources}
    else:
        streams = {"": corpus.documents()}
    tokenizer.save(folder)
    splits: dict[str, dict[str, Any]] = {}
    done = 0
    for suffix, stream in streams.items():
        writers = {
            split: ShardWriter(folder, f"{split}{suffix}", tokenizer.vocab_size, cfg.shard_tokens)
            for split in ("train", "val")
        }
        for documents in in_batches(stream):
            for document, (ids, mask) in zip(documents, encoded(documents, tokenizer, chat), strict=True):
                size = len(document.text.encode())
                writers["val" if document.validation else "train"].add(ids, size, mask)
                done += size
            progress("tokenising", done)
        splits |= {f"{split}{suffix}": writer.finish() for split, writer in writers.items()}
    return write_manifest(cfg, corpus, folder, identity, splits)


def write_manifest(
    cfg: DataConfig, corpus: Corpus, folder: Path, identity: dict[str, str], splits: dict[str, dict[str, Any]]
) -> Manifest:
    """The manifest of a folder with the tokenizer and the shards of every split of every corpus."""
    if isinstance(corpus, MixtureSource):
        both = {split: joined([splits[f"{split}/{name}"] for name in corpus.sources]) for split in ("train", "val")}
        splits = both | splits
    source = {
        **source_settings(cfg),
        "identity": identity,
        "tokenizer_digest": tokenizer_digest(folder / TOKENIZER_FILE),
    }
    manifest = Manifest(FORMAT_VERSION, source, splits)
    for split, entry in splits.items():
        if entry["tokens"] < 2 and not split.startswith("val/"):  # the others have validation documents
            name, key = "validation" if split == "val" else "training", "data.corpus"
            key += f".corpora.{split.removeprefix('train/')}" if "/" in split else f"={cfg.corpus.name}"
            raise ConfigError(f"{key} gives no {name} documents: add text, or set data.corpus.validation_path.")
    manifest.save(folder)
    return manifest


def encoded(
    documents: list[Document], tokenizer: TextTokenizer, chat: ChatEncoder | None
) -> Iterator[tuple[list[int], list[int] | None]]:
    """Ids of each document, the bos id first, and beside conversations a mask; of plain text everything is learnt."""
    if isinstance(documents[0], Conversation):
        assert chat is not None
        for document in documents:
            assert isinstance(document, Conversation)
            yield chat.encode(document)
        return
    for ids in tokenizer.encode_batch([document.text for document in documents]):
        yield [tokenizer.bos_id, *ids], None if chat is None else [1] * (len(ids) + 1)


def _training_texts(corpus: Corpus, progress: Progress) -> Iterator[str]:
    done = 0
    for document in corpus.documents():
        if not document.validation:
            yield document.text
            done += len(document.text)
            progress("training the tokenizer", done)


def in_batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
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
