"""Every kind of option trains: a few steps through the command line, in one process."""

import csv
import math
from pathlib import Path

import pytest
import torch

from bitnet_train.__main__ import answer
from tests.training.conftest import SETTINGS, Workspace

VARIANTS = [
    "quant=none",
    "quant=binary",
    "quant.weight.groups=4",
    "quant.weight.groups=row quant=binary",
    "quant.activation.bits=null",
    "quant.weight.threshold=0.7",
    'quant.overrides=[{pattern:"layers.0.*",scheme:float},{pattern:"*.down_proj",scheme:binary,groups:row}]',
    "model.norms=pre model.activation=silu init.sub_norm_gain=1",
    "model.tie_embeddings=false model.kv_heads=1",
    "model.residual_dtype=bfloat16",
    "model.residual_dtype=bfloat16 trainer.precision=32-true",
    "trainer.precision=bf16-mixed",
    "data.attend_within_documents=true",
    "data.workers=1 trainer.micro_batch=2",
    "schedule=cosine weight_decay_schedule=linear",
    "schedule=wsd schedule.shape=one_minus_sqrt",
    "schedule=inverse_sqrt schedule.timescale=3 schedule.warmup=1 schedule.decay=2 weight_decay_schedule=polynomial",
    "schedule=exponential schedule.warmup=2 schedule.warmup_start=0.2 schedule.warmup_shape=cosine",
    "optimizer=muon",
    "optimizer=muon optimizer.adjust_lr_fn=original optimizer.lr=0.02 optimizer.adamw_lr=0.2 trainer.micro_batch=4",
    "optimizer.groups=[{pattern:embed_tokens,lr:2.0,weight_decay:0.0}] optimizer.layer_lr_decay=0.9",
    "trainer.batch_warmup=[{until:2,tokens:64},{until:0.7,tokens:128}] trainer.micro_batch=4",
    "schedule=two_stage schedule.stages=[{share:0.5,final:0.5},{share:0.5,lr:0.3,weight_decay:0.0}]",
    "clip=percentile clip.min_history=2",
    "clip=none",
    "clip=scheduled clip.steps=4",
    "clip=zscore clip.warmup=2",
    "clip=adaptive",
    'clip=by_pattern clip.rules=[{pattern:"*",clip:{name:norm}},{pattern:"*proj*",clip:{name:zscore,warmup:2}}]',
    "init=normal init.sub_norm_gain=1.0",
    "kernels.backend=reference",
    "loss.z_loss=1e-3 loss.reduction=sum trainer.micro_batch=4",
    "regulariser=codes regulariser.distance=absolute regulariser.start=1",
    "regulariser=entropy regulariser.floor=1.585 quant.weight.groups=4",
]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_trains(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    monkeypatch.chdir(workspace.folder)
    steps = 6
    corpus = f"data.corpus.path={workspace.folder}/corpus"
    extra = ["run_name=v", f"trainer.max_steps={steps}", "samples.every_steps=6"]
    settings = [s for s in SETTINGS if not s.startswith("samples.every")]
    line = [*settings, corpus, *extra, *variant.split(" ")]
    try:
        assert answer(line) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    with Path("runs/v/metrics.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    losses = [float(row["train/loss"]) for row in rows]
    assert [row["step"] for row in rows] == [str(i + 1) for i in range(steps)]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    assert float(rows[-1]["val/bits_per_byte"]) > 0
    assert ("codes/zeros" in rows[0] and rows[0]["codes/zeros"] != "") == (variant != "quant=none")


def test_checkpoints_by_time_and_only_the_newest_are_kept(workspace: Workspace) -> None:
    settings = ("checkpoint.every_steps=null", "checkpoint.every_minutes=1e-6", "checkpoint.keep=3")
    code, output = workspace.run("run_name=a", "trainer.max_steps=7", *settings)
    assert code == 0, output
    folder = workspace.folder / "runs/a/checkpoints"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["last.ckpt", *(f"step-{step:08d}.ckpt" for step in (5, 6, 7))]
    assert (folder / "last.ckpt").samefile(folder / "step-00000007.ckpt")
    content = torch.load(folder / "last.ckpt", weights_only=True)
    assert content["global_step"] == 7
    assert content["ShardDataModule"]["consumed"] == 7 * 8
