"""A Ctrl-C while the configuration is composed is a Ctrl-C, never a wrong configuration."""

import os
import signal
import threading
from collections.abc import Callable

import pytest

from bitnet_train import __main__ as main
from bitnet_train.interrupts import interrupts_wait


def waiting(then: Callable[[], object]) -> None:
    """A Ctrl-C, then ``then``, inside."""
    with interrupts_wait():
        os.kill(os.getpid(), signal.SIGINT)
        then()


def test_an_interrupt_waits_for_the_end() -> None:
    done: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        waiting(lambda: done.append(1))
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is before
    with interrupts_wait():
        pass


def test_an_error_inside_is_not_hidden_by_the_interrupt() -> None:
    with pytest.raises(ValueError, match="'x'"):
        waiting(lambda: int("x"))


def test_other_threads_and_ignored_signals_are_left_alone() -> None:
    found = []

    def inside() -> None:
        with interrupts_wait():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts_wait():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("where", ["register", "hydra_main", "to_config"])
def test_an_interrupt_in_the_middle_of_composing_ends_with_130(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = getattr(main, where)

    def interrupted(*arguments: object) -> object:
        os.kill(os.getpid(), signal.SIGINT)
        return plain(*arguments)

    monkeypatch.setattr(main, where, interrupted)
    assert main.answer(["+recipe=tiny", "command=estimate"]) == 130
