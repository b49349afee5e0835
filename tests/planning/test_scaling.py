"""The scaling plan: its formulas by hand-worked numbers, and what it says about batches too small for the GPUs."""

import json
from pathlib import Path

import pytest

from bitnet_train.errors import ConfigError
from bitnet_train.planning.config import EstimateConfig, GpuKind
from bitnet_train.planning.gpus import GPUS, assumed_rates
from bitnet_train.planning.memory import TrainingMemory
from bitnet_train.planning.parameters import ParameterCounts
from bitnet_train.planning.scaling import WAYS, Plan, memory_per_gpu, plan_scaling, ring_share, wire_bytes
from bitnet_train.quant.spec import build_spec
from tests.composing import compose_config
from tests.fuzz.harness import run

DDP, FSDP, CODES = WAYS
COUNTS = ParameterCounts(embedding=100, head=0, norms=20, linear={"ternary": 800, "float": 80})


def test_bytes_on_the_wire_by_hand() -> None:
    assert ring_share(1) == 0
    assert ring_share(4) == 0.75
    # 1000 parameters: 4000 bytes of gradients go around a ring of 4 twice, 3/4 each time.
    assert wire_bytes(DDP, COUNTS, 4, micro_batches=5) == 2 * 3 / 4 * 4000
    # Per micro-batch: 2000 bytes of weights twice, 4000 of gradients once; 3/4 of 8000, five times.
    assert wire_bytes(FSDP, COUNTS, 4, micro_batches=5) == 5 * 6000
    # Weights: 800 codes of 2 bits are 200 bytes, 200 floats of bf16 400; 3/4 of (2 * 600 + 4000), twice.
    assert wire_bytes(CODES, COUNTS, 4, micro_batches=2) == 2 * 3900
    assert wire_bytes(CODES, COUNTS, 1, micro_batches=9) == 0


def test_memory_by_hand() -> None:
    cfg = compose_config("+recipe=tiny", "model.hidden=8", "model.layers=2", "model.heads=2", "model.kv_heads=1",
                         "model.ffn=16", "quant.overrides=[{pattern:'layers.1.*o_proj',scheme:float}]")  # fmt: skip
    memory = TrainingMemory(4000, 4000, 8000, 900, 160, {"a": 30, "b": 7})
    spec = build_spec(cfg.quant)
    assert memory_per_gpu(DDP, memory, cfg.decoder, spec, COUNTS, 4) == {
        "master weights": 4000, "gradients": 4000, "optimizer state": 8000, "codes": 900,
        "buckets, copies": 4000 + 160, "activations": 37,
    }  # fmt: skip
    # q and o are 8 x 8, k and v 4 x 8, gate, up and down 8 x 16: 576 weights in a block.
    assert memory_per_gpu(FSDP, memory, cfg.decoder, spec, COUNTS, 4) == {
        "master weights": 1000, "gradients": 1000, "optimizer state": 2000, "codes": 225,
        "gathered": 2 * 576 * 2 + 2 * 100, "activations": 37,
    }  # fmt: skip
    # The second block is larger: its o_proj stays in bf16.
    assert memory_per_gpu(CODES, memory, cfg.decoder, spec, COUNTS, 4)["gathered"] == 2 * (576 + 64) + 2 * 100


def test_a_plan_by_hand() -> None:
    plan = Plan(8, DDP, 2, 1, 2, 1000, {"a": 1.0, "b": 2.0}, 80.0, computing=3.0, communicating=1.0)
    assert (plan.memory_total, plan.overlapped, plan.in_turn) == (3.0, 3.0, 4.0)
    assert plan.tokens_per_second(plan.in_turn) == 250


def test_rings_are_as_fast_as_their_slowest_link() -> None:
    cfg = compose_config("+recipe=2b4t", "data.corpus.path=x")
    settings = EstimateConfig(gpus=[1, 8, 16], gpu=GpuKind.a100, network_share=0.5)
    plans = {(plan.gpus, plan.way): plan for plan in plan_scaling(cfg, settings)}
    assert plans[1, DDP].communicating == plans[1, FSDP].communicating == 0
    eight, sixteen = plans[8, FSDP], plans[16, FSDP]
    assert eight.communicating == pytest.approx(eight.wire_bytes / 150e9)
    assert sixteen.communicating == pytest.approx(sixteen.wire_bytes / 12.5e9)
    # 512 sequences on 16 GPUs in micro-batches of 4.
    assert (sixteen.sequences, sixteen.micro_batches, sixteen.micro_batch) == (32, 8, 4)
    assert sixteen.step_tokens == cfg.trainer.batch_tokens
    # Half the sequences take half the time, but for the optimizer.
    assert sixteen.computing < 0.51 * eight.computing
    assert plans[8, DDP].computing > eight.computing


def test_more_gpus_than_sequences_take_one_each() -> None:
    cfg = compose_config("+recipe=2b4t", "data.corpus.path=x")
    plans = plan_scaling(cfg, EstimateConfig(gpus=[500, 1024]))
    assert {(plan.gpus, plan.sequences, plan.step_tokens) for plan in plans} == {
        (500, 2, 512 * 4096), (1024, 1, 1024 * 4096)
    }  # fmt: skip


def test_activation_checkpointing_takes_time_for_memory() -> None:
    plans = [
        plan_scaling(
            compose_config("+recipe=2b4t", "data.corpus.path=x", f"trainer.activation_checkpointing={what}"),
            EstimateConfig(gpus=[8]),
        )[0]
        for what in ("none", "selective", "full")
    ]
    memory, computing = ([getattr(plan, name) for plan in plans] for name in ("memory_total", "computing"))
    assert memory == sorted(memory, reverse=True)
    assert computing == sorted(computing)
    assert 1.2 < computing[2] / computing[0] < 4 / 3


def test_published_rates_are_scaled_by_what_is_assumed() -> None:
    rates = assumed_rates(GPUS[GpuKind.h100], EstimateConfig(matmul_share=0.5, memory_share=0.25))
    assert (rates.bf16, rates.bandwidth) == (494.7e12, 0.8375e12)


def test_the_tables_and_the_file(tmp_path: Path) -> None:
    ended = run(["+recipe=2b4t", "command=estimate", "estimate.gpus=[6,1024]", f"paths.runs={tmp_path}",
                 f"paths.data={tmp_path}"])  # fmt: skip
    assert ended.code == 0, ended.errors
    for said in ("87.2 (too much)", "fsdp, 2-bit codes", "On paper", "Assumed: 60%", "For 1,024 GPUs one sequence each",
                 "512 sequences do not divide evenly among 6 GPUs"):  # fmt: skip
        assert said in ended.said
    content = json.loads((tmp_path / "2b4t" / "estimate" / "estimate.json").read_text())
    assert [(plan["gpus"], plan["way"]) for plan in content["scaling"]] == [(n, way) for n in (6, 1024) for way in WAYS]
    assert all(plan["in_turn"] >= plan["overlapped"] > 0 for plan in content["scaling"])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["estimate.gpus=[]"], "must be numbers of GPUs"),
        (["estimate.gpus=[8,0]"], "must be numbers of GPUs"),
        (["estimate.gpus_per_node=0"], "must be from 1"),
        (["estimate.matmul_share=1.5"], "must be above 0"),
        (["estimate.network_share=nan"], "must be a finite number"),
    ],
)
def test_plans_that_cannot_be_reckoned_are_refused(wrong: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose_config("+recipe=tiny", *wrong)
    with pytest.raises(ConfigError, match="language models only"):
        compose_config("+recipe=digits_mlp", "estimate.gpus=[8]")
