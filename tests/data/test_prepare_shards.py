"""Preparing shards: made once, found again, refused when anything about them changed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import bitnet_train.data.prepare as prepare_module
from bitnet_train.data.config import BpeTokenizer, DataConfig, FilesCorpus, Verify
from bitnet_train.data.prepare import prepare, prepared, shard_folder, split_text
from bitnet_train.data.shards import (
    MANIFEST,
    SAMPLE_BYTES,
    ShardWriter,
    TokenArray,
    load_manifest,
    sample_digest,
    verify_shards,
)
from bitnet_train.data.tokenizer import load_tokenizer
from bitnet_train.errors import ConfigError

MakeConfig = Callable[..., DataConfig]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "shards"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_shards_hold_every_document_once_after_its_bos(data_config: MakeConfig, root: Path, texts: list[str]) -> None:
    cfg = data_config()
    stages = []
    manifest = prepare(cfg, root, lambda stage, done: stages.append((stage, done)))
    folder = shard_folder(cfg, root)
    tokenizer = load_tokenizer(folder)
    held_out = texts[7::50]
    trained = [text for text in texts if text not in held_out]
    for split, documents in (("train", trained), ("val", held_out)):
        tokens = TokenArray(folder, manifest, split)
        expected = [i for text in documents for i in (tokenizer.bos_id, *tokenizer.encode(text))]
        assert tokens.slice(0, len(tokens)).tolist() == expected
        entry = manifest.splits[split]
        assert entry["tokens"] == len(tokens) == len(expected)
        assert entry["documents"] == len(documents)
        assert entry["bytes"] == sum(len(text.encode()) for text in documents)
        assert split_text(cfg, split) == "".join(documents)
    total = sum(len(text.encode()) for text in texts)
    assert stages[-1] == ("tokenising", total)
    assert stages[0][0] == "training the tokenizer"
    assert load_manifest(folder) == manifest


def test_prepared_finds_them_again_and_two_preparations_are_alike(data_config: MakeConfig, root: Path) -> None:
    cfg = data_config()
    assert prepared(cfg, root) is None
    manifest = prepare(cfg, root)
    found = prepared(cfg, root)
    assert found is not None
    assert found.fingerprint == manifest.fingerprint
    assert verify_shards(shard_folder(cfg, root), found, Verify.full) == "every byte"
    before = files(shard_folder(cfg, root))
    prepare(cfg, root)
    assert files(shard_folder(cfg, root)) == before
    assert [path.name for path in root.iterdir()] == [shard_folder(cfg, root).name]


def test_settings_that_change_the_tokens_have_a_folder_of_their_own(
    data_config: MakeConfig, jsonl: Path, root: Path
) -> None:
    base = shard_folder(data_config(), root)
    for other in (
        data_config(tokenizer=BpeTokenizer(vocab_size=301)),
        data_config(tokenizer=BpeTokenizer(vocab_size=300, end_of_text="<e>")),
        data_config(corpus=FilesCorpus(path=str(jsonl), validation_every=10)),
        data_config(shard_tokens=1000),
    ):
        assert shard_folder(other, root) != base
    for same in (
        data_config(sequence_length=32),
        data_config(workers=2),
        data_config(verify=Verify.full),
        data_config(),
    ):
        assert shard_folder(same, root) == base


def test_an_edited_text_is_refused_until_prepared_again(data_config: MakeConfig, jsonl: Path, root: Path) -> None:
    cfg = data_config()
    first = prepare(cfg, root)
    with jsonl.open("a") as stream:
        stream.write(json.dumps({"text": "one more"}) + "\n")
    with pytest.raises(ConfigError, match=r"has changed since .*data\.rebuild=true"):
        prepared(cfg, root)
    again = prepare(cfg, root)
    assert again.fingerprint != first.fingerprint
    assert again.splits["train"]["documents"] == first.splits["train"]["documents"] + 1
    assert prepared(cfg, root) == again


def test_a_failure_in_the_middle_leaves_nothing(
    data_config: MakeConfig, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = data_config(shard_tokens=100)

    def interrupted(self: ShardWriter, tokens: int) -> None:
        assert list(root.iterdir())  # it is at work
        raise KeyboardInterrupt

    monkeypatch.setattr(ShardWriter, "_flush", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(cfg, root)
    assert list(root.iterdir()) == []
    assert prepared(cfg, root) is None


def test_a_failed_second_preparation_leaves_the_first(
    data_config: MakeConfig, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = data_config()
    manifest = prepare(cfg, root)
    before = files(shard_folder(cfg, root))
    monkeypatch.setattr(prepare_module, "build_tokenizer", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(cfg, root)
    assert files(shard_folder(cfg, root)) == before
    assert prepared(cfg, root) == manifest


@pytest.mark.parametrize("kind", ["partial", "replaced"])
def test_leftovers_of_a_killed_preparation_are_swept_away(data_config: MakeConfig, root: Path, kind: str) -> None:
    cfg = data_config()
    folder = shard_folder(cfg, root)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    # A killed run's leftovers; in a container the next one often has the same process id.
    leftovers = [folder.with_name(f"{folder.name}.{kind}-{pid}") for pid in (dead.pid, os.getpid())]
    other_run = folder.with_name(f"{folder.name}.{kind}-{os.getppid()}")
    for leftover in (*leftovers, other_run):
        leftover.mkdir(parents=True)
        (leftover / "train-00000.npy").write_text("half")
    assert prepared(cfg, root) is None
    prepare(cfg, root)
    prepare(cfg, root)
    assert sorted(path.name for path in root.iterdir()) == sorted([folder.name, other_run.name])


def test_bad_text_met_while_the_tokenizer_trains_is_still_one_clear_error(
    data_config: MakeConfig, jsonl: Path, root: Path
) -> None:
    with jsonl.open("a") as stream:
        stream.write("{broken\n")
    with pytest.raises(ConfigError, match="line 61 is no JSON object"):
        prepare(data_config(), root)
    assert list(root.iterdir()) == []


@pytest.mark.parametrize(("lines", "missing"), [(5, "validation"), (0, "training")])
def test_a_split_without_documents_is_refused(
    data_config: MakeConfig, tmp_path: Path, root: Path, lines: int, missing: str
) -> None:
    path = tmp_path / "few.jsonl"
    path.write_text('{"text": "some text"}\n' * lines)
    with pytest.raises(ConfigError, match=f"no {missing} documents"):
        prepare(data_config(corpus=FilesCorpus(path=str(path))), root)
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("how", list(Verify))
@pytest.mark.parametrize("damage", ["truncated", "edited", "missing", "longer"])
def test_a_damaged_shard_is_refused(data_config: MakeConfig, root: Path, damage: str, how: Verify) -> None:
    cfg = data_config(shard_tokens=500)
    manifest = prepare(cfg, root)
    folder = shard_folder(cfg, root)
    assert len(manifest.shards("train")) > 2
    verify_shards(folder, manifest, how)
    path = folder / manifest.shards("train")[-1].file
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[:-2])
    elif damage == "longer":
        path.write_bytes(data + b"\0\0")
    else:
        data[-1] ^= 1
        path.write_bytes(data)
    with pytest.raises(ConfigError, match=rf"{path.name} .*data\.rebuild=true"):
        verify_shards(folder, manifest, how)


def test_a_damaged_validation_shard_is_refused_too(data_config: MakeConfig, root: Path) -> None:
    manifest = prepare(data_config(), root)
    folder = shard_folder(data_config(), root)
    (folder / manifest.shards("val")[0].file).unlink()
    with pytest.raises(ConfigError, match="is missing"):
        verify_shards(folder, manifest, Verify.auto)


def test_the_sample_digest_sees_both_ends_of_a_large_file(tmp_path: Path) -> None:
    path = tmp_path / "big"
    size = 20 * SAMPLE_BYTES
    data = bytearray(os.urandom(size))
    path.write_bytes(data)
    seen = {sample_digest(path)}
    for position in (0, size - 1, size // 15 * 7):
        changed = bytearray(data)
        changed[position] ^= 1
        path.write_bytes(changed)
        seen.add(sample_digest(path))
    assert len(seen) == 4


def edit_manifest(folder: Path, edit: Callable[[dict], None]) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    edit(content)
    (folder / MANIFEST).write_text(json.dumps(content))


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m["splits"]["train"].update(tokens=10**9),
        lambda m: m["splits"]["train"]["shards"].pop(),
        lambda m: m["source"].update(identity={}),
        lambda m: m["source"]["tokenizer"].update(vocab_size=1),
        lambda m: m.update(version=99),
        lambda m: m.update(fingerprint="0" * 64),
    ],
)
def test_an_edited_manifest_is_refused(data_config: MakeConfig, root: Path, edit: Callable[[dict], None]) -> None:
    prepare(data_config(), root)
    edit_manifest(shard_folder(data_config(), root), edit)
    with pytest.raises(ConfigError, match="was edited"):
        prepared(data_config(), root)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"version": 1}', '{"surprise": 1}'])
def test_an_unreadable_manifest_is_refused(data_config: MakeConfig, root: Path, content: str) -> None:
    prepare(data_config(), root)
    (shard_folder(data_config(), root) / MANIFEST).write_text(content)
    with pytest.raises(ConfigError, match="no readable manifest"):
        prepared(data_config(), root)


def test_slices_cross_shard_borders(data_config: MakeConfig, root: Path) -> None:
    one, many = data_config(), data_config(shard_tokens=97)
    whole_manifest, manifest = prepare(one, root), prepare(many, root)
    whole = TokenArray(shard_folder(one, root), whole_manifest, "train")
    tokens = TokenArray(shard_folder(many, root), manifest, "train")
    assert [shard.tokens for shard in manifest.shards("train")][:-1] == [97] * (len(manifest.shards("train")) - 1)
    ids = whole.slice(0, len(whole))
    assert ids.dtype == np.int64
    assert len(tokens) == len(whole)
    for start, stop in [
        (0, 1),
        (0, 97),
        (96, 98),
        (97, 98),
        (50, 350),
        (194, 291),
        (0, len(ids)),
        (len(ids) - 1, len(ids)),
    ]:
        assert np.array_equal(tokens.slice(start, stop), ids[start:stop]), (start, stop)


@pytest.mark.parametrize(("vocab", "dtype"), [(300, np.uint16), (2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_ids_take_two_bytes_until_they_need_four(tmp_path: Path, vocab: int, dtype: type) -> None:
    writer = ShardWriter(tmp_path, "train", vocab, shard_tokens=4)
    ids = [0, 1, vocab - 1, 7, vocab - 2, 3]
    writer.add(ids[:1], 1)
    writer.add(ids[1:], 2)
    entry = writer.finish()
    parts = [np.load(tmp_path / shard["file"]) for shard in entry["shards"]]
    assert [len(part) for part in parts] == [4, 2]
    assert all(part.dtype == dtype for part in parts)
    assert np.concatenate(parts).tolist() == ids
    assert (entry["tokens"], entry["documents"], entry["bytes"]) == (6, 2, 3)
