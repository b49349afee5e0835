"""Two processes: codes, losses and gradients are those of one process, under DDP and under FSDP2 with uneven shards."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from bitnet_train.nn.bit_linear import BitLinear
from bitnet_train.nn.code_cache import CodeCache
from bitnet_train.nn.config import DecoderConfig, NormalInit
from bitnet_train.nn.init import build_decoder
from bitnet_train.quant.spec import GradientPolicy, LayerQuant, QuantSpec

WORLD, STEPS = 2, 3
# 5 kv rows and 7 rows of 21 do not divide by two processes.
CONFIG = DecoderConfig(hidden=20, layers=2, heads=5, kv_heads=5, ffn=21, context=8, vocab=31)
SPEC = QuantSpec(LayerQuant(), gradient=GradientPolicy("int8", "bf16"))


def kept(layers: dict[str, BitLinear]) -> dict[str, Tensor]:
    """Codes and scale of every layer, one vector each."""
    return {name: torch.cat([m.codes.flatten().float(), m.scale]) for name, m in layers.items()}  # type: ignore[union-attr,list-item]


def train(kind: str, rank: int) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    """Losses of some steps on the same four sequences; every layer's codes and scale before and after."""
    torch.set_num_threads(1)
    model: nn.Module = build_decoder(CONFIG, SPEC, NormalInit(), seed=3)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, BitLinear)}
    if kind == "fsdp":
        for block in model.layers:  # type: ignore[union-attr]
            fully_shard(block)
        fully_shard(model)
        assert {p.to_local().shape[0] for p in model.parameters()} >= {10, 11} or rank == 1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # no step depends on a gradient's sign alone
    CodeCache(model, optimizer)
    before = kept(layers)
    wrapped = DistributedDataParallel(model) if kind == "ddp" else model
    ids = torch.arange(4 * 8).reshape(4, 8) * 7 % 31
    mine = ids if kind == "one" else ids[2 * rank : 2 * rank + 2]
    losses = []
    for _ in range(STEPS):
        logits = wrapped(mine[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), mine[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if kind != "one":
            loss = loss.detach()
            dist.all_reduce(loss)
            loss /= WORLD
        losses.append(loss.item())
    return losses, before, kept(layers)


def process(rank: int, kind: str, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=WORLD)
    torch.save(train(kind, rank), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_codes_and_losses_are_those_of_one_process(kind: str, tmp_path: Path) -> None:
    mp.spawn(process, args=(kind, tmp_path), nprocs=WORLD)
    losses, before, after = train("one", 0)
    assert losses[-1] < losses[0]
    assert any(not torch.equal(before[name], after[name]) for name in before)
    processes = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    for their_losses, their_before, their_after in processes:
        assert their_losses == pytest.approx(losses, rel=1e-3)
        for name in before:  # the same weights: the same codes and scale, bit for bit
            assert torch.equal(their_before[name], before[name])
            assert torch.equal(their_after[name], processes[0][2][name])
            assert (their_after[name] - after[name]).abs().gt(1e-4).float().mean() < 0.01  # gradients add up otherwise
