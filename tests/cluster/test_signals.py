"""Signals raise where nothing must be finished, are noted where something must, and do not reach child processes."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from bitnet_train import signals


def wait_for(number: int) -> None:
    os.kill(os.getpid(), number)
    for _ in range(1000):
        time.sleep(0.01)
    raise AssertionError("no signal came")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_raises_at_once(number: int) -> None:
    before = [signal.getsignal(n) for n in signals.EXIT_CODES]
    with signals.listening():
        assert signals.requested() is None
        with pytest.raises(signals.Terminated):
            wait_for(number)
        assert signals.terminated()
    assert [signal.getsignal(n) for n in signals.EXIT_CODES] == before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(signals.WARNINGS) == set()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
@pytest.mark.parametrize("listens", [True, False])
def test_a_deferred_signal_is_noted(number: int, listens: bool) -> None:
    with signals.listening() if listens else signals.raising(), signals.deferring():
        os.kill(os.getpid(), number)
        for _ in range(1000):
            if signals.requested() is not None:
                break
            time.sleep(0.01)
        assert signals.EXIT_CODES[signal.Signals(signals.requested() or 0)] == (130 if number == signal.SIGINT else 143)
        assert signals.terminated() == (number != signal.SIGINT)


def test_a_second_ctrl_c_does_not_wait() -> None:
    with signals.listening(), signals.deferring():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        with pytest.raises(KeyboardInterrupt) as stopped:
            wait_for(signal.SIGINT)
        assert not isinstance(stopped.value, signals.Terminated)


def test_a_new_listener_knows_no_old_signal() -> None:
    for _ in range(2):
        with signals.listening():
            assert signals.requested() is None
            with pytest.raises(signals.Terminated):
                wait_for(signal.SIGUSR1)


def test_listening_twice_and_in_a_thread_is_harmless() -> None:
    with signals.listening(), signals.listening():
        inner = threading.Thread(target=lambda: signals.listening().__enter__())
        inner.start()
        inner.join()
        with pytest.raises(signals.Terminated):
            wait_for(signal.SIGTERM)


def test_a_warning_does_not_kill_child_processes() -> None:
    """SLURM sends USR1 to every process of a job: loaders, compilers and W&B's would die of it."""
    script = "import time; print('ready', flush=True); time.sleep(0.3); print('alive')"
    with signals.listening():
        child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        child.stdout.readline()
        for number in signals.WARNINGS:
            child.send_signal(number)
        assert child.communicate(timeout=60)[0] == "alive\n"
        assert child.returncode == 0
