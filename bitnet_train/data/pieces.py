"""Tokenised units of a corpus on disk, each with a marker that it is whole, and the shards that they add up to.

Which documents are held out depends on their numbers in the whole corpus, which nobody knows while it is tokenised in
parallel. So a piece holds all documents of its unit in order, with their lengths, and they are told apart when the
shards are put together: by then the documents before each piece are counted.
"""

import hashlib
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bitnet_train.data.document import VALIDATION_OFFSET
from bitnet_train.data.shards import ShardInfo, file_digest, sample_digest

SPLITS = ("train", "val")
# Beside the token ids: tokens and UTF-8 bytes of each document, whether it says itself that it is held out.
PER_DOCUMENT = {"lengths": np.int64, "bytes": np.int64, "held": np.uint8}


def temporary(path: Path) -> Path:
    """A name beside ``path`` that no other process on any machine writes to."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


def write_whole(path: Path, text: str) -> None:
    """``text`` as a file that is there whole or not at all, also after a power cut."""
    beside = temporary(path)
    with beside.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(path)


class PieceWriter:
    """Writes the documents of unit ``number``; memory does not grow with them."""

    def __init__(self, folder: Path, number: int, dtype: type, masked: bool) -> None:
        self.folder, self.number = folder, number
        self.kinds: dict[str, Any] = {"ids": dtype, **PER_DOCUMENT, **({"mask": np.uint8} if masked else {})}
        self._paths = {kind: temporary(folder / f"{number:07d}.{kind}") for kind in self.kinds}
        self._digests = {kind: hashlib.blake2b(digest_size=32) for kind in self.kinds}
        self._streams: dict[str, BinaryIO] = {kind: path.open("wb") for kind, path in self._paths.items()}
        self.documents = self.tokens = 0

    def __enter__(self) -> "PieceWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self._streams.values():
            stream.close()
        for path in self._paths.values():
            path.unlink(missing_ok=True)

    def add(self, ids: Sequence[int], text_bytes: int, held: bool, mask: Sequence[int] | None) -> None:
        """Append one document."""
        values: dict[str, Any] = {"ids": ids, "lengths": [len(ids)], "bytes": [text_bytes], "held": [held]}
        if mask is not None:
            values["mask"] = mask
        assert values.keys() == self.kinds.keys()
        for kind, value in values.items():
            data = np.array(value, dtype=self.kinds[kind]).tobytes()
            self._digests[kind].update(data)
            self._streams[kind].write(data)
        self.documents += 1
        self.tokens += len(ids)

    def finish(self) -> None:
        """Name the files, and last the marker."""
        files = {}
        for kind, stream in self._streams.items():
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()
            path = self.folder / f"{self.number:07d}.{kind}"
            self._paths[kind].replace(path)
            files[kind] = [path.stat().st_size, self._digests[kind].hexdigest()]
        content = {"documents": self.documents, "tokens": self.tokens, "files": files}
        write_whole(marker(self.folder, self.number), json.dumps(content) + "\n")


def marker(folder: Path, number: int) -> Path:
    """The file that says that unit ``number`` is done."""
    return folder / f"{number:07d}.json"


@dataclass(frozen=True)
class Piece:
    """A finished unit."""

    folder: Path
    number: int
    dtype: Any
    documents: int
    files: dict[str, tuple[int, str]]

    def whole(self) -> bool:
        """Whether every byte is as it was written."""
        return all(file_digest(self._path(kind)) == digest for kind, (_, digest) in self.files.items())

    def read(self, kind: str) -> np.ndarray:
        """All values of a kind, mapped from the file."""
        dtype = PER_DOCUMENT.get(kind, np.uint8 if kind == "mask" else self.dtype)
        if not self.files[kind][0]:
            return np.empty(0, dtype)
        return np.memmap(self._path(kind), dtype=dtype, mode="r")

    def held_out(self, first: int, every: int | None) -> np.ndarray:
        """Whether each document is validation, bool (documents,); ``first`` is the number of the first of them."""
        if every is None:
            return self.read("held") == 1
        return (first + np.arange(self.documents)) % every == VALIDATION_OFFSET

    def _path(self, kind: str) -> Path:
        return self.folder / f"{self.number:07d}.{kind}"


def find_piece(folder: Path, number: int, dtype: Any) -> Piece | None:
    """The piece of unit ``number`` if it is there whole (by the sizes of its files), else None."""
    try:
        content = json.loads(marker(folder, number).read_text(encoding="utf-8"))
        files = {kind: (int(size), str(digest)) for kind, (size, digest) in content["files"].items()}
        piece = Piece(folder, number, dtype, int(content["documents"]), files)
        sizes = all((folder / f"{number:07d}.{kind}").stat().st_size == size for kind, (size, _) in files.items())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return piece if sizes else None


@dataclass(frozen=True)
class Share:
    """What a piece gives to a split."""

    number: int
    first: int
    every: int | None
    documents: int
    tokens: int
    bytes: int
    learnt: int


def shares_of(piece: Piece, first: int, every: int | None) -> dict[str, Share]:
    """Split -> what a piece gives to it; ``first`` is the number of its first document."""
    held, found = piece.held_out(first, every), {}
    lengths, sizes = piece.read("lengths"), piece.read("bytes")
    for split in SPLITS:
        chosen = held if split == "val" else ~held
        learnt = int(piece.read("mask")[np.repeat(chosen, lengths)].sum()) if "mask" in piece.files else 0
        found[split] = Share(
            piece.number, first, every, int(chosen.sum()), int(lengths[chosen].sum()), int(sizes[chosen].sum()), learnt
        )
    return found


def cut(piece: Piece, share: Share, split: str, kind: str, start: int, stop: int) -> np.ndarray:
    """Tokens [start, stop), or their mask, of those that a piece gives to a split."""
    held = piece.held_out(share.first, share.every)
    chosen = held if split == "val" else ~held
    lengths = np.asarray(piece.read("lengths"))
    # Tokens of the split, and of the piece, before the end of each document.
    of_split, of_piece = np.cumsum(lengths * chosen), np.cumsum(lengths)
    a, b = int(np.searchsorted(of_split, start, side="right")), int(np.searchsorted(of_split, stop, side="left"))
    begin = int(of_piece[a] - lengths[a])
    values = np.asarray(piece.read(kind)[begin : int(of_piece[b])])[np.repeat(chosen[a : b + 1], lengths[a : b + 1])]
    skipped = start - int(of_split[a] - lengths[a] * chosen[a])
    return values[skipped : skipped + stop - start]


@dataclass(frozen=True)
class ShardPlan:
    """One file of a split to be put together: tokens [start, stop) of its ``shares``."""

    split: str
    name: str
    kind: str
    start: int
    stop: int
    shares: tuple[Share, ...]


def plan_shards(split: str, suffix: str, shares: list[Share], shard_tokens: int, masked: bool) -> list[ShardPlan]:
    """The files of a split, as :class:`bitnet_train.data.shards.ShardWriter` would write and name them."""
    ends = np.cumsum([share.tokens for share in shares])
    total = int(ends[-1]) if len(shares) else 0
    found = []
    for number, start in enumerate(range(0, total, shard_tokens)):
        stop = min(total, start + shard_tokens)
        first, last = int(np.searchsorted(ends, start, side="right")), int(np.searchsorted(ends, stop, side="left"))
        before = int(ends[first]) - shares[first].tokens
        those = tuple(shares[first : last + 1])
        name = f"{split}{suffix.replace('/', '-')}-{number:05d}"
        kinds = {"ids": f"{name}.npy", **({"mask": f"{name}.mask.npy"} if masked else {})}
        found += [ShardPlan(split, file, kind, start - before, stop - before, those) for kind, file in kinds.items()]
    return found


def put_together(plan: ShardPlan, pieces: Path, folder: Path, dtype: Any) -> ShardInfo:
    """Write one shard and its marker; one that is there already is left as it is."""
    done = folder / f"{plan.name}.json"
    path = folder / plan.name
    try:
        info = ShardInfo(**json.loads(done.read_text(encoding="utf-8")))
        if path.stat().st_size == info.bytes:
            return info
    except (OSError, ValueError, TypeError):
        pass
    content = np.empty(plan.stop - plan.start, dtype=np.uint8 if plan.kind == "mask" else dtype)
    position, filled = 0, 0
    for share in plan.shares:
        start, stop = max(0, plan.start - position), min(share.tokens, plan.stop - position)
        position += share.tokens
        if start >= stop:
            continue
        piece = find_piece(pieces, share.number, dtype)
        if piece is None:
            raise FileNotFoundError(f"{pieces} lost unit {share.number} while its shards were put together")
        content[filled : filled + stop - start] = cut(piece, share, plan.split, plan.kind, start, stop)
        filled += stop - start
    assert filled == len(content)
    beside = temporary(path)
    with beside.open("wb") as stream:
        np.save(stream, content)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(path)
    info = ShardInfo(plan.name, len(content), path.stat().st_size, file_digest(path), sample_digest(path))
    write_whole(done, json.dumps(asdict(info)) + "\n")
    return info
