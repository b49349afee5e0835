"""Token shards: flat ``.npy`` files of token ids, and the manifest that fingerprints them.

A shard is one dimension of uint16 (or uint32) ids, documents one after the other, each started by the tokenizer's bos
id. Windows of any length are slices, so the sequence length can change without preparing again, and reading a window
reads only its bytes. ``benchmarks/shard_storage.py`` compares this with Arrow tables read through ``datasets``.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_train.data.config import Verify
from bitnet_train.data.shard_files import ShardFiles
from bitnet_train.errors import ConfigError

MANIFEST = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
AGAIN = "Prepare again with command=prepare data.rebuild=true."
FULL_VERIFY_LIMIT = 4 << 30
SAMPLE_BYTES = 1 << 20
SAMPLES = 16


@dataclass
class ShardInfo:
    """One shard file: its name, tokens, and digests of all its bytes and of a sample of them."""

    file: str
    tokens: int
    bytes: int
    digest: str
    sample_digest: str


@dataclass
class Manifest:
    """What a folder of shards holds and what it was made from."""

    version: int
    # The configuration, corpus identity and tokenizer digest that the shards were made from.
    source: dict[str, Any]
    # "train" and "val" -> shards, tokens, documents and UTF-8 bytes of text. A mixture has "train/NAME" and "val/NAME"
    # of each corpus beside, and the shards of the two are those of all of them.
    splits: dict[str, dict[str, Any]]
    # Digest of the tokens and the tokenizer: what a run remembers. The same text prepared again, touched or moved, has
    # the same fingerprint.
    fingerprint: str = field(default="")
    # Digest of the whole manifest, against edits of it.
    digest: str = field(default="")

    def compute_fingerprint(self) -> str:
        """Digest of what training sees: the shards' content and the tokenizer."""
        return _digest({"tokenizer": self.source.get("tokenizer_digest"), "splits": self.splits})

    def compute_digest(self) -> str:
        """Digest of everything in the manifest but this digest itself."""
        return _digest({key: value for key, value in asdict(self).items() if key != "digest"})

    def shards(self, split: str) -> list[ShardInfo]:
        """The shard files of a split, in order."""
        return [ShardInfo(**shard) for shard in self.splits[split]["shards"]]

    def masks(self, split: str) -> list[ShardInfo]:
        """Beside the shards of chat data: uint8 of as many tokens, 1 for those that are learnt. Else nothing."""
        return [ShardInfo(**shard) for shard in self.splits[split].get("masks", [])]

    @property
    def corpora(self) -> list[str]:
        """The names of a mixture's corpora, sorted; nothing for a single corpus."""
        return sorted(split.removeprefix("train/") for split in self.splits if split.startswith("train/"))

    def save(self, folder: Path) -> None:
        """Writes manifest.json."""
        self.fingerprint = self.compute_fingerprint()
        self.digest = self.compute_digest()
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=1, sort_keys=True) + "\n")


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_manifest(folder: Path) -> Manifest:
    """Reads manifest.json. Raises ConfigError when it is unreadable or was edited."""
    path = folder / MANIFEST
    try:
        manifest = Manifest(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path} is no readable manifest ({error}): prepare again with command=prepare data.rebuild=true."
        ) from None
    if manifest.digest != manifest.compute_digest():
        raise ConfigError(
            f"{path} was edited: its digest does not match. Prepare again with command=prepare data.rebuild=true."
        )
    return manifest


def tokenizer_digest(path: Path) -> str:
    """SHA-256 of a tokenizer file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


class ShardWriter:
    """Collects the tokens of one split into shards of ``shard_tokens`` tokens."""

    def __init__(self, folder: Path, split: str, vocab_size: int, shard_tokens: int) -> None:
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
        self.infos: list[ShardInfo] = []
        self.masks: list[ShardInfo] = []
        self.documents = self.text_bytes = self.learnt = 0
        self._pending: list[np.ndarray] = []
        self._pending_masks: list[np.ndarray] = []
        self._pending_tokens = 0

    def add(self, ids: Iterable[int], text_bytes: int, mask: Iterable[int] | None = None) -> None:
        """Append one document, with a mask (as many zeros and ones) or, all of a split alike, without."""
        part = np.fromiter(ids, dtype=self.dtype)
        if mask is not None:
            self._pending_masks.append(np.fromiter(mask, dtype=np.uint8))
            assert len(self._pending_masks[-1]) == len(part)
            self.learnt += int(self._pending_masks[-1].sum())
        self._pending.append(part)
        self._pending_tokens += len(part)
        self.documents += 1
        self.text_bytes += text_bytes
        while self._pending_tokens >= self.shard_tokens:
            self._flush(self.shard_tokens)

    def finish(self) -> dict[str, Any]:
        """Write what is left; the split's entry for the manifest."""
        if self._pending_tokens:
            self._flush(self._pending_tokens)
        masks: dict[str, Any] = {}
        if self.masks:
            masks = {"masks": [asdict(info) for info in self.masks], "learnt": self.learnt}
        return {
            "shards": [asdict(info) for info in self.infos],
            **masks,
            "tokens": sum(info.tokens for info in self.infos),
            "documents": self.documents,
            "bytes": self.text_bytes,
        }

    def _flush(self, tokens: int) -> None:
        name = f"{self.split.replace('/', '-')}-{len(self.infos):05d}"
        self._pending = self._write(self._pending, tokens, f"{name}.npy", self.infos)
        self._pending_tokens -= tokens
        if self._pending_masks:
            self._pending_masks = self._write(self._pending_masks, tokens, f"{name}.mask.npy", self.masks)

    def _write(self, pending: list[np.ndarray], tokens: int, name: str, infos: list[ShardInfo]) -> list[np.ndarray]:
        """Save the first ``tokens`` entries; the rest."""
        everything = np.concatenate(pending)
        path = self.folder / name
        np.save(path, everything[:tokens])
        infos.append(ShardInfo(name, tokens, path.stat().st_size, file_digest(path), sample_digest(path)))
        return [everything[tokens:]]


def joined(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest's entry of a split that consists of others, one after the other."""
    keys = ("tokens", "documents", "bytes", *(["learnt"] if any("learnt" in entry for entry in entries) else []))
    sums = {key: sum(entry.get(key, 0) for entry in entries) for key in keys}
    lists = {key: [shard for entry in entries for shard in entry.get(key, [])] for key in ("shards", "masks")}
    return {key: found for key, found in lists.items() if found or key == "shards"} | sums


def file_digest(path: Path) -> str:
    """BLAKE2b of all bytes of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def sample_digest(path: Path) -> str:
    """BLAKE2b of evenly spaced parts of a file, first and last included: up to 16 MiB whatever its size."""
    size = path.stat().st_size
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb") as stream:
        for i in range(SAMPLES):
            stream.seek(max(0, (size - SAMPLE_BYTES) * i // (SAMPLES - 1)))
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def verify_shards(folder: Path, manifest: Manifest, how: Verify) -> str:
    """Compare every shard with the manifest; what was compared, in words.

    Raises ConfigError for a missing, truncated or edited shard.
    """
    # A mixture's shards stand in two splits.
    named = (s for split in manifest.splits for s in (*manifest.shards(split), *manifest.masks(split)))
    shards = list({shard.file: shard for shard in named}.values())
    tokenizer = folder / TOKENIZER_FILE
    wanted_tokenizer = manifest.source.get("tokenizer_digest")
    if wanted_tokenizer is not None and (not tokenizer.is_file() or tokenizer_digest(tokenizer) != wanted_tokenizer):
        raise ConfigError(f"The tokenizer {tokenizer} is missing or was edited. {AGAIN}")
    full = how is Verify.full or (how is Verify.auto and sum(s.bytes for s in shards) <= FULL_VERIFY_LIMIT)
    for shard in shards:
        path = folder / shard.file
        if not path.is_file():
            raise ConfigError(f"The token shard {path} is missing. {AGAIN}")
        if path.stat().st_size != shard.bytes:
            raise ConfigError(
                f"The token shard {path} has {path.stat().st_size} bytes instead of {shard.bytes}. {AGAIN}"
            )
        actual, wanted = (file_digest(path), shard.digest) if full else (sample_digest(path), shard.sample_digest)
        if actual != wanted:
            raise ConfigError(f"The token shard {path} was edited: its digest does not match the manifest. {AGAIN}")
    return "every byte" if full else "sizes and samples"


class TokenArray:
    """The tokens of one split as one long array over its shards; picklable for loader processes.

    With ``masks`` their masks instead, an array of no length where there are none.
    """

    def __init__(self, folder: Path, manifest: Manifest, split: str, masks: bool = False) -> None:
        shards = manifest.masks(split) if masks else manifest.shards(split)
        # Ids of masks are 0 and 1; those of tokens may reach up to the tokenizer's vocabulary.
        vocab = None if masks else manifest.source.get("tokenizer", {}).get("vocab_size")
        self.starts = np.cumsum([0, *(shard.tokens for shard in shards)])
        self.files = ShardFiles(
            [folder / s.file for s in shards], [s.tokens for s in shards], [s.sample_digest for s in shards], vocab
        )

    def __len__(self) -> int:
        return int(self.starts[-1])

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Ids [start, stop) as int64, across shard borders."""
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        parts = []
        while start < stop:
            base, end = int(self.starts[first]), int(self.starts[first + 1])
            parts.append(self.files.read(first, start - base, min(stop, end) - base))
            start, first = min(stop, end), first + 1
        return np.concatenate(parts).astype(np.int64)

    def place(self, token: int) -> tuple[Path, int]:
        """The shard that holds ``token`` of the split, and the token's number in it."""
        shard = int(np.searchsorted(self.starts, token, side="right")) - 1
        return self.files.paths[shard], token - int(self.starts[shard])
