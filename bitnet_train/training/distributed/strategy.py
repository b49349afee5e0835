"""Lightning's strategies for several processes, as this project uses them."""

from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy as LightningStrategy
from torch.optim import Optimizer

from bitnet_train.ranks import this_process
from bitnet_train.training.config import RunConfig, processes
from bitnet_train.training.device import sharded
from bitnet_train.training.distributed.checkpoint_files import read_checkpoint, read_into_shards
from bitnet_train.training.distributed.group import COLLECTIVE_TIMEOUT
from bitnet_train.training.slurm import slurm_plugins

# Lightning's name of the moment after a checkpoint is written.
AFTER_SAVING = "Trainer.save_checkpoint"


class AnyCheckpoint(TorchCheckpointIO):
    """Reads checkpoints that are one file, and those that are folders of shards."""

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        if Path(path).is_dir():
            return read_checkpoint(Path(path))
        found: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only)
        return found


class Replicated(DDPStrategy):
    """DDP. The first process alone saves, and the others do not wait for that."""

    def barrier(self, name: str | None = None) -> None:
        if name != AFTER_SAVING:
            super().barrier(name)


class Sharded(ModelParallelStrategy):
    """FSDP2 over all processes. A checkpoint's tensors are put into the shards without any process reading all."""

    def __init__(self, world: int) -> None:
        super().__init__(world, 1, timeout=COLLECTIVE_TIMEOUT)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return getattr(optimizer, "_optimizer", optimizer).state_dict()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        module = self.lightning_module
        assert module is not None
        return read_into_shards(Path(checkpoint_path), module.state_dict(), dict(module.named_parameters()))

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        raise NotImplementedError("callbacks save shards: training.distributed.checkpoints")


def several_processes(cfg: RunConfig) -> dict[str, Any]:
    """The arguments of Lightning's trainer that say how many processes there are, and what they do together."""
    world, trainer = processes(cfg.trainer), cfg.trainer
    if world == 1:
        return {"devices": 1, "plugins": [AnyCheckpoint(), *slurm_plugins()]}
    environment: ClusterEnvironment = (
        SLURMEnvironment(auto_requeue=False) if this_process().launcher == "srun" else TorchElasticEnvironment()
    )
    strategy: LightningStrategy = Sharded(world)
    plugins: list[Any] = [environment]
    if not sharded(cfg):
        # Buffers are derived from the weights, or moved in the same way by all: nothing has to be sent.
        strategy = Replicated(timeout=COLLECTIVE_TIMEOUT, broadcast_buffers=False, gradient_as_bucket_view=True)
        plugins = [environment, AnyCheckpoint()]
    return {"devices": trainer.devices, "num_nodes": trainer.num_nodes, "strategy": strategy, "plugins": plugins}


__all__ = ["AnyCheckpoint", "Replicated", "Sharded", "several_processes"]
