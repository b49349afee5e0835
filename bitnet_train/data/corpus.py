"""Documents: an ordered, repeatable stream of texts, split into training and validation."""

import gzip
import hashlib
import json
import re
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from bitnet_train.data.chat import ChatSource
from bitnet_train.data.config import ChatCorpus, CorpusConfig, FilesCorpus, HubCorpus, MixtureCorpus, StdlibCorpus
from bitnet_train.data.document import (
    LONGEST_DOCUMENT,
    Document,
    endless,
    find_files,
    held_out,
    matching,
    stamp,
)
from bitnet_train.data.hub import HubSource
from bitnet_train.data.mixture import KEY, parts
from bitnet_train.data.parquet import read_texts
from bitnet_train.data.units import Line, Span, Unit, lines_of, named, spans
from bitnet_train.errors import ConfigError

SURROGATE = re.compile("[\ud800-\udfff]")


class Corpus(Protocol):
    """An ordered stream of documents that is the same every time it is read."""

    def documents(self) -> Iterator[Document]:
        """Every document, in a fixed order."""

    def identity(self) -> dict[str, str]:
        """What the text depends on; a change of it means the prepared shards are of another text."""


class StdlibSource:
    """The ``.py`` files of the running Python's standard library, by sorted relative path.

    Left out: third-party packages, ``encodings/`` and ``pydoc_data/`` (tables that flatter a model), test folders, and
    exact duplicates.
    """

    SKIPPED = frozenset(
        {"site-packages", "dist-packages", "encodings", "pydoc_data", "test", "tests", "idle_test", "__pycache__"}
    )

    def __init__(self, cfg: StdlibCorpus) -> None:
        self.cfg = cfg
        self.root = Path(sysconfig.get_paths()["stdlib"])

    def _paths(self) -> list[Path]:
        relative = (path.relative_to(self.root) for path in self.root.rglob("*.py"))
        return sorted((p for p in relative if not self.SKIPPED & set(p.parts)), key=lambda p: p.as_posix())

    def documents(self) -> Iterator[Document]:
        paths = self._paths()
        if not paths:
            raise ConfigError(f"This Python has no standard library source under {self.root}: use data.corpus=files.")
        seen: set[bytes] = set()
        index = 0
        for path in paths:
            text = (self.root / path).read_text(encoding="utf-8", errors="replace")
            digest = hashlib.sha256(text.encode()).digest()
            if digest in seen:
                continue
            seen.add(digest)
            yield Document(text, held_out(index, self.cfg.validation_every))
            index += 1

    def identity(self) -> dict[str, str]:
        return {"python": sys.version, "files": stamp(self.root / path for path in self._paths())}


class FilesSource:
    """Local files: one document per text file, one per line of a jsonl file (``.gz`` is unpacked on the way), one per
    row of a parquet file.
    """

    def __init__(self, cfg: FilesCorpus) -> None:
        if not cfg.path:
            raise ConfigError("data.corpus.path is not set: give a text, jsonl or parquet file, or a folder of them.")
        self.cfg = cfg
        # What the user may not expect.
        self.remarks: list[str] = []
        self.validation_files = (
            self._find(cfg.validation_path, "data.corpus.validation_path") if cfg.validation_path else None
        )
        # A validation file inside the training folder is held out, not trained on.
        held_out = {path.resolve() for path in self.validation_files or []}
        self.files = [path for path in self._find(cfg.path, "data.corpus.path") if path.resolve() not in held_out]
        if not self.files:
            raise ConfigError(f"data.corpus.path={cfg.path} holds no files but those of data.corpus.validation_path.")

    def _find(self, where: str, key: str) -> list[Path]:
        root, patterns = Path(where).expanduser(), self.cfg.patterns
        tables = matching(root, ["*.parquet"]) if root.is_dir() else []
        if tables and patterns == FilesCorpus().patterns and not matching(root, patterns):
            patterns = ["*.parquet"]
        found = find_files(where, patterns, key)
        if left := len(set(tables) - set(found)):
            self.remarks.append(f"{left} parquet file(s) in {where} are left out by data.corpus.patterns")
        return found

    def documents(self) -> Iterator[Document]:
        every = self.cfg.validation_every
        for index, text in enumerate(self._texts([Span(path) for path in self.files])):
            yield Document(text, self.validation_files is None and held_out(index, every))
        for text in self._texts([Span(path) for path in self.validation_files or []]):
            yield Document(text, True)

    def units(self, limit: int) -> list[Unit]:
        """Shares of about ``limit`` bytes (:mod:`bitnet_train.data.units`)."""

        def documents(share: list[Span], validation: bool) -> Iterator[Document]:
            return (Document(text, validation) for text in self._texts(share))

        every = self.cfg.validation_every if self.validation_files is None else None
        held = spans(self.validation_files or [], limit)
        return [
            *(Unit(named(share), partial(documents, share, False), every) for share in spans(self.files, limit)),
            *(Unit(named(share), partial(documents, share, True)) for share in held),
        ]

    def _texts(self, parts: list[Span]) -> Iterator[str]:
        for span in parts:
            path = span.path
            if path.suffix == ".parquet":
                yield from read_texts(path, self.cfg.text_field, (span.start, span.stop))
                continue
            opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
            try:
                if path.name.removesuffix(".gz").endswith(".jsonl"):
                    with opener(path, "rb") as stream:
                        yield from self._lines(lines_of(span, stream))
                else:
                    with opener(path, "rt", encoding="utf-8") as stream:
                        limit = LONGEST_DOCUMENT + 1 if path.suffix == ".gz" else -1
                        text = stream.read(limit)
                        if 0 < limit == len(text):
                            raise ConfigError(endless(f"{path}"))
                        if text:
                            yield text
            except UnicodeDecodeError as error:
                raise ConfigError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from None
            except (OSError, EOFError, zlib.error) as error:
                raise ConfigError(f"{path} cannot be read: {error}.") from None

    def _lines(self, lines: Iterator[tuple[Line, bytes]]) -> Iterator[str]:
        for where, line in lines:
            if not line.strip():
                continue
            try:
                text = json.loads(line.decode("utf-8"))[self.cfg.text_field]
            except UnicodeDecodeError as error:
                raise ConfigError(f"{where} is not UTF-8 text ({error.reason}).") from None
            except (json.JSONDecodeError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise ConfigError(
                    f"{where} is no JSON object with a text field '{self.cfg.text_field}' (data.corpus.text_field)."
                )
            if SURROGATE.search(text):
                raise ConfigError(f"{where} holds half of a surrogate pair (\\ud800 to \\udfff), which is no text.")
            if text:
                yield text

    def identity(self) -> dict[str, str]:
        return {"files": stamp([*self.files, *(self.validation_files or [])])}


class MixtureSource:
    """Several corpora, one after the other by name; ``sources`` holds each of them."""

    def __init__(self, cfg: MixtureCorpus) -> None:
        self.sources: dict[str, Corpus] = {}
        for name, part in parts(cfg).items():
            with told_apart(name):
                self.sources[name] = open_corpus(part.corpus)

    def documents(self) -> Iterator[Document]:
        for name in self.sources:
            yield from self.documents_of(name)

    def documents_of(self, name: str) -> Iterator[Document]:
        """The documents of one corpus."""
        with told_apart(name):
            yield from self.sources[name].documents()

    def identity(self) -> dict[str, str]:
        return {f"{name}/{key}": v for name, source in self.sources.items() for key, v in source.identity().items()}

    def identity_since(self, recorded: dict[str, str]) -> dict[str, str]:
        """As :func:`identity_since`, for each corpus."""
        found: dict[str, str] = {}
        for name, source in self.sources.items():
            own = {key.removeprefix(f"{name}/"): v for key, v in recorded.items() if key.startswith(f"{name}/")}
            found |= {f"{name}/{key}": value for key, value in identity_since(source, own).items()}
        return found


@contextmanager
def told_apart(name: str) -> Iterator[None]:
    """What is wrong with one corpus of a mixture names the key that it stands at."""
    try:
        yield
    except ConfigError as error:
        said = str(error)
        named = said.replace("data.corpus.", f"{KEY}.{name}.") if "data.corpus." in said else f"{KEY}.{name}: {said}"
        raise ConfigError(named) from None


# Add a corpus: a dataclass in data.config.CORPUS_CONFIGS, and its source here.
CORPORA: dict[type[CorpusConfig], Callable[..., Corpus]] = {
    StdlibCorpus: StdlibSource,
    FilesCorpus: FilesSource,
    HubCorpus: HubSource,
    ChatCorpus: ChatSource,
    MixtureCorpus: MixtureSource,
}


def open_corpus(cfg: CorpusConfig) -> Corpus:
    """The corpus of a configuration. Raises ConfigError when its files are missing."""
    if type(cfg) not in CORPORA:
        raise ConfigError(f"data.corpus={cfg.name} has no entry in bitnet_train.data.corpus.CORPORA")
    return CORPORA[type(cfg)](cfg)


def identity_since(corpus: Corpus, recorded: dict[str, str]) -> dict[str, str]:
    """The identity to compare with ``recorded``, that of shards made earlier.

    A corpus whose text lies elsewhere has a method of this name and need not be reached once its shards are made.
    """
    own: Callable[..., dict[str, str]] | None = getattr(corpus, "identity_since", None)
    return corpus.identity() if own is None else own(recorded)


def remarks(corpus: Corpus) -> list[str]:
    """What the user may not expect of a corpus, said before it is read."""
    inner = corpus.sources.values() if isinstance(corpus, MixtureSource) else [corpus]
    return [remark for source in inner for remark in getattr(source, "remarks", [])]
