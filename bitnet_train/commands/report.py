"""``command=report``: one page about a run, or about all runs of a sweep."""

from pathlib import Path

from bitnet_train.commands.console import make_console
from bitnet_train.config import Config
from bitnet_train.errors import ConfigError
from bitnet_train.reporting.run_page import REPORT_FILE, write_run_page
from bitnet_train.reporting.sweep_page import sweep_page, sweep_runs
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
