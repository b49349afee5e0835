"""A run in which no step ends is ended, with what every process was doing."""

import os
import time
from pathlib import Path

import pytest

from bitnet_train.training.distributed import group, watchdog
from bitnet_train.training.distributed.watchdog import HUNG, Watchdog
from tests.training.distributed.several import in_processes

SOON = 0.3 / 60


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "LOOK_EVERY", 0.02)


def a_function_that_waits(ended: list[int]) -> None:
    deadline = time.monotonic() + 60
    while not ended and time.monotonic() < deadline:
        time.sleep(0.05)


def test_the_stacks_are_written_and_the_run_ends(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ended: list[int] = []
    dog = Watchdog(tmp_path, SOON, ended.append)
    dog.start(7)
    dog.beat(8)
    a_function_that_waits(ended)
    dog.stop()
    assert ended == [HUNG]
    text = (tmp_path / "hang-rank0.txt").read_text()
    assert "process 0 of 1, after step 8" in text
    assert "a_function_that_waits" in text
    said = capfd.readouterr().err
    assert "no step has ended for 0.005 minutes after step 8 (trainer.hang_timeout)" in said
    assert said.count("bitnet_train:") == 1


def test_a_run_whose_folder_is_gone_ends_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ended: list[int] = []
    dog = Watchdog(tmp_path / "gone", SOON, ended.append)
    dog.start(7)
    a_function_that_waits(ended)
    dog.stop()
    assert ended == [HUNG]
    said = capfd.readouterr().err
    assert said.count("bitnet_train: Stopped: no step has ended") == 1
    assert "hang-rank0.txt cannot be written (No such file or directory): process 0 of 1, after step 7" in said
    assert "a_function_that_waits" in said
    assert "Traceback" not in said


def test_a_disk_that_never_answers_keeps_no_run_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "GRACE", 0.1)
    ended: list[int] = []
    stacks = tmp_path / "hang-rank0.txt"
    os.mkfifo(stacks)  # nobody reads it: to open it takes for ever
    dog = Watchdog(tmp_path, SOON, ended.append)
    dog.start(7)
    a_function_that_waits(ended)
    assert ended == [HUNG]
    reader = os.open(stacks, os.O_RDONLY | os.O_NONBLOCK)
    dog.stop()
    os.close(reader)


def test_steps_and_the_end_of_training_keep_it_quiet(tmp_path: Path) -> None:
    ended: list[int] = []
    dog = Watchdog(tmp_path, 10.0, ended.append)
    dog.start(0)
    for step in range(5):
        dog.beat(step)
        time.sleep(0.02)
    dog.stop()
    idle = Watchdog(tmp_path, None, ended.append)
    idle.start(0)
    time.sleep(0.1)
    idle.stop()
    assert ended == []
    assert list(tmp_path.iterdir()) == []


def hang(rank: int, folder: Path) -> list[int]:
    watchdog.LOOK_EVERY, watchdog.GRACE = 0.1, 2.0
    ended: list[int] = []
    # The second process would wait for an hour: it hears of the first one's hang.
    dog = Watchdog(folder, SOON if rank == 0 else 60.0, ended.append)
    dog.start(rank)
    a_function_that_waits(ended)
    dog.stop()
    return ended


def fail(rank: int, folder: Path) -> list[int]:
    watchdog.LOOK_EVERY, watchdog.GRACE = 0.1, 0.5
    ended: list[int] = []
    dog = Watchdog(folder, None, ended.append)
    dog.start(rank)
    if rank == 1:
        group.announce("the reason", 2)
        dog.stop()
        return [0]
    a_function_that_waits(ended)
    dog.stop()
    return ended


def test_all_processes_write_their_stacks(tmp_path: Path) -> None:
    assert in_processes(2, tmp_path, hang, tmp_path) == [[HUNG], [HUNG]]
    for rank in (0, 1):
        text = (tmp_path / f"hang-rank{rank}.txt").read_text()
        assert f"process {rank} of 2, after step {rank}" in text
        assert "a_function_that_waits" in text


def test_a_process_ends_with_the_others(tmp_path: Path) -> None:
    assert in_processes(2, tmp_path, fail, tmp_path) == [[2], [0]]
