"""Runs that go from float to quantised, with learned scales and with late inputs: they train, and go on as if nothing
had happened."""

import csv
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bitnet_train.__main__ import answer
from tests.composing import fresh_recipes
from tests.training.conftest import SETTINGS, Workspace

Train = Callable[..., list[dict[str, str]]]
SAME = ("train/loss", "val/loss", "lr", "grad_norm", "codes/flips", "codes/zeros")
# Ways, with a border behind the checkpoint of step 3 that the run is continued from.
WAYS = {
    "lambda": "quant/progressive=lambda quant.progressive.until=6 quant.progressive.shape=cosine",
    "switch": "quant/progressive=switch quant.progressive.at=5",
    "layerwise": "quant/progressive=layerwise quant.progressive.until=6 quant.progressive.order=last_to_first",
    "bits": "quant/progressive=bits quant.progressive.stages=[{bits:8,until:2},{bits:4,until:5}]",
    "noise": "quant/progressive=noise quant.progressive.until=6 quant.progressive.rate=0.4",
    "learned": "quant.weight.trainable_scale=true quant/progressive=lambda quant.progressive.until=6",
    "late": 'quant.overrides=[{pattern:"*.[qkv]_proj",activation_bits:4,activation_statistic:absmean,since:5}]',
}
# Quantisers of the whole run, and after how many steps the late ones of a recipe have begun.
QUANTISERS = {
    "quant.weight.statistic=absmedian quant.activation.granularity=group quant.activation.group_size=16": 5,
    "quant.weight.scheme=symmetric quant.weight.bits=8 quant.weight.trainable_scale=true quant.weight.statistic=absmean"
    " quant.activation.bits=4 quant.activation.hadamard=true quant.activation.top_k=0.6": 5,
    "quant.activation.granularity=tensor trainer.precision=bf16-mixed quant.weight.group_rows=4": 5,
    "quant=bitnet_v2": 12,
    "quant=bitnet_a4_8": 12,
    "quant=mixed": 5,
    "quant=trilm model.norms=inside model.activation=silu": 5,
}
# Losses of runs that others are compared with, trained once.
KNOWN: dict[str, list[float]] = {}


@pytest.fixture
def train(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Iterator[Train]:
    """Trains under settings in this process; the rows of its metrics."""
    monkeypatch.chdir(workspace.folder)
    kept = [s for s in SETTINGS if not s.startswith(("samples.", "trainer.validate"))]

    def run(name: str, settings: str = "", steps: int = 8) -> list[dict[str, str]]:
        fixed = [f"data.corpus.path={workspace.folder}/corpus", "samples.every_steps=8", "checkpoint.keep=9"]
        line = [*kept, *fixed, f"run_name={name}", f"trainer.max_steps={steps}", *settings.split()]
        try:
            assert answer(line) == 0
        finally:
            torch.use_deterministic_algorithms(False)
        with Path(f"runs/{name}/metrics.csv").open(newline="") as stream:
            return list(csv.DictReader(stream))

    with fresh_recipes():
        yield run


def cut_back(source: str, name: str, step: int) -> None:
    """The folder of a run as a kill after ``step`` would have left it."""
    shutil.copytree(f"runs/{source}", f"runs/{name}")
    checkpoints = Path(f"runs/{name}/checkpoints")
    (checkpoints / "last.ckpt").unlink()
    for path in checkpoints.glob("step-*.ckpt"):
        if path.name != f"step-{step:08d}.ckpt":
            path.unlink()
    shutil.copyfile(checkpoints / f"step-{step:08d}.ckpt", checkpoints / "last.ckpt")


def losses(rows: list[dict[str, str]]) -> list[float]:
    found = [float(row["train/loss"]) for row in rows]
    assert all(math.isfinite(loss) for loss in found)
    return found


def known(train: Train, quant: str) -> list[float]:
    if quant not in KNOWN:
        KNOWN[quant] = losses(train(quant, f"quant={quant}"))
    return KNOWN[quant]


@pytest.mark.parametrize("way", WAYS)
def test_a_continued_run_is_the_undisturbed_one_bit_for_bit(train: Train, way: str) -> None:
    whole = train("whole", WAYS[way])
    assert [row["step"] for row in whole] == [str(i + 1) for i in range(8)]
    found, dense, ternary = losses(whole), known(train, "none"), known(train, "ternary")
    # The option reaches the run: strength 0 is the dense model bit for bit, as long as nothing else has been trained.
    if way == "switch":
        assert found[:5] == dense[:5]
        assert found[5] != dense[5]
    elif way in ("lambda", "learned"):
        assert found[0] == dense[0]
        assert found[1] != dense[1]
    elif way == "late":
        assert found[:5] == ternary[:5]
        assert found[5] != ternary[5]
    else:
        assert found[0] not in (dense[0], ternary[0])
    cut_back("whole", "cut", 3)
    continued = train("cut", WAYS[way])
    assert [[row[c] for c in SAME] for row in continued] == [[row[c] for c in SAME] for row in whole]
    states = [torch.load(f"runs/{n}/checkpoints/last.ckpt", weights_only=True)["state_dict"] for n in ("whole", "cut")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    if way == "learned":
        early = torch.load("runs/whole/checkpoints/step-00000003.ckpt", weights_only=True)["state_dict"]
        scales = [name for name in early if name.endswith("weight_scale")]
        assert len(scales) == 2 * 7
        assert all(states[0][name].dtype is torch.float32 for name in scales)
        assert all(not torch.equal(states[0][name], early[name]) for name in scales)


@pytest.mark.parametrize("settings", QUANTISERS)
def test_a_quantiser_trains(train: Train, settings: str) -> None:
    found = losses(train("v", settings, steps=QUANTISERS[settings]))
    assert found[-1] < found[0]
    if settings != "quant=bitnet_a4_8":  # whose inputs change late
        assert found[0] != known(train, "ternary")[0]
