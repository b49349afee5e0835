"""Run folders that cannot be written, and two runs that want one."""

import errno
import fcntl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bitnet_train.durable import host_name, remove_leftovers, working_name
from bitnet_train.errors import ConfigError
from bitnet_train.training import run_lock
from bitnet_train.training.run_lock import RunLock
from tests.faults.conftest import RUN, Figures, Place, figures, without_root_rights

COMMAND = (*RUN, "run_name=a")


def test_a_folder_without_rights_is_refused_at_once(place: Place) -> None:
    (place.folder / "runs").mkdir(mode=0o555)
    with without_root_rights():
        said = place.refused(*COMMAND)
    assert said.endswith(
        "The run folder runs/a cannot be written (Permission denied): choose another with paths.runs=."
    )


def test_a_folder_that_becomes_read_only_stops_the_run_which_then_goes_on(place: Place, whole: Figures) -> None:
    folder = place.folder / "runs/a/checkpoints"
    place.at_step[4] = lambda: folder.chmod(0o555)
    with without_root_rights():
        said = place.refused(*COMMAND)
    assert "The checkpoint of step 6 cannot be written to runs/a/checkpoints (Permission denied)" in said
    assert "make the folder writable; runs/a/checkpoints/step-00000003.ckpt is intact" in said
    folder.chmod(0o755)
    with without_root_rights():
        place.done(*COMMAND)
    assert figures(place.folder / "runs/a") == whole


def test_data_and_exports_without_rights_are_refused(place: Place) -> None:
    (place.folder / "data").mkdir(mode=0o555)
    with without_root_rights():
        assert "cannot be written (Permission denied): free space or choose another paths.data" in place.refused(
            *COMMAND
        )
    (place.folder / "data").chmod(0o755)
    place.done(*COMMAND)
    (place.folder / "runs/a/export").mkdir(mode=0o555)
    with without_root_rights():
        said = place.refused("command=export", "run=runs/a", "export.formats=[packed]", "export.verify_tokens=64")
    assert said.endswith("The export runs/a/export/packed cannot be written: Permission denied.")


def no_locks(monkeypatch: pytest.MonkeyPatch, number: int = errno.ENOLCK) -> None:
    def lockf(*_: object) -> None:
        raise OSError(number, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT", 0.1)
    monkeypatch.setattr(run_lock, "PATIENCE", 2.0)


HOLDER = """
import sys, time, fcntl
from pathlib import Path
import bitnet_train.durable, bitnet_train.training.run_lock as run_lock
host, locks = sys.argv[2], sys.argv[3] == "locks"
run_lock.host_name = lambda: host
run_lock.BEAT = 0.1
if not locks:
    def lockf(*_): raise OSError(37, "No locks available")
    fcntl.lockf = lockf
run_lock.RunLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(120)
"""


def holder(folder: Path, host: str, locks: str) -> subprocess.Popen[str]:
    """Another process that holds the folder, on a machine called ``host``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), host, locks], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("locks", ["locks", "no locks"])
@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_a_second_run_is_refused_also_where_there_are_no_locks_and_from_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: str, where: str
) -> None:
    host = host_name() if where == "here" else "node-17"
    process = holder(tmp_path, host, locks)
    lines: list[str] = []
    try:
        if locks == "no locks" or where == "elsewhere":
            no_locks(monkeypatch)  # as the second machine sees a disk with locks of each machine's own
        with pytest.raises(ConfigError, match=f"in use by process {process.pid} on {host}: wait for it to end"):
            RunLock(tmp_path, lines.append).acquire()
    finally:
        process.kill()
        process.communicate()
    # It was killed: its folder can be had, after a look whether a machine that cannot be asked still counts.
    lock = RunLock(tmp_path, lines.append)
    lock.acquire()
    assert any("looking for 2 s" in line for line in lines) is (where == "elsewhere")
    lock.release()
    assert not (tmp_path / ".alive").exists()


@pytest.mark.usefixtures("quick")
def test_a_lock_counts_while_it_is_held_and_stops_with_it(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.acquire()
    seen = set()
    for _ in range(100):
        seen.add((tmp_path / ".alive").read_text())
        if len(seen) > 2:
            break
        time.sleep(0.1)
    assert len(seen) > 2
    assert {len(text) for text in seen} == {128}
    assert any(thread.name == "run-lock" for thread in threading.enumerate())
    lock.release()
    assert not any(thread.name == "run-lock" for thread in threading.enumerate())


def test_what_dead_processes_left_goes_and_what_living_ones_work_on_stays(tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    gone = [f".packed.partial-{host_name()}-{dead.pid}", f"packed.partial-{dead.pid}", f".packed.partial-{dead.pid}"]
    kept = [".packed.partial-node-17-4711", f".packed.partial-{host_name()}-1", ".other.partial-1234567"]
    for name in (*gone, *kept):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    old = tmp_path / ".packed.partial-node-3-4711"
    old.mkdir()
    import os

    os.utime(old, (1, 1))
    remove_leftovers(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kept)
    # Killed between taking the old one away and putting the new one there.
    taken = tmp_path / f".packed.replaced-{host_name()}-{dead.pid}"
    taken.mkdir()
    (taken / "weights").write_text("old")
    remove_leftovers(folder)
    assert (folder / "weights").read_text() == "old"
    assert working_name(folder, "partial", hidden=True).name.startswith(f".packed.partial-{host_name()}-")
