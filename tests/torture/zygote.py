"""Commands in processes that are forked from one that has imported everything: a second less for each.

Reads lines of JSON on standard input, ``{"command": [...], "output": FILE, "suicide": null or {...}}``, answers with
the process id of the child that runs the command, and with its wait status when it has ended. A child may be told to
kill itself at the n-th of the system calls that write, so that it dies at every phase of writing a checkpoint.
"""

import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

import bitnet_train.commands.export
import bitnet_train.commands.train
import bitnet_train.export.writers
import bitnet_train.training.run
from bitnet_train.__main__ import answer
from bitnet_train.training.callbacks import checkpoint

# Loaded when it is first asked for; exports are verified with it.
assert transformers.AutoModelForCausalLM


class Suicide:
    """Ends this process with SIGKILL at the n-th event of writing checkpoints and the files beside them: writes into a
    checkpoint (cut short first), syncs, renames, links, deletions; before or behind it."""

    def __init__(self, at: int, share: float) -> None:
        self.at, self.share, self.count = at, share, 0

    def due(self) -> bool:
        self.count += 1
        return self.count == self.at

    def arm(self) -> None:
        self._around(os, "fsync")
        self._around(os, "link")
        self._around(Path, "replace")
        self._around(Path, "unlink")
        plain = checkpoint._Remembering.write

        def write(stream: Any, data: Any) -> int:
            if self.due():
                part = memoryview(data).cast("B")
                io.FileIO.write(stream, part[: int(len(part) * self.share)])
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(stream, data)

        checkpoint._Remembering.write = write  # type: ignore[method-assign]

    def _around(self, owner: Any, name: str) -> None:
        plain: Callable[..., Any] = getattr(owner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            before = self.due()
            if before and self.share < 0.5:
                os.kill(os.getpid(), signal.SIGKILL)
            result = plain(*arguments, **named)
            if before:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, call)


def child(request: dict[str, Any]) -> None:
    """Run the command and end."""
    os.setsid()
    # As a shell starts a program; a test runner may ignore them.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(output, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
    os.chdir(request["folder"])
    bitnet_train.commands.train.write_run_page = lambda *_: None  # type: ignore[assignment]
    if request["suicide"] is not None:
        Suicide(**request["suicide"]).arm()
    code = 1
    try:
        code = answer(request["command"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(request)
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main()
