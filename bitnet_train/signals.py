"""Signals that ask the program to stop: Ctrl-C, TERM, and USR1 and USR2, by which schedulers announce that."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Sent by SLURM and submitit to every process of a job. Those that other programs start (loaders, compilers, W&B) would
# die of them.
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
# Exit codes that shells expect: 128 + signal number; a warning ends as the termination that it announces.
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGUSR2: 143}


class Terminated(KeyboardInterrupt):
    """TERM, USR1 or USR2 came while there was nothing to finish and to save first."""


class _State:
    # The signal that came, and whether it is only noted.
    number: int | None = None
    deferring = False
    ignoring = False
    watcher: threading.Thread | None = None


_state = _State()


def requested() -> int | None:
    """The signal that asked for a stop since :func:`listening` (or else :func:`raising`) began, or None."""
    return _state.number


def terminated() -> bool:
    """Whether that was TERM, USR1 or USR2."""
    return _state.number is not None and _state.number != signal.SIGINT


@contextmanager
def listening() -> Iterator[None]:
    """Inside, TERM, USR1 and USR2 raise :class:`Terminated`, and child processes do not see USR1 and USR2.

    Inside another ``listening``, and outside the main thread, which alone can handle signals, it does nothing.
    """
    if _state.watcher is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.number = None
    before = _take(signal.SIGTERM, *WARNINGS)
    # A blocked signal stays so in threads and processes that are started from here on; one thread waits for it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, WARNINGS)
    main = threading.main_thread().ident
    _state.watcher = threading.Thread(target=_pass_on, args=(main,), name="signals", daemon=True)
    _state.watcher.start()
    try:
        yield
    finally:
        watcher, _state.watcher = _state.watcher, None
        signal.pthread_kill(watcher.ident or 0, signal.SIGUSR1)
        watcher.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _put_back(before)


def _pass_on(main: int) -> None:
    while True:
        number = signal.sigwait(WARNINGS)
        if _state.watcher is not threading.current_thread():
            return
        _state.number = number
        signal.pthread_kill(main, signal.SIGTERM)  # wakes the main thread, whatever it waits for


@contextmanager
def raising() -> Iterator[None]:
    """Inside, a signal raises at once, whatever handlers others have put in place of ours."""
    if _state.watcher is None:
        _state.number = None
    before = _take(*EXIT_CODES)
    try:
        yield
    finally:
        _put_back(before)


@contextmanager
def deferring() -> Iterator[None]:
    """Inside, signals are only noted, for :func:`requested` to tell; a second Ctrl-C raises KeyboardInterrupt."""
    before = _take(*EXIT_CODES)
    _state.deferring = True
    try:
        yield
    finally:
        _state.deferring = False
        _put_back(before)


def ignore() -> None:
    """From here on nothing but Ctrl-C and KILL ends this process early."""
    _state.ignoring = True
    for number in (signal.SIGTERM, *WARNINGS):
        signal.signal(number, signal.SIG_IGN)


def _take(*numbers: int) -> dict[int, Any]:
    return {number: signal.signal(number, _receive) for number in numbers}


def _put_back(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        if not _state.ignoring:
            signal.signal(number, handler)


def _receive(number: int, frame: FrameType | None) -> None:
    del frame
    if number == signal.SIGINT and (not _state.deferring or _state.number == signal.SIGINT):
        raise KeyboardInterrupt
    _state.number = number
    if not _state.deferring:
        raise Terminated
