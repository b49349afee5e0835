"""One process per run folder, on this machine and on others that share its disk."""

import contextlib
import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from bitnet_train.durable import host_name, is_alive, reason
from bitnet_train.errors import ConfigError

# Seconds between two signs of life, and how long another machine is watched for one: so long that a slow file server
# shows one.
BEAT = 10.0
PATIENCE = 30.0
HELD = (errno.EACCES, errno.EAGAIN)


class RunLock:
    """Claims a folder until :meth:`release`, or until the process ends, however it ends.

    A POSIX record lock on ``.lock``: the kernel drops it with the process, loader processes do not inherit it, and NFS
    passes it on to other machines. Where the file system has no such locks (ENOLCK, ENOTSUP), or has them for one
    machine only (Lustre's localflock), ``.alive`` tells: its owner counts in it every 10 seconds. On one machine its
    process is asked for; on another the file is watched for 30 seconds. Two machines that start at the same moment on a
    disk without locks are not told apart.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = print) -> None:
        self.folder, self.say = folder, say
        self.beat_file = folder / ".alive"
        self._stream: IO[str] | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Raises ConfigError when another process holds the folder, and when it cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._stream = (self.folder / ".lock").open("a+")
        except OSError as error:
            raise ConfigError(
                f"The run folder {self.folder} cannot be written ({reason(error)}): choose another with paths.runs=."
            ) from None
        kernel = True
        try:
            fcntl.lockf(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD:
                self._stream.seek(0)
                holder = self._stream.read().strip() or "another process"
                self.release()
                raise ConfigError(self._refusal(holder)) from None
            kernel = False
        self._check_alive(kernel)
        with contextlib.suppress(OSError):  # a full disk is met later, where it matters
            self._stream.truncate(0)
            self._stream.write(f"process {os.getpid()} on {host_name()}")
            self._stream.flush()
        self._ended.clear()
        self._beat(0)
        self._thread = threading.Thread(target=self._keep_beating, name="run-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the folder back."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            with contextlib.suppress(OSError):
                self.beat_file.unlink()
        if self._stream is not None:
            with contextlib.suppress(OSError):
                self._stream.close()
            self._stream = None

    def _check_alive(self, kernel: bool) -> None:
        """Raises ConfigError when the owner of ``.alive`` still lives."""
        before = self._read()
        owner = before.partition(",")[0]
        words = owner.split()
        if len(words) != 4 or not words[1].isdigit():
            return
        pid, host = int(words[1]), words[3]
        if host == host_name():
            if not kernel and is_alive(pid):
                self.release()
                raise ConfigError(self._refusal(owner))
            return
        self.say(f"{owner} used {self.folder} last: looking for {PATIENCE:.0f} s whether it still does")
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            time.sleep(min(1.0, PATIENCE / 4))
            if self._read() not in (before, ""):
                self.release()
                raise ConfigError(self._refusal(owner))

    def _refusal(self, holder: str) -> str:
        return f"The run folder {self.folder} is in use by {holder}: wait for it to end, or choose another run_name."

    def _read(self) -> str:
        # Opened anew each time: NFS looks at the server then.
        try:
            return self.beat_file.read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""

    def _keep_beating(self) -> None:
        count = 0
        while not self._ended.wait(BEAT):
            count += 1
            self._beat(count)

    def _beat(self, count: int) -> None:
        # In place and of one length: that needs no new room on a full disk.
        with contextlib.suppress(OSError):
            number = os.open(self.beat_file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                os.pwrite(number, f"process {os.getpid()} on {host_name()}, {count:012d}\n".ljust(128).encode(), 0)
            finally:
                os.close(number)
