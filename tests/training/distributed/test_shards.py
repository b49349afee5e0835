"""Shards of uneven size compute what one process computes: codes, scales, gradients, clipping, penalties, steps."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from bitnet_train.nn.code_cache import CodeCache
from bitnet_train.nn.config import DecoderConfig, NormalInit
from bitnet_train.nn.decoder import Decoder
from bitnet_train.nn.init import build_decoder
from bitnet_train.nn.sharded_codes import ShardedCodeCache, whole
from bitnet_train.quant.config import OverrideConfig, QuantConfig, Statistic, WeightScheme
from bitnet_train.quant.spec import build_spec
from bitnet_train.quant.weights import quantise_weight, row_statistics, rows_to_codes, scales_from_statistics
from bitnet_train.training.clipping.config import AdaptiveClip, ByPatternClip, ClipConfig, NormClip, PatternRule
from bitnet_train.training.clipping.rules import build_clip
from bitnet_train.training.distributed.sharding import finish_gradients, shard_network
from bitnet_train.training.guard.config import GuardConfig
from bitnet_train.training.guard.rule import build_guard
from bitnet_train.training.losses.config import CrossEntropyLoss
from bitnet_train.training.losses.cross_entropy import CrossEntropy
from bitnet_train.training.optimizers.build import build_optimizer
from bitnet_train.training.optimizers.config import AdamWConfig
from bitnet_train.training.regularisers.config import CodesRegulariser
from bitnet_train.training.regularisers.penalties import build_regulariser
from bitnet_train.training.step import clip_gradients, next_token_loss
from tests.training.distributed.several import in_processes

# Rows of 20, 10 and 35: shards of two and of three processes are of uneven size.
SHAPE = DecoderConfig(vocab=61, hidden=20, layers=2, heads=2, kv_heads=1, ffn=35, context=16)
STEPS = 4


def quant(name: str) -> QuantConfig:
    cfg = QuantConfig()
    if name == "groups":
        cfg.weight.groups = 5
        cfg.overrides = [OverrideConfig("*.mlp.*", scheme=WeightScheme.binary, groups=1)]
    elif name == "mixed":
        cfg.overrides = [
            OverrideConfig("layers.0.self_attn.q_proj", trainable_scale=True),
            OverrideConfig("layers.0.mlp.gate_proj", statistic=Statistic.absmedian),
            OverrideConfig("layers.1.mlp.*", scheme=WeightScheme.float),
            OverrideConfig("layers.1.self_attn.o_proj", scheme=WeightScheme.symmetric, bits=4),
            OverrideConfig(
                "layers.1.self_attn.k_proj", scheme=WeightScheme.symmetric, bits=8, statistic=Statistic.absmean
            ),
        ]
    return cfg


CLIPS: dict[str, ClipConfig] = {
    "norm": NormClip(max_norm=0.1),
    "adaptive": AdaptiveClip(factor=1e-3),
    "by_pattern": ByPatternClip(
        rules=[
            PatternRule("*", {"name": "percentile", "percentile": 50, "min_history": 2, "initial": 0.1}),
            PatternRule("*.mlp.*", {"name": "zscore", "warmup": 2}),
        ]
    ),
}


def train(network: Decoder, batches: list[list[Tensor]], clip: str) -> dict[str, Any]:
    """What every step of ``batches`` (micro-batches of this process) gave, and the weights and codes after."""
    optimizer = build_optimizer(AdamWConfig(lr=0.01, weight_decay=0.1), network)
    sharded = hasattr(network, "master_shards")
    cache = (ShardedCodeCache if sharded else CodeCache)(network, optimizer)
    rule, loss = build_clip(CLIPS[clip], STEPS), CrossEntropy(CrossEntropyLoss())
    guard = build_guard(GuardConfig(outlier_sigma=1e6, skip_non_finite=True))
    regulariser = build_regulariser(CodesRegulariser(strength=0.1, start=0), network, network.spec, STEPS)
    assert regulariser is not None
    rows: dict[str, Any] = {"norms": [], "thresholds": [], "clipped": [], "flips": [], "penalty": []}
    for step, micro_batches in enumerate(batches):
        optimizer.zero_grad()
        total = torch.zeros(())
        for ids in micro_batches:
            value = next_token_loss(network, loss, ids, None).total / len(micro_batches)
            value.backward()
            total = total + value.detach()
        finish_gradients(network)
        penalty = regulariser.add_gradients(step)
        assert penalty is not None
        # The guard judges the same number in all processes; here it has nothing to skip but in the last step.
        judged = torch.tensor(torch.nan) if step == STEPS - 1 else torch.ones(())
        result = clip_gradients(network, rule, guard, optimizer, judged, step)
        cache.measure_next()
        optimizer.step()
        assert cache.statistics is not None
        rows["norms"].append(float(result.norm))
        rows["thresholds"].append(float(result.threshold))
        rows["clipped"].append(float(result.clipped))
        rows["flips"].append(cache.statistics.flips.tolist())
        rows["penalty"].append(float(penalty))
    rows["weights"] = {name: whole(p.detach()).clone() for name, p in network.named_parameters()}
    rows["codes"] = codes_of(network)
    return rows


def codes_of(network: Decoder) -> dict[str, tuple[Tensor, Tensor]]:
    found = {}
    for name, module in network.named_modules():
        if getattr(module, "kept", None) is not None and hasattr(module, "scale"):
            found[name] = module.codes.clone(), module.scale.clone()
    return found


def decoder(name: str) -> Decoder:
    return build_decoder(SHAPE, build_spec(quant(name)), NormalInit(std=0.2), 3)


def micro_batches(world: int) -> list[list[Tensor]]:
    """Two micro-batches per process and step, in the order in which one process would take them."""
    generator = torch.Generator().manual_seed(5)
    return [
        [torch.randint(0, SHAPE.vocab, (2, 17), generator=generator) for _ in range(2 * world)] for _ in range(STEPS)
    ]


def train_shards(rank: int, world: int, name: str, clip: str) -> dict[str, Any]:
    network = decoder(name)
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("data_parallel",))
    shard_network(network, mesh)
    before = ShardedCodeCache(network)
    first = codes_of(network)
    before.release()
    return {"first": first, **train(network, [step[rank::world] for step in micro_batches(world)], clip)}


@pytest.mark.parametrize(
    ("world", "name", "clip"), [(2, "ternary", "norm"), (3, "groups", "adaptive"), (2, "mixed", "by_pattern")]
)
def test_shards_train_as_one_process_does(tmp_path: Path, world: int, name: str, clip: str) -> None:
    network = decoder(name)
    cache = CodeCache(network)
    first = codes_of(network)
    cache.release()
    alone = train(network, micro_batches(world), clip)
    for found in in_processes(world, tmp_path, train_shards, world, name, clip):
        # From the same masters the same codes and scales, bit for bit.
        assert first.keys() == found["first"].keys()
        for layer, (codes, scale) in first.items():
            assert torch.equal(codes, found["first"][layer][0]), layer
            assert torch.equal(scale, found["first"][layer][1]), layer
        for key in ("norms", "thresholds", "clipped", "penalty"):
            assert found[key] == pytest.approx(alone[key], rel=1e-4), key
        for layer, weight in alone["weights"].items():
            torch.testing.assert_close(found["weights"][layer], weight, rtol=1e-3, atol=1e-4)
        # A code may flip where a weight lies within rounding of the border.
        for mine, theirs in zip(found["flips"], alone["flips"], strict=True):
            assert sum(map(abs, torch.tensor(mine).sub(torch.tensor(theirs)).tolist())) <= 4
        assert found["flips"][0] != [0] * len(found["flips"][0])
        assert found["flips"][-1] == [0] * len(found["flips"][-1])  # the guard has skipped the step


@pytest.mark.parametrize("scheme", ["ternary", "binary", "symmetric"])
@pytest.mark.parametrize("groups", [1, 3, 12])
@pytest.mark.parametrize("cuts", [(0, 12), (0, 5, 12), (0, 1, 1, 12), (0, 4, 8, 12, 12)])
def test_rows_give_the_codes_of_the_whole(scheme: str, groups: int, cuts: tuple[int, ...]) -> None:
    cfg = QuantConfig()
    cfg.weight.scheme = WeightScheme(scheme)
    cfg.weight.statistic = Statistic.absmean
    cfg.weight.bits = 4 if scheme == "symmetric" else None
    cfg.weight.groups = groups
    layer = build_spec(cfg).for_layer("layers.0.self_attn.q_proj")
    weight = torch.randn(12, 7, generator=torch.Generator().manual_seed(groups))
    wanted = quantise_weight(weight, layer)
    spans = list(pairwise(cuts))
    sums = torch.stack([row_statistics(weight[a:b], layer, a, 12) for a, b in spans]).sum(0)
    scale, mean = scales_from_statistics(sums, 12 // groups * 7, layer)
    assert torch.equal(scale, wanted.scale)
    codes = torch.cat([rows_to_codes(weight[a:b], layer, scale, mean, a, 12) for a, b in spans])
    assert torch.equal(codes, wanted.codes)


def test_a_weight_that_is_not_finite_shows_in_the_scale_of_its_group_alone() -> None:
    cfg = QuantConfig()
    cfg.weight.groups = 2
    layer = build_spec(cfg).for_layer("layers.0.self_attn.q_proj")
    weight = torch.ones(4, 3)
    weight[3, 1] = torch.nan
    sums = row_statistics(weight[:3], layer, 0, 4) + row_statistics(weight[3:], layer, 3, 4)
    scale, _ = scales_from_statistics(sums, 6, layer)
    assert scale[0] == 1
    assert torch.isnan(scale[1])
