"""``command=submit``: the sbatch script of a recipe's job, shown, kept in the run folder, and submitted on request."""

import os
import sys
from pathlib import Path

from bitnet_train.cluster.layout import job_layout
from bitnet_train.cluster.render import Job, render
from bitnet_train.cluster.submit import submit
from bitnet_train.commands.console import make_console
from bitnet_train.config import ON_A_RUN, Config
from bitnet_train.errors import ConfigError
from bitnet_train.training.run_folder import write_atomically


def run(cfg: Config, arguments: list[str], send: bool) -> int:
    """Write ``<run folder>/<command>.sbatch`` for ``cfg``, the configuration that the job will compose.

    ``arguments`` are the command line of that. With ``send`` it is submitted. Raises ConfigError when the folder cannot
    be written or SLURM refuses.
    """
    console = make_console()
    folder = run_folder(cfg)
    text = render(cfg.cluster, make_job(cfg, arguments, folder))
    script = folder / f"{cfg.command.value}.sbatch"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(script, text)
    except OSError as error:
        raise ConfigError(f"{script} cannot be written ({error.strerror}): choose another paths.runs=.") from None
    console.print(text, markup=False)
    if not send:
        console.print(f"written: {script}; not submitted: add submit=true, or run sbatch {script}", markup=False)
        return 0
    number = submit(script)
    console.print(f"submitted: job {number}; it prints to {folder / log_name(cfg, number)}", markup=False)
    return 0


def run_folder(cfg: Config) -> Path:
    """Where the script and the log of the job lie: the folder of the run that it makes or works on."""
    if cfg.command in ON_A_RUN:
        return Path(str(cfg.run))
    assert cfg.run_name is not None
    return Path(cfg.paths.runs).expanduser() / cfg.run_name


def make_job(cfg: Config, arguments: list[str], folder: Path) -> Job:
    """The job that runs ``arguments`` from here. Raises ConfigError where cluster= and trainer= contradict."""
    command = cfg.command.value
    name = cfg.run_name or folder.name
    layout = job_layout(cfg.cluster, cfg.trainer, cfg.trainer.accelerator.value, command)
    log = str(folder.absolute() / "LOG").replace("%", "%%")
    number = "%A_%a" if cfg.cluster.array is not None else "%j"
    return Job(
        name=name if command == "train" else f"{command}-{name}",
        arguments=(*arguments, *layout.settings),
        layout=layout,
        log=log.removesuffix("LOG") + log_name(cfg, number),
        folder=os.getcwd(),  # noqa: PTH109  as the shell names it
        python=sys.executable,
        remarks=(f"Written by bitnet_train, command=submit; to submit it again: sbatch {folder / command}.sbatch",),
    )


def log_name(cfg: Config, number: str) -> str:
    """The log file's name for the job ``number``."""
    return f"slurm-{number}.out" if cfg.command.value == "train" else f"slurm-{cfg.command.value}-{number}.out"
