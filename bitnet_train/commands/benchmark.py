"""``command=benchmark``: speed and memory beside the dense twin and other libraries, as tables, JSON and pictures."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bitnet_train.benchmarking.config import What
from bitnet_train.benchmarking.contenders import Line, line_up
from bitnet_train.benchmarking.picture import draw_layers, draw_step
from bitnet_train.benchmarking.report import open_folder, origin, write_report
from bitnet_train.benchmarking.results import StepResults
from bitnet_train.benchmarking.run_layers import LayerResults, run_layers
from bitnet_train.benchmarking.run_step import run_step
from bitnet_train.benchmarking.tables import Grid, layer_grids, layer_notes, profile_grid, step_grid, step_notes
from bitnet_train.commands.console import make_console, print_table
from bitnet_train.config import Config, to_plain
from bitnet_train.training.device import choose
from bitnet_train.validation import with_overrides


def run(cfg: Config) -> int:
    """Measure and leave the figures in ``<paths.runs>/<run_name>/benchmark/``, also those until a signal."""
    console = make_console()
    assert cfg.run_name is not None
    folder = Path(cfg.paths.runs) / cfg.run_name / "benchmark"
    variants = {
        v.name: with_overrides(cfg, v.overrides, f"benchmark.variants, {v.name}") for v in cfg.benchmark.variants
    }
    line = line_up(cfg, cfg.benchmark.baselines, variants)
    open_folder(folder)
    with _termination_as_exit():
        if cfg.benchmark.what in (What.step, What.all):
            _step(cfg, line, folder, console)
        if cfg.benchmark.what in (What.layers, What.all):
            _layers(cfg, folder, console)
    return 0


@contextmanager
def _termination_as_exit() -> Iterator[None]:
    """SIGTERM, which schedulers and ``timeout`` send, ends as Ctrl-C does, with what was measured written; code 143."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _step(cfg: Config, line: Line, folder: Path, console: Console) -> None:
    results = StepResults()
    first = line.contenders[0]
    source = origin(first.device, first.precision, first.compiled)
    console.print(f"one training step of {cfg.run_name} on {first.device}, {source['hardware']['threads']} threads")
    try:
        run_step(line, cfg.benchmark, results, lambda text: console.print(text, markup=False))
    finally:
        # Also what was measured until a signal came.
        if results.measured or results.not_measured:
            profile = profile_grid(results)
            grids = [step_grid(results), *([] if profile is None else [profile])]
            _leave(cfg, "step", source, results.as_dict(), grids, step_notes(results), folder, console)
            if results.timed:
                draw_step(results, f"{cfg.run_name}: one training step", folder / "step.png")


def _layers(cfg: Config, folder: Path, console: Console) -> None:
    results = LayerResults()
    choices = choose(cfg)
    source = origin(choices.device, "bf16-mixed", choices.compile)
    console.print(f"layers of {cfg.run_name} on {choices.device}, {source['hardware']['threads']} threads")
    try:
        run_layers(cfg, cfg.benchmark, choices, results, lambda text: console.print(text, markup=False))
    finally:
        grids = layer_grids(results)
        if grids:
            _leave(cfg, "layers", source, results.as_dict(), grids, layer_notes(results), folder, console)
            draw_layers(results, f"{cfg.run_name}: one layer, forward and backward", folder / "layers.png")


def _leave(
    cfg: Config, kind: str, source: dict[str, Any], figures: dict[str, Any], grids: list[Grid], notes: list[str],
    folder: Path, console: Console,
) -> None:  # fmt: skip
    assert cfg.run_name is not None
    write_report(folder, kind, cfg.run_name, source, {"config": to_plain(cfg), **figures}, grids, notes)
    _show(console, grids, notes)
    console.print(f"{folder}: {kind}.json, {kind}.md, {kind}.png", markup=False)


def _show(console: Console, grids: list[Grid], notes: list[str]) -> None:
    for grid in grids:
        table = Table(title=grid.title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for number, column in enumerate(grid.columns):
            table.add_column(column, justify="left" if number == 0 else "right", no_wrap=number == 0)
        for row in grid.rows:
            table.add_row(*row)
        console.print()
        print_table(console, table)
    for note in notes:
        console.print(note, markup=False)
