"""How many nodes, processes and GPUs a job of a configuration takes."""

from dataclasses import dataclass
from typing import Any

from bitnet_train.cluster.config import ClusterConfig
from bitnet_train.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """One process per task: ``tasks_per_node`` of them on each of ``nodes``, with ``gpus_per_node``."""

    nodes: int
    tasks_per_node: int
    gpus_per_node: int
    # Settings of the trainer that the command line needs for these, beside what it says already.
    settings: tuple[str, ...] = ()


def job_layout(cluster: ClusterConfig, trainer: Any, accelerator: str, command: str) -> Layout:
    """The layout of a job that runs ``command``. Raises ConfigError where ``cluster`` and ``trainer`` contradict.

    ``trainer`` says how many processes train, with ``devices`` and ``num_nodes``; ``cluster.nodes`` and
    ``cluster.gpus_per_node`` do where it leaves that open. Everything but training is one process on one node.
    """
    wanted = cluster.gpus_per_node
    if command != "train":
        return Layout(1, 1, wanted if wanted is not None else int(accelerator != "cpu" and command != "prepare"))
    num_nodes, devices = getattr(trainer, "num_nodes", 1), getattr(trainer, "devices", 1)
    settings = []
    nodes = num_nodes if cluster.nodes is None else cluster.nodes
    if nodes != num_nodes:
        if num_nodes != 1 or not hasattr(trainer, "num_nodes"):
            raise ConfigError(
                f"cluster.nodes={nodes}, but training is on trainer.num_nodes={num_nodes}: leave one out."
            )
        settings.append(f"trainer.num_nodes={nodes}")
    count = int(devices) if str(devices).isdigit() else None  # "auto" and -1: as many as there are
    if count is None or (count == 1 and (wanted or 0) > 1 and hasattr(trainer, "devices")):
        count = max(1, wanted or 1)
        settings.append(f"trainer.devices={count}")
    gpus = wanted if wanted is not None else (0 if accelerator == "cpu" else count)
    if gpus and gpus != count:
        raise ConfigError(
            f"cluster.gpus_per_node={gpus}, but {count} of each node's would train (trainer.devices={devices}): "
            "make them equal."
        )
    return Layout(nodes, count, gpus, tuple(settings))
