"""A loss or gradient that is not finite: the batch is named, in the message and in divergence.jsonl."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitnet_train.data.tokenizer import load_tokenizer
from bitnet_train.training.module import PretrainingModule
from tests.composing import compose_config
from tests.training.conftest import Workspace
from tests.training.test_guard import PER_STEP, Runs, at_steps


@pytest.fixture
def runs(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Runs:
    monkeypatch.chdir(workspace.folder)
    return Runs(workspace.folder, monkeypatch)


def test_the_first_bad_step_is_named_though_it_was_not_logged(runs: Runs) -> None:
    runs.bad = at_steps(7)
    assert runs("a", "trainer.log_every=5", "checkpoint.every_steps=4", "checkpoint.keep=9") == 3
    assert "Stopped at step 10: the loss is nan" in runs.error
    assert (
        "first were not finite in step 7. Step 7 read samples 48 to 55 (the first: shard train-00000.npy, offset "
        in (runs.error)
    )
    assert "more in runs/a/divergence.jsonl)" in runs.error
    assert "guard.skip_non_finite=true" in runs.error
    assert "\n" not in runs.error
    # Step 8 came after it: not saved.
    assert [p.name for p in Path("runs/a/checkpoints").glob("step-*")] == ["step-00000004.ckpt"]
    (event,) = runs.bad_steps("a")
    assert (event["event"], event["step"]) == ("non_finite", 7)
    assert (event["first_sample"], event["samples"], len(event["batch"])) == (6 * PER_STEP, PER_STEP, PER_STEP)
    # The same command does the same again, and writes it down once.
    first = runs.error
    assert runs("a", "trainer.log_every=5", "checkpoint.every_steps=4", "checkpoint.keep=9") == 3
    assert runs.error == first
    assert len(runs.bad_steps("a")) == 1


def test_a_bad_gradient_under_a_finite_loss_is_found(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = PretrainingModule.on_after_backward

    def on_after_backward(module: PretrainingModule) -> None:
        plain(module)
        if module.global_step == 5:
            next(module.parameters()).grad[3, 1] = math.inf  # type: ignore[index]

    monkeypatch.setattr(PretrainingModule, "on_after_backward", on_after_backward)
    assert runs("a") == 3
    assert "Stopped at step 6: the loss is " in runs.error
    assert "the loss is nan" not in runs.error
    assert "the gradient norm inf. Step 6 read samples 40 to 47" in runs.error


def test_the_places_are_those_that_the_model_saw(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    plain = PretrainingModule.batch_loss

    def batch_loss(module: PretrainingModule, ids: torch.Tensor, taught: Any = None) -> Any:
        if module.training and len(seen) < 5:
            seen.append(ids.clone())
        return plain(module, ids, taught)

    monkeypatch.setattr(PretrainingModule, "batch_loss", batch_loss)
    runs.bad = at_steps(5)
    assert runs("a", steps=6) == 3
    (event,) = runs.bad_steps("a")
    folder = next(Path("data").iterdir())
    tokenizer = load_tokenizer(folder)
    for ids, place in zip(seen[4], event["batch"], strict=True):
        tokens = np.load(folder / place["shard"])[place["offset"] : place["offset"] + place["tokens"]]
        assert tokens.tolist() == ids.tolist()
        assert tokenizer.decode(ids[:32].tolist()) == place["text"]


def test_skipped_steps_are_named_and_those_of_left_out_samples_stay(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.bad = at_steps(8, 9)
    assert runs("a", "guard.skip_non_finite=true", "guard.rollback_after=2") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "the last read samples 64 to 71 (the first: shard train-00000.npy, offset " in out
    assert len(runs.events("a")) == 1
    assert [(e["event"], e["step"], e["first_sample"]) for e in runs.bad_steps("a")] == [
        ("skipped", 8, 56), ("skipped", 9, 64)
    ]  # fmt: skip
    # A run that is continued keeps them, and drops those of steps that it makes again.
    assert runs("a", "guard.skip_non_finite=true", "guard.rollback_after=2", steps=16) == 0
    assert len(runs.bad_steps("a")) == 2
    runs.bad = at_steps(6)
    assert runs("b", "guard.skip_non_finite=true", steps=7) == 0
    Path("runs/b/checkpoints/step-00000007.ckpt").unlink()
    Path("runs/b/checkpoints/last.ckpt").unlink()
    runs.bad = at_steps()
    assert runs("b", "guard.skip_non_finite=true", steps=7) == 0
    assert runs.bad_steps("b") == []


def test_a_damaged_divergence_file_stops_nothing(runs: Runs) -> None:
    runs.bad = at_steps(5)
    assert runs("a", "guard.skip_non_finite=true", steps=6) == 0
    file = Path("runs/a/divergence.jsonl")
    file.write_text(file.read_text() + '{"event": "skipped", "st')
    assert runs("a", "guard.skip_non_finite=true", steps=8) == 0
    assert len(runs.bad_steps("a")) == 1 if file.read_text().endswith("\n") else True


def test_images_are_named_by_number_and_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from bitnet_train.commands import run as command
    from bitnet_train.errors import DivergedError

    monkeypatch.chdir(tmp_path)
    cfg = compose_config(
        "+recipe=digits_mlp", "trainer.max_steps=4", "optimizer.lr=1e30", "trainer.log_every=1",
        "trainer.compile=false",
    )  # fmt: skip
    with pytest.raises(DivergedError, match=r"read samples \d+ to [\d,]+ \(the first: image \d+, class \d; more in "):
        command(replace(cfg, run_name="a"))
    torch.use_deterministic_algorithms(False)
    event = json.loads(Path("runs/a/divergence.jsonl").read_text().splitlines()[-1])
    assert set(event["batch"][0]) == {"sample", "image", "class"}
