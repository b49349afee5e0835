"""Runs a function in a fresh process of the same interpreter and brings its result back."""

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from bitnet_train.benchmarking.timing import one_line

Result = TypeVar("Result")


class ChildError(Exception):
    """The child failed; the message is its own error in one line, or how it ended."""


def in_child(function: Callable[..., Result], *arguments: Any) -> Result:
    """``function(*arguments)`` in a spawned process with this one's number of threads.

    The function must be importable and everything must pickle. Raises ChildError when it raises or dies.
    """
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(send, torch.get_num_threads(), function, arguments))
    process.start()
    send.close()
    try:
        result, error = receive.recv()
    except EOFError:
        process.join()
        raise ChildError(_ending(process.exitcode)) from None
    finally:
        # Also on Ctrl-C, which the child ignores.
        receive.close()
        process.join(timeout=10)
        if process.is_alive():
            process.terminate()
            process.join()
    if error is not None:
        raise ChildError(error)
    answer: Result = result
    return answer


def _ending(exit_code: int | None) -> str:
    if exit_code == -signal.SIGKILL:
        return "its process was killed, most likely because memory ran out"
    return f"its process ended with code {exit_code}"


def _work(send: Connection, threads: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    try:
        send.send((function(*arguments), None))
    except Exception as error:
        send.send((None, one_line(error)))
    send.close()
