"""Runs with bad samples: steps are skipped, the run goes back, gives up, is killed and goes on, bit for bit."""

import csv
import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet_train.commands import run as command
from bitnet_train.config import Config
from bitnet_train.errors import ConfigError, DivergedError
from bitnet_train.quant.weights import quantise_weight
from bitnet_train.training.module import PretrainingModule
from bitnet_train.validation import with_overrides
from tests.composing import compose_config
from tests.training.conftest import SETTINGS, Workspace

# Of every step's 8 sequences; checkpoints lie at 3, 6, 9 and so on.
PER_STEP = 8


@cache
def base_config() -> Config:
    """Composed once: that takes as long as a run."""
    quick = ("schedule=constant", "samples.every_steps=null", "trainer.validate_every=7")
    settings = [setting for setting in SETTINGS if setting.split("=")[0] not in {q.split("=")[0] for q in quick}]
    return compose_config(*settings, *quick, "data.corpus.path=.")


class Killed(Exception):
    """In place of a kill -9: nothing of ours catches it."""


class Runs:
    """Short runs in this process whose loss is poisoned where the samples ``bad`` are consumed."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.bad: Callable[[int], float] = lambda sample: 1.0
        self.kill_at: int | None = None
        self.error = ""
        self.consumed: list[int] = []
        self.modules: list[PretrainingModule] = []
        original = PretrainingModule.training_step

        def training_step(module: PretrainingModule, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            if self.kill_at == module.global_step:
                self.kill_at = None
                raise Killed
            sample = module.trainer.datamodule.state_dict()["consumed"]  # type: ignore[attr-defined]
            self.consumed.append(sample)
            if not self.modules or self.modules[-1] is not module:
                self.modules.append(module)
            bad = self.bad(sample)
            loss = original(module, batch, batch_idx) * bad
            parts = module._parts[-1]
            module._parts[-1] = parts._replace(total=parts.total * bad, cross_entropy=parts.cross_entropy * bad)
            return loss

        monkeypatch.setattr(PretrainingModule, "training_step", training_step)

    def __call__(self, run: str, *arguments: str, steps: int = 14, fork: str | None = None) -> int:
        """The exit code of a run; ``error`` is what it said where it stopped with one."""
        self.consumed, self.modules, self.error = [], [], ""
        corpus = f"data.corpus.path={self.folder}/corpus"
        cfg = with_overrides(base_config(), [corpus, f"trainer.max_steps={steps}", *arguments], "here")
        try:
            return command(replace(cfg, run_name=run, resume={"from": fork}))
        except DivergedError as error:
            self.error = str(error)
            return error.exit_code
        finally:
            torch.use_deterministic_algorithms(False)

    def rows(self, run: str) -> list[dict[str, str]]:
        with (self.folder / "runs" / run / "metrics.csv").open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        for row in rows:  # what depends on the clock
            del row["tokens_per_second"], row["elapsed_seconds"], row["model_flops_share"]
        return rows

    def events(self, run: str) -> list[dict[str, Any]]:
        path = self.folder / "runs" / run / "divergence.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if "event" not in line]

    def bad_steps(self, run: str) -> list[dict[str, Any]]:
        """The lines of divergence.jsonl about single steps."""
        path = self.folder / "runs" / run / "divergence.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if "event" in line]

    def saved(self, run: str, step: int | None = None) -> dict[str, Any]:
        name = "last.ckpt" if step is None else f"step-{step:08d}.ckpt"
        loaded: dict[str, Any] = torch.load(self.folder / "runs" / run / "checkpoints" / name, weights_only=True)
        return loaded


@pytest.fixture
def runs(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Runs:
    monkeypatch.chdir(workspace.folder)
    return Runs(workspace.folder, monkeypatch)


def at_steps(*steps: int, value: float = math.nan) -> Callable[[int], float]:
    """Poisons the samples that these steps (from 1) of an undisturbed run consume."""
    return lambda sample: value if sample // PER_STEP + 1 in steps else 1.0


def same(one: Any, other: Any) -> bool:
    """Whether two checkpoints hold the same tensors."""
    if isinstance(one, dict):
        return set(one) == set(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one.nan_to_num(), other.nan_to_num())
    return bool(one == other)


STATE = ("state_dict", "optimizer_states", "ShardDataModule")


def test_without_a_guard_a_loss_that_is_no_number_stops_the_run(runs: Runs) -> None:
    runs.bad = at_steps(5)
    assert runs("a") == 3
    assert "Stopped at step 5: the loss is nan" in runs.error
    assert "guard" not in {key.split(".")[0] for key in runs.saved("a")["state_dict"]}
    assert runs.rows("a")[0]["skipped"] == ""


def test_skipped_steps_leave_the_state_as_it_was_and_the_run_ends_well(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.bad = at_steps(4, 8, 9)
    assert runs("a", "guard.skip_non_finite=true", "checkpoint.keep=20", "trainer.log_every=2") == 0
    out = capsys.readouterr().out
    assert "guard: skipped step 4 (not finite; the last had loss nan and gradient norm nan); 1 of 4 steps so far" in out
    assert "guard: skipped step 8" in out
    assert "guard: skipped step 9" in out
    rows = {int(row["step"]): row for row in runs.rows("a")}
    assert [rows[step]["skipped"] for step in (2, 4, 6, 8, 10, 14)] == ["0", "1", "1", "2", "3", "3"]
    assert rows[4]["train/loss"] == "nan"
    assert float(rows[4]["codes/flips"]) == 0.0 != float(rows[6]["codes/flips"])
    assert math.isfinite(float(rows[14]["train/loss"]))
    assert float(rows[14]["train/loss"]) < float(rows[2]["train/loss"])
    # Every step consumed its samples; the ninth was not saved but the next that was applied.
    assert runs.consumed == [PER_STEP * i for i in range(14)]
    steps = sorted(int(path.stem[5:]) for path in Path("runs/a/checkpoints").glob("step-*"))
    assert steps == [3, 6, 10, 12, 14]


def test_a_skipped_step_changes_no_bit_of_the_checkpoint(runs: Runs) -> None:
    # The run ends with a skipped step: saved, because the weights are those of the step before.
    extra = ("guard.skip_non_finite=true", "checkpoint.keep=20", "clip=zscore", "clip.warmup=2")
    runs.bad = at_steps(6, 7)
    assert runs("long", *extra, steps=7) == 0
    assert runs("short", *extra, steps=5) == 0
    long, short = runs.saved("long"), runs.saved("short")
    assert long["global_step"] == 7
    assert same(long["optimizer_states"], short["optimizer_states"])
    for name, value in short["state_dict"].items():
        if name not in ("guard.skipped", "guard.in_a_row", "guard.recent"):
            assert same(value, long["state_dict"][name]), name
    assert int(long["state_dict"]["guard.skipped"]) == int(long["state_dict"]["guard.in_a_row"]) == 2
    layer = runs.modules[-1].decoder.layers[0].self_attn.q_proj
    assert torch.equal(layer.codes, quantise_weight(layer.weight, layer.quant).codes)


def test_outliers_are_skipped(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.bad = at_steps(9, value=40.0)
    guard = ("guard.outlier_sigma=6", "guard.window=8")
    assert runs("a", *guard) == 0
    assert "guard: skipped step 9 (far above the steps before" in capsys.readouterr().out
    assert [row["skipped"] for row in runs.rows("a")][7:10] == ["0", "1", "1"]


def test_a_guard_that_skips_nothing_changes_nothing(runs: Runs) -> None:
    assert runs("with", "guard.skip_non_finite=true", "guard.outlier_sigma=50", "guard.rollback_after=2") == 0
    assert runs("without") == 0
    with_guard, without = runs.rows("with"), runs.rows("without")
    assert {row.pop("skipped") for row in with_guard} == {"0"}
    assert {row.pop("skipped") for row in without} == {""}
    assert with_guard == without


ROLLBACK = ("guard.skip_non_finite=true", "guard.rollback_after=2")


def test_a_run_goes_back_and_on_behind_the_bad_samples(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.bad = at_steps(8, 9, 10)
    assert runs("a", *ROLLBACK) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "guard: skipped step 9 (not finite" in out
    assert (
        "back from step 10 to step 6 (runs/a/checkpoints/step-00000006.ckpt), and on behind sample 80 (32 left out)"
        in out
    )
    assert "return 1 of 3" in out
    # Steps 7 to 10 are taken back; step 7 is made again from the samples behind those of step 10.
    assert runs.consumed == [PER_STEP * i for i in (*range(10), *range(10, 18))]
    assert runs.events("a") == [
        {"step": 10, "back_to": 6, "consumed": 80, "left_out": 32, "reason": runs.events("a")[0]["reason"]}
    ]
    rows = runs.rows("a")
    assert [int(row["step"]) for row in rows] == list(range(1, 15))
    assert all(math.isfinite(float(row["train/loss"])) for row in rows)
    assert {row["skipped"] for row in rows} == {"0"}
    saved = runs.saved("a")
    assert (saved["global_step"], saved["ShardDataModule"]["consumed"]) == (14, 18 * PER_STEP)
    assert len(runs.modules) == 2


def test_before_the_first_checkpoint_a_run_starts_again(runs: Runs) -> None:
    runs.bad = at_steps(1, 2, 3)
    assert runs("a", *ROLLBACK, steps=6) == 0
    assert [event["back_to"] for event in runs.events("a")] == [0]
    assert runs.consumed == [PER_STEP * i for i in (0, 1, 2, 3, 4, 5, 6, 7, 8)]
    assert [int(row["step"]) for row in runs.rows("a")] == list(range(1, 7))


def test_bad_steps_at_the_very_end_are_taken_back_too(runs: Runs) -> None:
    runs.bad = at_steps(13, 14)
    assert runs("a", *ROLLBACK) == 0
    assert [(event["step"], event["back_to"]) for event in runs.events("a")] == [(14, 12)]
    assert math.isfinite(float(runs.rows("a")[-1]["train/loss"]))
    assert runs.saved("a")["global_step"] == 14


def test_a_run_that_goes_back_too_often_stops(runs: Runs) -> None:
    runs.bad = lambda sample: math.nan if sample >= 7 * PER_STEP else 1.0
    assert runs("a", *ROLLBACK, "guard.max_rollbacks=2") == 3
    err = runs.error
    assert "the guard skipped steps 7 to 9 (not finite" in err
    assert "has gone back guard.max_rollbacks=2 times (step 10 to 6, step 9 to 6; see runs/a/divergence.jsonl)" in err
    assert "The last good state is step 6" in err
    assert "\n" not in err
    assert [(e["step"], e["back_to"], e["consumed"]) for e in runs.events("a")] == [(10, 6, 80), (9, 6, 104)]
    # The same command does the same again, and goes on where it may.
    assert runs("a", *ROLLBACK, "guard.max_rollbacks=2") == 3
    assert runs.consumed[0] == 104
    runs.bad = at_steps(*range(8, 18))
    assert runs("a", *ROLLBACK, "guard.max_rollbacks=3") == 0
    assert len(runs.events("a")) == 3


def test_a_run_that_never_goes_back_gives_up_after_a_window_of_skipped_steps(runs: Runs) -> None:
    runs.bad = lambda sample: math.nan if sample >= 5 * PER_STEP else 1.0
    assert runs("a", "guard.skip_non_finite=true", "guard.window=4", steps=80) == 3
    assert "Stopped at step 9: the guard skipped the last 4 steps, among them steps 6 to 9" in runs.error
    assert runs.saved("a")["global_step"] == 3
    assert runs.rows("a")[-1]["step"] == "9"


@pytest.mark.parametrize("kill_at", [4, 9, 12], ids=["before", "in-the-bad-stretch", "after"])
def test_a_run_that_is_killed_is_that_of_an_undisturbed_one(runs: Runs, kill_at: int) -> None:
    extra = (*ROLLBACK, "guard.outlier_sigma=8", "guard.window=8", "clip=percentile")
    settings = (*extra, "clip.min_history=2", "checkpoint.keep=20")
    runs.bad = at_steps(8, 9)
    assert runs("whole", *settings) == 0
    assert len(runs.events("whole")) == 1
    runs.kill_at = kill_at
    with pytest.raises(Killed):
        runs("killed", *settings)
    assert runs("killed", *settings) == 0
    assert runs.rows("killed") == runs.rows("whole")
    assert runs.events("killed") == runs.events("whole")
    one, other = runs.saved("killed"), runs.saved("whole")
    assert all(same(one[part], other[part]) for part in STATE)


def test_a_kill_right_after_going_back_is_no_different(runs: Runs) -> None:
    runs.bad = at_steps(8, 9)
    assert runs("whole", *ROLLBACK) == 0
    original, times = runs.bad, []

    def bad(sample: int) -> float:
        times.append(sample)
        if len(times) > 1 and times[-1] > PER_STEP * 9 and times[-2] == PER_STEP * 9:
            raise Killed  # the first step after the return
        return original(sample)

    runs.bad = bad
    with pytest.raises(Killed):
        runs("killed", *ROLLBACK)
    assert len(runs.events("killed")) == 1
    runs.bad = original
    assert runs("killed", *ROLLBACK) == 0
    assert runs.consumed[0] == PER_STEP * 10
    assert runs.rows("killed") == runs.rows("whole")
    assert all(same(runs.saved("killed")[part], runs.saved("whole")[part]) for part in STATE)


def test_a_fork_starts_its_guard_anew_and_goes_back_to_where_it_forked(runs: Runs) -> None:
    assert runs("a", steps=6) == 0
    runs.bad = at_steps(7, 8)
    assert runs("b", *ROLLBACK, "checkpoint.every_steps=20", steps=12, fork="runs/a@6") == 0
    assert [(e["step"], e["back_to"], e["consumed"]) for e in runs.events("b")] == [(9, 6, 72)]
    assert runs.consumed == [PER_STEP * i for i in (6, 7, 8, *range(9, 15))]
    # From a run with a guard to one without.
    assert runs("c", steps=13, fork="runs/b@12") == 0
    assert not any(name.startswith("guard.") for name in runs.saved("c")["state_dict"])


def stop_at(step: int, bad: Callable[[int], float]) -> Callable[[int], float]:
    """``bad``, and a SIGTERM when the samples of ``step`` are consumed for the first time."""
    sent = []

    def with_signal(sample: int) -> float:
        if sample == (step - 1) * PER_STEP and not sent:
            sent.append(sample)
            os.kill(os.getpid(), signal.SIGTERM)
        return bad(sample)

    return with_signal


@pytest.mark.parametrize("stop", [5, 7, 8, 9, 10])
@pytest.mark.parametrize("guard", [ROLLBACK, ROLLBACK[:1]], ids=["goes back", "does not"])
def test_a_run_that_was_told_to_stop_is_that_of_an_undisturbed_one(
    runs: Runs, stop: int, guard: tuple[str, ...]
) -> None:
    runs.bad = at_steps(8, 9)
    assert runs("whole", *guard, "checkpoint.keep=1") == 0
    assert len(runs.events("whole")) == len(guard) - 1
    runs.bad = stop_at(stop, at_steps(8, 9))
    assert runs("stopped", *guard, "checkpoint.keep=1") == 143
    # Also at a skipped step; but not when the guard takes it back.
    taken_back = len(guard) > 1 and stop == 10
    assert runs.saved("stopped")["global_step"] == (6 if taken_back else stop)
    assert runs("stopped", *guard, "checkpoint.keep=1") == 0
    assert runs.rows("stopped") == runs.rows("whole")
    assert runs.events("stopped") == runs.events("whole")
    assert all(same(runs.saved("stopped")[part], runs.saved("whole")[part]) for part in STATE)


def test_a_stopped_fork_goes_back_to_where_it_forked(runs: Runs) -> None:
    assert runs("a", steps=6) == 0
    runs.bad = at_steps(8, 9)
    fork, settings = "runs/a@6", (*ROLLBACK, "checkpoint.every_steps=5")
    assert runs("whole", *settings, steps=12, fork=fork) == 0
    assert [(e["step"], e["back_to"]) for e in runs.events("whole")] == [(10, 6)]
    runs.bad = stop_at(8, at_steps(8, 9))
    assert runs("stopped", *settings, steps=12, fork=fork) == 143
    assert runs.saved("stopped")["global_step"] == 8
    assert runs("stopped", *settings, steps=12, fork=fork) == 0
    assert runs.rows("stopped") == runs.rows("whole")
    assert runs.events("stopped") == runs.events("whole")


def test_a_stopped_run_goes_back_to_its_initial_weights(runs: Runs) -> None:
    runs.bad = at_steps(2, 3)
    assert runs("whole", *ROLLBACK, steps=6) == 0
    runs.bad = stop_at(2, at_steps(2, 3))
    assert runs("stopped", *ROLLBACK, steps=6) == 143
    assert runs("stopped", *ROLLBACK, steps=6) == 0
    assert [event["back_to"] for event in runs.events("stopped")] == [0]
    assert runs.rows("stopped") == runs.rows("whole")


@pytest.mark.parametrize("mirrored", [True, False])
def test_a_good_checkpoint_that_is_gone_is_restored_or_replaced(
    runs: Runs, mirrored: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """A new machine has what the mirror has, which is enough to go back; otherwise a run never begins anew."""
    settings = (*ROLLBACK, "checkpoint.keep=1")
    if mirrored:
        settings = (*settings, f"checkpoint.mirror=file://{runs.folder}/mirror")
    runs.bad = at_steps(8, 9)
    assert runs("whole", *settings) == 0
    runs.bad = stop_at(7, at_steps(8, 9))
    assert runs("stopped", *settings) == 143
    assert runs.saved("stopped")["state_dict"]["guard.good_step"] == 6
    if mirrored:
        shutil.rmtree(runs.folder / "runs/stopped")
    else:
        (runs.folder / "runs/stopped/checkpoints/step-00000006.ckpt").unlink()
    assert runs("stopped", *settings) == 0
    said = "the checkpoint of step 6, to which the guard would go back, is gone: step 7 takes its place"
    assert (said in capfd.readouterr().out) is not mirrored
    assert [event["back_to"] for event in runs.events("stopped")] == [6 if mirrored else 7]
    assert [row["step"] for row in runs.rows("stopped")] == [row["step"] for row in runs.rows("whole")]
    if mirrored:
        assert runs.rows("stopped") == runs.rows("whole")


def test_what_was_saved_past_the_good_step_is_gone_when_the_run_goes_back(runs: Runs) -> None:
    runs.bad = stop_at(8, at_steps(8, 9))
    assert runs("a", *ROLLBACK) == 143

    def bad(sample: int) -> float:
        if sample == 10 * PER_STEP:
            raise Killed  # the first step after the return
        return at_steps(8, 9)(sample)

    runs.bad = bad
    with pytest.raises(Killed):
        runs("a", *ROLLBACK)
    assert runs.saved("a")["global_step"] == 6
    assert not Path("runs/a/checkpoints/step-00000008.ckpt").exists()


def test_going_back_needs_checkpoints_that_the_step_decides() -> None:
    with pytest.raises(ConfigError, match="goes back to checkpoints that the step decides, not the clock"):
        compose_config("+recipe=tiny", *ROLLBACK, "checkpoint.every_steps=null")
