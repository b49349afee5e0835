"""Starts the processes of a run on this machine and answers with one exit code. No torch here.

torchrun does the same but for three things that this project promises: its exit code is 1 whatever a run ended with, it
adds a page of its own to every message, and Ctrl-C reaches the processes before they have saved.
"""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from bitnet_train.errors import BitnetTrainError, ConfigError
from bitnet_train.ranks import LAUNCHER
from bitnet_train.training.faults import go_on
from bitnet_train.training.run_folder import RunFolder

# Passed on to every process. (A second Ctrl-C stops them at once, as in a run of one process.)
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# Seconds that the others have to end by themselves once one has failed, and to end after a SIGTERM.
GRACE, LAST_GRACE = 60.0, 20.0
LOOK_EVERY = 0.1
# Linux: the signal that a process gets when its parent dies (prctl(2)).
PR_SET_PDEATHSIG = 1
# The exit code of a process that has lost another one and knows no more; :func:`launch` finds out and says it.
LOST = 6
# What ends a process that asked for nothing of the kind.
FATAL = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE}


def launch(plain: dict[str, Any], count: int) -> int:
    """Run the configuration ``plain`` in ``count`` processes of this machine, one per device; the exit code.

    That is the first process's, or where that is 0 the worst of the others'. A failure of one ends all. Raises
    BitnetTrainError when a process was killed, which nobody else can say.
    """
    folder_of_run = RunFolder(Path(plain["paths"]["runs"]) / plain["run_name"])
    with tempfile.TemporaryDirectory(prefix="bitnet_train-") as folder:
        job = Path(folder) / "job.json"
        job.write_text(json.dumps(plain))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(count)}
        address[LAUNCHER] = "1"
        if "OMP_NUM_THREADS" not in os.environ:
            address["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
        command = [sys.executable, "-m", "bitnet_train.worker", str(job)]
        children: list[subprocess.Popen[bytes]] = []
        received: list[int] = []

        def pass_on(number: int, _: FrameType | None) -> None:
            received.append(number)
            _send(children, number)

        before = {number: signal.signal(number, pass_on) for number in PASSED_ON}
        try:
            for rank in range(count):
                ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count), "GROUP_RANK": "0"}
                # A session of its own: what a terminal sends comes through this process, once.
                children.append(
                    subprocess.Popen(
                        command,
                        env={**os.environ, **address, **ranks},
                        start_new_session=True,
                        preexec_fn=_follow_parent,
                    )
                )
            for number in received:  # while they were being started
                _send(children, number)
            codes, killed = _wait(children)
        finally:
            _send(children, signal.SIGKILL)
            for number, handler in before.items():
                signal.signal(number, handler)
        if killed is not None:
            raise _killed(killed, count, codes[killed], folder_of_run)
        if LOST in codes and set(codes) <= {0, LOST}:
            raise ConfigError(
                f"The processes of this run have lost each other, and none said why; {go_on(folder_of_run)}."
            )
        return _code(codes)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _follow_parent() -> None:
    """In a new process: save and stop when the parent is gone, however it went."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _send(children: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for child in children:
        if child.poll() is None:
            child.send_signal(number)


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> tuple[list[int], int | None]:
    """The exit codes of all, once they have ended, and which process was killed by somebody else, if that came first.

    Those that outlive a failure are ended.
    """
    deadline, number = float("inf"), signal.SIGTERM
    killed: int | None = None
    while True:
        codes = [child.poll() for child in children]
        known = [code for code in codes if code is not None]
        dead = [rank for rank, code in enumerate(codes) if code is not None and -code in FATAL]
        # Later it may have been this process, or a library that does not survive the end of another one.
        if killed is None and number != signal.SIGKILL and all(c in (0, LOST) or -c in FATAL for c in known):
            killed = min(dead, key=lambda rank: (codes[rank] != -signal.SIGKILL, rank), default=None)
        if len(known) == len(children):
            return known, killed
        # A run that ended by itself may have others that still write.
        if any(known) and deadline == float("inf"):
            deadline = time.monotonic() + GRACE
        if time.monotonic() > deadline:
            _send(children, number)
            deadline, number = time.monotonic() + LAST_GRACE, signal.SIGKILL
        time.sleep(LOOK_EVERY)


def _killed(rank: int, count: int, code: int, folder: RunFolder) -> BitnetTrainError:
    """The sentence for process ``rank`` of ``count``, which ended with ``code``, a signal's."""
    number = signal.Signals(-code)
    why = "which is what the system does when memory runs out: free memory or lower trainer.micro_batch or data.workers"
    if number != signal.SIGKILL:
        why = "a crash outside of Python: look above for what a library said of it"
    error = ConfigError(f"Process {rank} of {count} was killed by {number.name}, {why}; {go_on(folder)}.")
    if number != signal.SIGKILL:
        error.exit_code = 128 + number
    return error


def _code(codes: Sequence[int]) -> int:
    # Ended by a signal: 128 + its number, as a shell says it.
    told = [128 - code if code < 0 else code for code in codes]
    # Who has only lost another one knows less than that one.
    return (told[0] if told[0] != LOST else 0) or max(code for code in (*told, 0) if code != LOST)
