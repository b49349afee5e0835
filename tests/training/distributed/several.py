"""Runs a function in several processes that are connected over gloo."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_processes(count: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function(rank, *arguments)``, of a module's top level, returns in each of ``count`` processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Forked from one process that has imported everything already, which takes six seconds.
    multiprocessing.set_forkserver_preload(["bitnet_train.training.run", __name__])
    given = (count, port, folder, function, arguments, dict(os.environ))
    mp.start_processes(_run, given, nprocs=count, start_method="forkserver")  # type: ignore[no-untyped-call]
    found = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]
    failed = [one["failed"] for one in found if "failed" in one]
    assert not failed, failed[0]
    return [one["returned"] for one in found]


def _run(
    rank: int,
    count: int,
    port: int,
    folder: Path,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    environment: dict[str, str],
) -> None:
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(environment)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
    from bitnet_train.ranks import this_process
    from bitnet_train.training.distributed import group

    group.join(this_process(), cuda=False)
    try:
        found = {"returned": function(rank, *arguments)}
        dist.barrier()
    except Exception:
        found = {"failed": traceback.format_exc()}
    torch.save(found, folder / f"{rank}.pt")
    if "failed" not in found:
        group.leave()
