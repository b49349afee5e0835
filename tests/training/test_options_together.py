"""Options that meet: learned scales and names, stages and telemetry, ways to codes and teachers, borders that move."""

import shutil

import pytest

from tests.training.conftest import InProcess, Workspace

pytestmark = pytest.mark.usefixtures("one_thread")
LEARNED = ("quant.weight.trainable_scale=true", "quant.weight.groups=4")


@pytest.fixture
def here(workspace: Workspace) -> InProcess:
    return InProcess(workspace.folder)


def train(here: Workspace, name: str, *settings: str, steps: int = 3) -> str:
    code, output = here.run(*settings, f"run_name={name}", f"trainer.max_steps={steps}")
    assert code == 0, output
    return output


def test_learned_scales_are_taken_over_where_they_mean_the_same(here: Workspace) -> None:
    train(here, "learned", *LEARNED)
    start = "init.from=runs/learned"
    same = train(here, "same", *LEARNED, start, steps=1)
    assert "left out" not in same
    left_out = "the learned scales of 14 layers are left out, which quant= has otherwise"
    assert left_out in train(here, "groups", LEARNED[0], "quant.weight.groups=8", start, steps=1)
    assert left_out in train(here, "plain", start, steps=1)
    wide = ("quant.weight.scheme=symmetric", "quant.weight.bits=4")
    assert left_out in train(here, "wide", *LEARNED, *wide, start, steps=1)


def test_learned_scales_have_names(here: Workspace) -> None:
    rule = "{pattern: '*.weight', clip: {name: norm, max_norm: 1}}"
    code, output = here.run(*LEARNED, "clip=by_pattern", f"clip.rules=[{rule}]")
    assert code == 2
    assert "no pattern matches the parameter layers.0.self_attn.q_proj.weight_scale" in output
    assert not (here.folder / "runs").exists()
    kept = "{pattern: '*.weight_scale', lr: 0}"
    train(here, "kept", *LEARNED, f"optimizer.groups=[{kept}]")
    train(here, "free", *LEARNED)
    assert here.losses("kept")["3"] != here.losses("free")["3"]


def test_a_planned_change_of_bits_is_no_collapse(here: Workspace) -> None:
    output = train(here, "staged", "quant/progressive=bits", "telemetry.every_steps=1", steps=12)
    assert "running away" not in output
    output = train(here, "staged", "quant/progressive=bits", "telemetry.every_steps=1", steps=14)
    assert "running away" not in output


def test_a_skipped_step_is_no_standstill(here: Workspace) -> None:
    guard = ("guard.outlier_sigma=0.001", "guard.window=16", "guard.min_history=2", "optimizer.lr=5")
    output = train(here, "skipping", *guard, "telemetry.every_steps=1", steps=6)
    assert "guard: skipped" in output
    assert "no code of any layer changed" not in output


def test_a_teacher_is_not_taken_on_its_way_to_codes(here: Workspace) -> None:
    way = ("quant/progressive=switch", "quant.progressive.at=5")
    train(here, "teacher", *way, "checkpoint.every_steps=3", steps=6)
    learns = ("loss=distillation", "data.workers=0")
    code, output = here.run(*learns, "loss.teacher=runs/teacher@3", "run_name=early")
    assert code == 2
    assert "is of step 3, where the weights are still on their way to codes" in output
    train(here, "late", *learns, "loss.teacher=runs/teacher")


@pytest.mark.parametrize(
    "way",
    [
        "quant/progressive=switch quant.progressive.at=0.5",
        "quant.overrides=[{pattern:'*',activation_bits:4,since:0.5}]",
    ],
)
def test_borders_that_move_back_are_said(here: Workspace, way: str) -> None:
    train(here, "longer", *way.split(), steps=4)
    assert "steps 5 to 10 are quantised otherwise" in train(here, "longer", *way.split(), steps=20)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ("quant.weight.trainable_scale=true", "quant.weight.trainable_scale"),
        ("quant=bitnet_a4_8", "quant.overrides with since"),
        ("quant/progressive=lambda", "quant/progressive=lambda"),
    ],
)
def test_convert_trains_nothing(here: Workspace, settings: str, named: str) -> None:
    shutil.copytree(here.folder / "corpus", here.folder / "llama")
    (here.folder / "llama" / "config.json").write_text("{}")
    code, output = here.run("command=convert", "convert.from=llama", "convert.to=new", *settings.split())
    assert code == 2
    assert f"trains nothing: leave out {named}." in output
