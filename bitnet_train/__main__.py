"""``python -m bitnet_train``: compose the configuration, run one command, answer with an exit code."""

import os
import re
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bitnet_train import signals
from bitnet_train.cluster.config import ClusterConfig
from bitnet_train.cluster.job import PREEMPTED, Requeued, plan_requeue, requeue
from bitnet_train.commented import commented
from bitnet_train.config import IN_JOBS, KINDS, ON_A_RUN, VARIANTS, Command, Config, from_plain, with_kinds
from bitnet_train.data.corpus import open_corpus
from bitnet_train.errors import BitnetTrainError, ConfigError, did_you_mean
from bitnet_train.explain import check_overrides, explain, quoted
from bitnet_train.help import help_text
from bitnet_train.interrupts import interrupts_wait
from bitnet_train.messages import TERMINATED, of_the_machine, say
from bitnet_train.ranks import this_process
from bitnet_train.recipes import (
    Catalogue,
    config_folder,
    option_of,
    read_sweep,
    register,
    settle,
    yaml_reason,
)
from bitnet_train.secrets import masked
from bitnet_train.storage import local_copy, source_of
from bitnet_train.trust import check_flags
from bitnet_train.validation import check_given, check_keys, may_change, to_config

# Commands that read the corpus.
NEED_TEXT = (Command.train, Command.prepare)
QUOTES = "'\""
# Longest name of one folder; file systems allow 255 bytes.
LONGEST_NAME = 120


def main() -> NoReturn:
    """The console entry: runs and exits."""
    sys.excepthook = lambda *error: print(masked("".join(traceback.format_exception(*error))), file=sys.stderr, end="")
    code = answer(sys.argv[1:])
    signals.ignore()  # what there was to do is done: a late one must not change the exit code
    try:
        sys.stdout.flush()
    except OSError:  # a full disk or a closed pipe, which would change the exit code
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def answer(arguments: list[str]) -> int:
    """Do what the command line says; the exit code, the worst one of a sweep."""
    with signals.listening():
        return _answer(arguments)


def _answer(arguments: list[str]) -> int:
    # Without this Hydra prints errors itself and exits with 1; here every error gets one sentence and code 2.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    catalogue = Catalogue()
    try:
        flags = _flags(arguments)
        check_flags(flags)
        with interrupts_wait():
            catalogue = register(Path(flags.config_dir) if flags.config_dir is not None else None)
        if not arguments or flags.help:
            print(help_text(catalogue), end="")
            return 0
        others = [argument for argument in arguments if argument not in flags.overrides]
        flags.overrides = put_sweeps_in(flags.overrides, catalogue, bool(flags.multirun))
        flags.overrides = [quoted(_on_local_copy(line)) for line in flags.overrides]
        check_overrides(flags.overrides, catalogue, sweeping=flags.multirun)
        if flags.cfg == "job" and flags.package is None:
            others = [] if flags.config_dir is None else ["--config-dir", flags.config_dir]
            shown = compose_job(others, flags.overrides, catalogue)
            assert shown is not None
            print(commented(shown.node, flags.resolve), end="")
            return 0
        if not flags.multirun:
            job = compose_job(others, flags.overrides, catalogue)
            return 0 if job is None else run_job(job, catalogue)
        from bitnet_train.sweeps import hydra_sweep, sweep

        if any(line.startswith(("hydra/launcher=", "hydra/sweeper=")) for line in flags.overrides):
            return hydra_sweep(others, flags.overrides, catalogue)
        others = [argument for argument in others if argument not in ("-m", "--multirun")]
        return sweep(others, flags.overrides, catalogue)
    except BitnetTrainError as error:
        error = told_to_all(error)
        say(str(error))
        return error.exit_code
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, RecursionError) as error:
        say(explain(error, catalogue, arguments))
        return 2
    except (MemoryError, OSError, RuntimeError) as error:
        sentence = of_the_machine(error)
        if sentence is None:
            raise
        say(sentence)
        return 2
    except Requeued:
        return PREEMPTED
    except signals.Terminated:
        say(TERMINATED)
        return PREEMPTED
    except KeyboardInterrupt:
        say("Interrupted; nothing was changed since the last save.")
        return 130


def told_to_all(error: BitnetTrainError) -> BitnetTrainError:
    """The error that all processes that train together end with, when this one failed before they met.

    Without a meeting the others would wait for this one, and only the first one speaks.
    """
    try:
        ranks = this_process()
    except ConfigError:  # nobody can be met
        return error
    if ranks.world > 1:
        import torch

        from bitnet_train.training.distributed import group

        if not group.joined():
            group.join(ranks, torch.cuda.is_available())
            try:
                group.agree(error)
            except BitnetTrainError as found:
                return found
    return error


def _on_local_copy(line: str) -> str:
    """``run=URL`` with the folder that it was copied to."""
    key, _, value = line.partition("=")
    return f"run={local_copy(value.strip(QUOTES), 'run')}" if key == "run" else line


def put_sweeps_in(overrides: list[str], catalogue: Catalogue, sweeping: bool) -> list[str]:
    """``overrides`` with the lines of conf/sweep/NAME.yaml in the place of ``+sweep=NAME``.

    Raises ConfigError without ``-m``, for a sweep that does not exist, and for a file that is none.
    """
    found: list[str] = []
    for line in overrides:
        key, _, name = line.lstrip("+").partition("=")
        if key != "sweep":
            found.append(line)
            continue
        options = catalogue.options.get("sweep", [])
        if name not in options:
            raise ConfigError(f"The sweep {name} does not exist; choose one of {', '.join(options)}."
                              f"{did_you_mean(name, options)}")  # fmt: skip
        if not sweeping:
            raise ConfigError(f"+sweep={name} makes many runs: put -m in front of the settings.")
        found += read_sweep(catalogue.files[f"sweep/{name}"])
    return found


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message[0].upper()}{message[1:]}; see --help.")


def _flags(arguments: list[str]) -> Namespace:
    """Hydra's flags, read before Hydra reads them, so that a wrong one is answered in one sentence."""
    parser = get_args_parser()
    parser.__class__ = _Parser
    flags, rest = parser.parse_known_args(arguments)
    wrong = [argument for argument in rest if argument.startswith("-")]
    if wrong:
        raise ConfigError(f"The flag {wrong[0]} does not exist; see --help.")
    # Overrides that follow a flag.
    flags.overrides += rest
    modes = [name for name in ("run", "multirun", "cfg", "info", "shell_completion") if getattr(flags, name)]
    if len(modes) > 1:
        raise ConfigError(f"--{modes[0]} and --{modes[1]} cannot be combined.")
    if flags.resolve and not flags.cfg:
        raise ConfigError("--resolve goes with --cfg job.")
    if flags.package and not flags.cfg:
        raise ConfigError("--package goes with --cfg job.")
    return flags


@dataclass
class Job:
    """A composed configuration, what it was composed from, and in a sweep its name."""

    node: DictConfig
    recipe: str | None
    overrides: list[str]
    name: str = ""
    # Hydra's flags of the command line, --config-dir for one.
    flags: list[str] = field(default_factory=list)


def compose_job(others: list[str], overrides: list[str], catalogue: Catalogue, name: str = "") -> Job | None:
    """Compose the configuration of ``overrides``; None when another flag of Hydra's was answered instead.

    Raises HydraException or OmegaConfBaseException, which :func:`explain` puts into words.
    """
    given = {key.lstrip("+"): value for key, _, value in (line.partition("=") for line in overrides)}
    with interrupts_wait():
        base = kinds_of_run(catalogue, given)
        settle(catalogue, base | given)
    jobs = []

    def keep(node: DictConfig) -> None:
        recipe = HydraConfig.get().runtime.choices.get("recipe")
        jobs.append(Job(node, None if recipe is None else str(recipe), overrides, name, others))

    try:
        with interrupts_wait():
            hydra_main(keep, others, [*(f"{group}={option}" for group, option in base.items()), *overrides])
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, RecursionError, MemoryError):
        raise
    except Exception as error:  # composing does no work of ours: Hydra met what it did not expect
        reason = str(error).strip().splitlines()
        raise ConfigError(
            f"The configuration cannot be composed: {reason[0].rstrip('.') if reason else type(error).__name__}."
        ) from None
    return jobs[0] if jobs else None


def kinds_of_run(catalogue: Catalogue, given: dict[str, str]) -> dict[str, str]:
    """Group -> option to compose with, so that the command line may set what only the kinds of ``run=`` have.

    Empty for a run on text, whose kinds are the default ones, and where a recipe tells the kinds.
    """
    folder = Path(given.get("run", "").strip("'\"")).expanduser()
    if "run" not in given or "recipe" in given:
        return {}
    try:
        saved = with_kinds(_read_saved(_saved_file(folder) or folder))
        kinds = {key: str(saved[key]["name"]) for key in KINDS}
        if kinds == {key: next(iter(options)) for key, options in KINDS.items()}:
            return {}
        inner = {"model": {}, "data": {"source": str(saved["data"]["source"]["name"])}}
    except (ConfigError, KeyError, TypeError):
        return {}  # said when the run is opened
    options = {key: option_of(catalogue, key, kind, inner[key]) for key, kind in kinds.items()}
    return {key: option for key, option in options.items() if option is not None}


def _saved_file(folder: Path) -> Path | None:
    """The configuration of the run that ``folder`` is, or, of an export, that it lies in."""
    return next((p for p in (folder / "config.yaml", folder.parent.parent / "config.yaml") if p.is_file()), None)


def hydra_main(task: Callable[[DictConfig], Any], others: list[str], overrides: list[str]) -> None:
    """Hydra's own entry on this command line. (Its parser takes the overrides in one piece only.)"""
    import hydra

    # Flags last: --info would take an override behind it for its own value.
    before, sys.argv = sys.argv, [sys.argv[0], *overrides, *others]
    try:
        hydra.main(config_path=str(config_folder("conf")), config_name="config", version_base="1.3")(task)()
    finally:
        sys.argv = before


def run_job(job: Job, catalogue: Catalogue) -> int:
    """Validate a composed configuration and run its command; the exit code.

    Whatever a signal interrupts ends with 143, and as a SLURM job goes back into the queue: raises Requeued.
    """
    check_keys(job.node)
    if job.node.command is Command.submit:
        return _submit(job, catalogue)
    with interrupts_wait():
        cfg = configuration(job, catalogue)

    from bitnet_train.commands import run

    try:
        with signals.listening():
            code = run(cfg)
    except BaseException as error:
        # An error that follows a signal is its doing: it reached a loader or a compiler too.
        if not signals.terminated():
            raise
        say(TERMINATED if isinstance(error, KeyboardInterrupt | SystemExit) else f"{TERMINATED} ({error})")
        code = PREEMPTED
    if code == PREEMPTED:
        _requeue(cfg.cluster)
    return code


def _requeue(cfg: ClusterConfig) -> None:
    plan = plan_requeue(cfg.max_requeues)
    if plan.sentence:
        say(plan.sentence)
    if plan.job is not None:
        say(requeue(plan.job))


def _submit(job: Job, catalogue: Catalogue) -> int:
    """Make the job of a cluster that runs this configuration, which is validated as the job itself will."""
    from bitnet_train.commands.submit import run

    node, send, url = job.node, bool(job.node.submit), source_of(str(job.node.run))
    if node.cluster.command not in IN_JOBS:
        to_config(node)  # says what is wrong with it
    node.command, node.submit = Command(node.cluster.command), False
    cfg = configuration(job, catalogue)
    own = ("command", "submit", "run_name", *(("run",) if cfg.command in ON_A_RUN else ()))
    lines = [line for line in job.overrides if line.lstrip("+").partition("=")[0] not in own]
    if cfg.command is not Command.train:
        lines.append(f"command={cfg.command.value}")
    # The folder by its whole name: the job knows nothing of a sweep that it may be part of.
    if cfg.command in ON_A_RUN:
        lines.append(quoted(f"run={url or cfg.run}"))
        if url is not None:
            # The job fetches it by itself: where the copy made here is, no node may see it, nor the script.
            cfg.run = str(Path(cfg.paths.runs) / Path(str(cfg.run)).name)
    elif cfg.run_name not in (None, job.recipe):
        lines.append(quoted(f"run_name={cfg.run_name}"))
    return run(cfg, [*job.flags, *lines], send)


def configuration(job: Job, catalogue: Catalogue) -> Config:
    """The validated configuration of a job. Raises ConfigError."""
    node = job.node
    if node.command in ON_A_RUN:
        cfg = to_config(on_a_run(job))
    else:
        command = node.command.value
        if job.recipe is None and node.command is not Command.convert:
            raise ConfigError(f"No recipe is chosen: add +recipe=NAME, one of {', '.join(catalogue.recipes)}.")
        if node.run is not None:
            those = ", ".join(c.value for c in ON_A_RUN)
            raise ConfigError(f"run= is for {those}; command={command} starts from a recipe.")
        if job.recipe is not None:
            node.run_name = run_name(job.recipe if node.run_name is None else node.run_name, job.name)
        cfg = to_config(node)
        check_given(cfg, [line.lstrip("+").partition("=")[0] for line in job.overrides])
        if node.command in NEED_TEXT and not cfg.on_images:
            open_corpus(cfg.text.corpus)  # says at once that the text is missing
    return cfg


def run_name(name: str, job: str) -> str:
    """The run's folder under paths.runs: its name, and under -m a folder of the job's own in it.

    Raises ConfigError for a name that is no plain folder below paths.runs.
    """
    plain = re.fullmatch(r"[\w.=+-]+(/[\w.=+-]+)*", name)
    if plain is None or any(part.startswith((".", "-")) or len(part) > LONGEST_NAME for part in name.split("/")):
        raise ConfigError(
            f"run_name='{name}' is no folder below paths.runs: use letters, digits and _ . - = + and '/' for folders "
            f"in folders (no spaces, no '.' or '-' at the start, at most {LONGEST_NAME} characters)."
        )
    return f"{name}/{job}" if job else name


def on_a_run(job: Job) -> DictConfig:
    """The saved configuration of ``run=`` (or of the run that the recipe names), with this command line on top."""
    node, overrides = job.node, job.overrides
    command = node.command.value
    if job.recipe is not None and node.run is None:
        node.run = str(Path(node.paths.runs) / run_name(node.run_name or job.recipe, job.name))
    if node.run is None:
        raise ConfigError(f"command={command} needs run=FOLDER, the folder of a finished run such as runs/tiny.")
    folder = Path(node.run).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"run={node.run} does not exist: give the folder of a run, such as runs/tiny.")
    saved_file = _saved_file(folder)
    if saved_file is None:
        sweep = command == "report" and any(folder.glob("**/config.yaml"))
        if sweep or (folder / "config.json").is_file() or any(folder.glob("*.gguf")):
            # An export on its own: its config.json describes the model, this configuration the rest.
            node.run = str(folder)
            return node
        raise ConfigError(f"run={node.run} is neither a run (no config.yaml there) nor an export (no config.json).")
    saved = from_plain(_read_saved(saved_file), saved_file)
    for override in OverridesParser.create().parse_overrides(overrides):
        key = override.key_or_group
        if key == "recipe":
            continue
        variant = key.replace("/", ".") in VARIANTS
        if (variant or key in ("quant", "model", "data")) and not may_change(key):
            raise ConfigError(f"{key}= cannot be changed with command={command}: {folder} was trained with its own.")
        OmegaConf.update(saved, key, OmegaConf.select(node, key), merge=not variant)
    saved.command, saved.run = node.command, str(folder)
    return saved


def _read_saved(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read: {yaml_reason(error)}.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} is not the configuration of a run.")
    return {str(key): value for key, value in content.items()}


if __name__ == "__main__":
    # Under its own name, so that what a job on a cluster is made of can be found there.
    from bitnet_train.__main__ import main as start

    start()
