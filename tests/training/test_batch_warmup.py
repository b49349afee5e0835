"""Batches that grow at the beginning: counts against a loop, the order of samples, whole runs, what is refused."""

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet_train.__main__ import answer
from bitnet_train.data.sampler import ConsumedBatchSampler, sample_index
from bitnet_train.errors import ConfigError
from bitnet_train.planning.estimate import estimate
from bitnet_train.training import micro_batch
from bitnet_train.training.batch_warmup import BatchPlan, BatchStage, BatchStageConfig, batch_stages, even_cuts
from bitnet_train.training.config import TrainerConfig, batch_plan, micro_batches
from bitnet_train.training.out_of_memory import training_advice
from tests.composing import compose_config
from tests.training.conftest import SETTINGS, Workspace

PLAN = BatchPlan(16, 8, 2, (BatchStage(3, 2), BatchStage(7, 6)))
# Of the workspace's 8 sequences a step: 2 for two steps, 4 until step 5.
WARMUP = "trainer.batch_warmup=[{until:2,tokens:64},{until:5,tokens:128}]"


def test_counts_are_the_sums_over_the_steps() -> None:
    sizes = [PLAN.sequences_at(step) for step in range(20)]
    assert sizes == [2] * 3 + [6] * 4 + [16] * 13
    assert [PLAN.consumed(steps) for steps in range(21)] == [0, *itertools.accumulate(sizes)]
    assert BatchPlan(16, 8, 2).consumed(5) == 80


@pytest.mark.parametrize("first", [0, 1, 3, 5, 7, 12])
def test_the_sampler_gives_every_step_its_micro_batches(first: int) -> None:
    sampler = ConsumedBatchSampler(50, 8, 3, PLAN.consumed(first), early=PLAN.early_batches(first))
    batches = list(itertools.islice(sampler, 2 * (20 - first)))
    for step, pair in zip(range(first, 20), zip(batches[::2], batches[1::2], strict=True), strict=True):
        assert [len(batch) for batch in pair] == [PLAN.sequences_at(step) // 2] * 2
    # Nothing is left out or taken twice, wherever the run was interrupted.
    numbers = range(PLAN.consumed(first), PLAN.consumed(20))
    assert [i for batch in batches for i in batch] == [sample_index(n, 50, 3) for n in numbers]


def test_ranks_share_growing_batches() -> None:
    def take(count: int, **ranks: int) -> list[list[int]]:
        return list(itertools.islice(ConsumedBatchSampler(50, 8, 3, 5, early=[(3, 2), (2, 4)], **ranks), count))

    together = zip(take(4, rank=0, world=2), take(4, rank=1, world=2), strict=True)
    assert [batch for pair in together for batch in pair] == take(8)


@pytest.mark.parametrize(("first", "second", "full"), [(2, 4, 8), (6, 12, 24), (5, 10, 20), (3, 4, 8)])
def test_cuts_are_those_that_divide_every_stage(first: int, second: int, full: int) -> None:
    stages = (BatchStage(1, first), BatchStage(2, second))
    cuts = [m for m in range(1, full + 1) if full % m == 0 and all(s.sequences % (full // m) == 0 for s in stages)]
    assert even_cuts(full, stages) == cuts
    trainer = TrainerConfig(batch_tokens=full * 16, max_steps=9)
    trainer.batch_warmup = [BatchStageConfig(1, first * 16), BatchStageConfig(2, second * 16)]
    assert micro_batches(trainer, 16) == cuts
    for micro in (m for m in range(1, full + 1) if full % m == 0):
        trainer.micro_batch = micro
        if micro in cuts:
            assert batch_plan(trainer, 16) == BatchPlan(full, micro, full // micro, stages)
        else:
            with pytest.raises(ConfigError, match=r"cannot share evenly.*trainer.micro_batch of " + str(cuts[0])):
                batch_plan(trainer, 16)


def test_shares_follow_the_length_of_the_run() -> None:
    stages = [BatchStageConfig(0.1, 32), BatchStageConfig(0.25, 64)]
    assert batch_stages(stages, 200, 128, 16) == (BatchStage(20, 2), BatchStage(50, 4))
    assert batch_stages(stages, 0, 128, 16) == ()


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([(5, 24)], "no multiple of data.sequence_length=16: use 32"),
        ([(5, 0)], "no multiple"),
        ([(5, 128)], "less than trainer.batch_tokens=128"),
        ([(5, 64), (8, 32)], "more than in the stage before"),
        ([(5, 32), (5, 64)], "after step 5"),
        ([(100, 32)], "before the end of the run"),
        ([(0.001, 32)], "is step 0"),
        ([(float("nan"), 32)], "after step 0"),
        ([(n + 1, 16 * n) for n in range(1, 8 + 1)], "7 at most"),
    ],
)  # fmt: skip
def test_stages_that_do_not_fit_are_refused(stages: list[tuple[float, int]], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        batch_stages([BatchStageConfig(*stage) for stage in stages], 100, 128, 16)


def test_the_command_line_is_answered_at_composition() -> None:
    stages = "trainer.batch_warmup=[{until: 0.1, tokens: 1024}, {until: 0.2, tokens: 2048}]"
    cfg = compose_config("+recipe=tiny", stages, "trainer.micro_batch=4")
    assert cfg.trainer.batch_warmup == [BatchStageConfig(0.1, 1024), BatchStageConfig(0.2, 2048)]
    with pytest.raises(ConfigError, match="4 sequences, which the 8 micro-batches"):
        compose_config("+recipe=tiny", stages, "trainer.micro_batch=2")
    with pytest.raises(ConfigError, match=r"batch_warmup\[0\].until"):
        compose_config("+recipe=tiny", "trainer.batch_warmup=[{until: 900, tokens: 1024}]", "trainer.micro_batch=auto")


def test_the_estimate_counts_the_smaller_batches() -> None:
    stages = "trainer.batch_warmup=[{until: 100, tokens: 1024}, {until: 0.25, tokens: 2048}]"
    cfg = compose_config("+recipe=tiny", "trainer.max_steps=800", stages, "trainer.micro_batch=auto")
    figures = estimate(cfg, cfg.export.dtype)
    assert figures.tokens == 100 * 1024 + 100 * 2048 + 600 * 4096
    assert figures.batch.micro_batch in (4, 8, 16)
    assert {p.what: (p.step, p.tokens) for p in figures.curve}["batch of 2,048 tokens"] == (100, 2048)
    assert [p.tokens for p in figures.curve] == sorted(p.tokens for p in figures.curve)
    json.dumps(figures.as_dict())


def test_out_of_memory_advises_what_the_warm_up_allows() -> None:
    plan = BatchPlan(24, 12, 2, (BatchStage(5, 8),))
    text = training_advice(plan, 512, 9, None, True)
    assert "12 x 512" in text
    assert "trainer.micro_batch=6 " in text
    assert "4 x 512" in training_advice(plan, 512, 5, None, True)
    assert "lets no smaller" in training_advice(BatchPlan(8, 4, 2, (BatchStage(5, 2),)), 512, 9, None, True)


def run(workspace: Workspace, name: str, *settings: str) -> list[dict[str, str]]:
    corpus = f"data.corpus.path={workspace.folder}/corpus"
    try:
        assert answer([*SETTINGS, corpus, f"run_name={name}", "checkpoint.keep=9", *settings]) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    with Path(f"runs/{name}/metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def results(rows: list[dict[str, str]]) -> list[tuple[str, ...]]:
    return [tuple(row[key] for key in ("step", "tokens", "train/loss", "val/loss", "lr", "grad_norm")) for row in rows]


@pytest.mark.usefixtures("one_thread")
def test_a_run_grows_its_batch_and_goes_on_from_any_step(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workspace.folder)
    settings = [WARMUP, "trainer.max_steps=8", "trainer.micro_batch=4", "checkpoint.every_steps=1"]
    whole = run(workspace, "whole", *settings)
    plan = BatchPlan(8, 4, 2, (BatchStage(2, 2), BatchStage(5, 4)))
    assert [int(row["tokens"]) for row in whole] == [32 * plan.consumed(step) for step in range(1, 9)]
    assert "after a warm-up of 64 tokens until step 2, 128 until step 5" in " ".join(capsys.readouterr().out.split())
    for step in (1, 5):
        saved = torch.load(f"runs/whole/checkpoints/step-{step:08d}.ckpt", weights_only=True)
        assert saved["ShardDataModule"]["consumed"] == plan.consumed(step)
        again = run(workspace, f"from-{step}", *settings, f"resume.from=runs/whole@{step}")
        assert results(again) == results(whole)[step:]
    # The same samples in smaller steps: the full batch alone begins otherwise.
    plain = run(workspace, "plain", "trainer.max_steps=8", "trainer.micro_batch=4")
    assert plain[0]["tokens"] == "256"
    assert plain[0]["train/loss"] != whole[0]["train/loss"]


@pytest.mark.usefixtures("one_thread")
def test_another_micro_batch_and_auto_change_nothing_but_rounding(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace.folder)
    tried: list[list[int]] = []

    def climb(sizes: list[int], *_: Any) -> dict[int, int]:
        tried.append(sizes)
        return {4: 1}

    monkeypatch.setattr(micro_batch, "climb", climb)
    whole = run(workspace, "whole", WARMUP, "trainer.max_steps=6", "trainer.micro_batch=8")
    auto = run(workspace, "auto", WARMUP, "trainer.max_steps=6", "trainer.micro_batch=auto")
    assert tried == [[4, 8]]
    assert [row["tokens"] for row in auto] == [row["tokens"] for row in whole]
    for a, b in zip(whole, auto, strict=True):
        assert float(a["train/loss"]) == pytest.approx(float(b["train/loss"]), rel=0.02)
