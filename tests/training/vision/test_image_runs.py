"""Runs of image classifiers through the command line, on local copies in the hub's format."""

import json
import os
import signal
from pathlib import Path

import datasets
import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from bitnet_train.training.callbacks.checkpoint import Checkpoints
from tests.training.vision.image_runs import SHORT, Run, figures, rows

QUANTS = ("none", "ternary", "binary")
# (size, channels, classes, column of images, column of classes), as on the hub.
SETS = {
    "mnist_mlp": (28, 1, 10, "image", "label"),
    "fashion_mnist_vit": (28, 1, 10, "image", "label"),
    "cifar100_vit": (32, 3, 100, "img", "fine_label"),
}


@pytest.fixture(scope="session")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per recipe with tiny data sets of random images, as parquet files."""
    datasets.disable_progress_bars()
    root, random = tmp_path_factory.mktemp("copies"), np.random.default_rng(0)
    for recipe, (size, channels, classes, image, label) in SETS.items():
        shape = (size, size) if channels == 1 else (size, size, channels)
        features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(num_classes=classes)})
        for split, count in (("train", 48), ("test", 10)):
            pictures = [Image.fromarray(random.integers(0, 256, shape, np.uint8)) for _ in range(count)]
            rows = {image: pictures, label: [i % 3 for i in range(count)]}
            (root / recipe).mkdir(exist_ok=True)
            table = datasets.Dataset.from_dict(rows, features=features)
            table.to_parquet(root / recipe / f"{split}-00000-of-00001.parquet")
    return root


@pytest.mark.parametrize("recipe", SETS)
@pytest.mark.parametrize("quant", QUANTS)
def test_the_recipes_of_the_hub_train_on_a_local_copy(run: Run, copies: Path, recipe: str, quant: str) -> None:
    line = (f"+recipe={recipe}", f"quant={quant}", f"data.source.path={copies / recipe}", *SHORT)
    code, out, err = run(*line)
    assert (code, err) == (0, "")
    inner = {"mnist_mlp": 2, "fashion_mnist_vit": 36, "cifar100_vit": 48}[recipe]
    assert f"{inner} linear layers ({inner} {'float' if quant == 'none' else quant})" in out
    assert "48" not in out.split("training")[0]  # a twelfth or a tenth is held out
    found = rows(recipe)
    assert [row["step"] for row in found] == ["1", "2"]
    assert [row["images"] for row in found] == ["4", "8"]
    assert found[0]["tokens"] == found[1]["val/bits_per_byte"] == ""
    classes = SETS[recipe][2]
    assert abs(float(found[0]["train/loss"]) - np.log(classes)) < 2
    assert 0 <= float(found[1]["val/accuracy"]) <= 1
    assert not (Path("runs") / recipe / "samples.md").exists()


def test_losses_differ_by_quantisation_only_where_something_is_quantised(run: Run) -> None:
    first = {}
    for name, more in {
        "ternary": (), "binary": ("quant=binary",), "none": ("quant=none",), "ends": ("model.quantise_ends=true",),
        "augmented": ("data.augmentation.crop_padding=1",), "mirrored": ("data.augmentation.flip=true",),
        "bare": ("model.norm=false",), "gelu": ("model.activation=gelu",), "scaled": ("data.mean=[0.0]",),
        "part": ('quant.overrides=[{pattern:"layers.0.*",scheme:float}]',),
    }.items():  # fmt: skip
        code, _, err = run("+recipe=digits_mlp", *SHORT, *more, "trainer.max_steps=1", f"run_name={name}")
        assert (code, err) == (0, "")
        first[name] = rows(name)[0]["train/loss"]
    assert len(set(first.values())) == len(first)


@pytest.mark.parametrize("recipe", ["digits_mlp", "digits_vit"])
def test_a_continued_run_is_the_same_bit_for_bit(run: Run, recipe: str) -> None:
    line = (
        f"+recipe={recipe}", *SHORT, "trainer.validate_every=3", "checkpoint.every_steps=3", "data.workers=0",
        "data.augmentation.crop_padding=1", "clip=percentile", "clip.min_history=2", "schedule=wsd",
    )  # fmt: skip
    assert run(*line, "trainer.max_steps=8", "run_name=whole")[0] == 0
    # Stopped by a signal behind the fourth step, and continued.
    save, steps = Checkpoints.on_step_end, []

    def interrupted(self: Checkpoints, trainer: L.Trainer, module: L.LightningModule, step: int) -> None:
        save(self, trainer, module, step)
        steps.append(step)
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "on_step_end", interrupted)
        code, out, _ = run(*line, "trainer.max_steps=8", "run_name=cut")
    assert code == 130
    assert steps[-1] in (4, 5)
    assert "the same command continues the run" in out
    assert len(rows("cut")) < 8
    code, out, _ = run(*line, "trainer.max_steps=8", "run_name=cut", "trainer.micro_batch=4")
    assert code == 0
    assert f"steps {steps[-1]} to 8" in out
    assert figures("cut") == figures("whole")
    states = [torch.load(f"runs/{name}/checkpoints/last.ckpt", weights_only=True) for name in ("whole", "cut")]
    assert states[0]["ImageDataModule"] == states[1]["ImageDataModule"]
    for name, tensor in states[0]["state_dict"].items():
        assert torch.equal(tensor.nan_to_num(), states[1]["state_dict"][name].nan_to_num()), name
    assert run(*line, "trainer.max_steps=8", "run_name=cut")[1].count("already at step 8") == 1


def test_micro_batches_and_loader_processes_change_nothing_but_rounding(run: Run) -> None:
    line = ("+recipe=digits_vit", *SHORT, "data.augmentation.flip=true", "trainer.max_steps=3")
    assert run(*line, "run_name=whole")[0] == 0
    assert run(*line, "run_name=cut", "trainer.micro_batch=2", "data.workers=1")[0] == 0
    for a, b in zip(rows("whole"), rows("cut"), strict=True):
        assert float(a["train/loss"]) == pytest.approx(float(b["train/loss"]), rel=1e-3)


def test_a_trained_classifier_is_evaluated_reported_and_not_exported(run: Run) -> None:
    line = ("+recipe=digits_mlp", "trainer.max_steps=60", "optimizer.lr=0.005")
    assert run(*line)[0] == 0
    code, out, err = run("command=evaluate", "run=runs/digits_mlp", "data.workers=0")
    assert (code, err) == (0, "")
    found = json.loads(Path("runs/digits_mlp/evaluation.json").read_text())["test"]
    assert found["images"] == 355
    assert found["accuracy"] > 0.85
    assert f"{found['accuracy']:.2%}" in out
    assert run("command=report", "run=runs/digits_mlp")[0] == 0
    page = Path("runs/digits_mlp/report.html").read_text()
    for text in ("accuracy on test images", f"{found['accuracy']:.2%}", "Accuracy on held-out images", "of 64 images"):
        assert text in page
    assert "bits per byte" not in page
    for command in ("export", "verify", "generate"):
        code, _, err = run(f"command={command}", "run=runs/digits_mlp")
        assert code == 2
        assert f"command={command} works on language models; this recipe trains an image classifier" in err
    code, _, err = run("command=evaluate", "run=runs/digits_mlp", "data.source.test_every=3")
    assert code == 2
    assert "trained on other images" in err
    code, _, err = run(*line, "data.batch_size=32")
    assert code == 2
    assert "data.batch_size=64" in err
    assert run(*line, "resume.from=runs/digits_mlp", "run_name=fork", "trainer.max_steps=62")[0] == 0
    assert [row["step"] for row in rows("fork")] == ["62"]


def test_a_sweep_is_ranked_by_accuracy(run: Run) -> None:
    line = ("-m", "+recipe=digits_mlp", *SHORT, "quant=none,ternary")
    assert run(*line)[0] == 0
    assert run("command=report", "run=runs/digits_mlp")[0] == 0
    page = Path("runs/digits_mlp/report.html").read_text()
    assert "By the best accuracy of held-out images (higher is better)" in page
    assert "best accuracy" in page


def test_estimate_and_prepare_of_a_classifier(run: Run) -> None:
    code, out, err = run("+recipe=digits_vit", "command=estimate")
    assert (code, err) == (0, "")
    found = json.loads(Path("runs/digits_vit/estimate/estimate.json").read_text())
    assert found["images"] == found["steps"] * 64
    assert found["parameters"]["linear"] == {"ternary": 4 * (4 * 64 * 64 + 2 * 64 * 128)}
    # Patches of 4 numbers to 64, 16 of them; four blocks; each patch with each, twice; ten classes.
    tokens, blocks = 16, 4 * (4 * 64 * 64 + 2 * 64 * 128)
    wanted = 2 * tokens * 4 * 64 + 2 * tokens * blocks + 4 * 4 * 64 * tokens**2 + 2 * 64 * 10
    assert found["forward_flops_per_image"] == wanted
    assert found["training_flops_per_image"] == 3 * wanted
    assert "images per step" in out
    code, out, err = run("+recipe=digits_vit", "command=prepare")
    assert (code, err) == (0, "")
    assert "training: 1,302 images in 10 classes" in out
    assert run("+recipe=cifar100_vit", "command=estimate")[0] == 0  # without the images


REFUSED = [
    (["model.pach=2"], "Did you mean 'model.patch'"),
    (["model.kv_heads=2"], "model.kv_heads is not a configuration key where model.name is vit: it belongs to decoder"),
    (["data.corpus.path=x"], "where data.name is images: it belongs to text"),
    (["data.source.path=x"], "path belongs to data/source=image_hub"),
    (["data.sequence_length=9"], "it belongs to text"),
    (["model.name=mlp"], "model.name=mlp does not choose anything"),
    (["model.classes=9"], "model.classes=9 is not data.classes=10"),
    (["trainer.batch_tokens=4096"], "set trainer.batch_tokens=null"),
    (["trainer.micro_batch=auto"], "trainer.micro_batch=auto is for text"),
    (["trainer.micro_batch=7"], "does not divide data.batch_size=64"),
    (["samples.every_steps=10"], "samples.* writes texts"),
    (["evaluate.window=64"], "evaluate.window is for language models"),
    (["init.from=runs/x"], "init.from= reads language models"),
    (["command=benchmark"], "command=benchmark works on language models"),
    (["model=tiny"], "model= is a language model, and data= holds images"),
    (["data=stdlib"], "model= is an image classifier, and data= holds text"),
    (["model.patch=3"], "model.patch=3 does not divide"),
    (["quant.overrides=[{pattern:head,scheme:float}]"], "'layers.0.self_attn.o_proj'"),
    (["quant.weight.groups=7"], "layers.0.self_attn.q_proj: quant.weight.groups=7"),
]


@pytest.mark.parametrize(("arguments", "wanted"), REFUSED, ids=[" ".join(a) for a, _ in REFUSED])
def test_mistakes_are_answered_in_one_sentence(run: Run, arguments: list[str], wanted: str) -> None:
    code, out, err = run("+recipe=digits_vit", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert wanted in err


def test_files_of_ones_own_say_which_kind_they_are(run: Run, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    (mine / "model").mkdir(parents=True)
    (mine / "model" / "narrow.yaml").write_text("hidden: 64\nheads: 2\nkv_heads: 2\n")  # as before there were kinds
    (mine / "model" / "eye.yaml").write_text("name: vit\npatch: 4\nhidden: 16\nlayers: 1\nheads: 2\nffn: 16\n")
    (mine / "model" / "keen_eye.yaml").write_text("defaults: [eye, _self_]\npatch: 2\n")
    (mine / "model" / "ear.yaml").write_text("name: vitt\n")
    own = ("--config-dir", str(mine))
    assert run(*own, "+recipe=tiny", "model=narrow", "command=estimate")[0] == 0
    for model, tokens in (("eye", 4), ("keen_eye", 16)):
        code, _, err = run(*own, "+recipe=digits_mlp", f"model={model}", "command=estimate")
        assert (code, err) == (0, "")
        found = json.loads(Path("runs/digits_mlp/estimate/estimate.json").read_text())
        assert found["forward_flops"]["attention"] == 4 * 16 * tokens**2
    code, _, err = run(*own, "+recipe=digits_mlp", "model=ear")
    assert code == 2
    assert "name is 'vitt'; it must be one of decoder, mlp, vit. Did you mean 'vit'?" in err


def test_a_launchers_sweep_takes_one_kind(run: Run) -> None:
    line = ("-m", "hydra/launcher=basic", "command=estimate")
    assert run(*line, "+recipe=digits_mlp,digits_vit")[0] == 2
    code, _, err = run(*line, "+recipe=digits_mlp,tiny")
    assert code == 2
    assert "one kind of model at a time" in err
    assert run(*line, "+recipe=digits_mlp", "model.hidden=64,128")[0] == 0
