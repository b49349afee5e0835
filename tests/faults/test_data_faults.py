"""Token shards that vanish, shrink or change while a run reads them, and loader processes that are killed."""

import multiprocessing.connection
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch.multiprocessing

from tests.faults.conftest import RUN, Figures, Place, figures

COMMAND = (*RUN, "run_name=a")


def shard(place: Place) -> Path:
    """The training tokens."""
    return next((place.folder / "data").rglob("train-00000.npy"))


def rewrite(path: Path, content: bytes) -> None:
    """In place, as an editor or a copy over it does; the time of the change differs."""
    with path.open("r+b") as stream:
        stream.write(content)
        stream.truncate()
    os.utime(path, (time.time() + 5, time.time() + 5))


@pytest.fixture
def prepared(place: Place) -> Place:
    place.done("command=prepare")
    return place


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_is_cut_short_stops_the_run_in_one_sentence(prepared: Place, whole: Figures, workers: int) -> None:
    path = shard(prepared)
    content = path.read_bytes()
    prepared.at_step[4] = lambda: os.truncate(path, 200)
    said = prepared.refused(*COMMAND, f"data.workers={workers}")
    # Loader processes read ahead: the check before a checkpoint may find it first.
    found = "was cut short while it was read" if workers == 0 else "was (cut short|changed) while .*read it?"
    assert re.search(f"The token shard {path.relative_to(prepared.folder)} {found}.*: restore it", said), said
    assert "the same command then continues the run" in said
    rewrite(path, content)
    assert "steps 3 to 9" in prepared.done(*COMMAND, f"data.workers={workers}")
    assert figures(prepared.folder / "runs/a") == whole


def test_a_shard_that_vanishes_while_it_is_open_costs_nothing(prepared: Place, whole: Figures) -> None:
    path = shard(prepared)
    prepared.at_step[4] = path.unlink
    output = prepared.done(*COMMAND)
    assert output.count("WARNING: the token shard ") == 1
    assert "is gone: the run goes on with what it has open" in output
    assert figures(prepared.folder / "runs/a") == whole
    # A new start reads it anew.
    said = prepared.refused(*COMMAND, "trainer.max_steps=10", "schedule=constant", "run_name=b")
    assert "is missing. Prepare again" in said


def test_nothing_is_saved_that_was_trained_on_changed_data(prepared: Place, whole: Figures) -> None:
    path = shard(prepared)
    content = path.read_bytes()
    swapped = content[:128] + content[128:][::-1]  # other ids, of the same vocabulary or not
    prepared.at_step[4] = lambda: rewrite(path, content[:128] + b"\1\0" * ((len(content) - 128) // 2))
    said = prepared.refused(*COMMAND)
    assert "train-00000.npy was changed while the run read it: restore it" in said
    assert sorted(p.name for p in (prepared.folder / "runs/a/checkpoints").glob("step-*")) == ["step-00000003.ckpt"]
    rewrite(path, swapped)
    assert "was edited" in prepared.refused(*COMMAND)
    rewrite(path, content)
    assert "steps 3 to 9" in prepared.done(*COMMAND)
    assert figures(prepared.folder / "runs/a") == whole


def test_a_shard_that_was_only_touched_is_taken_as_it_is(prepared: Place, whole: Figures) -> None:
    path = shard(prepared)
    prepared.at_step[4] = lambda: rewrite(path, path.read_bytes())
    prepared.done(*COMMAND)
    assert figures(prepared.folder / "runs/a") == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_an_id_beyond_the_vocabulary_is_named_with_shard_and_offset(prepared: Place, workers: int) -> None:
    path = shard(prepared)
    ids = np.load(path)

    def damage() -> None:
        ids[:] = 60_000
        rewrite(path, path.read_bytes()[: -ids.nbytes] + ids.tobytes())

    prepared.at_step[4] = damage
    long = ("trainer.max_steps=20", "checkpoint.every_steps=null")  # loader processes read ahead
    said = prepared.refused(*COMMAND, *long, f"data.workers={workers}")
    assert "train-00000.npy holds id 60000 at offset " in said
    assert "beyond its vocabulary of 320: it is damaged; restore it" in said
    if workers:
        assert said.startswith("bitnet_train: In step ")


def kill_loaders(_: pytest.MonkeyPatch) -> None:
    for child in torch.multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)  # type: ignore[arg-type]


def cut_off_loaders(patch: pytest.MonkeyPatch) -> None:
    """As if each died while it hands a batch over, before the system has noticed."""

    def connect(*_: object, **__: object) -> None:
        raise EOFError

    patch.setattr(multiprocessing.connection, "Client", connect)


@pytest.mark.parametrize("fault", [kill_loaders, cut_off_loaders])
def test_a_killed_loader_process_stops_the_run_cleanly(
    prepared: Place, whole: Figures, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        prepared.at_step[5] = lambda: fault(patch)
        said = prepared.refused(*COMMAND, "data.workers=2")
    # Killed in the middle of a batch or not, by chance; cut off always.
    end = r" ended in the middle of a batch" if fault is cut_off_loaders else r"( \(| ended in the middle of a batch)"
    assert re.search(rf"In step \d+ a data loader process{end}", said)
    assert "free memory or lower data.workers" in said
    assert "runs/a/checkpoints/last.ckpt is intact, and the same command goes on from it" in said
    prepared.done(*COMMAND, "data.workers=2")
    assert figures(prepared.folder / "runs/a") == whole
