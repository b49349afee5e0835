"""What corpora are made of: documents, which of them are held out, and what tells that files have changed."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

VALIDATION_OFFSET = 7


@dataclass(frozen=True)
class Document:
    """One text, and whether it is held out for validation."""

    text: str
    validation: bool


def held_out(index: int, every: int) -> bool:
    """Whether document ``index`` is validation when every ``every``-th is."""
    return index % every == VALIDATION_OFFSET


def stamp(paths: Iterable[Path]) -> str:
    """A digest of names, sizes and modification times: cheap, and different whenever a file was edited."""
    digest = hashlib.sha256()
    for path in paths:
        stat = path.stat()
        digest.update(f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
