"""The network over several processes: master weights as shards, everything else by FSDP2."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from bitnet_train.nn.sharded_codes import MasterShard, shard_masters


def shard_network(network: nn.Module, mesh: DeviceMesh, codes: bool = True) -> None:
    """Shard the parameters of ``network`` over the processes of ``mesh``, in place; all have the same ones before.

    Quantised layers gather ``codes`` where they can (``nn.sharded_codes``). FSDP2 gathers the rest in float32: blocks
    with matrices of their own when they run, embedding, head and norms once per step.
    """
    shards = shard_masters(network, mesh) if codes else []
    # Not a submodule or a buffer: a list that the network carries along.
    object.__setattr__(network, "master_shards", shards)
    own = {shard.parameter for shard in shards}
    blocks = getattr(network, "layers", None)
    for block in blocks if isinstance(blocks, nn.ModuleList) else []:
        if any(p.dim() > 1 for p in block.parameters() if p not in own):
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=own)
    # What the loss reads of the root (the head) stays gathered from the forward to the backward pass.
    fully_shard(network, mesh=mesh, reshard_after_forward=False, ignored_params=own)
    if hasattr(network, "hidden_states"):
        register_fsdp_forward_method(network, "hidden_states")


def is_sharded(network: nn.Module) -> bool:
    """Whether :func:`shard_network` was called on it."""
    return isinstance(network, FSDPModule)


def finish_gradients(network: nn.Module) -> None:
    """Wait, on the device, for gradients that are still on their way between processes."""
    shards: list[MasterShard] = getattr(network, "master_shards", [])
    if shards:
        shards[0].pending.finish()
