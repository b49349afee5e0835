"""Ctrl-C that waits for a moment."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """A Ctrl-C that comes inside raises KeyboardInterrupt at the end.

    OmegaConf's clean-up (``finally`` clauses that use what was not set yet) turns a KeyboardInterrupt in its middle
    into other errors, and sometimes into a configuration that lacks something. Composing takes a second or two.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    if not callable(before):  # ignored, or not Python's
        yield
        return
    came: list[tuple[int, object]] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt
