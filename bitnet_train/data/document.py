"""What corpora are made of: documents, which of them are held out, and what tells that files have changed."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from bitnet_train.errors import ConfigError

VALIDATION_OFFSET = 7
# Bytes of a line, characters of an unpacked file: a small .gz can unpack to any size.
LONGEST_DOCUMENT = 1 << 30


@dataclass(frozen=True)
class Document:
    """One text, and whether it is held out for validation."""

    text: str
    validation: bool


def held_out(index: int, every: int) -> bool:
    """Whether document ``index`` is validation when every ``every``-th is."""
    return index % every == VALIDATION_OFFSET


def bounded_lines(path: Path, stream: Any) -> Iterator[bytes]:
    """The lines of a binary stream. Raises ConfigError for one that does not end."""
    while line := stream.readline(LONGEST_DOCUMENT + 1):
        if len(line) > LONGEST_DOCUMENT:
            raise ConfigError(endless(f"A line of {path}"))
        yield line


def endless(what: str) -> str:
    """The sentence for a document that is longer than any should be."""
    return f"{what} is longer than {LONGEST_DOCUMENT >> 20:,} MiB, which no document is: it is damaged or hostile."


def find_files(where: str, patterns: list[str], key: str) -> list[Path]:
    """A file, or the files of a folder that match one of ``patterns``, by sorted path.

    Raises ConfigError, naming ``key``, when there are none.
    """
    root = Path(where).expanduser()
    if root.is_file():
        return [root]
    if not root.exists():
        raise ConfigError(f"{key}={where} does not exist: give a file, or a folder of them.")
    found = matching(root, patterns)
    if not found:
        raise ConfigError(f"{key}={where} holds no file that matches {', '.join(patterns)} (data.corpus.patterns).")
    return found


def matching(root: Path, patterns: list[str]) -> list[Path]:
    """The files under a folder whose names match one of ``patterns``, by sorted path."""
    inside = (p for p in root.rglob("*") if p.is_file() and any(fnmatch(p.name, pattern) for pattern in patterns))
    return sorted(inside, key=lambda p: p.relative_to(root).as_posix())


def stamp(paths: Iterable[Path]) -> str:
    """A digest of names, sizes and modification times: cheap, and different whenever a file was edited."""
    digest = hashlib.sha256()
    for path in paths:
        stat = path.stat()
        digest.update(f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
