"""What there is for language models works for image classifiers too, or is refused."""

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bitnet_train.training.callbacks.checkpoint import point_last_to
from bitnet_train.training.losses.classification import class_loss
from bitnet_train.training.losses.config import CrossEntropyLoss, Reduction
from bitnet_train.training.vision.module import ClassificationModule
from tests.training.vision.image_runs import SHORT, Run, figures, rows

LINE = ("+recipe=digits_vit", *SHORT, "telemetry.every_steps=null", "trainer.max_steps=4", "model.layers=2")


def losses(run: Run, name: str, *more: str) -> list[str]:
    code, _, err = run(*LINE, *more, f"run_name={name}")
    assert (code, err) == (0, "")
    return [row["train/loss"] for row in rows(name)]


def layers(name: str) -> list[dict[str, str]]:
    with (Path("runs") / name / "layers.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_class_loss_in_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(6, 4, generator=generator), torch.tensor([0, 1, 2, 3, 0, 1])
    nll = -torch.log_softmax(logits.double(), 1)[range(6), labels]
    z = torch.logsumexp(logits.double(), 1).square()
    mean = class_loss(logits, labels, CrossEntropyLoss(z_loss=0.5))
    assert float(mean.cross_entropy) == pytest.approx(float(nll.mean()))
    assert mean.z is not None
    assert float(mean.z) == pytest.approx(0.5 * float(z.mean()))
    assert float(mean.total) == pytest.approx(float((nll + 0.5 * z).mean()))
    summed = class_loss(logits, labels, CrossEntropyLoss(z_loss=0.5, reduction=Reduction.sum))
    assert float(summed.total) == pytest.approx(float((nll + 0.5 * z).sum()))
    assert float(summed.cross_entropy) == pytest.approx(float(nll.mean()))
    plain = class_loss(logits, labels, CrossEntropyLoss())
    assert torch.equal(plain.total, F.cross_entropy(logits, labels))
    assert plain.z is None


def test_progressive_quantisation_goes_from_the_dense_twin_to_the_ternary_one(run: Run) -> None:
    dense, ternary = losses(run, "dense", "quant=none"), losses(run, "ternary")
    switch = losses(run, "switch", "quant/progressive=switch", "quant.progressive.at=2")
    assert switch[0] == dense[0] != ternary[0]
    assert float(switch[1]) == pytest.approx(float(dense[1]), rel=1e-5)
    assert abs(float(switch[2]) - float(dense[2])) > 1e-4
    slow = losses(run, "lambda", "quant/progressive=lambda", "quant.progressive.until=3")
    assert slow[0] == dense[0]
    assert slow[1] not in (dense[1], switch[1])
    # One of two blocks in the first steps: neither twin.
    for order in ("first_to_last", "last_to_first"):
        way = ("quant/progressive=layerwise", f"quant.progressive.order={order}", "quant.progressive.until=2")
        assert losses(run, order, *way)[0] not in (dense[0], ternary[0])
    assert rows("first_to_last")[0]["train/loss"] != rows("last_to_first")[0]["train/loss"]
    noise = losses(run, "noise", "quant/progressive=noise", "quant.progressive.until=3")
    stages = "quant.progressive.stages=[{bits:8,until:1},{bits:4,until:2}]"
    bits = losses(run, "bits", "quant/progressive=bits", stages)
    assert abs(float(bits[0]) - float(dense[0])) < abs(float(ternary[0]) - float(dense[0]))
    assert len({noise[0], bits[0], dense[0], ternary[0]}) == 4


def test_an_mlp_counts_the_layers_between_its_ends_as_blocks(run: Run) -> None:
    line = ("+recipe=digits_mlp", *SHORT, "telemetry.every_steps=null", "trainer.max_steps=3")
    way = ("quant/progressive=layerwise", "quant.progressive.until=2")
    first = {}
    for name, more in {"dense": ("quant=none",), "ternary": (), "one": way, "float": (
        'quant.overrides=[{pattern:"layers.1.*",scheme:float}]',)}.items():  # fmt: skip
        assert run(*line, *more, f"run_name={name}")[0] == 0
        first[name] = float(rows(name)[0]["train/loss"])
    # Block 0 of 0 and 1 is quantised, block 1 is not yet; the integers of one are blended floats of the other.
    assert first["one"] == pytest.approx(first["float"], rel=1e-5)
    assert len({first["dense"], first["ternary"], first["one"]}) == 3
    ends = ("model.layers=2", "model.quantise_ends=true", "model.norm=true")
    assert run(*line, *ends, *way, "run_name=ends")[0] == 0


def test_the_last_steps_inputs_may_have_fewer_bits(run: Run) -> None:
    late = 'quant.overrides=[{pattern:"*.up_proj",activation_bits:4,since:2}]'
    plain, fewer = losses(run, "plain"), losses(run, "late", late)
    assert fewer[:2] == plain[:2]
    assert fewer[2] != plain[2]
    code, out, err = run("command=evaluate", "run=runs/late")
    assert (code, err) == (0, "")
    assert "step 4" in out


def test_losses_gradients_and_weights_can_be_had_otherwise(run: Run) -> None:
    plain = losses(run, "plain")
    changed = {
        "z": ("loss.z_loss=0.1",), "sum": ("loss.reduction=sum", "clip=scheduled", "clip.start=5"),
        "codes": ("regulariser=codes", "regulariser.start=0"),
        "entropy": ("regulariser=entropy", "regulariser.floor=1.585", "regulariser.strength=100"),
        "muon": ("optimizer=muon",), "depth": ("optimizer.layer_lr_decay=0.5",),
        "groups": ('optimizer.groups=[{pattern:"patch_embed",lr:0}]', "checkpoint.every_steps=2"),
        "agc": ("clip=adaptive",), "zscore": ("clip=zscore", "clip.warmup=2", "clip.initial=0.1"),
        "scheduled": ("clip=scheduled", "clip.start=0.1"),
        "patterns": ('clip=by_pattern', 'clip.rules=[{pattern:"*",clip:{name:norm,max_norm:0.2}},'
                     '{pattern:"head.*",clip:{name:none}}]'),
    }  # fmt: skip
    found = {name: losses(run, name, *more) for name, more in changed.items()}
    for name, values in found.items():
        assert values[0] == plain[0], name
        assert values[2] != plain[2], name
    assert float(rows("z")[0]["loss/z"]) > 0
    total, mean = float(rows("sum")[0]["loss/total"]), float(plain[0])
    assert total == pytest.approx(4 * mean, rel=1e-5)  # four images a step
    norms = [float(rows(name)[0]["grad_norm"]) for name in ("sum", "plain")]
    assert norms[0] == pytest.approx(4 * norms[1], rel=1e-3)
    assert all(float(row["loss/regulariser"]) > 0 for row in rows("codes"))
    files = [Path("runs/groups/checkpoints") / f"step-{step:08d}.ckpt" for step in (2, 4)]
    early, late = (torch.load(file, weights_only=True)["state_dict"] for file in files)
    still = {name for name in early if torch.equal(early[name], late[name])}
    assert {name for name in still if name.startswith("classifier.")} == {"classifier.patch_embed.weight"}
    cut = losses(run, "cut", "loss.reduction=sum", "trainer.micro_batch=2")
    assert float(cut[0]) == pytest.approx(mean, rel=1e-5)
    assert float(rows("cut")[0]["grad_norm"]) == pytest.approx(norms[0], rel=1e-3)


def test_weights_start_as_init_says(run: Run) -> None:
    options = {
        "normal": (), "fan_in": ("init=fan_in",), "small": ("init=small",), "mitchell": ("init=mitchell",),
        "overridden": ('init.overrides=[{pattern:"layers.0.mlp.*",factor:2},{pattern:positions,std:0.5}]',),
    }  # fmt: skip
    first = {name: losses(run, name, *more, "trainer.max_steps=1")[0] for name, more in options.items()}
    assert len(set(first.values())) == len(first)


def test_scales_can_be_learned_continued_and_evaluated(run: Run) -> None:
    line = ("quant.weight.trainable_scale=true", "checkpoint.every_steps=2", "optimizer.lr=0.01")
    code, _, err = run(*LINE, *line, "run_name=learned")
    assert (code, err) == (0, "")
    assert rows("learned")[0]["train/loss"] == losses(run, "fixed")[0]
    state = torch.load("runs/learned/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    scales = [name for name in state if name.endswith("weight_scale")]
    assert len(scales) == 2 * 6
    assert run(*LINE, *line, "run_name=learned", "trainer.max_steps=5")[0] == 0
    code, _, err = run("command=evaluate", "run=runs/learned")
    assert (code, err) == (0, "")


def test_layers_are_watched(run: Run) -> None:
    code, _, err = run("+recipe=digits_vit", *SHORT, "trainer.max_steps=4", "telemetry.every_steps=2", "model.layers=2")
    assert (code, err) == (0, "")
    found = layers("digits_vit")
    assert [row["step"] for row in found] == ["2"] * 12 + ["4"] * 12
    assert {row["layer"] for row in found} >= {"layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"}
    for row in found:
        assert 0 < float(row["zeros"]) < 1
        assert 0 < float(row["input_absmax"]) < math.inf
        assert 0 <= float(row["input_saturated"]) < 1
        assert float(row["grad_norm"]) > 0


@pytest.mark.parametrize(
    "more",
    [
        ("quant/progressive=noise", "quant.progressive.until=6", "clip=zscore", "clip.warmup=2"),
        ("quant/progressive=lambda", "quant.progressive.until=6", "optimizer=muon", "telemetry.every_steps=2"),
        ("guard.outlier_sigma=6", "guard.window=8", "regulariser=codes", "clip=adaptive", "loss.z_loss=1e-3"),
    ],
)
def test_a_continued_run_is_the_same_bit_for_bit(run: Run, more: tuple[str, ...]) -> None:
    line = (*LINE, "trainer.max_steps=8", "checkpoint.every_steps=3", "checkpoint.keep=9", *more)
    assert run(*line, "run_name=whole")[0] == 0
    # As if the process had been killed in the fifth step.
    shutil.copytree("runs/whole", "runs/cut")
    saved = Path("runs/cut/checkpoints")
    for step in (6, 8):
        (saved / f"step-{step:08d}.ckpt").unlink()
    point_last_to(saved / "step-00000003.ckpt")
    code, out, _ = run(*line, "run_name=cut")
    assert code == 0
    assert "steps 3 to 8" in out
    assert figures("cut") == figures("whole")
    if "telemetry.every_steps=2" in more:
        assert layers("cut") == layers("whole")
    states = [torch.load(f"runs/{name}/checkpoints/last.ckpt", weights_only=True) for name in ("whole", "cut")]
    for name, tensor in states[0]["state_dict"].items():
        assert torch.equal(tensor.nan_to_num(), states[1]["state_dict"][name].nan_to_num()), name


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Steps (from 1, of four samples each of an undisturbed run) whose samples give no number."""
    bad: set[int] = set()
    original = ClassificationModule.batch_loss

    def batch_loss(module: ClassificationModule, batch: Any) -> Any:
        parts = original(module, batch)
        data = module.trainer.datamodule  # type: ignore[attr-defined]
        factor = math.nan if data.samples_before(module.global_step) // 4 + 1 in bad else 1.0
        return parts._replace(total=parts.total * factor, cross_entropy=parts.cross_entropy * factor)

    monkeypatch.setattr(ClassificationModule, "batch_loss", batch_loss)
    return bad


def test_steps_that_are_no_number_are_skipped(run: Run, poisoned: set[int]) -> None:
    poisoned.update({3})
    code, _, err = run(*LINE, "run_name=stopped")
    assert code == 3
    assert "Stopped at step 3" in err
    code, out, _ = run(*LINE, "run_name=skipped", "guard.skip_non_finite=true")
    assert code == 0
    assert "guard: skipped step 3" in out
    assert [row["skipped"] for row in rows("skipped")] == ["0", "0", "1", "1"]


def test_a_run_goes_back_and_on_behind_the_bad_images(run: Run, poisoned: set[int]) -> None:
    poisoned.update({6, 7})
    line = (*LINE, "trainer.max_steps=9", "checkpoint.every_steps=3", "checkpoint.keep=9")
    line = (*line, "guard.skip_non_finite=true", "guard.rollback_after=2")
    code, out, _ = run(*line, "run_name=back")
    assert code == 0
    assert "back from step 8 to step 3" in out
    lines = [json.loads(text) for text in Path("runs/back/divergence.jsonl").read_text().splitlines()]
    events = [line for line in lines if "event" not in line]
    assert [(e["step"], e["back_to"], e["consumed"], e["left_out"]) for e in events] == [(8, 3, 32, 20)]
    assert [row["step"] for row in rows("back")] == [str(step) for step in range(1, 10)]
    # Behind the 32 samples that were consumed, six steps from step 3 on.
    state = torch.load("runs/back/checkpoints/last.ckpt", weights_only=True)["ImageDataModule"]
    assert (state["step"], state["consumed"]) == (9, 32 + 6 * 4)
    assert run(*line, "run_name=never", "guard.max_rollbacks=0")[0] == 3


def test_a_classifier_on_its_way_to_codes_is_not_evaluated(run: Run) -> None:
    way = ("quant/progressive=lambda", "quant.progressive.until=3", "checkpoint.every_steps=2", "checkpoint.keep=9")
    assert run(*LINE, *way, "run_name=way")[0] == 0
    assert run("command=evaluate", "run=runs/way")[0] == 0
    point_last_to(Path("runs/way/checkpoints/step-00000002.ckpt"))
    for later in sorted(Path("runs/way/checkpoints").glob("step-*.ckpt"))[1:]:
        later.unlink()
    code, _, err = run("command=evaluate", "run=runs/way")
    assert code == 2
    assert "is of step 2, where the weights are still on their way to codes (quant.progressive=lambda)" in err


def test_the_estimate_knows_the_optimizer_and_the_images(run: Run) -> None:
    for optimizer in ("adamw", "muon"):
        code, out, err = run(
            "+recipe=digits_vit", f"optimizer={optimizer}", "command=estimate", f"run_name={optimizer}"
        )
        assert (code, err) == (0, "")
        assert "data: digits" in out
    found = {name: json.loads(Path(f"runs/{name}/estimate/estimate.json").read_text()) for name in ("adamw", "muon")}
    blocks = found["muon"]["parameters"]["linear"]["ternary"]
    adamw, muon = (found[name]["memory"]["optimizer_state"] for name in ("adamw", "muon"))
    assert adamw - muon == 4 * blocks
    assert all(point["tokens"] == 64 for point in found["adamw"]["curve"])


REFUSED = [
    (["loss=distillation", "loss.teacher=x"], "loss=distillation is for language models: use loss=cross_entropy"),
    (["trainer.batch_warmup=[{until:2,tokens:64}]"], "trainer.batch_warmup counts tokens of text"),
    (["init.sub_norms=ones"], "init.sub_norms=ones has no effect without init.from"),
    (
        ['init.overrides=[{pattern:"embed_tokens",std:1}]'],
        "names look like 'layers.0.self_attn.o_proj' and 'patch_embed'",
    ),
    (["model.norms=inside"], "model.norms=inside is for language models: use pre or pre_sub"),
    (["command=convert", "convert.from=x", "convert.to=y"], "command=convert works on language models"),
    (["quant=bitnet_a4_8"], "the pattern '*.gate_proj' matches no linear layer"),
    (['quant.overrides=[{pattern:"head",activation_bits:4,since:9}]'], "the pattern 'head' matches no linear layer"),
    (["quant.activation.granularity=group", "quant.activation.group_size=48"], "group_size=48 does not divide its 64"),
    (["quant=none", "quant/progressive=lambda"], "has nothing to quantise with quant=none"),
    (["quant/progressive=switch", "quant.progressive.at=900"], "must lie within the run of trainer.max_steps=800"),
    (["quant=none", "regulariser=codes"], "acts on quantised layers"),
    (['optimizer.groups=[{pattern:"embed_tokens",lr:2}]'], "names look like 'layers.0.self_attn.o_proj.weight'"),
    (["clip=by_pattern", 'clip.rules=[{pattern:"lm_head.*",clip:{name:none}}]'], "'lm_head.*' matches no parameter"),
    (["data.corpus=mixture"], "data.corpus"),
    (["loss.z_loss=-1"], "loss.z_loss is -1"),
]


@pytest.mark.parametrize(("arguments", "wanted"), REFUSED, ids=[" ".join(a) for a, _ in REFUSED])
def test_what_does_not_fit_is_refused_in_one_sentence(run: Run, arguments: list[str], wanted: str) -> None:
    code, out, err = run("+recipe=digits_vit", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert wanted in err


MLP_REFUSED = [
    (["optimizer=muon", "model.layers=2", "model.quantise_ends=true"], "optimizer=muon is for the matrices of blocks"),
    (["init=small"], "init=small scales the layers that write to a residual stream, and model=mlp has none"),
    (["quant=bitnet_v2"], "the pattern '*.o_proj' matches no linear layer; names look like 'layers.0.proj'"),
]


@pytest.mark.parametrize(("arguments", "wanted"), MLP_REFUSED, ids=[" ".join(a) for a, _ in MLP_REFUSED])
def test_what_an_mlp_lacks_is_refused(run: Run, arguments: list[str], wanted: str) -> None:
    code, out, err = run("+recipe=digits_mlp", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert wanted in err
