"""Codes of a model whose master weights are sharded by rows over processes: the codes travel, the weights stay.

A BitLinear's forward and backward need its codes, and its master weight only as the place where the gradient goes. So
no process ever has a whole master weight. Once per optimizer step every process sends 64-bit sums of its rows, in one
all-reduce for all layers, from which all have the same scales as a single process would; it ternarises its own rows and
sends their codes, four to a byte, in all-gathers of several layers at once. In the backward pass the gradient of the
whole weight is computed from the process's own samples, averaged over the processes and cut into rows by a
reduce-scatter (as in FSDP, arXiv 2304.11277), layer by layer while the pass goes on.

That is for layers whose scale is the mean magnitude. Where a scale is learned, or is the median or the maximum, and for
float layers, FSDP2 gathers the weights themselves.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from bitnet_train.kernels.backend import Backend
from bitnet_train.nn.bit_linear import BitLinear
from bitnet_train.nn.code_cache import CodeCache, Quantise, quantise_master
from bitnet_train.quant.packing import pack_quarters, unpack_quarters
from bitnet_train.quant.weights import Codes, row_statistics, rows_to_codes, scales_from_statistics

# Bytes of codes that a process sends at once: enough to keep a network busy, little beside the codes themselves.
MESSAGE = 32 * 2**20
# Their names since torch 2.13; the older ones warn there.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
# Gradients of whole weights that wait to be reduced at the same time, at most.
IN_FLIGHT = 4


def whole(tensor: Tensor) -> Tensor:
    """``tensor``, or all of one that is sharded, gathered: a call for all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(target: Tensor, full: Tensor) -> Tensor:
    """The whole tensor ``full``, sharded as ``target`` is if it is: every process takes its rows, nothing is sent."""
    if not isinstance(target, DTensor):
        return full
    return distribute_tensor(full.to(target.device), target.device_mesh, target.placements, src_data_rank=None)


def travels_as_codes(layer: BitLinear) -> bool:
    """Whether nothing but its codes is needed of the layer's weights, and sums of the rows give its scales."""
    by_mean = layer.quant.scheme in ("ternary", "binary") or layer.quant.scheme == "symmetric"
    return by_mean and layer.quant.statistic == "absmean" and layer.weight_scale is None


class MasterShard:
    """The rows of a layer's master weight that this process has, and the place that receives the whole gradient.

    ``layer.weight`` becomes a DTensor, for the optimizer and for checkpoints. The forward passes ``target`` on in its
    place (:attr:`BitLinear.master`): a leaf of the weight's shape without any memory.
    """

    def __init__(self, layer: BitLinear, mesh: DeviceMesh, pending: "PendingGradients") -> None:
        full = layer.weight.detach()
        self.layer, self.pending, self.group = layer, pending, mesh.get_group()
        self.world, self.rows = mesh.size(), full.shape[0]
        # As torch.chunk cuts: the last processes may have fewer rows, or none.
        self.chunk = -(-self.rows // self.world)
        layer.weight = nn.Parameter(distribute_tensor(full, mesh, [Shard(0)], src_data_rank=None))
        self.first = min(self.rows, mesh.get_local_rank() * self.chunk)
        nothing = torch.zeros((), dtype=full.dtype, device=layer.weight.device)
        self.target = nothing.expand(full.shape).requires_grad_()
        self.target.register_post_accumulate_grad_hook(self._reduce)
        layer.stand_in = self.target

    @property
    def parameter(self) -> nn.Parameter:
        """The layer's master weight, a DTensor."""
        weight = self.layer.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def local(self) -> Tensor:
        """This process's rows, (rows, in)."""
        weight = self.layer.weight
        assert isinstance(weight, DTensor)
        return weight.to_local().detach()

    def _reduce(self, target: Tensor) -> None:
        grad, target.grad = target.grad, None
        assert grad is not None
        padding = self.chunk * self.world - self.rows
        full = torch.cat([grad, grad.new_zeros(padding, grad.shape[1])]) if padding else grad.contiguous()
        mine = grad.new_empty(self.chunk, grad.shape[1])
        work = _reduce_scatter(mine, full, group=self.group, async_op=True)
        self.pending.add(work, self, mine, full)

    @torch.no_grad()
    def receive(self, summed: Tensor) -> None:
        """Add this process's rows of the mean over the processes, of which ``summed`` is the sum, to the gradient."""
        weight = self.layer.weight
        assert isinstance(weight, DTensor)
        local = summed[: weight.to_local().shape[0]].div_(self.world)
        if weight.grad is None:
            grad = DTensor.from_local(
                local, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride()
            )
            weight.grad = grad
        else:
            assert isinstance(weight.grad, DTensor)
            weight.grad.to_local().add_(local)


class PendingGradients:
    """Reduce-scatters that are on their way, in their order; the same on every process."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Any, MasterShard, Tensor, Tensor]] = deque()

    def add(self, work: Any, shard: MasterShard, mine: Tensor, full: Tensor) -> None:
        """Remember a reduction, and take in the oldest when there are too many."""
        self._waiting.append((work, shard, mine, full))
        if len(self._waiting) > IN_FLIGHT:
            self._take()

    def finish(self) -> None:
        """Take in all. The device waits for them, not the host."""
        while self._waiting:
            self._take()

    def _take(self) -> None:
        work, shard, mine, _ = self._waiting.popleft()
        work.wait()
        shard.receive(mine)


def shard_masters(model: nn.Module, mesh: DeviceMesh) -> list[MasterShard]:
    """Shard the master weights of all layers that :func:`travels_as_codes` over the processes of ``mesh``."""
    pending = PendingGradients()
    layers = [m for m in model.modules() if isinstance(m, BitLinear) and travels_as_codes(m)]
    return [MasterShard(layer, mesh, pending) for layer in layers]


class _Message(NamedTuple):
    """The codes of a layer's rows as bytes (chunk, width), padded to the same for every process."""

    shard: MasterShard
    bytes: Tensor


class ShardedCodeCache(CodeCache):
    """A :class:`CodeCache` of a model some of whose master weights are :class:`MasterShard`; refreshed by all processes
    together."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        # Of layers whose codes have arrived: the bytes of all rows, and the scale.
        self._fresh: dict[int, tuple[Tensor, Tensor]] = {}
        super().__init__(model, optimizer)

    def _find_layers(self) -> None:
        super()._find_layers()
        shards = getattr(self.model, "master_shards", [])
        known = {id(layer) for layer in self._layers}
        self._shards: list[MasterShard] = [shard for shard in shards if id(shard.layer) in known]

    @property
    def _on_load(self) -> Callable[[nn.Module, Any], None]:
        return lambda *_: self.refresh()

    @property
    def _quantise(self) -> Quantise:
        return self._arrived

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self, measure: bool = False) -> None:
        """As :meth:`CodeCache.refresh`, with what the other processes have of the weights."""
        scales = self._scales()
        for messages in self._messages(scales):
            self._exchange(messages, scales)
        super().refresh(measure)

    def _arrived(self, layer: BitLinear, kernels: Backend, codes: Tensor | None, backward: Tensor | None) -> Codes:
        if id(layer) not in self._fresh:
            return quantise_master(layer, kernels, codes, backward)
        rows, scale = self._fresh.pop(id(layer))
        packed = layer.quant.largest_code == 1
        unpacked = unpack_quarters(rows, layer.in_features) if packed else rows.view(torch.int8)
        fresh = Codes(unpacked.contiguous(), scale)
        if backward is not None:
            dx, _ = layer.gradient.resolve("bf16")
            layout = kernels.backward_layout(fresh.codes, dx)
            backward.copy_(fresh.codes.t() if layout is None else layout)
        return fresh if codes is None else Codes(codes.copy_(fresh.codes), fresh.scale)

    def _scales(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Scale and, for binary codes, mean of every group of every sharded layer, float32: one all-reduce."""
        if not self._shards:
            return {}
        parts = [row_statistics(s.local, s.layer.quant, s.first, s.rows) for s in self._shards]
        sums = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(sums, group=self._shards[0].group)
        found = {}
        for shard, part, summed in zip(
            self._shards, parts, torch.split(sums, [part.numel() for part in parts]), strict=True
        ):
            size = shard.rows // part.shape[1] * shard.layer.in_features
            found[id(shard)] = scales_from_statistics(summed.reshape(part.shape), size, shard.layer.quant)
        return found

    def _messages(self, scales: dict[int, tuple[Tensor, Tensor]]) -> Iterable[list[_Message]]:
        """This process's codes, as many layers at a time as make a message."""
        found: list[_Message] = []
        size = 0
        for shard in self._shards:
            codes = rows_to_codes(shard.local, shard.layer.quant, *scales[id(shard)], shard.first, shard.rows)
            packed = pack_quarters(codes) if shard.layer.quant.largest_code == 1 else codes.view(torch.uint8)
            missing = shard.chunk - packed.shape[0]
            padded = torch.cat([packed, packed.new_zeros(missing, packed.shape[1])]) if missing else packed
            found.append(_Message(shard, padded))
            size += padded.numel()
            if size >= MESSAGE:
                yield found
                found, size = [], 0
        if found:
            yield found

    def _exchange(self, messages: list[_Message], scales: dict[int, tuple[Tensor, Tensor]]) -> None:
        mine = torch.cat([message.bytes.flatten() for message in messages])
        world = messages[0].shard.world
        gathered = mine.new_empty(world * mine.numel())
        _all_gather(gathered, mine, group=messages[0].shard.group)
        all_bytes = gathered.view(world, -1)
        start = 0
        for shard, sent in messages:
            rows = all_bytes[:, start : start + sent.numel()].reshape(world * shard.chunk, -1)[: shard.rows]
            start += sent.numel()
            self._fresh[id(shard.layer)] = rows, scales[id(shard)][0]
