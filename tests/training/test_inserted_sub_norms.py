"""A run with sub-norms starts from a model without: what it starts at, what it says, and that it goes on."""

import re

import torch

from tests.training.conftest import Workspace

DENSE = ("quant=none", "model.norms=pre", "model.activation=silu", "init.sub_norm_gain=1")
SUB = ("model.activation=silu", "init.sub_norm_gain=1", "init.from=runs/dense")


def started(
    workspace: Workspace, name: str, *settings: str
) -> tuple[str, tuple[float, float], dict[str, torch.Tensor]]:
    """What a run without steps printed, the two losses in it, and its gains."""
    code, output = workspace.run(f"run_name={name}", "trainer.max_steps=0", *SUB, *settings)
    assert code == 0, output
    line = " ".join(output.split())
    assert "sub-norms: 4 put in" in line, output
    figures = re.search(r"validation loss of these weights ([\d.]+) without, ([\d.]+) with them", line)
    assert figures is not None, output
    path = workspace.folder / "runs" / name / "checkpoints" / "last.ckpt"
    state = torch.load(path, weights_only=True)["state_dict"]
    gains = {key: tensor for key, tensor in state.items() if "sub_norm" in key}
    return line, (float(figures[1]), float(figures[2])), gains


def test_sub_norms_are_put_in_and_calibrated(workspace: Workspace) -> None:
    assert workspace.run("run_name=dense", "trainer.max_steps=20", *DENSE)[0] == 0
    line, (before, calibrated), gains = started(workspace, "calibrated")
    other_line, (same, at_one), ones = started(workspace, "ones", "init.sub_norms=ones")
    assert same == before
    assert abs(calibrated - before) < abs(at_one - before)
    assert "at one" in other_line
    assert re.search("one gain for a norm.*a gain for each channel|a gain for each channel.*one gain for a norm", line)
    assert all(bool((tensor == 1).all()) for tensor in ones.values())
    assert not any(bool((tensor == 1).any()) for tensor in gains.values())
    # What the dense run's own validation said is what it starts from.
    assert abs(before - float(workspace.rows("dense")[-1]["val/loss"])) < 0.05
    # The same weights train, and a continued run brings its gains with it.
    code, output = workspace.run("run_name=b", "trainer.max_steps=3", *SUB)
    assert code == 0, output
    assert line.partition("sub-norms:")[2][:120] in " ".join(output.split())
    code, output = workspace.run("run_name=b", "trainer.max_steps=5", *SUB)
    assert code == 0, output
    assert "steps 3 to 5" in output
    assert "sub-norms:" not in output
    # Settings that would do nothing, and norms that would be lost.
    for start, settings, sentence in (
        ("runs/b", ("init.sub_norms=ones",), "init.from=runs/b brings its own sub-norms: leave init.sub_norms out."),
        ("runs/b", ("model.norms=pre",), "is of another model: set model.norms=pre_sub"),
    ):
        code, output = workspace.run("run_name=c", *SUB[:2], f"init.from={start}", *settings)
        assert code == 2
        assert sentence in output
