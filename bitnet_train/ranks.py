"""Which of the processes that train together this one is. No torch here: errors are said before it is loaded.

torchrun and this project's own launcher say it in RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE, srun in SLURM_*.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from bitnet_train.errors import ConfigError

# Set by this project's own launcher, which says itself that a process was killed.
LAUNCHER = "BITNET_TRAIN_LAUNCHER"


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
    """The ranks that the ``environment`` (of this process by default) tells; those of a single process otherwise.

    Raises ConfigError for what is no number there, or none that can be.
    """
    told = os.environ if environment is None else environment
    if "RANK" in told and "WORLD_SIZE" in told and "LOCAL_RANK" in told:
        world = _number(told, "WORLD_SIZE", least=1)
        local_world = _number(told, "LOCAL_WORLD_SIZE", least=1, otherwise=world)
        launcher = "bitnet_train" if LAUNCHER in told else "torchrun"
        return Ranks(_number(told, "RANK", below=world), _number(told, "LOCAL_RANK"), world, local_world, launcher)
    # Of a job step (srun): the batch script itself has no step, and is a single process.
    world = _number(told, "SLURM_STEP_NUM_TASKS", least=1, otherwise=1)
    if world > 1 and "SLURM_PROCID" in told:
        nodes = _number(told, "SLURM_STEP_NUM_NODES", least=1, otherwise=1)
        rank, local = _number(told, "SLURM_PROCID", below=world), _number(told, "SLURM_LOCALID", otherwise=0)
        return Ranks(rank, local, world, world // nodes, "srun")
    return Ranks()


def _number(
    told: Mapping[str, str], name: str, least: int = 0, below: int | None = None, otherwise: int | None = None
) -> int:
    """The number that ``told`` has under ``name``, or ``otherwise``."""
    text = told[name] if otherwise is None else told.get(name, str(otherwise))
    if text.isascii() and text.isdigit() and least <= int(text) and (below is None or int(text) < below):
        return int(text)
    wanted = f"a whole number from {least}" + ("" if below is None else f" to {below - 1}")
    raise ConfigError(
        f"The environment says {name}={text}, which must be {wanted}: it is set by what starts the processes of a run "
        "(torchrun, srun); unset it to train in a single process."
    )
