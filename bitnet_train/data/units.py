"""Shares of a corpus that are read and tokenised by themselves, by whichever process comes first.

How a corpus is cut depends on its files and the size of a share alone, so that the shares, one after the other, are the
corpus in its order whatever the number of processes.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from bitnet_train.data.document import Document, bounded_lines
from bitnet_train.errors import ConfigError

COUNTED_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Unit:
    """A share of a corpus.

    ``what`` tells it from others of the corpus. With ``every``, documents of all such units of a corpus are numbered
    from 0 and ``held_out(number, every)`` are validation; without, the documents themselves say what they are.
    """

    what: str
    documents: Callable[[], Iterator[Document]]
    every: int | None = None


@dataclass(frozen=True)
class Span:
    """A file or a part: of jsonl the lines that begin in bytes [start, stop), of parquet row groups [start, stop)."""

    path: Path
    start: int = 0
    stop: int | None = None


class Line(NamedTuple):
    """A line of a file; its number is counted when it is asked for, unless it is known."""

    path: Path
    start: int
    number: int | None

    def __str__(self) -> str:
        number = self.number
        if number is None:
            number, left = 1, self.start
            with self.path.open("rb") as stream:
                while left and (read := stream.read(min(left, COUNTED_AT_ONCE))):
                    number, left = number + read.count(b"\n"), left - len(read)
        return f"{self.path} line {number}"


def lines_of(span: Span, stream: IO[bytes]) -> Iterator[tuple[Line, bytes]]:
    """The lines of a span, each with its place; ``stream`` is the opened file."""
    position, number = span.start, 1 if span.start == 0 else None
    if span.start:
        # A line that began before belongs to the span before.
        stream.seek(span.start - 1)
        position += len(stream.readline()) - 1
    for line in bounded_lines(span.path, stream):
        if span.stop is not None and position >= span.stop:
            return
        yield Line(span.path, position, number), line
        position += len(line)
        number = None if number is None else number + 1


def spans(files: list[Path], limit: int) -> list[list[Span]]:
    """``files`` in shares of about ``limit`` bytes: several small ones, or parts of a large one that can be divided."""
    shares: list[list[Span]] = []
    filled = 0
    for path in files:
        size = _size(path)
        parts = [Span(path)] if size <= limit else _divided(path, size, limit)
        if not shares or len(parts) > 1 or filled + size > limit:
            shares += [[part] for part in parts]
            filled = limit if len(parts) > 1 else size
        else:
            shares[-1] += parts
            filled += size
    return shares


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None


def _divided(path: Path, size: int, limit: int) -> list[Span]:
    if path.suffix == ".jsonl":
        return [Span(path, start, min(size, start + limit)) for start in range(0, size, limit)]
    if path.suffix != ".parquet":
        return [Span(path)]
    from bitnet_train.data.parquet import row_group_bytes

    found, start, filled = [], 0, 0
    sizes = row_group_bytes(path)
    for number, group in enumerate(sizes):
        if number > start and filled + group > limit:
            found.append(Span(path, start, number))
            start, filled = number, 0
        filled += group
    return [*found, Span(path, start, len(sizes))]


def named(share: list[Span]) -> str:
    """What a share of files is called."""
    return "; ".join(f"{span.path}[{span.start}:{'' if span.stop is None else span.stop}]" for span in share)


def units_of(corpus: object, limit: int) -> list[Unit]:
    """The units of a corpus, of about ``limit`` bytes each; one that has no method ``units`` is a single one."""
    own: Callable[[int], list[Unit]] | None = getattr(corpus, "units", None)
    if own is not None:
        return own(limit)
    documents: Callable[[], Iterator[Document]] = corpus.documents  # type: ignore[attr-defined]
    return [Unit("everything", documents)]


def digest_of(units: list[Unit]) -> str:
    """A digest of how a corpus is cut."""
    return hashlib.sha256("\n".join(f"{unit.what} {unit.every}" for unit in units).encode()).hexdigest()
