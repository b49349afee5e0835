"""The step benchmark as a whole: what is written, what is said, and that failures do not stop it."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bitnet_train.benchmarking.child import ChildError, in_child
from bitnet_train.benchmarking.config import BASELINES
from bitnet_train.benchmarking.contenders import Contender, line_up
from bitnet_train.benchmarking.results import StepResults
from bitnet_train.benchmarking.run_step import run_step
from bitnet_train.benchmarking.tables import step_grid, step_notes
from bitnet_train.benchmarking.timing import alternate, one_line, ratio, spread
from bitnet_train.commands import benchmark
from bitnet_train.config import Config
from tests.benchmarking.conftest import SMALL
from tests.composing import compose_config


def test_the_command_leaves_json_markdown_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = compose_config(*SMALL, f"paths.runs={tmp_path}", "run_name=small", "benchmark.memory=false")
    assert benchmark.run(cfg) == 0
    folder = tmp_path / "small" / "benchmark"
    assert sorted(p.name for p in folder.iterdir()) == ["step.json", "step.md", "step.png"]
    assert [p.name for p in (tmp_path / "small").iterdir()] == ["benchmark"]
    content = json.loads((folder / "step.json").read_text())
    assert content["complete"]
    assert content["config"]["benchmark"]["rounds"] == 2
    assert {"torch", "bitnet_train"} <= content["versions"].keys()
    assert content["hardware"]["threads"] == 1
    assert all(rate > 0 for rate in content["device_rates"].values())
    measured = content["contenders"]
    assert {"ternary", "dense", "textbook_fp32_eager"} <= measured.keys()
    assert measured.keys() | content["not_measured"].keys() == BASELINES.keys()
    for result in measured.values():
        assert len(result["seconds"]) == 2
        assert result["tokens_per_second"] == pytest.approx(128 / result["seconds_spread"]["median"])
        assert all(5 < loss < 7 for loss in result["warmup_losses"])
        assert result["predicted_seconds"] == pytest.approx(sum(result["predicted_parts"].values()))
    assert measured["dense"]["speed_over_reference"] == {"of_medians": 1.0, "smallest": 1.0, "largest": 1.0}
    page = (folder / "step.md").read_text()
    for name in BASELINES:
        assert page.count(f"| {name} |") == 1
    assert "command:" in page
    assert (folder / "step.png").read_bytes().startswith(b"\x89PNG")
    assert "round 2/2" in capsys.readouterr().out


def test_peak_memory_is_measured_in_a_process_of_its_own(small: Config) -> None:
    cfg = replace(small.benchmark, rounds=1)
    results = StepResults()
    run_step(line_up(small, ["ternary"], {}), cfg, results, lambda text: None)
    memory = results.measured["ternary"].memory
    assert memory is not None, results.measured["ternary"].no_memory
    assert memory.peak > memory.held_before > 50e6
    assert results.reference == "ternary"
    assert step_grid(results).rows[0][-2] != "-"
    assert any("peak over three steps" in note for note in step_notes(results))


def test_a_contender_that_fails_is_reported_and_the_others_go_on(
    small: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Contender.decoder

    def decoder(self: Contender) -> object:
        if self.name == "dense":
            raise RuntimeError("out of everything\nand more lines")
        return build(self)

    monkeypatch.setattr(Contender, "decoder", decoder)
    results = StepResults()
    cfg = replace(small.benchmark, rounds=1, memory=False)
    run_step(line_up(small, ["ternary", "dense"], {}), cfg, results, lambda text: None)
    assert results.not_measured == {"dense": "RuntimeError: out of everything"}
    assert list(results.timed) == ["ternary"]
    assert [row[0] for row in step_grid(results).rows] == ["ternary", "dense"]
    assert "dense not measured: RuntimeError: out of everything" in step_notes(results)


def test_rounds_rotate_and_a_late_failure_ends_one_contender_only() -> None:
    order: list[str] = []
    failures: list[str] = []
    kept: list[tuple[str, float]] = []

    def runner(name: str, fails_at: int) -> object:
        def work(number: int) -> float:
            order.append(f"{name}{number}")
            if number == fails_at:
                raise MemoryError
            return float(number)

        return work

    runs = {"a": runner("a", -1), "b": runner("b", 1), "c": runner("c", -1)}
    alternate(
        runs,  # type: ignore[arg-type]
        3,
        lambda name, seconds: kept.append((name, seconds)),
        lambda name, error: failures.append(f"{name} {one_line(error)}"),
        lambda number: None,
    )
    assert order == ["a0", "b0", "c0", "b1", "c1", "a1", "a2", "c2"]
    assert failures == ["b MemoryError"]
    assert [name for name, _ in kept].count("b") == 1


@pytest.mark.parametrize(("number", "ending"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_an_interruption_leaves_what_was_measured(
    tmp_path: Path, small: Config, monkeypatch: pytest.MonkeyPatch, number: int, ending: type[BaseException]
) -> None:
    def interrupted(runs: object, rounds: object, keep: object, failed: object, after: object) -> None:
        keep("ternary", 0.5)  # type: ignore[operator]
        signal.raise_signal(number)

    monkeypatch.setattr("bitnet_train.benchmarking.run_step.alternate", interrupted)
    cfg = replace(small, run_name="stopped", paths=replace(small.paths, runs=str(tmp_path)))
    with pytest.raises(ending):
        benchmark.run(cfg)
    content = json.loads((tmp_path / "stopped" / "benchmark" / "step.json").read_text())
    assert not content["complete"]
    assert content["contenders"]["ternary"]["seconds"] == [0.5]
    assert "interrupted" in (tmp_path / "stopped" / "benchmark" / "step.md").read_text()


def test_ratios_and_spreads() -> None:
    assert spread([3.0, 1.0, 2.0, 4.0]).median == 2.5
    assert (spread([1.0]).lower, spread([1.0]).upper) == (1.0, 1.0)
    compared = ratio([2.0, 4.0, 6.0], [1.0, 1.0, 2.0])
    assert (compared.of_medians, compared.smallest, compared.largest) == (4.0, 2.0, 4.0)


def test_a_child_that_dies_or_raises_is_an_error_in_one_line() -> None:
    with pytest.raises(ChildError, match="ended with code 7"):
        in_child(os._exit, 7)
    with pytest.raises(ChildError, match="ValueError: invalid literal"):
        in_child(int, "x")


def test_the_command_line_says_what_is_wrong(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bitnet_train", *SMALL, "benchmark.baselines=[tourchao]"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "Did you mean 'torchao'" in done.stderr
