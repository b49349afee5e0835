"""``command=benchmark``: speed and memory beside the dense twin and other libraries, as tables, JSON and pictures."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from bitnet_train.benchmarking.config import What
from bitnet_train.benchmarking.contenders import Line, line_up
from bitnet_train.benchmarking.picture import draw_step
from bitnet_train.benchmarking.report import open_folder, origin, write_report
from bitnet_train.benchmarking.results import StepResults
from bitnet_train.benchmarking.run_step import run_step
from bitnet_train.benchmarking.tables import Grid, step_grid, step_notes
from bitnet_train.commands.console import make_console, print_table
from bitnet_train.config import Config, to_plain, with_overrides


def run(cfg: Config) -> int:
    """Measure and leave the figures in ``<paths.runs>/<run_name>/benchmark/``, also those until Ctrl-C."""
    console = make_console()
    assert cfg.run_name is not None
    folder = Path(cfg.paths.runs) / cfg.run_name / "benchmark"
    origins = {v.name: f"benchmark.variants, {v.name}" for v in cfg.benchmark.variants}
    variants = {v.name: with_overrides(cfg, v.overrides, origins[v.name]) for v in cfg.benchmark.variants}
    line = line_up(cfg, cfg.benchmark.baselines, variants)
    open_folder(folder)
    if cfg.benchmark.what in (What.step, What.all):
        _step(cfg, line, folder, console)
    return 0


def _step(cfg: Config, line: Line, folder: Path, console: Console) -> None:
    results = StepResults()
    first = line.contenders[0]
    source = origin(first.device, first.precision, first.compiled)
    console.print(f"one training step of {cfg.run_name} on {first.device}, {source['hardware']['threads']} threads")
    try:
        run_step(line, cfg.benchmark, results, lambda text: console.print(text, markup=False))
    finally:
        # Also what was measured until Ctrl-C.
        if results.measured or results.not_measured:
            _leave(cfg, results, source, folder, console)


def _leave(cfg: Config, results: StepResults, source: dict[str, object], folder: Path, console: Console) -> None:
    assert cfg.run_name is not None
    grids, notes = [step_grid(results)], step_notes(results)
    content = {"config": to_plain(cfg), **results.as_dict()}
    write_report(folder, "step", cfg.run_name, source, content, grids, notes)
    written = [folder / "step.json", folder / "step.md"]
    if results.timed:
        draw_step(results, f"{cfg.run_name}: one training step", folder / "step.png")
        written.append(folder / "step.png")
    _show(console, grids, notes)
    console.print(", ".join(map(str, written)), markup=False)


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
