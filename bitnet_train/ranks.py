"""Which of the processes that train together this one is. No torch here: errors are said before it is loaded.

torchrun and this project's own launcher say it in RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE, srun in SLURM_*.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """This process's number among all and on its node, both from 0, and how many there are."""

    rank: int = 0
    local: int = 0
    world: int = 1
    local_world: int = 1
    # What started the processes: "" for a single one.
    launcher: str = ""

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0


def this_process(environment: Mapping[str, str] | None = None) -> Ranks:
    """The ranks that the ``environment`` (of this process by default) tells; those of a single process otherwise."""
    told = os.environ if environment is None else environment
    if "RANK" in told and "WORLD_SIZE" in told and "LOCAL_RANK" in told:
        world = int(told["WORLD_SIZE"])
        local_world = int(told.get("LOCAL_WORLD_SIZE", world))
        return Ranks(int(told["RANK"]), int(told["LOCAL_RANK"]), world, local_world, "torchrun")
    # Of a job step (srun): the batch script itself has no step, and is a single process.
    world = int(told.get("SLURM_STEP_NUM_TASKS", "1"))
    if world > 1 and "SLURM_PROCID" in told:
        nodes = max(1, int(told.get("SLURM_STEP_NUM_NODES", "1")))
        return Ranks(int(told["SLURM_PROCID"]), int(told.get("SLURM_LOCALID", "0")), world, world // nodes, "srun")
    return Ranks()
