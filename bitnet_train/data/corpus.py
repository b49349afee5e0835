"""Documents: an ordered, repeatable stream of texts, split into training and validation."""

import gzip
import hashlib
import json
import re
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol

from bitnet_train.data.config import CorpusConfig, FilesCorpus, StdlibCorpus
from bitnet_train.errors import ConfigError

VALIDATION_OFFSET = 7
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Document:
    """One text, and whether it is held out for validation."""

    text: str
    validation: bool


class Corpus(Protocol):
    """An ordered stream of documents that is the same every time it is read."""

    def documents(self) -> Iterator[Document]:
        """Every document, in a fixed order."""

    def identity(self) -> dict[str, str]:
        """What the text depends on; a change of it means the prepared shards are of another text."""


def _held_out(index: int, every: int) -> bool:
    return index % every == VALIDATION_OFFSET


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
            yield Document(text, _held_out(index, self.cfg.validation_every))
            index += 1

    def identity(self) -> dict[str, str]:
        return {"python": sys.version, "files": _stamp(self.root / path for path in self._paths())}


class FilesSource:
    """Local files: one document per text file, one per line of a jsonl file; ``.gz`` is unpacked on the way."""

    def __init__(self, cfg: FilesCorpus) -> None:
        if not cfg.path:
            raise ConfigError("data.corpus.path is not set: give a text or jsonl file, or a folder of them.")
        self.cfg = cfg
        self.validation_files = (
            self._find(cfg.validation_path, "data.corpus.validation_path") if cfg.validation_path else None
        )
        # A validation file inside the training folder is held out, not trained on.
        held_out = {path.resolve() for path in self.validation_files or []}
        self.files = [path for path in self._find(cfg.path, "data.corpus.path") if path.resolve() not in held_out]
        if not self.files:
            raise ConfigError(f"data.corpus.path={cfg.path} holds no files but those of data.corpus.validation_path.")

    def _find(self, where: str, key: str) -> list[Path]:
        root = Path(where).expanduser()
        if root.is_file():
            return [root]
        if not root.exists():
            raise ConfigError(f"{key}={where} does not exist: give a text or jsonl file, or a folder of them.")
        found = sorted(
            (
                p
                for p in root.rglob("*")
                if p.is_file() and any(fnmatch(p.name, pattern) for pattern in self.cfg.patterns)
            ),
            key=lambda p: p.relative_to(root).as_posix(),
        )
        if not found:
            raise ConfigError(
                f"{key}={where} holds no file that matches {', '.join(self.cfg.patterns)} (data.corpus.patterns)."
            )
        return found

    def documents(self) -> Iterator[Document]:
        every = self.cfg.validation_every
        for index, text in enumerate(self._texts(self.files)):
            yield Document(text, self.validation_files is None and _held_out(index, every))
        for text in self._texts(self.validation_files or []):
            yield Document(text, True)

    def _texts(self, files: list[Path]) -> Iterator[str]:
        for path in files:
            opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
            try:
                if path.name.removesuffix(".gz").endswith(".jsonl"):
                    with opener(path, "rb") as stream:
                        yield from self._lines(path, stream)
                else:
                    with opener(path, "rt", encoding="utf-8") as stream:
                        if text := stream.read():
                            yield text
            except UnicodeDecodeError as error:
                raise ConfigError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from None
            except (OSError, EOFError, zlib.error) as error:
                raise ConfigError(f"{path} cannot be read: {error}.") from None

    def _lines(self, path: Path, stream: Iterator[bytes]) -> Iterator[str]:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line.decode("utf-8"))[self.cfg.text_field]
            except UnicodeDecodeError as error:
                raise ConfigError(f"{path} line {number} is not UTF-8 text ({error.reason}).") from None
            except (json.JSONDecodeError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise ConfigError(
                    f"{path} line {number} is no JSON object with a text field '{self.cfg.text_field}' "
                    "(data.corpus.text_field)."
                )
            if SURROGATE.search(text):
                raise ConfigError(
                    f"{path} line {number} holds half of a surrogate pair (\\ud800 to \\udfff), which is no text."
                )
            if text:
                yield text

    def identity(self) -> dict[str, str]:
        return {"files": _stamp([*self.files, *(self.validation_files or [])])}


def _stamp(paths: Iterator[Path] | list[Path]) -> str:
    """A digest of names, sizes and modification times: cheap, and different whenever a file was edited."""
    digest = hashlib.sha256()
    for path in paths:
        stat = path.stat()
        digest.update(f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


# Add a corpus: a dataclass in data.config.CORPUS_CONFIGS, and its source here.
CORPORA: dict[type[CorpusConfig], Callable[..., Corpus]] = {StdlibCorpus: StdlibSource, FilesCorpus: FilesSource}


def open_corpus(cfg: CorpusConfig) -> Corpus:
    """The corpus of a configuration. Raises ConfigError when its files are missing."""
    if type(cfg) not in CORPORA:
        raise ConfigError(f"data.corpus={cfg.name} has no entry in bitnet_train.data.corpus.CORPORA")
    return CORPORA[type(cfg)](cfg)
