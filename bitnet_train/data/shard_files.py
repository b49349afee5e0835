"""Reading parts of token shards that may vanish, shrink or change while a run reads them.

Not through a memory map: a file that shrinks under one kills the process (SIGBUS) without a word.
"""

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bitnet_train.errors import ConfigError

# Files that one process keeps open at a time.
OPEN_FILES = 64
KINDS = (np.uint8, np.uint16, np.uint32)
RESTORE = "restore it or prepare again with command=prepare data.rebuild=true; the same command then continues the run"


class ShardFiles:
    """One-dimensional ``.npy`` files of unsigned integers, read by part; picklable for loader processes.

    What a file was (size and time of its last change) is remembered where this is made, which is after the shards
    were compared with their manifest. ``tokens`` and ``digests`` (of samples) are the manifest's. ``vocab``: ids reach
    up to it, if it is known.
    """

    def __init__(self, paths: list[Path], tokens: list[int], digests: list[str], vocab: int | None = None) -> None:
        self.paths, self.tokens, self.digests, self.vocab = paths, tokens, digests, vocab
        self._known = [_stamp(path) for path in paths]
        self._open: OrderedDict[int, tuple[BinaryIO, np.dtype[Any], int]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def read(self, number: int, start: int, stop: int) -> np.ndarray:
        """Entries [start, stop) of file ``number``.

        Raises ConfigError, which names the file and the place in it, when the file is gone, cut short or changed, and
        when an id lies beyond the vocabulary.
        """
        stream, kind, offset = self._opened(number)
        wanted, place = (stop - start) * kind.itemsize, offset + start * kind.itemsize
        parts: list[bytes] = []
        try:
            while wanted:
                part = os.pread(stream.fileno(), wanted, place)
                if not part:
                    raise ConfigError(
                        f"The token shard {self.paths[number]} was cut short while it was read: {RESTORE}."
                    )
                parts.append(part)
                wanted, place = wanted - len(part), place + len(part)
        except OSError as error:
            raise ConfigError(
                f"The token shard {self.paths[number]} cannot be read ({error.strerror}): {RESTORE}."
            ) from None
        found = np.frombuffer(b"".join(parts), dtype=kind)
        if self.vocab is not None and len(found) and int(found.max()) >= self.vocab:
            at = int(np.argmax(found >= self.vocab))
            raise ConfigError(
                f"The token shard {self.paths[number]} holds id {found[at]} at offset {start + at}, beyond its "
                f"vocabulary of {self.vocab}: it is damaged; {RESTORE}."
            )
        return found

    def check(self) -> list[Path]:
        """The files that are gone. Raises ConfigError when one is not what it was."""
        gone = []
        for number, path in enumerate(self.paths):
            if not path.is_file():
                gone.append(path)
            elif _stamp(path) != self._known[number]:
                self._accept(number)
        return gone

    def _opened(self, number: int) -> tuple[BinaryIO, np.dtype[Any], int]:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        path = self.paths[number]
        if _stamp(path) != self._known[number] and path.is_file():
            self._accept(number)
        try:
            stream = path.open("rb", buffering=0)
            try:
                version = np.lib.format.read_magic(stream)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, kind = read(stream)
                if shape != (self.tokens[number],) or kind not in KINDS:
                    raise ValueError(f"it holds {kind} of shape {shape}")
            except BaseException:
                stream.close()
                raise
        except FileNotFoundError:
            raise ConfigError(f"The token shard {path} is gone: {RESTORE}.") from None
        except Exception as error:  # of the system, and whatever numpy's reading of a header raises
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ConfigError(f"The token shard {path} cannot be read ({lines[0][:200]}): {RESTORE}.") from None
        self._open[number] = stream, kind, stream.tell()
        if len(self._open) > OPEN_FILES:
            self._open.popitem(last=False)[1][0].close()
        return self._open[number]

    def _accept(self, number: int) -> None:
        """Remember a file that was touched or put there again, if it holds what it held. Raises ConfigError if not."""
        from bitnet_train.data.shards import sample_digest

        path, now = self.paths[number], _stamp(self.paths[number])
        try:
            same = sample_digest(path) == self.digests[number]
        except OSError:
            same = False
        if not same:
            raise ConfigError(f"The token shard {path} was changed while the run read it: {RESTORE}.")
        self._known[number] = now


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
