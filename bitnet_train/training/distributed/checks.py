"""Rules that training with several processes must keep. No torch here, so that a mistake is answered at once."""

import math

from bitnet_train.errors import ConfigError
from bitnet_train.ranks import Ranks
from bitnet_train.training.config import RunConfig, Strategy, processes
from bitnet_train.training.optimizers.config import AdamWConfig


def check_processes(cfg: RunConfig) -> None:
    """Raises ConfigError for numbers of processes that cannot be, and for what does not work on shards.

    That the micro-batches divide is checked where the step is cut (``training.config.step_plan``).
    """
    trainer = cfg.trainer
    if isinstance(trainer.devices, str):
        if trainer.devices != "auto":
            raise ConfigError(f"trainer.devices={trainer.devices} is unknown: use a number of processes, or auto.")
    elif isinstance(trainer.devices, bool) or trainer.devices < 1:
        raise ConfigError(f"trainer.devices is {trainer.devices}; it must be at least 1, or auto for all GPUs.")
    if trainer.num_nodes < 1:
        raise ConfigError(f"trainer.num_nodes is {trainer.num_nodes}; it must be at least 1.")
    if trainer.hang_timeout is not None and not 0 < trainer.hang_timeout < math.inf:
        raise ConfigError(
            f"trainer.hang_timeout is {trainer.hang_timeout:g}; it must be a positive number of minutes, or null."
        )
    if trainer.strategy is Strategy.fsdp:
        _check_sharded(cfg)


def _check_sharded(cfg: RunConfig) -> None:
    """Raises ConfigError for settings that shards of the weights cannot be trained with, whatever their number."""
    if type(cfg.optimizer) is not AdamWConfig:
        why = {
            "muon": "orthogonalises whole matrices",
            "adamw_8bit": "keeps moments in blocks that shards of uneven size would cut",
        }.get(cfg.optimizer.name, "is not written for shards")
        raise ConfigError(
            f"optimizer={cfg.optimizer.name} {why}, and trainer.strategy=fsdp shards them: use trainer.strategy=ddp, "
            "or optimizer=adamw and an optimizer.lr for it."
        )
    if cfg.quant.progressive.name != "none":
        raise ConfigError(
            f"quant/progressive={cfg.quant.progressive.name} mixes master weights with codes, and "
            "trainer.strategy=fsdp gathers the codes alone: use trainer.strategy=ddp."
        )
    if cfg.trainer.micro_batch == "auto":
        raise ConfigError(
            "trainer.micro_batch=auto measures the whole model on one device, which trainer.strategy=fsdp shards: give "
            "a number of sequences."
        )
    if cfg.trainer.compile is True:
        raise ConfigError(
            "trainer.compile=true does not work with trainer.strategy=fsdp, whose gathers break the compiled graph: "
            "use auto or false."
        )


def check_started(cfg: RunConfig, ranks: Ranks) -> None:
    """Raises ConfigError when the processes that run are not those that ``cfg``, with a number of devices, wants."""
    wanted, trainer = processes(cfg.trainer), cfg.trainer
    if ranks.world == 1:
        if trainer.num_nodes > 1:
            raise ConfigError(
                f"trainer.num_nodes={trainer.num_nodes} needs something that starts the processes on every node: use "
                "srun (see slurm/) or torchrun."
            )
        return
    if ranks.world != wanted:
        raise ConfigError(
            f"{ranks.launcher} started {ranks.world} processes, but trainer.devices={trainer.devices} x "
            f"trainer.num_nodes={trainer.num_nodes} is {wanted}: make them the same."
        )
