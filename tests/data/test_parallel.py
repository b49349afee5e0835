"""Shards made by several processes and parts: those of one process byte for byte, also after kills and damage."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bitnet_train.data import parallel
from bitnet_train.data.config import (
    BpeTokenizer,
    ChatCorpus,
    DataConfig,
    FilesCorpus,
    HubCorpus,
    MixtureCorpus,
    PrepareConfig,
    StdlibCorpus,
)
from bitnet_train.data.corpus import CORPORA, open_corpus
from bitnet_train.data.document import Document
from bitnet_train.data.parallel import Tokeniser, prepare_in_parts, work_folder
from bitnet_train.data.pieces import PieceWriter, marker
from bitnet_train.data.prepare import prepare, prepared, shard_folder
from bitnet_train.data.tokenizer import train_bpe
from bitnet_train.data.units import Unit, units_of
from bitnet_train.errors import ConfigError
from tests.conftest import make_text
from tests.data.test_prepare_shards import files

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
# Units of 900 bytes: many of each corpus.
SMALL = 0.0009


def chats(path: Path, count: int) -> Path:
    lines = []
    for i in range(count):
        turns = [{"role": "user", "content": make_text(i, 9)}, {"role": "assistant", "content": f"yes {i}"}]
        lines.append(json.dumps({"messages": turns}) + "\n" + "\n" * (i % 3 == 0))
    path.write_text("".join(lines))
    return path


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder with files of every kind: small texts, an empty one, and large ones that are divided or not."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for i in range(9):
        (folder / f"a{i}.txt").write_text(make_text(i, 12 * i) if i != 4 else "")
    records = [json.dumps({"text": make_text(i, 5 + i % 40) if i % 7 else "", "n": i}) for i in range(120)]
    (folder / "b.jsonl").write_text("\n\n".join(records))  # no newline at the end
    with gzip.open(folder / "c.jsonl.gz", "wt") as stream:
        stream.write("".join(json.dumps({"text": make_text(i)}) + "\n" for i in range(200, 240)))
    return folder


@pytest.fixture
def table(tmp_path: Path) -> Path:
    texts = [make_text(i, 20) if i % 9 else None for i in range(90)]
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table({"text": texts}), path, row_group_size=11)
    return path


def corpora(name: str, tmp_path: Path, mixed: Path, table: Path) -> Any:
    held = tmp_path / "held"
    held.mkdir()
    shutil.copy(table, held / "x.parquet")
    if name == "hub":
        for split, shift in (("train", 0), ("test", 100)):
            rows = {"text": [make_text(i + shift, 8) for i in range(100)]}
            datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "hub" / f"{split}.parquet"))
    talks = chats(tmp_path / "talks.jsonl", 70)
    return {
        "files": FilesCorpus(path=str(mixed)),
        "validation files": FilesCorpus(path=str(mixed), validation_path=str(held), patterns=["*.jsonl", "*.parquet"]),
        "parquet": FilesCorpus(path=str(table)),
        "stdlib": StdlibCorpus(),
        "chat": ChatCorpus(path=str(talks), template=TEMPLATE),
        "hub": HubCorpus(path=str(tmp_path / "hub"), max_documents=83),
        "mixture": MixtureCorpus(
            corpora={
                "a": {"corpus": "files", "path": str(mixed)},
                "b": {"corpus": "files", "path": str(table)},
                "talk": {"corpus": "chat", "path": str(talks), "template": TEMPLATE, "validation_every": 9},
            }
        ),
    }[name]


def settings(corpus: Any, **prepare_settings: Any) -> DataConfig:
    given = {"unit_mb": SMALL, **prepare_settings}
    return DataConfig(
        corpus=corpus,
        tokenizer=BpeTokenizer(vocab_size=300),
        sequence_length=16,
        shard_tokens=700,
        prepare=PrepareConfig(**given),
    )


@pytest.mark.parametrize("name", ["files", "validation files", "parquet", "chat", "hub", "mixture"])
def test_the_shards_are_those_of_one_process(name: str, tmp_path: Path, mixed: Path, table: Path) -> None:
    cfg = settings(corpora(name, tmp_path, mixed, table))
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    wanted = prepare(cfg, alone)
    assert len(wanted.shards("train")) > 2
    assert wanted.splits["val"]["documents"] > 0
    # Three parts, one after the other, the last of them first.
    assert len(Tokeniser(cfg, shard_folder(cfg, alone), 900).units) > 4
    assert prepare_in_parts(cfg, shared, 0, 3) is None
    assert prepare_in_parts(cfg, shared, 2, 3) is None
    assert prepared(cfg, shared) is None
    found = prepare_in_parts(cfg, shared, 1, 3)
    assert found == wanted
    assert files(shard_folder(cfg, shared)) == files(shard_folder(cfg, alone))
    assert [path.name for path in shared.iterdir()] == [shard_folder(cfg, alone).name]
    assert prepared(cfg, shared) == wanted


def test_processes_change_nothing_either(tmp_path: Path, mixed: Path, table: Path) -> None:
    cfg = settings(corpora("mixture", tmp_path, mixed, table), processes=2)
    wanted, stages = prepare(cfg, tmp_path / "alone"), []
    found = prepare_in_parts(cfg, tmp_path / "shared", progress=lambda stage, done: stages.append((stage, done)))
    assert found == wanted
    assert files(shard_folder(cfg, tmp_path / "shared")) == files(shard_folder(cfg, tmp_path / "alone"))
    total = sum(wanted.splits[split]["bytes"] for split in ("train", "val"))
    assert max(done for stage, done in stages if stage == "tokenising") == total


@pytest.mark.parametrize("unit_mb", [64.0, 0.01])
def test_the_size_of_units_changes_nothing(tmp_path: Path, mixed: Path, table: Path, unit_mb: float) -> None:
    cfg = settings(corpora("files", tmp_path, mixed, table), unit_mb=unit_mb)
    assert prepare_in_parts(cfg, tmp_path / "shared") == prepare(cfg, tmp_path / "alone")


def test_streamed_files_and_a_corpus_that_cannot_be_cut(tmp_path: Path) -> None:
    for number in range(3):
        rows = {"text": [make_text(i + 40 * number, 8) for i in range(40)]}
        datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "hub" / f"train-{number}.parquet"))
    cfg = settings(HubCorpus(path=str(tmp_path / "hub"), streaming=True))
    assert [unit.what for unit in units_of(open_corpus(cfg.corpus), 900)] == [f"train[{i}:3]" for i in range(3)]
    assert prepare_in_parts(cfg, tmp_path / "shared") == prepare(cfg, tmp_path / "alone")
    limited = open_corpus(HubCorpus(path=str(tmp_path / "hub"), streaming=True, max_documents=50))
    assert len(units_of(limited, 900)) == 1
    assert len(units_of(open_corpus(StdlibCorpus()), 900)) == 1


def test_units_are_the_corpus_in_its_order(mixed: Path) -> None:
    corpus = open_corpus(FilesCorpus(path=str(mixed)))
    whole = [document.text for document in corpus.documents()]
    for limit in (1, 100, 1000, 5000, 10**9):
        units = units_of(corpus, limit)
        assert [document.text for unit in units for document in unit.documents()] == whole
    assert len(units_of(corpus, 1)) > len(whole) > len(units_of(corpus, 5000)) > len(units_of(corpus, 10**9)) == 1


def test_a_bad_line_is_named_by_its_number_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    records = [json.dumps({"text": make_text(i)}) for i in range(60)]
    path.write_text("\n".join([*records[:41], "{broken", *records[41:]]))
    cfg = settings(FilesCorpus(path=str(path)))
    units = units_of(open_corpus(cfg.corpus), 900)
    bad = [unit for unit in units if _fails(unit)]
    assert len(bad) == 1
    with pytest.raises(ConfigError, match=r"x\.jsonl line 42 is no JSON object"):
        list(bad[0].documents())
    talks = chats(tmp_path / "talks.jsonl", 40)
    talks.write_text(talks.read_text() + '{"messages": [{"role": "user", "content": "x"}]}\n')
    last = units_of(open_corpus(ChatCorpus(path=str(talks), template=TEMPLATE)), 900)[-1]
    number = talks.read_text().count("\n")
    with pytest.raises(ConfigError, match=rf"talks\.jsonl line {number} has no turn of the assistant"):
        list(last.documents())


def _fails(unit: Unit) -> bool:
    try:
        list(unit.documents())
    except ConfigError:
        return True
    return False


def test_what_is_done_is_not_done_again(
    tmp_path: Path, mixed: Path, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = settings(corpora("files", tmp_path, mixed, table))
    wanted, root = prepare(cfg, tmp_path / "alone"), tmp_path / "shared"
    made: list[int] = []
    plain = Tokeniser.tokenise

    def dying(self: Tokeniser, number: int) -> int:
        if len(made) in (2, 5):
            made.append(-1)
            raise KeyboardInterrupt
        made.append(number)
        return plain(self, number)

    monkeypatch.setattr(Tokeniser, "tokenise", dying)
    trained: list[int] = []
    make_tokenizer = parallel.make_tokenizer
    monkeypatch.setattr(parallel, "make_tokenizer", lambda *a: trained.append(1) or make_tokenizer(*a))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            prepare_in_parts(cfg, root)
    assert prepared(cfg, root) is None
    assert prepare_in_parts(cfg, root) == wanted
    done = [number for number in made if number >= 0]
    assert done == sorted(set(done))
    assert trained == [1]


def test_a_damaged_piece_is_made_again(tmp_path: Path, mixed: Path, table: Path) -> None:
    cfg = settings(corpora("chat", tmp_path, mixed, table))
    wanted, root = prepare(cfg, tmp_path / "alone"), tmp_path / "shared"
    assert prepare_in_parts(cfg, root, 0, 2) is None
    work = work_folder(cfg, root)
    for number, kind in ((0, "ids"), (2, "mask"), (4, "lengths")):
        path = work / f"{number:07d}.{kind}"
        data = bytearray(path.read_bytes())
        data[0] ^= 1
        path.write_bytes(data)
    marker(work, 6).write_text("{half")
    (work / "0000008.ids").write_bytes(b"")
    assert prepare_in_parts(cfg, root, 1, 2) is not None or prepare_in_parts(cfg, root) is not None
    assert prepared(cfg, root) == wanted
    assert files(shard_folder(cfg, root)) == files(shard_folder(cfg, tmp_path / "alone"))


def test_a_merge_that_was_killed_goes_on(
    tmp_path: Path, mixed: Path, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = settings(corpora("files", tmp_path, mixed, table))
    wanted, root, written = prepare(cfg, tmp_path / "alone"), tmp_path / "shared", []
    plain = parallel.put_together

    def dying(plan: Any, *rest: Any) -> Any:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(plan.name)
        return plain(plan, *rest)

    monkeypatch.setattr(parallel, "put_together", dying)
    with pytest.raises(KeyboardInterrupt):
        prepare_in_parts(cfg, root)
    assert prepared(cfg, root) is None
    monkeypatch.setattr(parallel, "put_together", plain)
    before = {name: (work_folder(cfg, root) / "shards" / name).stat().st_mtime_ns for name in written}
    assert prepare_in_parts(cfg, root) == wanted
    after = {name: (shard_folder(cfg, root) / name).stat().st_mtime_ns for name in written}
    assert after == before


def test_a_text_that_changed_meanwhile_is_begun_again(tmp_path: Path, mixed: Path, table: Path) -> None:
    cfg, root = settings(corpora("files", tmp_path, mixed, table), wait_minutes=0), tmp_path / "shared"
    assert prepare_in_parts(cfg, root, 0, 2) is None
    (mixed / "a1.txt").write_text("something else altogether\n")
    with pytest.raises(ConfigError, match=r"is not what .* was begun with: start part 0"):
        prepare_in_parts(cfg, root, 1, 2)
    assert prepare_in_parts(cfg, root) == prepare(cfg, tmp_path / "alone")


def test_a_part_waits_for_the_tokenizer_or_says_that_there_is_none(tmp_path: Path, mixed: Path, table: Path) -> None:
    cfg, root = settings(corpora("files", tmp_path, mixed, table), wait_minutes=0), tmp_path / "shared"
    with pytest.raises(ConfigError, match=r"Part 0 has made no tokenizer in .*wait_minutes=0"):
        prepare_in_parts(cfg, root, 1, 2)
    assert not root.exists()
    cfg.prepare.wait_minutes = 5
    found: list[Any] = []
    waiting = threading.Thread(target=lambda: found.append(prepare_in_parts(cfg, root, 1, 2)))
    waiting.start()
    found.append(prepare_in_parts(cfg, root, 0, 2))
    waiting.join()
    assert (found[0] or found[1] or prepare_in_parts(cfg, root)) == prepare(cfg, tmp_path / "alone")


def test_a_killed_process_is_said_in_one_sentence(tmp_path: Path, mixed: Path, table: Path) -> None:
    cfg, root = settings(corpora("files", tmp_path, mixed, table), processes=2), tmp_path / "shared"
    with (
        pytest.raises(ConfigError, match=r"was killed .*the same command goes on"),
        parallel._pool(cfg, root, SimpleNamespace(unit_bytes=1)) as each,  # type: ignore[arg-type]
    ):
        list(each(_kill_me, [1]))
    with (
        pytest.raises(ConfigError, match="what I say"),
        parallel._pool(cfg, root, SimpleNamespace(unit_bytes=1)) as each,  # type: ignore[arg-type]
    ):
        list(each(_refuse, [1]))


def _kill_me(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _refuse(_: int) -> None:
    raise ConfigError("what I say")


class Endless:
    """Many small documents that are made while they are read."""

    count = 0

    def __init__(self, cfg: object) -> None:
        del cfg

    def documents(self) -> Iterator[Document]:
        for i in range(self.count):
            yield Document(f"document {i} of many", i % 50 == 7)

    def identity(self) -> dict[str, str]:
        return {"count": str(self.count)}


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CORPORA, StdlibCorpus, Endless)
    monkeypatch.setattr("bitnet_train.data.prepare.BATCH_BYTES", 1 << 16)
    peaks = {}
    for count in (10_000, 100_000):
        monkeypatch.setattr(Endless, "count", count)
        cfg = settings(StdlibCorpus())
        root = tmp_path / str(count)
        work = work_folder(cfg, root)
        work.mkdir(parents=True)
        train_bpe([make_text(i) for i in range(30)], BpeTokenizer(vocab_size=300)).save(work)
        own = Tokeniser(cfg, work, 1)
        tracemalloc.start()
        own.tokenise(0)
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        piece = own.piece(0)
        assert piece is not None
        assert piece.documents == count
        assert piece.held_out(0, None).sum() == count // 50
    assert peaks[100_000] < 1.2 * peaks[10_000]


def test_a_piece_that_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    with PieceWriter(tmp_path, 3, int, masked=False) as writer:
        writer.add([1, 2], 5, False, None)
        assert len(list(tmp_path.iterdir())) == 4
    assert list(tmp_path.iterdir()) == []


def command(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    own = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    return subprocess.Popen(
        [sys.executable, "-m", "bitnet_train", *arguments],
        env=own | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_tasks_of_an_array_share_the_work(tmp_path: Path, mixed: Path) -> None:
    lines = ["+recipe=tiny", "command=prepare", "data=files", f"data.corpus.path={mixed}", f"paths.data={tmp_path}/d",
             "data.tokenizer.vocab_size=300", "data.prepare.unit_mb=0.0009", "data.prepare.processes=2"]  # fmt: skip
    # Numbers 5 and 7, as --array=5-7:2 gives them.
    tasks = [
        command(*lines, SLURM_ARRAY_TASK_COUNT="2", SLURM_ARRAY_TASK_ID=str(number), SLURM_ARRAY_TASK_MIN="5",
                SLURM_ARRAY_TASK_STEP="2") for number in (7, 5)
    ]  # fmt: skip
    outputs = [task.communicate(timeout=300)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert "part 1 of 2" in outputs[0]
    assert "part 0 of 2" in outputs[1]
    assert any("fingerprint" in output for output in outputs), outputs
    again = command(*lines)
    output = again.communicate(timeout=300)[0]
    assert again.returncode == 0, output
    cfg = DataConfig(corpus=FilesCorpus(path=str(mixed)), tokenizer=BpeTokenizer(vocab_size=300))
    assert f"fingerprint {prepare(cfg, tmp_path / 'alone').fingerprint[:16]}" in output


def test_kills_at_any_moment_lose_nothing(tmp_path: Path, mixed: Path) -> None:
    lines = ["+recipe=tiny", "command=prepare", "data=files", f"data.corpus.path={mixed}", f"paths.data={tmp_path}/d",
             "data.tokenizer.vocab_size=300", "data.prepare.unit_mb=0.0009", "data.prepare.processes=2"]  # fmt: skip
    cfg = DataConfig(corpus=FilesCorpus(path=str(mixed)), tokenizer=BpeTokenizer(vocab_size=300))
    work = work_folder(cfg, tmp_path / "d")
    for reached in ("plan.json", "*.json", "000000[5-9].json"):
        task = command(*lines)
        while task.poll() is None and not list(work.glob(reached)):
            time.sleep(0.01)
        task.kill()
        task.communicate(timeout=60)
    task = command(*lines)
    output = task.communicate(timeout=300)[0]
    assert task.returncode == 0, output
    assert f"fingerprint {prepare(cfg, tmp_path / 'alone').fingerprint[:16]}" in output
    assert not work.exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["data.prepare.processes=0"], "must be at least 1"),
        (["command=prepare", "data.prepare.parts=0"], "must be at least 1"),
        (["command=prepare", "data.prepare.part=2"], "needs data.prepare.parts"),
        (["command=prepare", "data.prepare.part=2", "data.prepare.parts=2"], "must be from 0 to 1"),
        (["command=prepare", "data.prepare.part=-1", "data.prepare.parts=2"], "must be from 0 to 1"),
        (["data.prepare.part=0", "data.prepare.parts=2"], "are for command=prepare"),
        (["data.prepare.unit_mb=nan"], "must be a finite number"),
        (["data.prepare.wait_minutes=-1"], "must be from 0"),
    ],
)
def test_wrong_shares_are_refused(wrong: list[str], said: str) -> None:
    from tests.composing import compose_config

    with pytest.raises(ConfigError, match=said):
        compose_config("+recipe=tiny", *wrong)


def test_a_place_among_parts() -> None:
    from bitnet_train.commands.prepare import place_among_parts

    find: Callable[..., tuple[int, int]] = lambda **fields: place_among_parts(PrepareConfig(**fields))  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("SLURM_"):
                patch.delenv(name)
        assert find() == (0, 1)
        assert find(parts=4) == (0, 4)
        assert find(part=3, parts=4) == (3, 4)
        patch.setenv("SLURM_ARRAY_TASK_COUNT", "8")
        patch.setenv("SLURM_ARRAY_TASK_ID", "5")
        patch.setenv("SLURM_ARRAY_TASK_MIN", "1")
        assert find() == (4, 8)
        assert find(part=1, parts=2) == (1, 2)
        with pytest.raises(ConfigError, match="part 4 of 2"):
            find(parts=2)
        patch.setenv("SLURM_ARRAY_TASK_ID", "x")
        with pytest.raises(ConfigError, match="is no number"):
            find()
