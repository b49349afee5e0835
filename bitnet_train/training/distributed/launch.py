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

# Passed on to every process. (A second Ctrl-C stops them at once, as in a run of one process.)
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# Seconds that the others have to end by themselves once one has failed, and to end after a SIGTERM.
GRACE, LAST_GRACE = 60.0, 20.0
LOOK_EVERY = 0.1
# Linux: the signal that a process gets when its parent dies (prctl(2)).
PR_SET_PDEATHSIG = 1


def launch(plain: dict[str, Any], count: int) -> int:
    """Run the configuration ``plain`` in ``count`` processes of this machine, one per device; the exit code.

    That is the first process's, or where that is 0 the worst of the others'. A failure of one ends all.
    """
    with tempfile.TemporaryDirectory(prefix="bitnet_train-") as folder:
        job = Path(folder) / "job.json"
        job.write_text(json.dumps(plain))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(count)}
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
            return _code(_wait(children))
        finally:
            _send(children, signal.SIGKILL)
            for number, handler in before.items():
                signal.signal(number, handler)


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


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """The exit codes of all, once they have ended; those that outlive a failure are ended."""
    deadline, number = float("inf"), signal.SIGTERM
    while True:
        codes = [child.poll() for child in children]
        known = [code for code in codes if code is not None]
        if len(known) == len(children):
            return known
        # A run that ended by itself may have others that still write.
        if any(known) and deadline == float("inf"):
            deadline = time.monotonic() + GRACE
        if time.monotonic() > deadline:
            _send(children, number)
            deadline, number = time.monotonic() + LAST_GRACE, signal.SIGKILL
        time.sleep(LOOK_EVERY)


def _code(codes: Sequence[int]) -> int:
    # Ended by a signal: 128 + its number, as a shell says it.
    told = [128 - code if code < 0 else code for code in codes]
    return told[0] or max(told)
