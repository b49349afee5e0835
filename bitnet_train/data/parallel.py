"""Token shards made by several processes or by the tasks of a cluster's array, and continued after a kill.

``<shards>.parts/`` beside the folder of the shards holds the work while it lasts: the plan and the tokenizer (by part
0), a piece for each unit of text with a marker, and in ``shards/`` the result, which is renamed at the end. Units
belong to parts by their numbers. The shards are those of one process, byte for byte.
"""

import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_train.data.chat_template import ChatEncoder
from bitnet_train.data.config import DataConfig
from bitnet_train.data.corpus import Corpus, MixtureSource, open_corpus, told_apart
from bitnet_train.data.pieces import (
    SPLITS,
    Piece,
    PieceWriter,
    Share,
    find_piece,
    marker,
    plan_shards,
    put_together,
    shares_of,
    write_whole,
)
from bitnet_train.data.prepare import (
    Accept,
    Progress,
    accept_any,
    encoded,
    identity_of,
    in_batches,
    make_tokenizer,
    no_progress,
    prepared,
    shard_folder,
    source_settings,
    sources_of,
    write_manifest,
)
from bitnet_train.data.shards import TOKENIZER_FILE, Manifest
from bitnet_train.data.tokenizer import SPECIALS_FILE, load_tokenizer
from bitnet_train.data.units import Unit, digest_of, units_of
from bitnet_train.errors import ConfigError

PLAN = "plan.json"
POLL_SECONDS = 0.5


def work_folder(cfg: DataConfig, root: Path) -> Path:
    """Where the work on the shards of ``cfg`` lies until it is finished."""
    folder = shard_folder(cfg, root)
    return folder.with_name(f"{folder.name}.parts")


def prepare_in_parts(
    cfg: DataConfig,
    root: Path,
    part: int = 0,
    parts: int = 1,
    progress: Progress = no_progress,
    accept: Accept = accept_any,
) -> Manifest | None:
    """Do the share of ``part`` among ``parts`` of making the shards of ``cfg``, and all the rest if others have theirs.

    None when other parts have to finish before the shards are whole. Raises ConfigError like
    :func:`bitnet_train.data.prepare.prepare`, when part 0 does not make the tokenizer in time, and when a process was
    killed, and whatever ``accept`` raises for the tokenizer.
    """
    corpus = open_corpus(cfg.corpus)
    work = work_folder(cfg, root)
    plan = _make_plan(cfg, corpus, root, progress, accept) if part == 0 else _wait_for_plan(cfg, corpus, root, progress)
    if plan is None:
        return prepared(cfg, root)
    own = Tokeniser(cfg, work, plan["unit_bytes"])
    if own.digest != plan["units"]:
        raise ConfigError(_changed(cfg, work))
    numbers = range(part, len(own.units), parts)
    done = 0
    with _pool(cfg, work, own) as each:
        for size in each(tokenise, [n for n in numbers if own.piece(n) is None]):
            done += size
            progress("tokenising", done)
    if not all(marker(work, n).is_file() for n in range(len(own.units))):
        return None
    # Whoever comes second waits only where nobody else would say that it is done.
    with _locked(work, wait=parts == 1) as mine:
        if not mine:
            return None
        if not (work / PLAN).is_file():
            return prepared(cfg, root)
        return _merge(cfg, corpus, root, work, own, plan, progress)


def _changed(cfg: DataConfig, work: Path) -> str:
    return (
        f"The text of data.corpus={cfg.corpus.name} is not what {work} was begun with: start part 0 of command=prepare "
        "first, it begins again."
    )


def _identity(cfg: DataConfig, corpus: Corpus) -> dict[str, Any]:
    # As it comes back from JSON.
    settings: dict[str, Any] = json.loads(json.dumps(source_settings(cfg)))
    return {"settings": settings, "identity": identity_of(cfg, corpus)}


def _read_plan(work: Path) -> dict[str, Any] | None:
    try:
        plan: dict[str, Any] = json.loads((work / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return plan if {"settings", "identity", "units", "unit_bytes"} <= plan.keys() else None


def _make_plan(
    cfg: DataConfig, corpus: Corpus, root: Path, progress: Progress, accept: Accept
) -> dict[str, Any] | None:
    """The plan of work that was begun, or a new one with the tokenizer; None if it was finished meanwhile."""
    work = work_folder(cfg, root)
    work.mkdir(parents=True, exist_ok=True)
    with _locked(work, wait=True):
        if not work.is_dir() or _finished(cfg, root):
            return None
        identity, plan = _identity(cfg, corpus), _read_plan(work)
        if plan is not None and all(plan[key] == value for key, value in identity.items()):
            accept(load_tokenizer(work))
            return plan
        for old in work.iterdir():
            if old.is_dir():
                shutil.rmtree(old)
            elif old.name != "lock":
                old.unlink()
        tokenizer, _ = make_tokenizer(cfg, corpus, progress)
        accept(tokenizer)
        tokenizer.save(work)
        unit_bytes = max(1, int(cfg.prepare.unit_mb * 1e6))
        units = Tokeniser(cfg, work, unit_bytes)
        plan = {**identity, "units": units.digest, "unit_bytes": unit_bytes}
        write_whole(work / PLAN, json.dumps(plan, indent=1, sort_keys=True) + "\n")
        return plan


def _finished(cfg: DataConfig, root: Path) -> bool:
    return not cfg.rebuild and prepared(cfg, root) is not None


def _wait_for_plan(cfg: DataConfig, corpus: Corpus, root: Path, progress: Progress) -> dict[str, Any] | None:
    """The plan as soon as part 0 has made it; None if everything was finished meanwhile."""
    work = work_folder(cfg, root)
    progress("waiting for part 0", 0)
    identity, end = _identity(cfg, corpus), time.monotonic() + 60 * cfg.prepare.wait_minutes
    while True:
        plan = _read_plan(work)
        if plan is not None and all(plan[key] == value for key, value in identity.items()):
            return plan
        if _finished(cfg, root):
            return None
        if time.monotonic() >= end:
            if plan is not None:
                raise ConfigError(_changed(cfg, work))
            raise ConfigError(
                f"Part 0 has made no tokenizer in {work} within "
                f"data.prepare.wait_minutes={cfg.prepare.wait_minutes:g}: "
                "start command=prepare with data.prepare.part=0, or give it longer."
            )
        time.sleep(POLL_SECONDS)


@contextmanager
def _locked(work: Path, wait: bool) -> Iterator[bool]:
    """Hold the lock of ``work``, which ends with the process; whether it is held (without ``wait`` another may)."""
    try:
        stream = (work / "lock").open("w")
    except FileNotFoundError:  # finished by another
        yield True
        return
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:
            # A file system without locks. Two that merge at once write the same files under names of their own.
            pass
        yield True


def _of(name: str) -> AbstractContextManager[None]:
    return told_apart(name) if name else nullcontext()


class Tokeniser:
    """Makes pieces of units; every process has one."""

    def __init__(self, cfg: DataConfig, work: Path, unit_bytes: int) -> None:
        self.cfg, self.work, self.unit_bytes = cfg, work, unit_bytes
        corpus = open_corpus(cfg.corpus)
        self.units: list[tuple[str, Unit]] = []
        for name, source in sources_of(corpus).items():
            with _of(name):
                self.units += [(name, unit) for unit in units_of(source, unit_bytes)]
        self.digest = digest_of([unit for _, unit in self.units])
        self.tokenizer = load_tokenizer(work)
        template = self.tokenizer.chat_template
        self.chat = None
        if self.tokenizer_makes_chats(corpus) and template is not None:
            self.chat = ChatEncoder(self.tokenizer, template)
        self.dtype: Any = np.uint16 if self.tokenizer.vocab_size <= 1 << 16 else np.uint32

    @staticmethod
    def tokenizer_makes_chats(corpus: Corpus) -> bool:
        """Whether any source holds conversations; then every token has a mask."""
        from bitnet_train.data.chat import ChatSource

        return any(isinstance(source, ChatSource) for source in sources_of(corpus).values())

    def piece(self, number: int) -> Piece | None:
        """The piece of a unit if it is finished."""
        return find_piece(self.work, number, self.dtype)

    def tokenise(self, number: int) -> int:
        """Make the piece of a unit; the bytes of its text."""
        name, unit = self.units[number]
        total = 0
        with _of(name), PieceWriter(self.work, number, self.dtype, self.chat is not None) as writer:
            for documents in in_batches(unit.documents()):
                for document, (ids, mask) in zip(documents, encoded(documents, self.tokenizer, self.chat), strict=True):
                    size = len(document.text.encode())
                    writer.add(ids, size, document.validation, mask)
                    total += size
            writer.finish()
        return total

    def check(self, number: int) -> bool:
        """Whether the piece of a unit is whole to the last byte; one that is not is forgotten."""
        piece = self.piece(number)
        if piece is None or not piece.whole():
            marker(self.work, number).unlink(missing_ok=True)
            return False
        return True

    def shares(self, number: int, first: int) -> dict[str, Share]:
        """Split -> what a unit gives to it."""
        piece = self.piece(number)
        assert piece is not None
        return shares_of(piece, first, self.units[number][1].every)


def _merge(
    cfg: DataConfig, corpus: Corpus, root: Path, work: Path, own: Tokeniser, plan: dict[str, Any], progress: Progress
) -> Manifest:
    """The finished folder from all pieces. One that was damaged is made again."""
    numbers = list(range(len(own.units)))
    with _pool(cfg, work, own) as each:
        progress("checking pieces", 0)
        while damaged := [n for n, fine in zip(numbers, each(check, numbers, ordered=True), strict=True) if not fine]:
            for _ in each(tokenise, damaged):
                pass
        firsts = _first_numbers(own)
        found = list(each(shares, list(enumerate(firsts)), ordered=True))
        target = work / "shards"
        target.mkdir(exist_ok=True)
        entries: dict[str, dict[str, Any]] = {}
        jobs, keys = [], []
        for name in sources_of(corpus):
            suffix = f"/{name}" if isinstance(corpus, MixtureSource) else ""
            of_source = [found[n] for n in numbers if own.units[n][0] == name]
            for split in SPLITS:
                parts = [shares_of_unit[split] for shares_of_unit in of_source]
                entries[f"{split}{suffix}"] = {
                    "shards": [],
                    **({"masks": [], "learnt": sum(p.learnt for p in parts)} if own.chat and _any(parts) else {}),
                    "tokens": sum(p.tokens for p in parts),
                    "documents": sum(p.documents for p in parts),
                    "bytes": sum(p.bytes for p in parts),
                }
                for shard in plan_shards(split, suffix, parts, cfg.shard_tokens, own.chat is not None):
                    jobs.append((shard, work, target, own.dtype))
                    keys.append((f"{split}{suffix}", "masks" if shard.kind == "mask" else "shards"))
        done = 0
        for (split, kind), info in zip(keys, each(write_shard, jobs, ordered=True), strict=True):
            entries[split][kind].append(asdict(info))
            done += info.bytes
            progress("putting shards together", done)
    for name in (TOKENIZER_FILE, SPECIALS_FILE):
        shutil.copyfile(work / name, target / name)
    manifest = write_manifest(cfg, corpus, target, plan["identity"], entries)
    for stale in target.glob("*.npy.json"):
        stale.unlink()
    _move(target, shard_folder(cfg, root))
    (work / PLAN).unlink(missing_ok=True)  # first, so that nobody goes on with the rest
    shutil.rmtree(work, ignore_errors=True)
    return manifest


def _any(parts: list[Share]) -> bool:
    return any(part.tokens for part in parts)


def _first_numbers(own: Tokeniser) -> list[int]:
    """The number, in its corpus, of the first document of each unit; validation files of their own are not counted."""
    counts: dict[str, int] = {}
    firsts = []
    for number, (name, unit) in enumerate(own.units):
        firsts.append(counts.get(name, 0))
        piece = own.piece(number)
        assert piece is not None
        if unit.every is not None:
            counts[name] = counts.get(name, 0) + piece.documents
    return firsts


def _move(source: Path, folder: Path) -> None:
    replaced = folder.with_name(f"{folder.name}.replaced-{os.getpid()}")
    if folder.exists():
        folder.rename(replaced)
    source.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


# What a process of the pool works with, made at its first job.
_settings: tuple[DataConfig, Path, int] | None = None
_own: Tokeniser | None = None


def _mine() -> Tokeniser:
    global _own
    if _own is None:
        assert _settings is not None
        _own = Tokeniser(*_settings)
    return _own


def tokenise(number: int) -> int:
    """Job: make a piece."""
    return _mine().tokenise(number)


def check(number: int) -> bool:
    """Job: check a piece."""
    return _mine().check(number)


def shares(job: tuple[int, int]) -> dict[str, Share]:
    """Job: (unit, number of its first document) -> what it gives to each split."""
    return _mine().shares(*job)


def write_shard(job: tuple[Any, Path, Path, Any]) -> Any:
    """Job: put a shard together."""
    return put_together(*job)


def _begin(settings: tuple[DataConfig, Path, int], threads: int) -> None:
    """In a new process: leave Ctrl-C to the first one, end when it ends, and share the cores."""
    global _settings
    _settings = settings
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextmanager
def _pool(cfg: DataConfig, work: Path, own: Tokeniser) -> Iterator[Callable[..., Iterator[Any]]]:
    """Gives ``each(job, arguments, ordered)``: the results of a job, as they come or in order, from
    ``data.prepare.processes`` processes, or this one if it is to work alone.
    """
    global _own
    if cfg.prepare.processes == 1:
        before, _own = _own, own
        try:
            yield lambda job, arguments, ordered=False: map(job, arguments)
        finally:
            _own = before
        return
    threads = max(1, (os.cpu_count() or 1) // cfg.prepare.processes)
    others = set(multiprocessing.active_children())
    # A copy of a process whose tokenizer has threads may hang: new ones are started.
    pool = ProcessPoolExecutor(
        cfg.prepare.processes, multiprocessing.get_context("spawn"), _begin, ((cfg, work, own.unit_bytes), threads)
    )

    def each(job: Callable[[Any], Any], arguments: list[Any], ordered: bool = False) -> Iterator[Any]:
        futures = [pool.submit(job, argument) for argument in arguments]
        for future in futures if ordered else as_completed(futures):
            yield future.result()

    try:
        yield each
    except BrokenProcessPool:
        raise ConfigError(
            "A process of data.prepare.processes was killed (out of memory?): the same command goes on where it was, "
            "with fewer processes or a smaller data.prepare.unit_mb if need be."
        ) from None
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
