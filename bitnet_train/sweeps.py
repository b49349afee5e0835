"""Many jobs from one command line (``-m``), one after the other or by a launcher of Hydra's; ranked at the end."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.util import find_spec
from itertools import product
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from bitnet_train.__main__ import LONGEST_NAME, Job, compose_job, hydra_main, run_job
from bitnet_train.config import Command
from bitnet_train.errors import BitnetTrainError, ConfigError
from bitnet_train.explain import explain
from bitnet_train.messages import of_the_machine, say
from bitnet_train.recipes import Catalogue, check_one_kind, settle
from bitnet_train.validation import may_change

# Overrides that never name a sweep's job.
NAMELESS = ("recipe", "run_name", "run", "command", "submit", "paths.runs", "paths.data")
# Exit codes of a job that was told to stop, and with it the sweep.
STOPPED = (130, 143)


@dataclass(frozen=True)
class Result:
    """How a job of a sweep ended: its exit code, what was wrong with it, and the folders of the run that it trained and
    of the sweep above it."""

    code: int
    sentence: str = ""
    folder: str | None = None
    above: str | None = None


def sweep(others: list[str], overrides: list[str], catalogue: Catalogue) -> int:
    """Run one job after the other; the worst exit code. All are composed first: a typo stops the sweep at once."""
    swept, combinations = expand(overrides)
    jobs = [compose_job(others, line, catalogue, job_name(line, swept)) for line in combinations]
    results: list[Result] = []
    for job in jobs:
        assert job is not None
        results.append(run_one(job, catalogue))
        if results[-1].sentence:
            say(results[-1].sentence)
        if results[-1].code in STOPPED:
            break
    return conclude(results)


def run_one(job: Job, catalogue: Catalogue) -> Result:
    """Run a job of a sweep; what is wrong with it is put into words with its overrides and does not end the sweep."""
    named = " ".join(job.overrides)
    try:
        code = run_job(job, catalogue)
    except BitnetTrainError as error:
        return Result(error.exit_code, f"{named}: {error}")
    except OmegaConfBaseException as error:
        return Result(2, f"{named}: {explain(error, catalogue, job.overrides)}")
    except (MemoryError, OSError, RuntimeError) as error:
        sentence = of_the_machine(error)
        if sentence is None:
            raise
        return Result(2, f"{named}: {sentence}")
    if job.node.command is not Command.train:
        return Result(code)
    folder = Path(job.node.paths.runs) / job.node.run_name
    return Result(code, "", str(folder), str(folder.parent) if job.name else None)


def conclude(results: Sequence[Result]) -> int:
    """Show what the sweep's training runs came to, ranked, and return the worst exit code."""
    folders = [Path(result.folder) for result in results if result.folder is not None]
    if len(folders) > 1:
        from bitnet_train.commands.report import rank_sweep

        above = {result.above for result in results if result.folder is not None}
        rank_sweep(folders, Path(str(*above)) if len(above) == 1 and above != {None} else None)
    return max((result.code for result in results), default=0)


@dataclass
class SweptJob:
    """What a launcher of Hydra's calls for each job: here, or in a process of its own on another machine."""

    swept: set[str]
    catalogue: Catalogue
    # What Hydra makes of a setting (optimizer.lr=0.001) -> how it was typed (1e-3), by which runs are named.
    typed: dict[str, str]
    # How the jobs ended that were run, or waited for, in this process.
    results: list[Result] = field(default_factory=list)

    def __call__(self, node: DictConfig) -> Result:
        config = HydraConfig.get()
        recipe = config.runtime.choices.get("recipe")
        lines = [self.typed.get(line, line) for line in config.overrides.task]
        name = job_name(lines, self.swept)
        result = run_one(Job(node, None if recipe is None else str(recipe), lines, name), self.catalogue)
        self.ended(result)
        if result.code in STOPPED and "SUBMITIT_EXECUTOR" not in os.environ:
            raise KeyboardInterrupt  # ends the sweep
        return result

    def ended(self, result: Result) -> None:
        """Note how a job ended, and say what was wrong with it."""
        if result.sentence:
            say(result.sentence)
        self.results.append(result)

    def __reduce__(self) -> tuple[type["SweptJob"], tuple[set[str], Catalogue, dict[str, str]]]:
        return SweptJob, (self.swept, self.catalogue, self.typed)  # the results stay where they are


def hydra_sweep(others: list[str], overrides: list[str], catalogue: Catalogue) -> int:
    """A sweep by a launcher or sweeper that the command line names: Hydra's own loop makes the jobs and starts them."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    swept = {override.key_or_group for override in parsed if override.is_sweep_override()}
    fixed = {line.lstrip("+").partition("=")[0]: line.partition("=")[2] for line in overrides}
    _, combinations = expand(overrides)
    every = [{key.lstrip("+"): value for key, _, value in (o.partition("=") for o in one)} for one in combinations]
    kinds = check_one_kind(catalogue, every)
    if fixed.get("hydra/launcher") == "slurm":
        check_slurm_sweep(fixed)
        # A typo stops the sweep now, and not when its jobs come to the front of the queue.
        flags = [argument for argument in others if argument not in ("-m", "--multirun")]
        for one in combinations:
            compose_job(flags, [line for line in one if not line.startswith("hydra")], catalogue)
    settle(catalogue, {key: value for key, value in fixed.items() if key not in swept}, kinds)
    job = SweptJob(swept, catalogue, as_typed(overrides))
    try:
        hydra_main(job, others, overrides)
    except KeyboardInterrupt:
        job.results.append(Result(130))
    return conclude(job.results)


def check_slurm_sweep(fixed: dict[str, str]) -> None:
    """Raises ConfigError when hydra/launcher=slurm cannot do what the command line wants."""
    if find_spec("submitit") is None or find_spec("hydra_plugins.hydra_submitit_launcher") is None:
        raise ConfigError(
            'hydra/launcher=slurm needs hydra-submitit-launcher: install it with pip install "bitnet-train[slurm]".'
        )
    if fixed.get("command") == "submit":
        raise ConfigError("command=submit and hydra/launcher=slurm both make jobs: leave one of them out.")


def expand(overrides: list[str]) -> tuple[set[str], list[list[str]]]:
    """The keys that have several values, and the overrides of every combination, with the values as they were typed.

    Raises ConfigError for a key that has several values and is set again: the last one would count in every run.
    """
    parsed = OverridesParser.create().parse_overrides(overrides)
    swept = {override.key_or_group for override in parsed if override.is_sweep_override()}
    for key in sorted(swept):
        lines = [line for line, override in zip(overrides, parsed, strict=True) if override.key_or_group == key]
        if len(lines) > 1:
            raise ConfigError(
                f"The sweep sets {key} {len(lines)} times ({'; '.join(lines)}): leave all but one out. "
                "(+sweep=NAME sets what conf/sweep/NAME.yaml lists.)"
            )
    choices = [_typed(line, override) for line, override in zip(overrides, parsed, strict=True)]
    return swept, [list(combination) for combination in product(*choices)]


def _typed(line: str, override: Override) -> list[str]:
    """The override with each of its values, as they were typed."""
    head, _, text = line.partition("=")
    values = [text]
    if override.is_sweep_override():
        plain = override.value_type is ValueType.SIMPLE_CHOICE_SWEEP and not set(text) & set("[]{}()'\"")
        values = text.split(",") if plain else list(override.sweep_string_iterator())
    return [f"{head}={value}" for value in values]


def as_typed(overrides: list[str]) -> dict[str, str]:
    """What Hydra's sweepers make of every value -> how it was typed."""
    found: dict[str, str] = {}
    for line, override in zip(overrides, OverridesParser.create().parse_overrides(overrides), strict=True):
        made = (
            list(override.sweep_string_iterator())
            if override.is_sweep_override()
            else [override.get_value_element_as_str()]
        )
        typed = _typed(line, override)
        found |= {f"{override.get_key_element()}={value}": one for value, one in zip(made, typed, strict=True)}
    return found


def job_name(overrides: list[str], swept: set[str]) -> str:
    """What tells one job of a sweep from the others: its overrides.

    A setting that may change when a run is continued is left out unless the sweep tries several values of it, so that
    the same sweep with more steps continues its runs.
    """
    tried: list[str] = []
    fixed: list[str] = []
    for line in overrides:
        key, _, value = line.lstrip("+").partition("=")
        if key not in NAMELESS and (key in swept or not may_change(key)):
            (tried if key in swept else fixed).append(f"{key}={value}")
    parts = [*tried, *fixed]  # a long name is cut at its end, which the jobs have in common
    # No comma: Hydra would read run=NAME as a list of values.
    name = "+".join(re.sub(r"[^\w=.-]+", "_", part).strip("_.-") for part in parts)
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME - 9]}-{sha256(name.encode()).hexdigest()[:8]}"
    return name
