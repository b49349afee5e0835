"""``command=report``: one page about a run, or about all runs of a sweep."""

import os
from pathlib import Path

from rich.table import Table

from bitnet_train.commands.console import make_console, print_table
from bitnet_train.config import Config
from bitnet_train.errors import ConfigError
from bitnet_train.reporting.run_page import REPORT_FILE, write_run_page
from bitnet_train.reporting.sweep_page import rank, sweep_page, sweep_runs
from bitnet_train.training.run_folder import RunFolder

SWEEP_FILE = "sweep.html"


def run(cfg: Config) -> int:
    """Write report.html into the folder of ``run=``."""
    console = make_console()
    folder = Path(str(cfg.run))
    try:
        if (folder / "config.yaml").is_file():
            path = write_run_page(cfg, RunFolder(folder), cfg.run_name or folder.name)
            if sweep_runs(folder):  # a sweep of the same recipe lies in the run's own folder
                (folder / SWEEP_FILE).write_text(sweep_page(folder), encoding="utf-8")
                console.print(f"written: {folder / SWEEP_FILE} (the runs below)", markup=False)
        else:
            path = folder / REPORT_FILE
            path.write_text(sweep_page(folder), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder / REPORT_FILE} cannot be written: {error.strerror}.") from None
    console.print(f"written: {path}", markup=False)
    return 0


def rank_sweep(folders: list[Path], above: Path | None) -> None:
    """Print the ranked table of the runs that a sweep has trained, and write the page with their curves.

    The page is that of all runs below ``above``, the sweep's own folder; a sweep over recipes has none.
    """
    common = os.path.commonpath([folder.parent for folder in folders])
    ranking = rank({os.path.relpath(folder, common): folder for folder in folders})
    if ranking is None:
        return
    console = make_console()
    more = "higher" if ranking.on_images else "lower"
    table = Table(
        title=f"Ranked by {ranking.what} ({more} is better)",
        title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 3, 0, 0),
    )  # fmt: skip
    for place, heading in enumerate(ranking.headings):
        table.add_column(heading, justify="right" if place in ranking.numbers else "left", overflow="fold")
    for row in ranking.rows:
        table.add_row(*map(str, row))
    console.print()
    print_table(console, table)
    if above is None:
        return
    page = above / (SWEEP_FILE if (above / "config.yaml").is_file() else REPORT_FILE)
    try:
        page.write_text(sweep_page(above), encoding="utf-8")
    except OSError as error:
        console.print(f"{page} is not written: {error.strerror}", markup=False)
    else:
        console.print(f"written: {page}", markup=False)
