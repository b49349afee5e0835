"""What two processes send each other in a training step with FSDP2, when quantised layers gather their codes (as
training does) and when they gather their master weights, in float32 or, as FSDP2's mixed precision does, in bfloat16,
and how long the step takes. On the CPU, over gloo.

    python benchmarks/gather_bytes.py [--hidden 512] [--layers 6] [--accumulation 4] [--steps 5]

Bytes are those that a process sends on a ring: (W - 1) / W of what an all-gather gives or a reduce-scatter takes, twice
that of an all-reduce. Codes and float32 weights must end with the same codes, or the run fails. Times are medians;
loopback is no network, so that they say what the packing costs rather than what the bytes saved are worth.
"""

import argparse
import functools
import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from bitnet_train.nn import sharded_codes
from bitnet_train.nn.config import DecoderConfig, NormalInit
from bitnet_train.nn.init import build_decoder
from bitnet_train.quant.config import QuantConfig
from bitnet_train.quant.spec import build_spec
from bitnet_train.training.distributed import sharding
from bitnet_train.training.distributed.sharding import finish_gradients, shard_network
from bitnet_train.training.losses.config import CrossEntropyLoss
from bitnet_train.training.losses.cross_entropy import CrossEntropy
from bitnet_train.training.optimizers.build import build_optimizer
from bitnet_train.training.optimizers.config import AdamWConfig
from bitnet_train.training.step import next_token_loss

WORLD = 2
CODES, FLOAT32, BFLOAT16 = VARIANTS = ("codes", "float32", "bfloat16")
# Which argument holds what is sent, and how often it is sent, of each collective.
COLLECTIVES = {
    "all_gather_into_tensor": (0, 1),
    "all_gather_single": (0, 1),
    "reduce_scatter_tensor": (1, 1),
    "reduce_scatter_single": (1, 1),
    "all_reduce": (0, 2),
}


def counted(sent: dict[str, int]) -> None:
    """Have every collective of this process add its bytes to ``sent``."""

    def wrap(name: str, collective: Callable[..., Any], argument: int, times: int) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            given = list(arguments) or list(named.values())
            kind = name.replace("_into_tensor", "").replace("_single", "").replace("_tensor", "")
            sent[kind] = sent.get(kind, 0) + times * given[argument].nbytes * (WORLD - 1) // WORLD
            return collective(*arguments, **named)

        return call

    for name, (argument, times) in COLLECTIVES.items():
        if hasattr(dist, name):
            setattr(dist, name, wrap(name, getattr(dist, name), argument, times))
    # These were looked up when the module was imported.
    for own, name in (("_all_gather", "all_gather_single"), ("_reduce_scatter", "reduce_scatter_single")):
        collective = getattr(sharded_codes, own)
        setattr(sharded_codes, own, wrap(name, collective, COLLECTIVES[name][0], 1))


def measure(rank: int, port: int, out: str, settings: argparse.Namespace) -> None:
    """One process: every variant, and what the first one found in ``out``."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    sent: dict[str, int] = {}
    counted(sent)
    mesh = init_device_mesh("cpu", (WORLD,))
    shape = DecoderConfig(
        vocab=settings.vocab, hidden=settings.hidden, layers=settings.layers, heads=8, kv_heads=8,
        ffn=3 * settings.hidden, context=settings.tokens,
    )  # fmt: skip
    results: dict[str, Any] = {}
    codes: dict[str, torch.Tensor] = {}
    for name in VARIANTS:
        if name == BFLOAT16:
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            sharding.fully_shard = functools.partial(fully_shard, mp_policy=policy)
        network = build_decoder(shape, build_spec(QuantConfig()), NormalInit(), 1)
        shard_network(network, mesh, codes=name == CODES)
        optimizer = build_optimizer(AdamWConfig(lr=1e-3), network)
        sharded_codes.ShardedCodeCache(network, optimizer)
        loss = CrossEntropy(CrossEntropyLoss())
        generator = torch.Generator().manual_seed(rank)
        times, per_step = [], []
        for step in range(settings.steps + 1):
            sent.clear()
            dist.barrier()
            start = time.perf_counter()
            optimizer.zero_grad()
            for _ in range(settings.accumulation):
                ids = torch.randint(0, settings.vocab, (1, settings.tokens + 1), generator=generator)
                (next_token_loss(network, loss, ids, None).total / settings.accumulation).backward()
                finish_gradients(network)
            optimizer.step()
            if step:  # the first one allocates
                times.append(time.perf_counter() - start)
                per_step.append(dict(sent))
        found = torch.cat([m.codes.flatten() for m in network.modules() if hasattr(m, "stand_in")])
        codes[name] = found
        results[name] = {"seconds": statistics.median(times), "bytes": per_step[-1]}
    same = float((codes[CODES] == codes[FLOAT32]).float().mean())
    if rank == 0:
        quantised = codes[CODES].numel()
        Path(out).write_text(json.dumps({"quantised": quantised, "same_codes": same, **results}))
    dist.destroy_process_group()


def main() -> None:
    """Measure and print a table; the last line is the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("hidden", 512), ("layers", 6), ("vocab", 4096), ("tokens", 128), ("accumulation", 4),
                          ("steps", 5)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    settings = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        mp.spawn(measure, (port, out.name, settings), nprocs=WORLD)
        found = json.loads(Path(out.name).read_text())
    if found["same_codes"] < 0.9999:
        raise SystemExit(f"the variants do not compute the same: only {found['same_codes']:.2%} of the codes agree")
    print(f"{found['quantised']:,} quantised weights, {settings.accumulation} micro-batches a step, {WORLD} processes")
    kinds = sorted({kind for name in VARIANTS for kind in found[name]["bytes"]})
    print(f"{'gathered':10}" + "".join(f"{kind:>18}" for kind in kinds) + f"{'all':>18}{'ms per step':>14}")
    for name in (FLOAT32, BFLOAT16, CODES):
        sent = [found[name]["bytes"].get(kind, 0) for kind in kinds]
        cells = "".join(f"{n / 1e6:>15.2f} MB" for n in [*sent, sum(sent)])
        print(f"{name:10}{cells}{found[name]['seconds'] * 1e3:>14.0f}")
    print(json.dumps({"settings": vars(settings), **found}))


if __name__ == "__main__":
    main()
