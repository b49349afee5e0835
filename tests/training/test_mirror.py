"""Checkpoints and exports on other file systems: copied, pruned, gone on from, and never in the way of the training."""

import csv
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from bitnet_train.errors import ConfigError
from bitnet_train.storage import (
    Remote,
    check_url,
    complete_steps,
    fetch_run,
    is_url,
    local_copy,
    put_checkpoint,
    remove_checkpoint,
)
from bitnet_train.training.callbacks import mirror as mirror_module
from bitnet_train.training.callbacks.mirror import Mirror
from bitnet_train.training.run_folder import RunFolder
from tests.composing import compose_config
from tests.conftest import make_text
from tests.fuzz.harness import Ended, run


class Unreachable(MemoryFileSystem):
    """A file system whose network is gone."""

    protocol = "unreachable"

    def _open(self, *_: Any, **__: Any) -> Any:
        raise TimeoutError("no route to host")

    def find(self, *_: Any, **__: Any) -> Any:
        return []


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BITNET_TRAIN_CACHE", str(tmp_path / "cache"))
    fsspec.register_implementation("unreachable", Unreachable, clobber=True)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": make_text(i)}) + "\n" for i in range(60)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


def train(*more: str, steps: int = 6) -> Ended:
    return run([
        "+recipe=tiny", "data=files", "data.corpus.path=texts.jsonl", "data.tokenizer.vocab_size=300",
        "model.hidden=32",
        "data.sequence_length=16", "model.layers=2", "model.heads=2", "model.kv_heads=2", "model.ffn=64",
        "trainer.batch_tokens=64", f"trainer.max_steps={steps}", "trainer.validate_every=2", "trainer.log_every=1",
        "trainer.compile=false", "trainer.accelerator=cpu", "samples.every_steps=null", "telemetry.every_steps=null",
        "checkpoint.every_steps=2", "schedule=constant", *more,
    ])  # fmt: skip


def losses(name: str) -> list[tuple[str, str]]:
    with Path("runs", name, "metrics.csv").open(newline="") as stream:
        return [(row["step"], row["train/loss"]) for row in csv.DictReader(stream) if row["train/loss"]]


def test_a_run_goes_on_from_its_mirror_as_if_nothing_had_happened() -> None:
    assert train("run_name=plain").code == 0
    ended = train("run_name=a", "checkpoint.mirror=memory://m/runs", steps=4)
    assert ended.code == 0, ended.errors
    remote = Remote("memory://m/runs/a")
    assert {"config.yaml", "metrics.csv", "tokenizer/tokenizer.json"} <= set(remote.files())
    assert list(complete_steps(remote, remote.files())) == [4, 2]
    shutil.rmtree("runs/a")
    ended = train("run_name=a", "checkpoint.mirror=memory://m/runs")
    assert ended.code == 0, ended.errors
    assert "restored from memory://m/runs/a: step 4" in ended.said
    assert losses("a") == losses("plain")
    # As many as checkpoint.keep.
    assert list(complete_steps(remote, remote.files())) == [6, 4]
    assert not [name for name in remote.files() if "00000002" in name]
    # Nothing is restored where there is something to go on from.
    assert "restored" not in train("run_name=a", "checkpoint.mirror=memory://m/runs", steps=8).said


def test_a_damaged_copy_is_left_out_for_the_one_before_and_a_half_one_does_not_count() -> None:
    assert train("run_name=a", "checkpoint.mirror=memory://m", steps=4).code == 0
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/m/a/checkpoints/step-00000009.ckpt", b"half")  # without its marker
    data = bytearray(memory.cat_file("/m/a/checkpoints/step-00000004.ckpt"))
    data[len(data) // 2] ^= 1
    memory.pipe_file("/m/a/checkpoints/step-00000004.ckpt", bytes(data))
    shutil.rmtree("runs/a")
    ended = train("run_name=a", "checkpoint.mirror=memory://m")
    assert ended.code == 0, ended.errors
    assert "warning: memory://m/a: the checkpoint of step 4 is damaged there and is left out" in ended.said
    assert "restored from memory://m/a: step 2" in ended.said
    assert train("run_name=plain").code == 0
    assert losses("a") == losses("plain")


def test_a_folder_of_shards_is_copied_file_by_file_and_back(tmp_path: Path) -> None:
    shards = tmp_path / "there" / "step-00000004.ckpt"
    shards.mkdir(parents=True)
    content = {".metadata": b"m", "rest.pt": b"r" * 1000, "__0_0.distcp": bytes(range(256)), "files-0.json": b"{}"}
    for name, data in content.items():
        (shards / name).write_bytes(data)
    remote = Remote("memory://m/sharded")
    put_checkpoint(remote, 2, shards)
    put_checkpoint(remote, 4, shards)
    to = tmp_path / "back"
    assert fetch_run(remote, to) == (4, [])
    last = to / "checkpoints" / "last.ckpt"
    assert last.resolve().name == "step-00000004.ckpt"
    assert {path.name: path.read_bytes() for path in last.iterdir()} == content
    # One shard is damaged there: the checkpoint before is taken, and nothing of the damaged one stays.
    fsspec.filesystem("memory").pipe_file("/m/sharded/checkpoints/step-00000004.ckpt/__0_0.distcp", bytes(256))
    (last / "rest.pt").write_bytes(b"s" * 1000)
    step, remarks = fetch_run(remote, to)
    assert step == 2
    assert "step 4 is damaged" in remarks[0]
    assert sorted(path.name for path in (to / "checkpoints").iterdir()) == ["last.ckpt", "step-00000002.ckpt"]
    remove_checkpoint(remote, 4)
    assert list(complete_steps(remote, remote.files())) == [2]
    # A shard is missing there.
    remote.remove("checkpoints/step-00000002.ckpt/rest.pt")
    assert not complete_steps(remote, remote.files())


def test_an_unreachable_mirror_is_said_and_does_not_stop_the_training() -> None:
    ended = train("run_name=a", "checkpoint.mirror=unreachable://m")
    assert ended.code == 0, ended.errors
    assert "warning: checkpoint.mirror=unreachable://m/a cannot be written: no route to host. Step 6 is" in ended.said
    assert "training goes on" in ended.said
    assert train("run_name=plain").code == 0
    assert losses("a") == losses("plain")


def test_a_mirror_that_cannot_be_read_does_not_begin_the_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise ConnectionError("nobody there")

    monkeypatch.setattr(Unreachable, "find", refuse)
    ended = train("run_name=a", "checkpoint.mirror=unreachable://m")
    assert ended.code == 2
    assert "cannot be read (nobody there)" in ended.sentences[0]


def test_a_slow_mirror_leaves_out_what_was_overtaken_and_the_end_does_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoints").mkdir()
    said: list[str] = []
    console = SimpleNamespace(print=lambda text, **_: said.append(text))
    checkpoints: Any = SimpleNamespace(saved_step=-1, folder=tmp_path / "checkpoints")
    callback = Mirror(checkpoints, RunFolder(tmp_path), "memory://slow", 2, console)  # type: ignore[arg-type]
    gate, began, copied = threading.Event(), threading.Event(), []

    def copy(step: int, stream: Any) -> None:
        began.set()
        gate.wait(60)
        copied.append((step, stream.read()))

    monkeypatch.setattr(callback, "_copy", copy)
    trainer: Any = SimpleNamespace(is_global_zero=True)
    for step in (1, 2, 3):
        path = checkpoints.folder / f"step-{step:08d}.ckpt"
        path.write_bytes(bytes([step]))
        checkpoints.saved_step = step
        callback.on_step_end(trainer, None, step)  # type: ignore[arg-type]
        assert began.wait(60)
        path.unlink()  # pruned while it is copied
    assert said == ["warning: checkpoint.mirror=memory://slow is slower than checkpoints are saved: step 2 is not "
                    "copied; training goes on"]  # fmt: skip
    monkeypatch.setattr(mirror_module, "LAST_COPY_SECONDS", 0.01)
    thread = callback._thread
    assert thread is not None
    callback.teardown(trainer, None, "fit")  # type: ignore[arg-type]
    assert "takes longer than" in said[-1]
    gate.set()
    thread.join(60)
    assert copied == [(1, b"\1"), (3, b"\3")]


def test_runs_and_exports_at_urls(tmp_path: Path) -> None:
    url = tmp_path.joinpath("elsewhere").as_uri()
    assert train("run_name=a", f"checkpoint.mirror={url}", steps=4).code == 0
    ended = train("run_name=fork", f"resume.from={url}/a@2", steps=4)
    assert ended.code == 0, ended.errors
    assert losses("fork") == [row for row in losses("a") if int(row[0]) > 2]
    ended = train("run_name=started", f"init.from={url}/a", steps=2)
    assert ended.code == 0, ended.errors
    assert "init: step 4 of" in ended.said
    ended = run(["command=export", f"run={url}/a", "export.formats=[packed]", f"export.to={url}/out"])
    assert ended.code == 0, ended.errors
    assert f"copied: {url}/out/a/packed" in ended.said
    local = tmp_path / "elsewhere" / "out" / "a" / "packed"
    assert (local / "config.json").is_file()
    ended = run(["command=generate", f"run={url}/out/a/packed", "generate.max_new_tokens=4"])
    assert ended.code == 0, ended.errors
    ended = run(["command=export", f"run={url}/a", "export.formats=[packed]", "export.to=unreachable://x"])
    assert ended.code == 2
    assert "export.to=unreachable://x/a/packed cannot be written" in ended.sentences[0]


def test_urls_that_lead_nowhere_are_one_sentence(tmp_path: Path) -> None:
    for url, said in (
        ("memory://nothing", "does not exist, or is an empty folder"),
        ("nope://x", "no file system of fsspec"),
        ("ftp://me:secret@host/x", "holds a password"),
    ):
        ended = run(["command=report", f"run={url}"])
        assert ended.code == 2
        assert said in ended.sentences[0]
        assert "secret" not in ended.errors
    assert train("run_name=a", "checkpoint.mirror=memory://m", steps=2).code == 0
    with pytest.raises(ConfigError, match="steps saved there: 2"):
        local_copy("memory://m/a@7", "resume.from")
    assert local_copy("runs/a@7", "resume.from") == "runs/a@7"
    assert is_url("s3://bucket/x")
    assert not is_url("runs/a")


@pytest.mark.parametrize("key", ["checkpoint.mirror", "export.to"])
def test_what_is_no_url_is_refused(key: str) -> None:
    for wrong, said in (("some/folder", "is no URL"), ("nope://x", "no file system of fsspec"), ("''", "is no URL")):
        with pytest.raises(ConfigError, match=said):
            compose_config("+recipe=tiny", f"{key}={wrong}")
    check_url("memory://x", key)
