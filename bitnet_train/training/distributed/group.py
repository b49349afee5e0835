"""What the processes of a run say to each other outside of Lightning: who goes first, what failed, when to stop.

Everything here does nothing in a run of one process. Words between the hosts go over gloo on the CPU, so that no device
has to wait; tensors of the step are reduced on their device.
"""

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bitnet_train.errors import BitnetTrainError, ConfigError
from bitnet_train.ranks import Ranks, this_process
from bitnet_train.training.distributed.launch import LOST

T = TypeVar("T")

# How long a process waits for the others in a collective: between steps the first one may write for a while.
COLLECTIVE_TIMEOUT = timedelta(hours=2)
# Seconds between two looks at the store while waiting for the first process, which may prepare data for hours.
LOOK_EVERY = 0.2
# Seconds in which the reason for a broken connection must arrive from the process that failed, and in which the others
# must have heard it from the first one, whose end takes the store along.
REASON_WITHIN = 5.0
# What gloo, NCCL and the store say when another process is gone. A RuntimeError without any of it (they complain of
# tensors of two sizes too) is a bug, whose traceback is wanted.
CONNECTION_LOST = re.compile(
    r"Connection (closed|reset|refused|was likely closed|aborted|timed out)|Broken pipe|failed to recv, got 0 bytes|"
    r"No route to host|Network is unreachable|ncclRemoteError|NCCL communicator was aborted",
    re.IGNORECASE,
)
GONE = (
    "Another process of this run is gone without a word: it was killed, which is what the system does when memory runs "
    "out, or its machine cannot be reached; what started the processes may say more. What was saved before is intact, "
    "and the same command goes on from it."
)

_HOSTS: list[dist.ProcessGroup] = []
_TURNS = [0]
# The failure of another process, once it is known: the store that told it may be gone by then.
_HEARD: list[tuple[str, int]] = []


def joined() -> bool:
    """Whether the processes of this run are connected."""
    return dist.is_initialized()


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def first() -> bool:
    """Whether this process writes and speaks."""
    return rank() == 0


def join(ranks: Ranks, cuda: bool) -> None:
    """Connect the processes of a run; nothing when there is one, or when it is done already.

    Where nothing else says so the meeting point is that of srun: its first node.
    """
    if ranks.world == 1 or dist.is_initialized():
        return
    if ranks.launcher == "srun":
        from lightning.pytorch.plugins.environments import SLURMEnvironment

        meeting = SLURMEnvironment(auto_requeue=False)
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = meeting.main_address, str(meeting.main_port)
    if cuda:
        torch.cuda.set_device(ranks.local)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", rank=ranks.rank, world_size=ranks.world, timeout=COLLECTIVE_TIMEOUT
    )
    # A group of its own, so that the words of the hosts never mix with collectives of the step.
    _HOSTS.append(_new_hosts())


def _new_hosts() -> dist.ProcessGroup:
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    return group


def leave() -> None:
    """Disconnect, if connected."""
    _HOSTS.clear()
    _HEARD.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def new_host_group() -> dist.ProcessGroup:
    """A further group of all processes on their CPUs, for another thread. To be called by all."""
    return _new_hosts()


def store() -> dist.Store:
    """The key-value store that the processes share."""
    found: dist.Store = dist.distributed_c10d._get_default_store()
    return dist.PrefixStore("bitnet_train", found)


def largest(*values: int) -> list[int]:
    """The largest of every process's values, at the same place."""
    if world() == 1:
        return list(values)
    found = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_HOSTS[0])
    return [int(value) for value in found]


def smallest(value: int) -> int:
    """The smallest of every process's value."""
    return -largest(-value)[0]


def summed(values: list[float]) -> list[float]:
    """The sums over all processes, in float64."""
    if world() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total, group=_HOSTS[0])
    return [float(value) for value in total]


def mean(tensor: Tensor) -> Tensor:
    """The mean over all processes of a tensor on the step's device, where it stays; the host does not wait for it."""
    if world() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / world()


def from_first(action: Callable[[], T]) -> T:
    """What ``action`` returns in the first process, to all; the others do not do it. Its errors are raised in all."""
    if world() == 1:
        return action()
    given: list[tuple[T | None, str | None, int]] = [(None, None, 0)]
    if first():
        try:
            given = [(action(), None, 0)]
        except BitnetTrainError as error:
            given = [(None, str(error), error.exit_code)]
    dist.broadcast_object_list(given, 0, group=_HOSTS[0])
    value, message, code = given[0]
    if message is not None:
        raise _error(message, code)
    return value  # type: ignore[return-value]


def in_turn(action: Callable[[], T]) -> T:
    """Do ``action`` in the first process and then, when it is done there, in all others.

    Raises the error of the first process that failed in all of them, so that all end in the same way.
    """
    if world() == 1:
        return action()
    _TURNS[0] += 1
    key, failure, value = f"turn{_TURNS[0]}", None, None
    if first():
        failure, value = _attempt(action)
        store().set(key, "failed" if failure else "done")
    else:
        # Not a collective, which would give up while hours of text are prepared.
        while not store().check([key]):
            time.sleep(LOOK_EVERY)
        if store().get(key) == b"done":
            failure, value = _attempt(action)
    agree(failure)
    return value  # type: ignore[return-value]


def _attempt(action: Callable[[], T]) -> tuple[BitnetTrainError | None, T | None]:
    try:
        return None, action()
    except BitnetTrainError as error:
        return error, None


def agree(failure: BitnetTrainError | None) -> None:
    """Tell the others whether something failed here. Raises what failed in the first process in which it did."""
    if world() == 1:
        if failure is not None:
            raise failure
        return
    failures: list[tuple[str, int] | None] = [None] * world()
    dist.all_gather_object(failures, None if failure is None else (str(failure), failure.exit_code), group=_HOSTS[0])
    found = next((one for one in failures if one is not None), None)
    if found is not None:
        raise failure if failure is not None and first() else _error(*found)


def _error(message: str, code: int) -> BitnetTrainError:
    error = ConfigError(message)
    error.exit_code = code
    return error


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Inside, a failure of one process that the others meet as a broken connection is raised in all as what it was."""
    if world() == 1:
        yield
        return
    try:
        yield
    except BitnetTrainError as error:
        announce(str(error), error.exit_code)
        _until_heard()
        raise
    except KeyboardInterrupt:
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and CONNECTION_LOST.search(str(error)):
            found = announced(REASON_WITHIN)
            if found is None:
                found = (GONE, _gone_code())
                announce(*found)  # for those that wait for somebody else
            raise _error(*found) from None
        lines = str(error).strip().splitlines() or ["no reason given"]
        announce(f"process {rank()} failed with {type(error).__name__}: {lines[0]}", 1)
        _until_heard()
        raise


def _gone_code() -> int:
    # This project's own launcher knows better who is gone, and says it.
    return LOST if this_process().launcher == "bitnet_train" else ConfigError.exit_code


def _until_heard() -> None:
    """Say that this process knows of the failure; the first one waits a moment until all others do."""
    tell(f"heard{rank()}", "")
    deadline = time.monotonic() + REASON_WITHIN
    others = [f"heard{other}" for other in range(1, world())]
    with contextlib.suppress(RuntimeError, ValueError):
        while first() and not store().check(others) and time.monotonic() < deadline:
            time.sleep(LOOK_EVERY)


def announce(message: str, code: int) -> None:
    """Leave the reason for this process's end where the others find it; the first one stays."""
    tell("failure", f"{code}:{rank()}:{message}")


def tell(key: str, value: str) -> None:
    """Leave a word for the others; the first one stays. Nothing when they cannot be reached."""
    with contextlib.suppress(RuntimeError, ValueError):
        if joined() and not store().check([key]):
            store().set(key, value)


def told(key: str) -> str | None:
    """A word that a process has left, or None."""
    with contextlib.suppress(RuntimeError, ValueError):
        if joined() and store().check([key]):
            return store().get(key).decode()
    return None


def announced(within: float = 0.0) -> tuple[str, int] | None:
    """What another process failed with, as (message, exit code), if it is known ``within`` so many seconds."""
    deadline = time.monotonic() + within
    while not _HEARD:
        try:
            found = store().get("failure").decode() if joined() and store().check(["failure"]) else None
        except (RuntimeError, ValueError):  # the first process is gone, and the store with it
            return None
        if found is not None:
            code, who, message = found.split(":", 2)
            if int(who) == rank():
                return None
            _HEARD.append((message, int(code)))
            tell(f"heard{rank()}", "")
        elif time.monotonic() > deadline:
            return None
        else:
            time.sleep(LOOK_EVERY)
    return _HEARD[0]
