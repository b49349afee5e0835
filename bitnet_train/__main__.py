"""``python -m bitnet_train``: compose the configuration, run one command, answer with an exit code."""

import os
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bitnet_train.config import (
    KINDS,
    ON_A_RUN,
    VARIANTS,
    Command,
    check_keys,
    from_plain,
    may_change,
    to_config,
    with_kinds,
)
from bitnet_train.data.corpus import open_corpus
from bitnet_train.errors import BitnetTrainError, ConfigError, did_you_mean
from bitnet_train.explain import check_overrides, explain, quoted
from bitnet_train.help import help_text
from bitnet_train.recipes import (
    Catalogue,
    check_one_kind,
    config_folder,
    option_of,
    read_sweep,
    register,
    settle,
    yaml_reason,
)
from bitnet_train.storage import local_copy
from bitnet_train.training.out_of_memory import is_out_of_memory

# Overrides that never name a sweep's job.
NAMELESS = ("recipe", "run_name", "run", "command", "paths.runs", "paths.data")
# Commands that read the corpus.
NEED_TEXT = (Command.train, Command.prepare)
# The sentence for a command that ran out of memory; training, which knows its batch, has a better one.
OUT_OF_MEMORY = (
    "This machine ran out of memory ({reason}): choose a smaller model, a shorter data.sequence_length or a machine "
    "with more memory; whatever was saved before is intact."
)
QUOTES = "'\""
# Longest name of one folder; file systems allow 255 bytes.
LONGEST_NAME = 120


def main() -> NoReturn:
    """The console entry: runs and exits."""
    sys.exit(answer(sys.argv[1:]))


def answer(arguments: list[str]) -> int:
    """Do what the command line says; the exit code, the worst one of a sweep."""
    # Without this Hydra prints errors itself and exits with 1; here every error gets one sentence and code 2.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    catalogue = Catalogue()
    try:
        flags = _flags(arguments)
        catalogue = register(Path(flags.config_dir) if flags.config_dir is not None else None)
        if not arguments or flags.help:
            print(help_text(catalogue), end="")
            return 0
        others = [argument for argument in arguments if argument not in flags.overrides]
        flags.overrides = put_sweeps_in(flags.overrides, catalogue, bool(flags.multirun))
        flags.overrides = [quoted(_on_local_copy(line)) for line in flags.overrides]
        check_overrides(flags.overrides, catalogue, sweeping=flags.multirun)
        if not flags.multirun:
            job = compose_job(others, flags.overrides, catalogue)
            return 0 if job is None else run_job(job, catalogue)
        if any(line.startswith(("hydra/launcher=", "hydra/sweeper=")) for line in flags.overrides):
            return _hydra_sweep(others, flags.overrides, catalogue)
        others = [argument for argument in others if argument not in ("-m", "--multirun")]
        return _sweep(others, flags.overrides, catalogue)
    except BitnetTrainError as error:
        _say(str(error))
        return error.exit_code
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, RecursionError) as error:
        _say(explain(error, catalogue, arguments))
        return 2
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _say(_out_of_memory(error))
        return 2
    except KeyboardInterrupt:
        _say("Interrupted; nothing was changed since the last save.")
        return 130


def _say(sentence: str) -> None:
    # A value of thousands of letters says no more than its beginning.
    short = re.sub(r"\S{400,}", lambda found: f"{found[0][:200]}...", sentence)
    print(f"bitnet_train: {short}", file=sys.stderr, flush=True)


def _out_of_memory(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return OUT_OF_MEMORY.format(reason=lines[0][:160].rstrip(". ") if lines else type(error).__name__)


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


def compose_job(others: list[str], overrides: list[str], catalogue: Catalogue, name: str = "") -> Job | None:
    """Compose the configuration of ``overrides``; None when another flag of Hydra's was answered instead.

    Raises HydraException or OmegaConfBaseException, which :func:`explain` puts into words.
    """
    given = {key.lstrip("+"): value for key, _, value in (line.partition("=") for line in overrides)}
    base = kinds_of_run(catalogue, given)
    settle(catalogue, base | given)
    jobs = []

    def keep(node: DictConfig) -> None:
        recipe = HydraConfig.get().runtime.choices.get("recipe")
        jobs.append(Job(node, None if recipe is None else str(recipe), overrides, name))

    try:
        _hydra_main(keep, others, [*(f"{group}={option}" for group, option in base.items()), *overrides])
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


def _hydra_main(task: Callable[[DictConfig], None], others: list[str], overrides: list[str]) -> None:
    """Hydra's own entry on this command line. (Its parser takes the overrides in one piece only.)"""
    import hydra

    # Flags last: --info would take an override behind it for its own value.
    before, sys.argv = sys.argv, [sys.argv[0], *overrides, *others]
    try:
        hydra.main(config_path=str(config_folder("conf")), config_name="config", version_base="1.3")(task)()
    finally:
        sys.argv = before


def _sweep(others: list[str], overrides: list[str], catalogue: Catalogue) -> int:
    """Run one job after the other; the worst exit code. All are composed first: a typo stops the sweep at once."""
    swept, combinations = expand(overrides)
    jobs = [compose_job(others, line, catalogue, job_name(line, swept)) for line in combinations]
    code = 0
    for job in jobs:
        assert job is not None
        last = _job_of_many(job, catalogue)
        code = max(code, last)
        if last in (130, 143):
            break
    return code


def _job_of_many(job: Job, catalogue: Catalogue) -> int:
    """Run a job of a sweep; what is wrong with it is said with its overrides and does not end the sweep."""
    try:
        return run_job(job, catalogue)
    except BitnetTrainError as error:
        _say(f"{' '.join(job.overrides)}: {error}")
        return error.exit_code
    except OmegaConfBaseException as error:
        _say(f"{' '.join(job.overrides)}: {explain(error, catalogue, job.overrides)}")
        return 2
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _say(f"{' '.join(job.overrides)}: {_out_of_memory(error)}")
        return 2


def _hydra_sweep(others: list[str], overrides: list[str], catalogue: Catalogue) -> int:
    """A sweep by a launcher or sweeper that the command line names: Hydra's own loop makes the jobs and starts them."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    swept = {override.key_or_group for override in parsed if override.is_sweep_override()}
    fixed = {line.lstrip("+").partition("=")[0]: line.partition("=")[2] for line in overrides}
    _, combinations = expand(overrides)
    every = [{key.lstrip("+"): value for key, _, value in (o.partition("=") for o in one)} for one in combinations]
    kinds = check_one_kind(catalogue, every)
    settle(catalogue, {key: value for key, value in fixed.items() if key not in swept}, kinds)
    codes: list[int] = []

    def job(node: DictConfig) -> None:
        hydra_config = HydraConfig.get()
        recipe = hydra_config.runtime.choices.get("recipe")
        lines = list(hydra_config.overrides.task)
        one = Job(node, None if recipe is None else str(recipe), lines, job_name(lines, swept))
        codes.append(_job_of_many(one, catalogue))
        if codes[-1] in (130, 143):
            raise KeyboardInterrupt

    try:
        _hydra_main(job, others, overrides)
    except KeyboardInterrupt:
        codes.append(130)
    return max(codes, default=0)


def run_job(job: Job, catalogue: Catalogue) -> int:
    """Validate a composed configuration and run its command; the exit code."""
    node = job.node
    check_keys(node)
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
        if node.command in NEED_TEXT and not cfg.on_images:
            open_corpus(cfg.text.corpus)  # says at once that the text is missing

    from bitnet_train.commands import run

    return run(cfg)


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


def expand(overrides: list[str]) -> tuple[set[str], list[list[str]]]:
    """The keys that have several values, and the overrides of every combination, with the values as they were typed."""
    parser = OverridesParser.create()
    swept, choices = set(), []
    for line in overrides:
        head, _, text = line.partition("=")
        override = parser.parse_overrides([line])[0]
        values = [text]
        if override.is_sweep_override():
            swept.add(head.lstrip("+"))
            plain = override.value_type is ValueType.SIMPLE_CHOICE_SWEEP and not set(text) & set("[]{}()'\"")
            values = text.split(",") if plain else list(override.sweep_string_iterator())
        choices.append([f"{head}={value}" for value in values])
    return swept, [list(combination) for combination in product(*choices)]


def job_name(overrides: list[str], swept: set[str]) -> str:
    """What tells one job of a sweep from the others: its overrides.

    A setting that may change when a run is continued is left out unless the sweep tries several values of it, so that
    the same sweep with more steps continues its runs.
    """
    parts = []
    for line in overrides:
        key, _, value = line.lstrip("+").partition("=")
        if key not in NAMELESS and (key in swept or not may_change(key)):
            parts.append(f"{key}={value}")
    # No comma: Hydra would read run=NAME as a list of values.
    name = "+".join(re.sub(r"[^\w=.-]+", "_", part).strip("_.-") for part in parts)
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME - 9]}-{sha256(name.encode()).hexdigest()[:8]}"
    return name


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
    main()
